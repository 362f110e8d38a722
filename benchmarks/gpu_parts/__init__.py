"""The parts of benchmarks/gpu.py: each has `rows`, which measures, and `lines`, which writes its rows in Markdown."""
