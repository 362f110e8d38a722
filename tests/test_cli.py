"""The command line: what a person can change is one sentence, and libraries are quiet about what nobody can change."""

import logging

from caftune.cli import _quiet_libraries


def test_of_bitsandbytes_messages_its_offer_of_kernels_alone_is_left_out(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    reason = ModuleNotFoundError("No module named 'kernels'")
    _quiet_libraries()
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure ...", reason)
    logger.warning("Weights are damaged: %s", reason)
    logging.getLogger("bitsandbytes.cextension").warning("gemm_4bit_forward is missing")
    assert [record.getMessage() for record in caplog.records] == [
        "Weights are damaged: No module named 'kernels'",
        "gemm_4bit_forward is missing",
    ]
