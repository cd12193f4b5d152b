"""What analysis found, as a versioned JSON file: probes, CKA curves, candidate intervals, width sites, sizes.

A field that holds an index counts blocks in their `ModuleList`; lists and matrices begin at the stack's first block.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.files import Record, Sealed

Matrix = list[list[float | None]]
"""``[u][k]`` over the blocks of a stack; None below the diagonal and where no sample defines the number."""


class Interval(Record):
    """Blocks `first` to `last` (inclusive) that one student block could replace.

    `open_ended`: Delta keeps falling up to the end of the stack, so that Eq. 5 names no end.
    """

    first: int = Field(ge=0)
    last: int = Field(ge=0)
    open_ended: bool = False

    @model_validator(mode="after")
    def _two_blocks(self) -> Interval:
        if self.last <= self.first:
            raise ValueError(f"interval [{self.first}, {self.last}] holds fewer than two blocks")
        return self


class StreamCurves(Record):
    """The probe statistics of one stream ("image", "text") of one stack.

    fit: per block, ``||l(T_{i-1}) + T_{i-1} - T_i||^2 / ||T_i - T_{i-1}||^2`` over all tokens held out
        (Eq. 2, relative): 0 where the block is linear, 1 where a probe says nothing.
    cka: ``cka(u, k)`` of Eq. 3, averaged over samples and timesteps; 1 on the diagonal.
    delta: ``Delta(u, k)`` of Eq. 4, for k > u.
    gap: mean over tokens of ``||Norm(x) - Norm(T_k)||^2`` between the surrogate x of Eq. 3 and the teacher,
        the measure of Eq. 6: 0 on the diagonal, at most 4.
    similarity: CKA between the teacher's own block outputs, every pair (the paper's Fig. 5).
    energy: per block, the mean squared length of a token of its output, relative to that of the stack's last block.
    candidates: intervals by Eq. 5 and Algorithm 1.
    live: whether anything after the stack reads its last block's output of this stream.
    """

    fit: list[float]
    cka: Matrix
    delta: Matrix
    gap: Matrix
    similarity: Matrix
    energy: list[float]
    candidates: list[Interval]
    live: bool = True

    @model_validator(mode="after")
    def _square(self) -> StreamCurves:
        blocks = len(self.fit)
        for name in ("cka", "delta", "gap", "similarity"):
            matrix: Matrix = getattr(self, name)
            if len(matrix) != blocks or any(len(row) != blocks for row in matrix):
                raise ValueError(f"{name} is not {blocks} x {blocks}, the number of blocks in fit")
        if len(self.energy) != blocks:
            raise ValueError(f"energy has {len(self.energy)} entries, but fit has {blocks}")
        return self


class FfnFit(Record):
    """How well ``h + W h + b`` stands in for one feed-forward (appendix 6), over all tokens held out.

    error: squared, relative to what the feed-forward adds. similarity: cosine between the states after the two.
    """

    block: int = Field(ge=0)
    stream: str
    error: float
    similarity: float


class BlockSavings(Record):
    """Parameters that an edit at this block saves, projectors already paid; None where it is not possible.

    ffn: all streams' feed-forwards; ffn_without_text: once the text stream is gone. text: the text stream, in the
    middle of a group; text_last: as its last block (one projector more).
    """

    ffn: int | None = None
    ffn_without_text: int | None = None
    text: int | None = None
    text_last: int | None = None


class StackAnalysis(Record):
    """One stack: `name`, its ModuleList's path and its first block's index there, its blocks' module paths and sizes.

    text_similarity: per block, the CKA between its text input and its text output.
    """

    name: str
    path: str
    first: int = Field(ge=0)
    blocks: list[str] = Field(min_length=1)
    block_params: list[int]
    streams: dict[str, StreamCurves]
    text_similarity: list[float | None]
    ffn: list[FfnFit]
    savings: list[BlockSavings]

    @model_validator(mode="after")
    def _one_entry_a_block(self) -> StackAnalysis:
        lists = {name: getattr(self, name) for name in ("block_params", "text_similarity", "savings")}
        for name, values in (lists | {f"streams.{name}": one.fit for name, one in self.streams.items()}).items():
            if len(values) != len(self.blocks):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.blocks)} blocks")
        for name, curves in self.streams.items():
            for found in curves.candidates:
                if found.first < self.first or found.last > self.last:
                    where = f"leaves stack {self.name} [{self.first}, {self.last}]"
                    raise ValueError(f"{name} candidate [{found.first}, {found.last}] {where}")
        return self

    @property
    def last(self) -> int:
        """Index of the last block in the ModuleList."""
        return self.first + len(self.blocks) - 1

    def curves(self, stream: str) -> StreamCurves:
        """Return the curves of `stream`, or of the only one; PpclError where several have other names."""
        if stream not in self.streams and len(self.streams) == 1:
            (stream,) = self.streams
        if stream not in self.streams:
            known = f"{near(stream, self.streams)}; its streams are {', '.join(self.streams)}"
            raise PpclError(f"stack {self.name} has no stream {stream!r}{known}")
        return self.streams[stream]


class Redundancy(Record, Sealed):
    """The result of `ppcl_fx.analyze`, saved as ``analysis.json``; model and calls are fingerprints.

    calls_used: the recorded calls that were run. samples_used: the sample-timesteps that the CKA curves average over.
    held_out: what fits are judged on, calls that their maps were not solved from, or samples or tokens of the only
    call; None in files of version 1, whose fits are of the tokens that they were solved from. few: a line for each
    stream whose maps were solved from few tokens.
    """

    version: Literal[1, 2] = 2
    model: str
    calls: str
    teacher_params: int
    calls_used: int
    samples_used: int
    held_out: Literal["calls", "samples", "tokens"] | None = None
    few: list[str] = Field(default_factory=list)
    stream: str = "image"
    stacks: list[StackAnalysis]

    def stack(self, name: str) -> StackAnalysis:
        """Return the stack called `name`; PpclError where there is none."""
        stacks = {stack.name: stack for stack in self.stacks}
        if name not in stacks:
            raise PpclError(f"analysis has no stack {name!r}{near(name, stacks)}; it has {', '.join(stacks)}")
        return stacks[name]
