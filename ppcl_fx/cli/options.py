"""What several commands share: options, the checks that come before any long work, and opening what they start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppcl_fx.cli.terminal import Terminal, quiet_diffusers
from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.files import check_writable
from ppcl_fx.io.options import Config, Flag, flag_of
from ppcl_fx.io.owned_folders import Kind, check_no_link, check_replaceable, foreign

if TYPE_CHECKING:
    from torch import nn

    from ppcl_fx.calls.store import Calls
    from ppcl_fx.model.pluggable import PluggableModel
    from ppcl_fx.model.sources import Source
    from ppcl_fx.tracing.meta_model import Checkpoint

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id, or 'shapes'.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
File = Annotated[Path | None, Flag(metavar="FILE")]
Folder = Annotated[Path | None, Flag(metavar="FOLDER")]
DEVICES = ("cpu", "cuda", "mps", "xpu")


def refuse(config: Config, names: Iterable[str], why: str) -> None:
    """Refuse options that were given and have no use."""
    for name in config.given(names):
        raise PpclError(f"{flag_of(type(config), name)}: {why}")


def check_folder(folder: Path | None, what: str, manifest: str | None = None) -> None:
    """Refuse a folder that is not there, or lacks the file that tells it, before anything slow is imported."""
    _check_there(folder, "folder", what, folder is None or folder.is_dir())
    if folder is not None and manifest is not None and not (folder / manifest).exists():
        raise PpclError(f"{folder / manifest}: no such file; give {what}")


def check_file(path: Path | None, what: str) -> None:
    """Refuse a file that is not there, before anything slow is imported."""
    _check_there(path, "file", what, path is None or path.exists())


def _check_there(path: Path | None, kind: str, what: str, there: bool) -> None:
    if path is not None and not there:
        beside = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PpclError(f"{path}: no such {kind}{near(str(path), beside)}; give {what}")


def check_device(text: str, limited: bool) -> None:
    """Refuse a device that torch does not have here."""
    kind, colon, index = text.partition(":")
    if kind not in DEVICES or (colon and not (index.isascii() and index.isdecimal() and len(index) < 4)):
        raise PpclError(f"--device {text}: no device{near(kind, DEVICES)}; give one such as 'cpu', 'cuda' or 'cuda:1'")
    if text == "cpu":
        return
    if not limited:
        raise PpclError(f"--device {text}: only block by block; give --memory-limit too")
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise PpclError(f"--device {text}: not here ({str(error).splitlines()[0]}); give 'cpu'") from None


def check_output(
    path: Path, *, kind: Kind | None = None, overwrite: bool = False, reads: Iterable[str | Path | None] = ()
) -> None:
    """Refuse an output that exists or cannot be written, before any work is done; nothing is left behind."""
    if path.exists() and not path.is_dir():
        raise PpclError(f"{path}: is a file, and a folder is to be written there; choose another output")
    if kind is not None and path.is_dir() and any(path.iterdir()):
        if overwrite:
            check_no_link(path)
            check_replaceable(path, kind, [read for read in reads if read is not None])
        else:
            way = ", or replace it with --overwrite" if foreign(path, kind) is None else ""
            raise PpclError(f"{path}: already exists; choose another output{way}")
    check_writable(path)


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

        words = f"recorded from another model than the teacher of {student}; record its calls"
        if (student / TEACHER).is_dir():
            known = open_source(str(student / TEACHER)).checkpoint().known_as(self.calls.model)
            if known is not None:
                dtype = str(known.dtype).removeprefix("torch.")
                words = (
                    f"recorded in {dtype}, and {student} was made from the same model in another dtype; rewrite "
                    "the model with these calls, or record it in the student's dtype"
                )
        raise PpclError(f"{self.folder}: {words}")


def open_calls(folder: Path, terminal: Terminal) -> Recorded:
    """Open recorded calls and check every tensor."""
    from ppcl_fx.calls.store import Calls

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
                advice = "give that model, or make it again for this one"
                raise PpclError(f"{file}: made for another model than {name}; {advice}")
            checkpoint = known
    return checkpoint


def open_student(folder: Path, terminal: Terminal, recorded: Recorded | None = None) -> PluggableModel:
    """Load a pluggable model."""
    import ppcl_fx
    from ppcl_fx.model.pluggable import PluggableModel

    check_folder(folder, "what 'ppcl-fx rewrite' wrote")
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
