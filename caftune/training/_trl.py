"""TRL, which CAFTTrainer needs and CAFTMixin does not. This module alone imports it, so that a missing or older one is named.

TRL 1.15 and older compute SFTTrainer's loss in other ways, which CAFTTrainer does not know.
"""

from importlib.metadata import PackageNotFoundError, version

from caftune.errors import CaftuneError

_OLDEST = (1, 16)


def _check_version() -> None:
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        raise CaftuneError(
            f"TRL must be at least {'.'.join(map(str, _OLDEST))} for CAFTTrainer and for recipes, got {found}. "
            "`pip install -U trl`, or use CAFTMixin with your own Trainer."
        )


_check_version()

from trl import SFTConfig, SFTTrainer  # noqa: E402
from trl.chat_template_utils import get_training_chat_template, has_generation_markers  # noqa: E402
from trl.trainer.utils import create_model_from_path, get_config_model_id  # noqa: E402

__all__ = [
    "SFTConfig",
    "SFTTrainer",
    "create_model_from_path",
    "get_config_model_id",
    "get_training_chat_template",
    "has_generation_markers",
]
