"""Runs Axolotl's training command on configurations, one after another in one process; of those that fail, writes why.

    python axolotl_runs.py FOLDER NAME ...

Reads FOLDER/NAME.yaml and writes FOLDER/NAME.error where a run failed.
"""

import sys
import traceback
from pathlib import Path

folder, names = Path(sys.argv[1]), sys.argv[2:]
sys.argv = sys.argv[:1]  # Axolotl reads the command line

from axolotl.cli.train import do_cli  # noqa: E402

for name in names:
    try:
        do_cli(str(folder / f"{name}.yaml"))
    except Exception as error:
        (folder / f"{name}.error").write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
