"""The table of ratios, the two curves above it, and the grid of pictures, in the report and as a PNG file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import new_folder
from ppcl_fx.report.page import quantity
from ppcl_fx.report.svg import LineChart, Series

Ratio = Mapping[str, Any]  # one object of summary.json
_SMALL = 96  # pictures up to this many pixels are enlarged with hard edges
_SIDE, _GAP, _LEFT, _TOP = 96, 8, 210, 28  # of a contact sheet


@dataclass(frozen=True)
class PictureGrid:
    """Pictures by prompt and by ratio.

    ``images[i][j]`` is the picture of ``prompts[i]`` by ``columns[j]``: a PIL image, the bytes of a PNG, a path to one,
    or None. ``marks[i][j]`` says whether it passed its check (None: not checked).
    """

    prompts: Sequence[str]
    columns: Sequence[str]
    images: Sequence[Sequence[Any]]
    marks: Sequence[Sequence[bool | None]] | None = None

    def __post_init__(self) -> None:
        for name, rows in (("images", self.images), ("marks", self.images if self.marks is None else self.marks)):
            if len(rows) != len(self.prompts) or any(len(row) != len(self.columns) for row in rows):
                shape = f"{len(self.prompts)} x {len(self.columns)}"
                raise PpclError(f"report: {name} of the picture grid must be {shape} (prompts x columns)")

    def rows(self) -> Iterator[tuple[str, list[dict[str, Any] | None]]]:
        """Return each prompt with what the page shows of its pictures."""
        for i, prompt in enumerate(self.prompts):
            yield prompt, [self._cell(i, j) for j in range(len(self.columns))]

    def _cell(self, i: int, j: int) -> dict[str, Any] | None:
        if self.images[i][j] is None:
            return None
        picture, buffer = open_picture(self.images[i][j]), io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        mark = None if self.marks is None else self.marks[i][j]
        verdict = {None: "", True: ", accepted", False: ", not accepted"}[mark]
        return {
            "source": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"),
            "words": f"{self.prompts[i]} by {self.columns[j]}{verdict}",
            "small": max(picture.size) <= _SMALL,
            "mark": mark,
        }


def label(ratio: Ratio) -> str:
    """Return a ratio's name: its own ``name`` where it has one, else made of ``keep`` and ``finetuned``."""
    keep = ratio.get("keep")
    share = f"{keep:.0%}" if isinstance(keep, int | float) else "?"
    return str(ratio.get("name") or share + (", fine-tuned" if ratio.get("finetuned") else ""))


def headline(ratios: Sequence[Ratio]) -> list[tuple[str, str]]:
    """Return (value, words) pairs for the cards at the top of the page."""
    if not ratios or ratios[0].get("params") is None:
        return []
    first, last = ratios[0], min(ratios, key=lambda r: (r.get("params") or math.inf, not r.get("finetuned")))
    cards = [(quantity(first.get("params")), "parameters of the teacher")]
    if last is first:
        return cards
    cards.append((quantity(last.get("params")), f"parameters at {label(last)}"))
    if _overall(last) is not None and _overall(first) is not None:
        cards.append((f"{_overall(last):.3f}", f"score at {label(last)}; teacher {_overall(first):.3f}"))
    if last.get("speedup") is not None:
        cards.append((f"{last['speedup']:.2f}×", "faster than the teacher in onnxruntime"))
    return cards


def ratios_view(ratios: Sequence[Ratio]) -> dict[str, Any]:
    """Return the table of ratios with curves of score and latency over the share of parameters."""
    whole = max((r.get("params") or 0 for r in ratios), default=0)
    names = dict.fromkeys(name for r in ratios for name in r.get("score") or {} if name != "overall")
    view = {"ratios": ratios, "label": label, "whole": whole, "categories": list(names), "scores": None}
    sized = [r for r in ratios if r.get("params") and whole]
    if len(sized) < 2:
        return view
    tuned = [r for r in sized if r.get("finetuned")]
    plain = [r for r in sized if not r.get("finetuned") and r.get("weights", "stored") == "stored"]

    def shares(rows: Sequence[Ratio]) -> list[float]:
        return [100 * row["params"] / whole for row in rows]

    scores = [
        Series("as distilled", shares(plain), [_overall(r) for r in plain], 0, dots=True),
        Series("fine-tuned", shares(tuned), [_overall(r) for r in tuned], 1, line=False, dots=True),
    ]
    times = [Series("latency", shares(plain), [r.get("latency_ms") for r in plain], 5, dots=True)]
    left, size = "parameters left, %", (520, 220)
    return view | {
        "scores": LineChart(scores, "Score over size", (left, "score"), size, y_range=(0, 1.02)),
        "times": LineChart(times, "Latency over size", (left, "ms"), size),
        "orange": " Orange: after fine-tuning." if tuned else "",
    }


def open_picture(image: Any) -> Any:
    """Return a PIL image, the bytes of a picture file, or a path to one as an RGB image without metadata."""
    from PIL import Image

    from ppcl_fx.train.images import pictures

    try:
        known = isinstance(image, bytes | str | Path)
        clean = pictures.open_picture(image) if known else pictures.as_rgb(image)
    except PpclError as error:
        raise PpclError(f"report: a picture cannot be read ({error}): give PNG files or PIL images") from None
    return Image.frombytes("RGB", clean.size, clean.tobytes())


def _overall(ratio: Ratio) -> float | None:
    value = (ratio.get("score") or {}).get("overall")
    return None if value is None else float(value)


def write_contact_sheet(folder: Path, grid: PictureGrid) -> Path:
    """Write the grid to ``folder/grid.png`` and return that path; the folder is replaced as a whole or not at all."""
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
