"""What `ppcl-fx train` learns from: recorded calls, prompts that the teacher draws as it goes, or pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl_fx.cli.analyze import read_prompts
from ppcl_fx.cli.options import check_file, check_folder
from ppcl_fx.cli.teacher import open_calls, open_pipeline
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError
from ppcl_fx.sources import check_source

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.model import PluggableModel
    from ppcl_fx.train.config import TrainConfig
    from ppcl_fx.train.ranks import Ranks
    from ppcl_fx.train.sources.source import Source

RECORDED, ENCODED = "recorded", "encoded"


@dataclass(frozen=True)
class Given:
    """The data that the command line names; exactly one of the first three.

    Attributes:
        calls: folder of recorded calls.
        prompts: file with one prompt a line.
        images: folder with ``metadata.jsonl``, or WebDataset shards.
        pipeline: the teacher's pipeline, for prompts and images.
    """

    calls: Path | None
    prompts: Path | None
    images: Path | None
    pipeline: str | None

    def check(self) -> None:
        """Raise `PpclError` where not exactly one kind of data is named, or one lacks its pipeline."""
        named = [
            name for name, value in (("--calls", self.calls), ("--prompts", self.prompts), ("--images", self.images))
            if value is not None
        ]  # fmt: skip
        if len(named) != 1:
            raise PpclError(f"{' and '.join(named) or 'no data'}: give one of --calls, --prompts, --images")
        if self.calls is None and self.pipeline is None:
            raise PpclError(f"{named[0]}: needs the teacher's pipeline; give --pipeline MODEL")
        if self.calls is not None and self.pipeline is not None:
            raise PpclError("--pipeline: recorded calls need none; leave it out")

    def check_there(self) -> None:
        """Raise `PpclError` where what is named is not there, before anything slow is imported."""
        check_folder(self.calls, "recorded calls", "index.json")
        check_file(self.prompts, "a text file, one prompt a line")
        check_file(self.images, "a folder of pictures, or a shard")
        if self.pipeline is not None:
            check_source(self.pipeline)

    def open(
        self, student: Path, model: PluggableModel, options: TrainConfig, terminal: Terminal, ranks: Ranks
    ) -> Calls | Source:
        """Open the data, all ranks together; recordings and encoded pictures are kept in the student's folder.

        Raises:
            PpclError: the data is missing or damaged, or the pipeline is not the teacher's.
        """
        if self.calls is not None:
            recording = open_calls(self.calls, terminal)
            recording.check(student, model.plan.model)
            return recording.calls
        pipeline = self._pipeline(student, model, terminal)
        how: dict[str, Any] = {"device": model.device, "dtype": model.dtype, "ranks": ranks}
        if self.prompts is not None:
            from ppcl_fx.train.sources.prompts import PromptSource

            texts = read_prompts(self.prompts)
            return PromptSource(pipeline, texts, student / RECORDED, options.batch, options.seed, **how)
        from ppcl_fx.train.sources.images import open_images

        assert self.images is not None
        with terminal.step("encoding the pictures") as report:
            return open_images(
                pipeline, self.images, student / ENCODED, options.batch, options.seed, progress=report, **how
            )

    def _pipeline(self, student: Path, model: PluggableModel, terminal: Terminal) -> Any:
        from ppcl_fx.sources import open_source

        assert self.pipeline is not None
        return open_pipeline("--pipeline", open_source(self.pipeline), student, model.plan.model, terminal)
