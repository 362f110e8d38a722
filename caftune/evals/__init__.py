"""Evaluation: tasks, scoring and statistics. Nothing here knows of models, heads or trainers.

Names: TASKS, Task, Example, run_python, find_concepts, compare_runs, holm, interval, pass_at_k.

tasks, task             the tasks by name; what a task is
maths, answers          GSM8K and MATH-500; how their final answers and numbers are read
code, programs          HumanEval and MBPP; how the program of an answer is read
sandbox, launcher       where that program runs
molecules, proteins     a molecule as SMILES, a protein as amino acids
clinical, exact         notes by ROUGE; your own prompts and completions, to the letter
thought, reading        what all of them share: an answer without thoughts, its code blocks
statistics              intervals, tests and corrections of a comparison
concepts                where a text has concepts of several tokens
requirements            packages of the extra `eval`
"""

from caftune._lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "TASKS": "tasks",
        "Task": "task",
        "Example": "task",
        "run_python": "sandbox",
        "find_concepts": "concepts",
        "compare_runs": "statistics",
        "holm": "statistics",
        "interval": "statistics",
        "pass_at_k": "statistics",
    },
)
