"""`python -m grpo` is the `grpo` command."""

import os
import sys

# Python puts the working directory first for -m, where a file of the user called string.py would hide Python's own
try:
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        del sys.path[0]
except FileNotFoundError:  # it has been removed, which the command itself says
    pass

from grpo.cli import main

raise SystemExit(main())
