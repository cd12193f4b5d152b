"""`python -m ppcl_fx` is the command `ppcl-fx`."""

from __future__ import annotations

import sys

from ppcl_fx.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
