"""Runs Axolotl's training command on configurations, one after another in one process; of those that fail, writes why.

    python axolotl_runs.py FOLDER NAME ...

Reads FOLDER/NAME.yaml and writes FOLDER/NAME.error where a run failed.
"""

import sys
import traceback
from pathlib import Path


def main(folder, names):
    from axolotl.cli.train import do_cli

    for name in names:
        try:
            do_cli(str(folder / f"{name}.yaml"))
        except Exception as error:
            (folder / f"{name}.error").write_text(f"{type(error).__name__}: {error}")
            traceback.print_exc()


if __name__ == "__main__":  # Axolotl's own processes import this file, too
    given, sys.argv = sys.argv[1:], sys.argv[:1]  # Axolotl reads the command line
    main(Path(given[0]), given[1:])
