"""The table of ratios, the two curves above it, and the grid of pictures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.report.html import Html, join, quantity, tag
from ppcl_fx.report.svg import Series, line_chart

Ratio = Mapping[str, Any]  # one object of summary.json
_SMALL = 96  # pictures up to this many pixels are enlarged with hard edges


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
    curves = _curves(ratios)
    return tag(
        "section", tag("h2", "Ratios"), tag("p", words, class_="lead"), _table(ratios), curves, id="ratios"
    )


def pictures_section(grid: PictureGrid) -> Html:
    """Return the grid: prompts down, ratios across, a mark on each picture that was checked."""
    head = tag(
        "tr",
        tag("th", "prompt", scope="col", class_="left"),
        [tag("th", name, scope="col") for name in grid.columns],
    )
    rows = []
    for i, prompt in enumerate(grid.prompts):
        cells = [_cell(grid, i, j) for j in range(len(grid.columns))]
        rows.append(tag("tr", tag("th", prompt, scope="row"), cells))
    marked = " A mark says whether the checker accepted the picture." if grid.marks is not None else ""
    caption = tag("caption", f"The same prompts and the same noise for every column.{marked}")
    table = tag("table", caption, tag("thead", head), tag("tbody", rows), class_="pictures")
    return tag(
        "section", tag("h2", "Pictures"), tag("div", table, class_="scroll", tabindex=0), id="pictures"
    )


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
    categories = list(
        dict.fromkeys(name for r in ratios for name in (r.get("score") or {}) if name != "overall")
    )
    names = ["model", "parameters", "blocks", *(c.replace("_", " ") for c in categories)]
    names += ["overall", "drop", "latency", "speed\N{NON-BREAKING HYPHEN}up", "parity"]
    head = tag(
        "tr", [tag("th", name, scope="col", class_="left" if name == "model" else None) for name in names]
    )
    top = max((r.get("params") or 0 for r in ratios), default=0)
    rows = [tag("tr", _cells(ratio, categories, top)) for ratio in ratios]
    words = (
        "Latency: one call of the transformer in onnxruntime, median, in ms. Parity: largest absolute "
        "difference between onnxruntime and PyTorch, float32."
    )
    table = tag("table", tag("caption", words), tag("thead", head), tag("tbody", rows))
    return tag("div", table, class_="scroll", tabindex=0)


def _cells(ratio: Ratio, categories: Sequence[str], top: int) -> list[Html]:
    score = ratio.get("score") or {}
    params = ratio.get("params")
    share = f"{params / top:.1%}" if params and top else ""
    return [
        tag("th", label(ratio), scope="row"),
        tag("td", quantity(params), tag("small", share, class_="under") if share else None),
        tag("td", _text(ratio.get("blocks"), "{}")),
        *[_bar(score.get(name)) for name in categories],
        _bar(score.get("overall"), strong=True),
        tag("td", _text(ratio.get("drop_pct"), "{:.1f} %")),
        tag("td", _text(ratio.get("latency_ms"), "{:.1f}")),
        tag("td", _text(ratio.get("speedup"), "{:.2f}×")),
        tag("td", _text(ratio.get("parity_max_abs"), "{:.1e}")),
    ]


def _bar(value: float | None, strong: bool = False) -> Html:
    if value is None:
        return tag("td", "–")
    share = f"--share: {min(max(value, 0.0), 1.0):.1%}"
    return tag(
        "td",
        f"{value:.3f}" if strong else f"{value:.2f}",
        class_="bar strong" if strong else "bar",
        style=share,
    )


def _curves(ratios: Sequence[Ratio]) -> Html:
    top = max((r.get("params") or 0 for r in ratios), default=0)
    sized = [r for r in ratios if r.get("params") and top]
    if len(sized) < 2:
        return join()
    tuned = [r for r in sized if r.get("finetuned")]
    plain = [r for r in sized if not r.get("finetuned")]
    scores = [
        Series(
            "as distilled",
            [100 * r["params"] / top for r in plain],
            [_overall(r) for r in plain],
            0,
            dots=True,
        ),
        Series(
            "fine-tuned",
            [100 * r["params"] / top for r in tuned],
            [_overall(r) for r in tuned],
            1,
            line=False,
            dots=True,
        ),
    ]
    times = [
        Series(
            "latency",
            [100 * r["params"] / top for r in plain],
            [r.get("latency_ms") for r in plain],
            5,
            dots=True,
        )
    ]
    x_label = "parameters left, %"
    left = line_chart(
        scores, title="Score over size", x_label=x_label, y_label="score", size=(520, 220), y_range=(0, 1.02)
    )
    right = line_chart(times, title="Latency over size", x_label=x_label, y_label="ms", size=(520, 220))
    orange = " Orange: after fine-tuning." if tuned else ""
    one = tag(
        "figure",
        tag("h3", "Score"),
        left,
        tag("figcaption", f"Overall score over the share of parameters.{orange}"),
    )
    two = tag("figure", tag("h3", "Latency"), right, tag("figcaption", "onnxruntime, one call, median."))
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
    badge = (
        None
        if mark is None
        else tag("span", "✓" if mark else "✗", class_="mark" if mark else "mark no", aria_hidden="true")
    )
    return tag("td", tag("span", shown, badge, class_="frame"))


def open_picture(image: Any) -> Any:
    """Return a PIL image, the bytes of a picture file, or a path to one as an RGB image without metadata.

    Raises:
        PpclError: it is no picture.
    """
    from PIL import Image

    from ppcl_fx import pictures

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


def _text(value: float | int | None, form: str) -> str:
    return "–" if value is None else form.format(value)
