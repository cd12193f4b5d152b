"""The table of ratios, the two curves above it, and the grid of pictures, in the report and as a PNG file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import new_folder
from ppcl_fx.report.html import Child, Html, join, quantity, section, table, tag
from ppcl_fx.report.svg import Series, figure, line_chart

Ratio = Mapping[str, Any]  # one object of summary.json
_SMALL = 96  # pictures up to this many pixels are enlarged with hard edges
_SIDE, _GAP, _LEFT, _TOP = 96, 8, 210, 28  # of a contact sheet


@dataclass(frozen=True)
class PictureGrid:
    """Pictures by prompt and by ratio.

    ``images[i][j]`` is the picture of ``prompts[i]`` by ``columns[j]``: a PIL image, the bytes of a PNG, or a
    path to one; None leaves the place empty. ``marks[i][j]`` says whether the picture passed its check (None:
    not checked).
    """

    prompts: Sequence[str]
    columns: Sequence[str]
    images: Sequence[Sequence[Any]]
    marks: Sequence[Sequence[bool | None]] | None = None

    def __post_init__(self) -> None:
        for name, rows in (("images", self.images), ("marks", self.marks)):
            if rows is None:
                continue
            if len(rows) != len(self.prompts) or any(len(row) != len(self.columns) for row in rows):
                shape = f"{len(self.prompts)} x {len(self.columns)}"
                raise PpclError(f"report: {name} of the picture grid must be {shape} (prompts x columns)")


def ratios_section(ratios: Sequence[Ratio]) -> Html:
    """Return the table of ratios with curves of score and latency over the share of parameters."""
    words = "Scores are shares of pictures that the checker accepts. Drop is relative to the first row."
    return section("ratios", "Ratios", words, _table(ratios), _curves(ratios))


def pictures_section(grid: PictureGrid) -> Html:
    """Return the grid: prompts down, ratios across, a mark on each picture that was checked."""
    columns = range(len(grid.columns))
    rows = [[prompt, *(_cell(grid, i, j) for j in columns)] for i, prompt in enumerate(grid.prompts)]
    marked = " A mark says whether the checker accepted the picture." if grid.marks is not None else ""
    words = f"The same prompts and the same noise for every column.{marked}"
    return section("pictures", "Pictures", "", table(["prompt", *grid.columns], rows, words, class_="pictures"))


def label(ratio: Ratio) -> str:
    """Return a ratio's name: its own ``name`` where it has one, else made of ``keep`` and ``finetuned``."""
    if ratio.get("name"):
        return str(ratio["name"])
    keep = ratio.get("keep")
    share = f"{keep:.0%}" if isinstance(keep, int | float) else "?"
    return share + (", fine-tuned" if ratio.get("finetuned") else "")


def headline(ratios: Sequence[Ratio]) -> list[tuple[str, str]]:
    """Return (value, words) pairs for the cards at the top of the page."""
    if not ratios or ratios[0].get("params") is None:
        return []
    first, last = ratios[0], min(ratios, key=lambda r: (r.get("params") or math.inf, not r.get("finetuned")))
    cards = [(quantity(first.get("params")), "parameters of the teacher")]
    if last is not first:
        cards.append((quantity(last.get("params")), f"parameters at {label(last)}"))
        if _overall(last) is not None and _overall(first) is not None:
            cards.append((f"{_overall(last):.3f}", f"score at {label(last)}; teacher {_overall(first):.3f}"))
        if last.get("speedup") is not None:
            cards.append((f"{last['speedup']:.2f}×", "faster than the teacher in onnxruntime"))
    return cards


def _table(ratios: Sequence[Ratio]) -> Html:
    categories = list(dict.fromkeys(name for r in ratios for name in r.get("score") or {} if name != "overall"))
    names = ["model", "parameters", "blocks", *(c.replace("_", " ") for c in categories)]
    names += ["overall", "drop", "latency", "speed\N{NON-BREAKING HYPHEN}up", "parity"]
    words = (
        "Latency: one call of the transformer in onnxruntime, median, in ms. Parity: largest absolute "
        "difference between onnxruntime and PyTorch, float32."
    )
    return table(names, [_cells(ratio, categories, _most(ratios)) for ratio in ratios], words)


def _most(ratios: Sequence[Ratio]) -> int:
    return max((r.get("params") or 0 for r in ratios), default=0)


def _cells(ratio: Ratio, categories: Sequence[str], top: int) -> list[Child]:
    score = ratio.get("score") or {}
    params = ratio.get("params")
    share = f"{params / top:.1%}" if params and top else ""

    def text(name: str, form: str) -> str:
        return "–" if ratio.get(name) is None else form.format(ratio[name])

    return [
        label(ratio),
        [quantity(params), tag("small", share, class_="under") if share else None],
        text("blocks", "{}"),
        *[_bar(score.get(name)) for name in categories],
        _bar(score.get("overall"), strong=True),
        text("drop_pct", "{:.1f} %"),
        text("latency_ms", "{:.1f}"),
        text("speedup", "{:.2f}×"),
        text("parity_max_abs", "{:.1e}"),
    ]


def _bar(value: float | None, strong: bool = False) -> Html:
    if value is None:
        return tag("td", "–")
    share = f"--share: {min(max(value, 0.0), 1.0):.1%}"
    text, class_ = (f"{value:.3f}", "bar strong") if strong else (f"{value:.2f}", "bar")
    return tag("td", text, class_=class_, style=share)


def _curves(ratios: Sequence[Ratio]) -> Html:
    top = _most(ratios)
    sized = [r for r in ratios if r.get("params") and top]
    if len(sized) < 2:
        return join()
    tuned = [r for r in sized if r.get("finetuned")]
    plain = [r for r in sized if not r.get("finetuned")]
    shares, scores = [100 * r["params"] / top for r in plain], [_overall(r) for r in plain]
    after = [100 * r["params"] / top for r in tuned], [_overall(r) for r in tuned]
    both = [
        Series("as distilled", shares, scores, 0, dots=True),
        Series("fine-tuned", *after, 1, line=False, dots=True),
    ]
    times = [Series("latency", shares, [r.get("latency_ms") for r in plain], 5, dots=True)]
    x_label, size = "parameters left, %", (520, 220)
    left = line_chart(
        both, title="Score over size", x_label=x_label, y_label="score", size=size, y_range=(0, 1.02)
    )
    right = line_chart(times, title="Latency over size", x_label=x_label, y_label="ms", size=size)
    orange = " Orange: after fine-tuning." if tuned else ""
    one = figure(left, f"Overall score over the share of parameters.{orange}", title="Score")
    two = figure(right, "onnxruntime, one call, median.", title="Latency")
    return tag("div", one, two, class_="pair")


def _cell(grid: PictureGrid, i: int, j: int) -> Html:
    image = grid.images[i][j]
    if image is None:
        return tag("td", "–")
    data, size = _png(image)
    mark = grid.marks[i][j] if grid.marks is not None else None
    verdict = "" if mark is None else (", accepted" if mark else ", not accepted")
    words = f"{grid.prompts[i]} by {grid.columns[j]}{verdict}"
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    shown = tag("img", src=source, alt=words, title=words, class_="small" if max(size) <= _SMALL else None)
    sign, class_ = ("✓", "mark") if mark else ("✗", "mark no")
    badge = None if mark is None else tag("span", sign, class_=class_, aria_hidden="true")
    return tag("td", tag("span", shown, badge, class_="frame"))


def open_picture(image: Any) -> Any:
    """Return a PIL image, the bytes of a picture file, or a path to one as an RGB image without metadata.

    Raises:
        PpclError: it is no picture.
    """
    from PIL import Image

    from ppcl_fx.train.images import pictures

    try:
        known = isinstance(image, bytes | str | Path)
        clean = pictures.open_picture(image) if known else pictures.as_rgb(image)
    except PpclError as error:
        raise PpclError(f"report: a picture cannot be read ({error}): give PNG files or PIL images") from None
    return Image.frombytes("RGB", clean.size, clean.tobytes())


def _png(image: Any) -> tuple[bytes, tuple[int, int]]:
    """Return the picture as the bytes of a PNG, and its size."""
    picture = open_picture(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue(), picture.size


def _overall(ratio: Ratio) -> float | None:
    value = (ratio.get("score") or {}).get("overall")
    return None if value is None else float(value)


def write_contact_sheet(folder: Path, grid: PictureGrid) -> Path:
    """Write the grid, prompts down and ratios across, to ``folder/grid.png`` and return that path.

    The folder is replaced as a whole or not at all.

    Raises:
        PpclError: the file cannot be written or a picture cannot be read.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns, rows = len(grid.columns), len(grid.prompts)
    size = (_LEFT + columns * (_SIDE + _GAP), _TOP + rows * (_SIDE + _GAP))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for j, name in enumerate(grid.columns):
        pen.text((_LEFT + j * (_SIDE + _GAP), 8), name, fill="black", font=font)
    for i, prompt in enumerate(grid.prompts):
        top = _TOP + i * (_SIDE + _GAP)
        pen.text((_GAP, top + _SIDE // 2 - 8), prompt, fill="black", font=font)
        for j in range(columns):
            if grid.images[i][j] is not None:
                picture = open_picture(grid.images[i][j]).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
                sheet.paste(picture, (_LEFT + j * (_SIDE + _GAP), top))
    with new_folder(folder, replaces=owned.PICTURES) as beside:
        sheet.save(beside / "grid.png", optimize=True)
    return folder / "grid.png"
