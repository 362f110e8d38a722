"""CAFTConfig, CAFTTrainer, and the cost of a step.

Names: CAFTConfig, CAFTTrainer, DivergedError.

options.py, config.py  the options, each declared once; CAFTConfig
prepare.py             data sets tokenized and cut, once, as the trainer reads them
trainer.py             CAFTTrainer: both stages, logs, saving and exporting
loading.py             the base, the tokenizer and the heads that a run starts from
trained_heads.py       training heads: in full or with a LoRA, and saving them
checks.py              what is refused before the first step
progress.py            running a stage: output, resuming, SIGTERM; resumption.py: options that may change when it resumes
divergence.py          stopping a training whose weights are NaN or infinite
measured_cost.py       seconds, tokens, FLOPs and memory of a training; run_setup.py, estimate.py, flops.py,
                       memory.py: before it
_compat.py             work-arounds for other libraries
"""

from caftune._lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "CAFTConfig": "config",
        "CAFTTrainer": "trainer",
        "DivergedError": "divergence",
    },
)
