"""Opening what several commands start from: recorded calls, the teacher they belong to, the pluggable model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl_fx.cli.terminal import Terminal, quiet_diffusers
from ppcl_fx.errors import PpclError

if TYPE_CHECKING:
    from torch import nn

    from ppcl_fx.calls.store import Calls
    from ppcl_fx.model.pluggable import PluggableModel
    from ppcl_fx.model.sources import Source
    from ppcl_fx.tracing.meta_model import Checkpoint


@dataclass(frozen=True)
class Recorded:
    """Calls and the folder they were read from."""

    folder: Path
    calls: Calls

    def check(self, student: Path, model: str) -> None:
        """Raise `PpclError` where a pluggable model has another teacher (fingerprint `model`) than these calls."""
        if not model or not self.calls.model or model == self.calls.model:
            return
        from ppcl_fx.model.pluggable import TEACHER
        from ppcl_fx.model.sources import open_source

        teacher = open_source(str(student / TEACHER)).checkpoint() if (student / TEACHER).is_dir() else None
        known = teacher.known_as(self.calls.model) if teacher is not None else None
        if known is not None:
            dtype = str(known.dtype).removeprefix("torch.")
            raise PpclError(
                f"{self.folder}: recorded in {dtype}, and {student} was made from the same model in another dtype; "
                "rewrite the model with these calls, or record it in the student's dtype"
            )
        raise PpclError(f"{self.folder}: recorded from another model than the teacher of {student}; record its calls")


def open_calls(folder: Path, terminal: Terminal) -> Recorded:
    """Open recorded calls and check every tensor."""
    from ppcl_fx.calls.store import Calls

    if not folder.is_dir():
        raise PpclError(f"{folder}: no such folder; give recorded calls with --calls")
    with terminal.step("checking the calls"):
        return Recorded(folder, Calls.open(folder))


def open_teacher(name: str, terminal: Terminal, fingerprints: Mapping[Path, str]) -> nn.Module:
    """Load a transformer that certain files were made for, in the dtype that their fingerprint names."""
    from ppcl_fx.model.sources import open_source

    dtype = open_checkpoint(name, terminal, fingerprints).dtype if any(fingerprints.values()) else None
    with terminal.step("loading the transformer"):
        return open_source(name).transformer(dtype)


def open_pipeline(option: str, source: Source, student: Path, model: str, terminal: Terminal) -> Any:
    """Load the pipeline of a student's teacher; its progress bar is off."""
    if source.kind != "pipeline":
        raise PpclError(f"{source.name}: a bare transformer draws nothing; give the teacher's whole pipeline")
    with terminal.step("loading the pipeline"), quiet_diffusers():
        known = source.checkpoint().known_as(model) if model else None
        if model and known is None:
            raise PpclError(f"{option} {source.name}: not the teacher of {student}; give the pipeline it came from")
        pipeline = source.pipeline(known.dtype if known is not None else None)
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_checkpoint(name: str, terminal: Terminal, fingerprints: Mapping[Path, str]) -> Checkpoint:
    """Open a transformer that certain files were made for, its weights left on disk.

    It is used in the dtype that the files name, by its fingerprint; where they name none, as it is stored.
    """
    from ppcl_fx.model.sources import open_source

    with terminal.step("checking the weights"):
        checkpoint = open_source(name).checkpoint()
        for file, other in fingerprints.items():
            known = checkpoint.known_as(other) if other else checkpoint
            if known is None:
                raise PpclError(
                    f"{file}: made for another model than {name}; give that model, or make it again for this one"
                )
            checkpoint = known
    return checkpoint


def open_student(folder: Path, terminal: Terminal, recorded: Recorded | None = None) -> PluggableModel:
    """Load a pluggable model."""
    import ppcl_fx
    from ppcl_fx.model.pluggable import PluggableModel

    if not folder.is_dir():
        raise PpclError(f"{folder}: no such folder; give what 'ppcl-fx rewrite' wrote")
    with terminal.step("loading the student"):
        student = ppcl_fx.load(folder)
    if isinstance(student, PluggableModel):
        return student
    if recorded is None:
        raise PpclError(
            f"{folder}: a released checkpoint, without its teacher; join the two with "
            f"'ppcl-fx rewrite TEACHER --released {folder}', or export it as it is with --calls"
        )
    return student.pluggable(recorded.calls.examples())
