"""The method: heads, their targets and their losses, for any Hugging Face causal language model.

Names: Backbone, UnsupportedModelError, AuxiliaryHeads, HeadsConfig, attach_heads, detach_heads, AuxiliaryWeights,
    auxiliary_loss, horizon_targets, SpeculativeDecoding.

objective.py           the equation: targets of every horizon, weights of their losses, the sample of targets
heads.py               what heads are, how they are built, and how their losses are computed
attach.py              putting heads into a model, so that its forward returns the auxiliary losses
backbone.py            the parts of a model that heads use, found and checked on eight tokens
replay.py              calling the last layer again, also at some positions only
sequential_heads.py    one head after another, forward and backward, so that memory does not grow with their number
cross_entropy.py       losses without the logits of all positions in memory
soft_targets.py        the model's own distributions as targets
speculative.py         decoding with heads that draft
adapters.py, finite.py, probes.py, _compat.py    PEFT's wrappers, NaN, trying calls, work-arounds for libraries
"""

from caftune._lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "Backbone": "backbone",
        "UnsupportedModelError": "backbone",
        "AuxiliaryHeads": "heads",
        "HeadsConfig": "heads",
        "attach_heads": "attach",
        "detach_heads": "attach",
        "AuxiliaryWeights": "objective",
        "auxiliary_loss": "objective",
        "horizon_targets": "objective",
        "SpeculativeDecoding": "speculative",
    },
)
