"""The options of `export` and `build` that say for which shapes, and how, TensorRT engines are built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ppcl_fx.cli.options import choice, given
from ppcl_fx.errors import PpclError
from ppcl_fx.memory import parse_size

if TYPE_CHECKING:
    from ppcl_fx.export.tensorrt.options import BuildOptions
    from ppcl_fx.export.tensorrt.profiles import Spec
    from ppcl_fx.export.tensorrt.request import BuildRequest

PANEL = "TensorRT engines"
REFITS = ("none", "identical", "any")

Shapes = Annotated[
    str | None,
    typer.Option(
        metavar="WxH,...",
        rich_help_panel=PANEL,
        help="Pictures in pixels, a profile for each: 1024x1024,1328x1328, or a range 1024x1024-1328x1328.",
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(metavar="N,...", rich_help_panel=PANEL, help="Image tokens, where pixels are not known: 4096."),
]
Batch = Annotated[
    str | None,
    typer.Option(metavar="RANGE", rich_help_panel=PANEL, help="Samples in a call: 1-4, tuned for 4; or 1-2-4."),
]
Text = Annotated[
    str | None, typer.Option(metavar="RANGE", rich_help_panel=PANEL, help="Text tokens: 1-512, for example.")
]
Size = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=RANGE", rich_help_panel=PANEL, help="An open size by its own name; may be repeated."),
]
PixelsPerToken = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        rich_help_panel=PANEL,
        help="Pixels along a side of a token (of a latent cell): often 16 (8).",
    ),
]
Workspace = Annotated[
    str | None,
    typer.Option(metavar="SIZE", rich_help_panel=PANEL, help="GPU memory that a kernel may use for itself: 4GiB."),
]
Level = Annotated[
    int | None,
    typer.Option(min=0, max=5, rich_help_panel=PANEL, help="Builder's effort, 0 to 5; TensorRT's default is 3."),
]
Refit = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        rich_help_panel=PANEL,
        help="Weights that can be put in later: 'none', 'identical' ones, or 'any' (slower).",
    ),
]
Stripped = Annotated[
    bool, typer.Option("--stripped", rich_help_panel=PANEL, help="Engines without weights; they come at load.")
]
WeightStreaming = Annotated[
    str | None,
    typer.Option(metavar="SIZE", rich_help_panel=PANEL, help="Weights that stay on the GPU: 8GiB; the rest streams."),
]


def request_from(
    base: BuildRequest,
    *,
    shapes: str | None,
    tokens: str | None,
    batch: str | None,
    text: str | None,
    size: Sequence[str] | None,
    pixels_per_token: int | None,
    workspace: str | None,
    level: int | None,
    refit: str | None,
    stripped: bool,
    weight_streaming: str | None,
) -> BuildRequest:
    """Return what the options ask for; what is left out stays as in `base`.

    Raises:
        PpclError: an option is wrong.
    """
    from ppcl_fx.export.tensorrt.profiles import check_spec

    spec: Spec = base.spec.model_copy(
        update=given(batch=batch, text=text, pixels=pixels_per_token)
        | ({"shapes": shapes or "", "tokens": tokens or ""} if shapes or tokens else {})
        | ({"sizes": _sizes(size)} if size else {})
    )
    check_spec(spec)
    kind = cast(Literal["none", "identical", "any"], choice("--refit", refit, REFITS)) if refit else None
    options: BuildOptions = base.options.model_copy(
        update=given(
            workspace=parse_size("--workspace", workspace) if workspace else None,
            level=level,
            refit=kind,
            stripped=stripped or None,
            weight_streaming=parse_size("--weight-streaming", weight_streaming) if weight_streaming else None,
        )
    )
    if options.stripped and options.refit == "none" and refit == "none":
        raise PpclError("--stripped --refit none: weights must come back somehow; leave --refit out")
    return base.model_copy(update={"spec": spec, "options": options})


def _sizes(texts: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise PpclError(f"--size {text}: give NAME=RANGE, such as encoder_hidden_states_1=1-512")
        if name in found:
            raise PpclError(f"--size {name}: is there twice; give each size once")
        found[name] = value
    return found
