"""The process that a build runs in: a job in a line of JSON on stdin, what happens in lines of JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.export.tensorrt.compiling import Job, compile_graph
from ppcl_fx.export.tensorrt.monitor import Messages, Monitor
from ppcl_fx.export.tensorrt_api import load_builder


def main() -> None:
    """Compile the job on stdin. A further line there stops it at its next step; where stdin ends, this process does."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    lock = threading.Lock()

    def tell(**what: Any) -> None:
        with lock:
            channel.write(json.dumps(what) + "\n")

    job = Job.model_validate_json(sys.stdin.readline())
    monitor = Monitor(lambda *step: tell(progress=step))

    def listen() -> None:
        while sys.stdin.readline():
            monitor.stop.set()
        os._exit(1)  # who asked for the engine is gone

    threading.Thread(target=listen, daemon=True).start()
    try:
        api = load_builder("the ONNX file stays", job.kind)
        done = compile_graph(api, job, monitor, Messages(api, lambda said: tell(said=said)))
        tell(done=done.model_dump())
    except PpclError as error:
        tell(refused=str(error))
    except OSError as error:
        tell(unwritten=[error.errno or 0, error.strerror or str(error)])
    channel.flush()
    os._exit(0)  # the library's own end is not waited for: it may crash there, and all is written


if __name__ == "__main__":
    main()
