"""caftune: concept-aware fine-tuning of language models (CAFT, arXiv 2506.07833).

CAFTTrainer, CAFTConfig        a drop-in for TRL's SFTTrainer and SFTConfig
CAFTMixin, CAFTOptions         the same for your own Trainer and TrainingArguments, without TRL
attach_heads, detach_heads     put heads into a model and take them out: for your own training loop
Backbone, AuxiliaryHeads, HeadsConfig, AuxiliaryWeights, auxiliary_loss      the method, without TRL
load_heads, save_heads, export_model                                         heads and models on disk
CaftuneError                   an error that a user can fix: it names the place, the value and the remedy
SpeculativeDecoding            decoding in which kept heads draft for their model
"""

from typing import TYPE_CHECKING

from caftune._lazy import lazy

if TYPE_CHECKING:  # for type checkers, which do not follow `lazy`
    from caftune.checkpoints.export import export_model as export_model
    from caftune.checkpoints.heads_folder import load_heads as load_heads
    from caftune.checkpoints.heads_folder import save_heads as save_heads
    from caftune.core.attach import attach_heads as attach_heads
    from caftune.core.attach import detach_heads as detach_heads
    from caftune.core.backbone import Backbone as Backbone
    from caftune.core.heads import AuxiliaryHeads as AuxiliaryHeads
    from caftune.core.heads import HeadsConfig as HeadsConfig
    from caftune.core.objective import AuxiliaryWeights as AuxiliaryWeights
    from caftune.core.objective import auxiliary_loss as auxiliary_loss
    from caftune.core.speculative import SpeculativeDecoding as SpeculativeDecoding
    from caftune.errors import CaftuneError as CaftuneError
    from caftune.training.config import CAFTConfig as CAFTConfig
    from caftune.training.mixin import CAFTMixin as CAFTMixin
    from caftune.training.options import CAFTOptions as CAFTOptions
    from caftune.training.trainer import CAFTTrainer as CAFTTrainer

__all__, __getattr__ = lazy(
    __name__,
    {
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
        "CAFTMixin": "training.mixin",
        "CAFTOptions": "training.options",
        "CaftuneError": "errors",
        "CAFTTrainer": "training.trainer",
    },
)
__version__ = "0.1.0"
