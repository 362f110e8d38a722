"""Two hosts, which are network namespaces with a cable between them, equal one process; each configuration as it is shipped."""

import os
import shutil
import subprocess

import pytest
from launches import CONFIGS, assert_equals_one_process, finish, launch, run_in_one_process, write_recipe

ADDRESSES = ("10.77.0.1", "10.77.0.2")


@pytest.fixture(scope="module")
def hosts():
    """The names of two namespaces; that of the interface in each is "wire"."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts are network namespaces, which need root and `ip` (iproute2)")
    names = [f"caftune-{os.getpid()}-{number}" for number in (0, 1)]
    try:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if made.returncode != 0:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        ends = ["type", "veth", "peer", "name", "wire", "netns", names[1]]
        call("link", "add", "wire", "netns", names[0], *ends)
        for name, address in zip(names, ADDRESSES, strict=True):
            call("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            for device in ("lo", "wire"):
                call("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def call(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def one(peer, tmp_path_factory):
    """The run in one process."""
    peer("deepspeed")  # before anything is computed
    return run_in_one_process(write_recipe(tmp_path_factory.mktemp("hosts"), "one", batch=4))


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_run_on_two_hosts_its_resumption_and_its_export_equal_one_process(peer, hosts, one, name):
    recipe = write_recipe(one.parent, name, batch=2)
    machines = ["--num_machines", 2, "--num_processes", 2, "--main_process_ip", ADDRESSES[0]]
    machines += ["--main_process_port", 29500]
    processes = [
        launch(
            peer("deepspeed") / "bin" / "python",
            CONFIGS / f"{name}.yaml",
            [recipe],
            prefix=["ip", "netns", "exec", host],
            options=[*machines, "--machine_rank", rank],
            environment={"GLOO_SOCKET_IFNAME": "wire"},
        )
        for rank, host in enumerate(hosts)
    ]
    finish(*processes)
    assert_equals_one_process(recipe, one)
