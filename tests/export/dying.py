"""A compiler that says something, begins, and ends by a signal: `ppcl_fx.export.tensorrt.process` in the worst case."""

from __future__ import annotations

import json
import os
import signal
import sys

if __name__ == "__main__":
    sys.stdin.readline()
    said = "IBuilder::buildSerializedNetwork: Error Code 9: Internal Error (no tactic for 'mm')"
    for line in ({"said": said}, {"progress": [10, 100, "Building engine"]}):
        sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    os.kill(os.getpid(), getattr(signal, os.environ["DYING_BY"]))
