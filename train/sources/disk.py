"""What one rank writes and the others read."""

from __future__ import annotations

import time
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.train.ranks import Ranks

SECONDS = 90.0
"""How late a network disk may show what another node wrote; NFS remembers a missing name for up to 60 s."""


def wait_for(path: Path, ranks: Ranks) -> None:
    """Wait until this rank sees what another one has written.

    Raises:
        PpclError: It does not come to be seen.
    """
    end = time.monotonic() + SECONDS
    while not ranks.alone and not path.exists():
        if time.monotonic() > end:
            raise PpclError(
                f"{path}: was written by another rank, and rank {ranks.rank} does not see it; "
                "keep the data on a disk that all ranks see"
            )
        time.sleep(0.1)
