"""caftune: concept-aware fine-tuning of language models (CAFT, arXiv 2506.07833).

CAFTTrainer, CAFTConfig        a drop-in for TRL's SFTTrainer and SFTConfig
attach_heads, detach_heads     put heads into a model, take them out: for a training loop of your own
Backbone, AuxiliaryHeads, HeadsConfig, AuxiliaryWeights, auxiliary_loss      the method, without TRL
load_heads, save_heads, export_model                                         heads and models on disk
CaftuneError                   what a person can fix: the message names the place, the value and the remedy
SpeculativeDecoding            kept heads draft for their model
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caftune.checkpoints.export import export_model
    from caftune.checkpoints.heads_folder import load_heads, save_heads
    from caftune.core.attach import attach_heads, detach_heads
    from caftune.core.backbone import Backbone
    from caftune.core.heads import AuxiliaryHeads, HeadsConfig
    from caftune.core.objective import AuxiliaryWeights, auxiliary_loss
    from caftune.core.speculative import SpeculativeDecoding
    from caftune.errors import CaftuneError
    from caftune.training.config import CAFTConfig
    from caftune.training.trainer import CAFTTrainer

_HOME = {
    "Backbone": "core.backbone",
    "AuxiliaryHeads": "core.heads",
    "HeadsConfig": "core.heads",
    "attach_heads": "core.attach",
    "detach_heads": "core.attach",
    "AuxiliaryWeights": "core.objective",
    "auxiliary_loss": "core.objective",
    "load_heads": "checkpoints.heads_folder",
    "save_heads": "checkpoints.heads_folder",
    "export_model": "checkpoints.export",
    "SpeculativeDecoding": "core.speculative",
    "CAFTConfig": "training.config",
    "CaftuneError": "errors",
    "CAFTTrainer": "training.trainer",
}
__all__ = [
    "AuxiliaryHeads",
    "AuxiliaryWeights",
    "Backbone",
    "CAFTConfig",
    "CAFTTrainer",
    "CaftuneError",
    "HeadsConfig",
    "SpeculativeDecoding",
    "attach_heads",
    "auxiliary_loss",
    "detach_heads",
    "export_model",
    "load_heads",
    "save_heads",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import caftune` and `caftune --help` stay light."""
    if name in _HOME:
        return getattr(import_module(f"caftune.{_HOME[name]}"), name)
    raise AttributeError(f"module 'caftune' has no attribute {name!r}")
