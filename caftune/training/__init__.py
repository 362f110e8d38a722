"""CAFTMixin for any Trainer, CAFTTrainer, and the cost of a step.

Names: CAFTConfig, CAFTMixin, CAFTOptions, CAFTTrainer, DivergedError.

options.py, config.py  CAFTOptions, in which each option is declared; CAFTConfig
mixin.py               CAFTMixin: both stages, logs, saving and exporting, for any Trainer
trainer.py             CAFTTrainer: the mixin with SFTTrainer's ways to load a base and to read rows
prepare.py             data sets tokenized and cut, once, as CAFTTrainer reads them
loading.py             the base, the tokenizer and the heads that a run starts from
trained_heads.py       training heads: in full or with a LoRA, and saving them
checks.py              what is refused before the first step
progress.py            running a stage: output, resuming, SIGTERM; resumption.py: options that may change when it resumes
divergence.py          stopping a training whose weights are NaN or infinite
measured_cost.py       seconds, tokens, FLOPs and memory of a training; run_setup.py, estimate.py, flops.py,
                       memory.py: before it
_compat.py, _trl.py    work-arounds for other libraries; TRL, which the mixin does without
"""

from caftune._lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "CAFTConfig": "config",
        "CAFTMixin": "mixin",
        "CAFTOptions": "options",
        "CAFTTrainer": "trainer",
        "DivergedError": "divergence",
    },
)
