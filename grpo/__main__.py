"""Run the `grpo` command for `python -m grpo`."""

import os
import sys

# With -m, Python puts the working directory first in sys.path. A user's file string.py there would shadow Python's own
try:
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        del sys.path[0]
except FileNotFoundError:  # the working directory has been removed; the command itself reports that
    pass

from grpo.commands.cli import main

raise SystemExit(main())
