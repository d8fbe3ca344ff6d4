"""`python -m grpo` is the `grpo` command."""

import contextlib
import os
import sys

# Python puts the working directory first for -m, where a file of the user called string.py would hide Python's own
with contextlib.suppress(FileNotFoundError):  # it has been removed, as the command itself says
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        del sys.path[0]

from grpo.cli import main

raise SystemExit(main())
