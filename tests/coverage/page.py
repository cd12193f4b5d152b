"""The page that is generated from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tests.coverage.excluded import EXCLUDED
from tests.coverage.exports import TYPES, Exports

if TYPE_CHECKING:
    from tests.coverage.table import Row

_HEAD = """\
# Coverage

Generated: `python -m tests.coverage.table --write` measures every row and writes this page; a test compares the two.

Each row is a small random model of a diffusers class. It is traced on one call, without a line of code for that class.

- **stacks**: runs of blocks of one structure, with their number and the tensors that are chained from block to block.
- **example**: is the trace equal to the model, to the last bit, on the traced call?
- **batch, size, text, values**: the same on a call that differs in the number of samples, in the resolution (and
  frames), in the length of the text, in every number and in what a mask leaves out. *re-trace*: the call lies outside
  of what was traced, a guard says so, and a new trace is equal. *not taken*: the model itself refuses that shape. An
  answer that differs without an error has no word here: the test fails.
- **depth**: two neighbouring blocks become one. The result is equal, to the last bit, to the model whose second block
  returns what its first one returned, and to the teacher while it is not plugged. *takes more*: parts of the model
  between the two blocks go with them. *keeps more*: something besides the next block reads from the first one, so
  (part of) it stays too.
- **FFN**: the streams whose feed-forward can become a linear projector. With projectors of zeros it is the model
  without those feed-forwards. *not alone*: it runs beside the attention, or on both streams at once.
- **text stream**: can a block lose its text stream? With random projectors the result is equal, to the last bit, to the
  model whose blocks are given the source's text through those projectors (Eq. 8), and to the teacher while it is not
  plugged; it is smaller. *one stream*: there is no other. *streams joined*: the attention takes both in one tensor.
- **ControlNet**: where the model's forward takes residuals of a ControlNet, each stack becomes one block. The result is
  equal, to the last bit, to the model whose other blocks give back what enters them, and to the teacher while it is not
  plugged. *summed*: every residual that the teacher feels, the student feels. *own only*: the residuals are added
  inside of the blocks, and the student feels those of the block that it is made of. *not in*: the model writes the
  residuals into a part of the state, and depth edits with them are refused in that stack. *not by block*: it
  takes residuals, but not one for each block. *none*: no residuals.
- **fp32, bf16, fp16**: is the model, loaded in float32, exported in that type? *yes*: it is lowered and translated, the
  file passes `onnx.checker`, and onnxruntime gives on it what PyTorch gives, at the traced shape and at others; files
  of half precision are compared with every type in them widened to float32. Else the reason why there is no file.

Where a class has several stacks, the cells of the edits follow the order of the stacks.

| class | stacks | example | batch | size | text | values | depth | FFN | text stream | ControlNet \
| fp32 | bf16 | fp16 |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def render(rows: Sequence[Row], exports: Exports) -> str:
    """Return the page as Markdown; `exports` are the cells of the types."""
    covered = len({row.name.split(" ")[0] for row in rows})
    lines = [_HEAD + "\n".join(_line(row, exports[row.name]) for row in rows)]
    lines.append(f"\n{len(rows)} rows of {covered} classes.\n\n## Classes without a row\n")
    lines += [f"- `{name}`: {reason}" for name, reason in sorted(EXCLUDED.items())]
    return "\n".join(lines) + "\n"


def _line(row: Row, exports: Mapping[str, str]) -> str:
    name, _, variant = row.name.partition(" ")
    cells = [f"`{name}` {variant}".strip(), "<br>".join(_stack(*stack) for stack in row.stacks), row.example]
    cells += [row.others[key] for key in ("batch", "size", "text", "values")]
    cells += ["<br>".join(row.edits[key]) for key in ("depth", "ffn", "text", "control")]
    cells += [exports[name] for name in TYPES]
    return "| " + " | ".join(cells) + " |"


def _stack(name: str, count: int, streams: tuple[str, ...]) -> str:
    return f"`{name}` × {count} ({', '.join(streams)})"
