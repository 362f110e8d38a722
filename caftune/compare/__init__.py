"""Did it help? Arms, seeds, intervals, verdict.

Names: compare, Comparison, summarise_comparison.

runner                         makes the runs: arms and seeds
runs                           reads them
measures                       their measures and differences
summary                        what a comparison is, and how its numbers are written
verdict                        what may be concluded, in sentences
examples, concept_study, control_heads    answers side by side, whole concepts, heads of the control arms
"""

from caftune._lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "compare": "runner",
        "Comparison": "summary",
        "summarise_comparison": "measures",
    },
)
