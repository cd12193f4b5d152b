"""``python -m ppcl_fx`` is ``ppcl-fx``; what launches several processes starts each of them so."""

from __future__ import annotations

import os
import sys

from ppcl_fx.cli.app import main

if __name__ == "__main__":
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # All is written. Now and then a thread of gloo outlives its process group, and the end of the interpreter under
        # it aborts a process that is done: the launcher would then stop the others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
