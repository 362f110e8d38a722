"""Evaluation: tasks, scoring and statistics. Usable alone: nothing here knows of heads or trainers."""
