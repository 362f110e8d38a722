"""The tasks by name."""

from caftune.evals.clinical import MIMIC_BHC, MTS_DIALOG
from caftune.evals.code import HUMANEVAL, MBPP
from caftune.evals.exact import EXACT_MATCH
from caftune.evals.maths import GSM8K, MATH500
from caftune.evals.molecules import MOLECULES
from caftune.evals.proteins import PROTEINS
from caftune.evals.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (HUMANEVAL, MBPP, GSM8K, MATH500, MTS_DIALOG, MIMIC_BHC, MOLECULES, PROTEINS, EXACT_MATCH)
}
