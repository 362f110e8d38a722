"""What every test shares: one thread, a seed, checked shape annotations, and the real data where it is at hand."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

from caftune.errors import CaftuneError

# Before caftune is imported: from here on a call that breaks a shape annotation of these modules raises.
_CHECKED = (
    "caftune.core.backbone",
    "caftune.core.cross_entropy",
    "caftune.core.heads",
    "caftune.core.objective",
    "caftune.core.replay",
    "caftune.core.soft_targets",
)
_HOOK = install_import_hook(_CHECKED, "beartype.beartype")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Where the sandbox cannot be had (it is refused there), its tests are skipped with its own reason."""
    boxed = [
        item for item in items if item.path.name in ("test_sandbox.py", "test_code_tasks.py", "test_code_forms.py")
    ]
    if not boxed:
        return
    from caftune.evals.sandbox import check_sandbox

    try:
        check_sandbox()
    except CaftuneError as error:
        for item in boxed:
            item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.fixture(autouse=True)
def seed():
    """The same global random state for every test, in any order and on any worker."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and models: CAFTUNE_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("CAFTUNE_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"real data is not here: {folder} does not exist (set CAFTUNE_SHARED)")
    return folder


@pytest.fixture(scope="session")
def rows():
    from datasets import Dataset

    from caftune.demo.chemistry import completion, molecules, prompt

    drawn = molecules(40, seed=7, substituents=(0, 2))
    return Dataset.from_list([{"prompt": prompt(m), "completion": completion(m)} for m in drawn])


@pytest.fixture(scope="session")
def heads(rows, tmp_path_factory):
    from trainers import config

    from caftune import CAFTTrainer
    from caftune.demo.run import BASE

    folder = tmp_path_factory.mktemp("stage1")
    trainer = CAFTTrainer(str(BASE), config(folder / "out", pretrain_heads=True, num_heads=3), train_dataset=rows)
    trainer.train()
    trainer.export(folder / "heads")
    return str(folder / "heads")
