"""A build in a process of its own: the compiler may end by itself, or take all memory, and only the build ends.

A job goes there in a line of JSON on stdin; what happens comes back in lines of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import IO, Any, NoReturn

from ppcl_fx.errors import PpclError
from ppcl_fx.export.tensorrt.compiling import Compiled, Job, compile_graph
from ppcl_fx.export.tensorrt.monitor import Messages, Monitor, Report, silent
from ppcl_fx.export.tensorrt_api import LIBRARIES, load_builder, short
from ppcl_fx.io.memory import peak_memory, size_words

WORKER = "ppcl_fx.export.tensorrt.process"
"""This module, as a program: `main`."""
LOOK = 0.1
"""Seconds between two looks at the process's memory, and at Ctrl-C."""
GRACE = 10.0
"""Seconds that a stopped build has to write its timings down."""


def compile_apart(job: Job, report: Report = silent) -> Compiled:
    """Compile in a new process; what interrupts this one ends that one.

    Raises:
        PpclError: the compiler refuses the model, ends by itself, or takes more memory than ``builder_memory``. The
            line has its last words.
        OSError: the engine cannot be written.
    """
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for this process, which tells that one
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        build = _Build(process, job, report, words)
        try:
            return build.result()
        except BaseException:
            build.stop()
            raise
        finally:
            build.close()


class _Build:
    """A process that compiles, and what it told so far."""

    def __init__(self, process: subprocess.Popen[str], job: Job, report: Report, words: IO[bytes]) -> None:
        self.process, self.job, self.report, self.words = process, job, report, words
        self.last, self.phase = "", ""
        self.told: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, name="build")
        self.reader.start()
        self._say(job.model_dump_json())

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended, and why is found where it is waited for
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.told.put(line)
        self.told.put(None)

    def stop(self) -> None:
        """Let the build end at its next step."""
        self._say("stop")
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)

    def close(self) -> None:
        """End the process, if it has not ended, and give back what it took here."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
        with suppress(OSError):  # a line that nobody read
            self.process.communicate()

    def result(self) -> Compiled:
        """Wait for the end."""
        while True:
            self._look()
            try:
                line = self.told.get(timeout=LOOK)
            except queue.Empty:
                continue
            if line is None:
                self._died()
            match json.loads(line):
                case {"progress": [done, total, phase]}:
                    self.phase = phase
                    self.report(done, total, phase)
                case {"said": said}:
                    self.last = said
                case {"refused": reason}:
                    raise PpclError(reason)
                case {"unwritten": [number, reason]}:
                    raise OSError(number, reason, self.job.plan)
                case {"done": done}:
                    return Compiled.model_validate(done)

    def _look(self) -> None:
        """End the build where it holds too much."""
        limit, held = self.job.options.builder_memory, peak_memory(self.process.pid)
        if limit is not None and held > limit:
            self.process.kill()
            raise PpclError(
                f"{self.job.onnx}: the build held {size_words(held)}, more than --builder-memory allows "
                f"({size_words(limit)}); give more, or export a smaller ratio; the ONNX file stays"
            )

    def _died(self) -> NoReturn:
        code: Any = self.process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self.words.seek(0, os.SEEK_END)
        self.words.seek(max(0, self.words.tell() - 2000))
        lines = self.words.read().decode("utf-8", "replace").strip().splitlines()
        last = short(self.last or (lines[-1] if lines else ""))[:300]
        said = "; ".join(part for part in (f"at {self.phase!r}" if self.phase else "", last) if part)
        memory = ", for want of memory perhaps" if name == "SIGKILL" else ""
        raise PpclError(
            f"{self.job.onnx}: the compiler of {LIBRARIES[self.job.kind].name} ended by itself, {name}{memory}"
            f"{f' ({said})' if said else ''}; export with another --dtype, or build smaller sizes; the ONNX file stays"
        )


def main() -> None:
    """Be the process that a build runs in: compile the job on stdin.

    A further line there stops it at its next step; where stdin ends, so does this process.
    """
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
