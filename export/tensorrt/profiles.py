"""Optimisation profiles: from ``--shapes 1024x1024 --batch 1-4 --text 1-512`` to a range for every open size, and
whether the ranges fit each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ppcl_fx.errors import PpclError, near
from ppcl_fx.export.extras import need
from ppcl_fx.io.files import Record
from ppcl_fx.io.options import Config, Flag

if TYPE_CHECKING:
    from ppcl_fx.export.store.manifest import Port

BATCH = "batch"
Kind = Literal["min", "opt", "max"]
KINDS: tuple[Kind, Kind, Kind] = ("min", "opt", "max")


TABLES = {"RotaryEmbedding": ((0, 1, -2), (0, 2, -2)), "Attention": ((0, 3, -2), (1, 3, -1), (1, 2, -2))}
"""What ONNX's inference does not compare: of an operator two inputs, the first by its next to last size, which is the
tokens, and which size of the second has to be the same, or one: tables of positions, and the mask.
"""


class Range(Record):
    """The sizes an engine takes for one open size: smallest, the one it is tuned for, largest."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"a range goes min <= opt <= max, and {self.min}, {self.opt}, {self.max} does not")
        return self


class Profile(Record):
    """One optimisation profile of an engine: what a person calls it (``1024x1024``), and the range for each open size
    of the ONNX file, by its name.
    """

    name: str = ""
    sizes: dict[str, Range] = Field(default_factory=dict)


class Spec(Config):
    """Profiles as a person writes them; every field is text of the command line, empty where it was left out."""

    shapes: Annotated[str, Flag(metavar="WxH,...")] = Field(
        "",
        description="pictures in pixels, a profile for each: 1024x1024,1328x1328, or a range 1024x1024-1328x1328",
    )
    tokens: Annotated[str, Flag(metavar="N,...")] = Field(
        "", description="image tokens, where pixels are not known: 4096"
    )
    batch: Annotated[str, Flag(metavar="RANGE")] = Field(
        "", description="samples in a call: 1-4, tuned for 4; or 1-2-4"
    )
    text: Annotated[str, Flag(metavar="RANGE")] = Field("", description="text tokens: 1-512, for example")
    sizes: Annotated[dict[str, str], Flag("--size", metavar="NAME=RANGE")] = Field(
        {}, description="an open size by its own name; may be repeated"
    )
    pixels: Annotated[int | None, Flag("--pixels-per-token")] = Field(
        None, ge=1, le=4096, description="pixels along a side of a token (of a latent cell): often 16 (8)"
    )
    limits: Annotated[dict[str, int], Flag(hidden=True)] = Field(
        {}, description="the largest value of a size that the model takes, where that is known"
    )


@dataclass(frozen=True)
class Roles:
    """What the open sizes of a graph mean, by where they appear: the picture's are in the output too, one for a
    sequence of tokens, height and width for latents. The batch is None where it is fixed; all others are text.
    """

    batch: str | None
    image: tuple[str, ...]
    text: tuple[str, ...]


def roles(inputs: Sequence[Port], outputs: Sequence[Port]) -> Roles:
    """Tell which open sizes are the batch, the picture and the text."""
    names, leaving = (
        list(dict.fromkeys(size for port in ports for size in port.shape if isinstance(size, str)))
        for ports in (inputs, outputs)
    )
    return Roles(
        BATCH if BATCH in names else None,
        tuple(name for name in leaving if name in names and name != BATCH),
        tuple(name for name in names if name not in leaving and name != BATCH),
    )


def parse_range(option: str, text: str) -> Range:
    """Return the range that ``4``, ``1-4`` (tuned for the largest) or ``1-2-4`` stands for; `PpclError` where it is
    none, holds a zero, or is not in order.
    """
    parts = text.strip().split("-")
    if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"[0-9]{1,9}", part.strip()) for part in parts):
        raise PpclError(f"{option} {text}: not a range; give a number, MIN-MAX or MIN-OPT-MAX, such as 1-4")
    return _range(option, text, [int(part) for part in parts])


def _range(option: str, text: str, numbers: list[int]) -> Range:
    low, best, high = (numbers[0], numbers[-2] if len(numbers) == 3 else numbers[-1], numbers[-1])
    if low < 1:
        raise PpclError(f"{option} {text}: a size of 0; the smallest is 1")
    if not low <= best <= high:
        raise PpclError(f"{option} {text}: not in order; give the smallest first, such as 1-4")
    return Range(min=low, opt=best, max=high)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def check_spec(spec: Spec) -> None:
    """Raise `PpclError` for a spec that fits no graph: a range that is none, pictures without pixels of a token."""
    if spec.shapes and spec.tokens:
        raise PpclError("--shapes and --tokens both say how large pictures are; give one of them")
    if spec.shapes and spec.pixels is None:
        raise PpclError(
            "--shapes: how many pixels make a token is not known; give --pixels-per-token 16, for example, or "
            "--tokens 4096 instead"
        )
    for part in _parts(spec.shapes):
        _resolution(part, spec.pixels or 1, ("tokens",))
    ranges = [("--tokens", part) for part in _parts(spec.tokens)]
    ranges += [(option, text) for option, text in (("--batch", spec.batch), ("--text", spec.text)) if text]
    for option, text in [*ranges, *((f"--size {name}", text) for name, text in spec.sizes.items())]:
        parse_range(option, text)


def resolve(spec: Spec, inputs: Sequence[Port], outputs: Sequence[Port], file: str) -> list[Profile]:
    """Return the profiles that a spec asks for, of an ONNX file with these inputs and outputs; `PpclError` where it
    leaves an open size out, or asks for what the model cannot serve.
    """
    check_spec(spec)
    known = roles(inputs, outputs)
    ranges = _named(spec, known, file)
    profiles = [Profile(name=name, sizes=ranges | sizes) for name, sizes in _pictures(spec, known, file)]
    for name, hint in _hints(known).items():
        if name not in profiles[0].sizes:
            raise PpclError(f"{file}: no range for {hint}, for example")
    for profile in profiles:
        for name, size in profile.sizes.items():
            if name in spec.limits and size.max > spec.limits[name]:
                raise PpclError(
                    f"{file}: {name} up to {size.max} is asked for, and the model takes at most {spec.limits[name]}; "
                    "give a smaller range"
                )
    return profiles


def _named(spec: Spec, known: Roles, file: str) -> dict[str, Range]:
    """Return the ranges of the sizes that are given by name, and of the batch and the text."""
    names = [*((known.batch,) if known.batch else ()), *known.image, *known.text]
    found: dict[str, Range] = {}
    for name, text in spec.sizes.items():
        if name not in names:
            raise PpclError(
                f"{file}: no open size {name!r}{near(name, names)}; open are {', '.join(names) or 'none'}, and every "
                "other size is fixed in the file"
            )
        found[name] = parse_range(f"--size {name}", text)
    if spec.batch:
        if known.batch is None:
            raise PpclError(f"{file}: the batch is fixed in the file; leave --batch out")
        found.setdefault(known.batch, parse_range("--batch", spec.batch))
    if spec.text:
        open_text = [name for name in known.text if name not in spec.sizes]
        if len(open_text) != 1:
            several = f"{len(open_text)} sizes may be text ({', '.join(open_text)})"
            why = several if open_text else "the size of the text is fixed in the file"
            raise PpclError(f"{file}: {why}; give each range by its name with --size NAME=1-512, or leave --text out")
        found[open_text[0]] = parse_range("--text", spec.text)
    return found


def _hints(known: Roles) -> dict[str, str]:
    """Return for each open size the option that gives its range."""
    hints = {known.batch: "the batch; give --batch 1-4"} if known.batch else {}
    hints |= {name: f"the picture ({name}); give --shapes 1024x1024 or --tokens 4096" for name in known.image}
    for name in known.text:
        hints[name] = f"{name!r}; give " + ("--text 1-512" if len(known.text) == 1 else f"--size {name}=1-512")
    return hints


def _pictures(spec: Spec, known: Roles, file: str) -> list[tuple[str, dict[str, Range]]]:
    """Return the ranges of the picture's sizes for each profile, with the profile's name."""
    open_sizes = [name for name in known.image if name not in spec.sizes]
    if not spec.shapes and not spec.tokens:
        return [("", {})]
    if not open_sizes:
        option = "--shapes" if spec.shapes else "--tokens"
        raise PpclError(f"{file}: the size of the picture is fixed in the file; leave {option} out")
    if spec.tokens:
        if len(open_sizes) != 1:
            raise PpclError(
                f"{file}: takes latents with the sizes {', '.join(open_sizes)}, not tokens; give --shapes, or each by "
                "its name with --size"
            )
        return [(f"{part} tokens", {open_sizes[0]: parse_range("--tokens", part)}) for part in _parts(spec.tokens)]
    if len(open_sizes) > 2:
        raise PpclError(f"{file}: takes {', '.join(open_sizes)}, more than a width and a height; give each with --size")
    return [(part, _resolution(part, spec.pixels or 1, open_sizes)) for part in _parts(spec.shapes)]


def _resolution(text: str, pixels: int, open_sizes: Sequence[str]) -> dict[str, Range]:
    parts = text.split("-")
    found = [re.fullmatch(r"\s*([0-9]{1,6})[x×]([0-9]{1,6})\s*", part) for part in parts]
    pairs = [(int(match[1]), int(match[2])) for match in found if match]
    if not 1 <= len(parts) <= 3 or len(pairs) < len(parts):
        raise PpclError(f"--shapes {text}: not WIDTHxHEIGHT, nor MIN-MAX of two; give for example 1024x1024")
    for side in {side for pair in pairs for side in pair}:
        if side < 1 or side % pixels:
            raise PpclError(
                f"--shapes {text}: {side} pixels is not a multiple of {pixels}, the side of one token; give one that is"
            )
    widths, heights = ([side // pixels for side in sides] for sides in zip(*pairs, strict=True))
    if len(open_sizes) == 1:
        tokens = [width * height for width, height in zip(widths, heights, strict=True)]
        return {open_sizes[0]: _range("--shapes", text, tokens)}
    # An output [..., height, width] names the height first.
    return {
        name: _range("--shapes", text, sides)
        for name, sides in zip(open_sizes, (heights, widths), strict=True)
    }


def default_profile(inputs: Sequence[Port], sizes: Mapping[str, int]) -> Profile:
    """Return a profile around an example, whose open sizes are given by name."""
    names = {size for port in inputs for size in port.shape}
    open_sizes = {name: size for name, size in sizes.items() if name in names}
    return Profile(
        name="default",
        sizes={n: Range(min=1, opt=s, max=(2 if n == BATCH else 4) * s) for n, s in open_sizes.items()},
    )


def shapes_of(port: Port, profile: Profile) -> dict[Kind, tuple[int, ...]]:
    """Return an input's smallest, best and largest shape; `PpclError` where an open size has no range."""
    for size in port.shape:
        if isinstance(size, str) and size not in profile.sizes:
            raise PpclError(
                f"the profile has no range for the size {size!r} of the input {port.name!r}"
                f"{near(size, profile.sizes)}; add one"
            )
    return {
        kind: tuple(size if isinstance(size, int) else getattr(profile.sizes[size], kind) for size in port.shape)
        for kind in KINDS
    }


def check_agreement(onnx: Path, profiles: Sequence[Profile]) -> None:
    """Raise `PpclError` where sizes of a profile contradict each other: the batch of two inputs, tokens and the
    table of their positions, a text and its mask.

    An exported graph calls sizes that must be equal by one name. What names leave open is found by inferring the shapes
    of the whole graph at each profile's smallest, best and largest sizes; no weight is read.
    """
    library = need("onnx")
    model = library.load(str(onnx), load_external_data=False)
    dims = [dim for port in model.graph.input for dim in port.type.tensor_type.shape.dim if dim.dim_param]
    names = [str(dim.dim_param) for dim in dims]
    for profile in profiles:
        for kind in KINDS:
            for dim, name in zip(dims, names, strict=True):
                if name in profile.sizes:
                    dim.dim_value = getattr(profile.sizes[name], kind)
            reason = _contradiction(library, model)
            if reason is not None:
                given = ", ".join(f"{name} {getattr(size, kind)}" for name, size in profile.sizes.items())
                raise PpclError(
                    f"{onnx}: sizes of the profile {profile.name or 'asked for'} contradict each other: {given} "
                    f"({reason}); give sizes that agree"
                )


def _contradiction(library: Any, model: Any) -> str | None:
    """Return the first node of a graph with certain inputs whose own inputs do not fit each other, and why."""
    try:
        graph = library.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except library.shape_inference.InferenceError as error:
        text = str(error)
        found = re.search(r"\(op_type:\s*(\w+),? node name:\s*([^)]*)\):\s*([^(]*)", text)
        words = " ".join((found[3] if found else text).split()).removeprefix("[ShapeInferenceError] ")[:200]
        return f"{found[1]} {found[2].strip()}: {words}" if found else words
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]  # 0 where unknown
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    for node in graph.node:
        for first, second, axis in TABLES.get(node.op_type, ()):
            names = [node.input[index] if index < len(node.input) else "" for index in (first, second)]
            one, other = (shapes.get(name, []) for name in names)
            if len(one) < 2 or len(other) < 2 or other[axis] in (0, 1, one[-2]) or not one[-2]:
                continue
            return f"{node.op_type} {node.name}: {one[-2]} tokens, and {other[axis]} in {names[1]}"
    return None
