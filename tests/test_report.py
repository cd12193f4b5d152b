"""The report: complete, self-contained, and safe whatever text the files hold."""

from __future__ import annotations

import base64
import io
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.selection.frontier import frontier
from ppcl_fx.passes.selection.select import Options
from ppcl_fx.report import PictureGrid, write_report
from ppcl_fx.report.blockmap import StackEdits
from ppcl_fx.report.heatmap import Heatmap, value_range
from ppcl_fx.report.page import drawn
from ppcl_fx.report.results import write_contact_sheet
from ppcl_fx.report.svg import LineChart, Series, short, ticks
from ppcl_fx.report.training import smooth
from ppcl_fx.schema.analysis import BlockSavings, FfnFit, Interval, Redundancy, StackAnalysis, StreamCurves
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit

EVIL = "<script>alert(1)</script>\"' onload=x"
CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "attribute_binding")
_VOID = {"meta", "img", "br", "hr", "link", "col", "input"}


class Page(HTMLParser):
    """Parses a report strictly enough: every tag closed in order; keeps elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs), f"an attribute of <{name}> is given twice"
        self.elements.append((name, dict(attrs)))
        if name not in _VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]

    def classed(self, class_: str) -> list[str]:
        return [e for e, attributes in self.elements if class_ in (attributes.get("class") or "").split()]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def _curves(blocks: int, first: int, candidates: list[tuple[int, int, bool]]) -> StreamCurves:
    def above(u: int, k: int) -> float | None:
        return None if k <= u else 0.01 * (1 + ((k - u) % 3))

    square = [[above(u, k) for k in range(blocks)] for u in range(blocks)]
    cka = [
        [1.0 if k == u else (None if k < u else 1 - 0.02 * (k - u)) for k in range(blocks)]
        for u in range(blocks)
    ]
    similarity: list[list[float | None]] = [
        [math.exp(-0.1 * abs(i - j)) for j in range(blocks)] for i in range(blocks)
    ]
    return StreamCurves(
        fit=[0.1 * (i + 1) for i in range(blocks)],
        cka=cka,
        delta=square,
        gap=square,
        similarity=similarity,
        energy=[1.0] * blocks,
        candidates=[Interval(first=first + a, last=first + b, open_ended=c) for a, b, c in candidates],
    )


def _stack(
    path: str, blocks: int, streams: tuple[str, ...], name: str | None = None, first: int = 0
) -> StackAnalysis:
    candidates = [(0, 1, False), (2, 4, False), (5, blocks - 1, True)]
    return StackAnalysis(
        name=name or path,
        path=path,
        first=first,
        blocks=[f"{path}.{first + i}" for i in range(blocks)],
        block_params=[1000] * blocks,
        streams={stream: _curves(blocks, first, candidates) for stream in streams},
        text_similarity=[0.9999 if i % 2 else 0.95 for i in range(blocks)],
        ffn=[
            FfnFit(block=first + i, stream=s, error=0.3, similarity=0.9)
            for i in range(blocks)
            for s in streams
        ],
        savings=[BlockSavings()] * blocks,
    )


def _redundancy(*stacks: StackAnalysis, model: str = "m" * 8) -> Redundancy:
    return Redundancy(
        model=model, calls="c" * 8, teacher_params=8000, calls_used=3, samples_used=24, stacks=list(stacks)
    )


def _plan(reason: list[str] | None = None) -> Plan:
    edits = [
        DepthEdit(stack="blocks", first=2, last=4),
        FfnEdit(stack="blocks", block=7),
        TextStreamEdit(stack="blocks", source=4, last=6),
    ]
    return Plan(model="m" * 8, teacher_params=8000, params=4000, edits=edits, reason=reason or ["because"])


def _ratios() -> list[dict[str, Any]]:
    rows = []
    for keep, tuned, score in ((1.0, False, 0.9), (0.5, False, 0.6), (0.5, True, 0.87)):
        rows.append(
            {
                "keep": keep,
                "finetuned": tuned,
                "params": int(8000 * keep),
                "weight_bytes": int(2**20 * 3 * keep),
                "blocks": int(8 * keep),
                "score": {**dict.fromkeys(CATEGORIES, score), "overall": score},
                "drop_pct": 100 * (1 - score / 0.9),
                "latency_ms": 10 * keep,
                "speedup": 1 / keep,
                "parity_max_abs": 2e-6,
            }
        )
    return rows


def _write(path: Path, **parts: Any) -> Page:
    assert write_report(path / "report.html", **parts) == path / "report.html"
    return Page((path / "report.html").read_text(encoding="utf-8"))


def test_full_report_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    picture = Image.new("RGB", (24, 24), (200, 30, 30))
    page = _write(
        tmp_path,
        redundancy=_redundancy(_stack("blocks", 8, ("image", "text"))),
        plan=_plan(),
        losses={"depth": {"depth:blocks.2-4": [0.5, 0.4, 0.3]}, "finetune": {"model": [0.2, 0.1]}},
        ratios=_ratios(),
        pictures=PictureGrid(["a red circle"], ["100%", "50%"], [[picture, picture]], [[True, False]]),
        provenance={"command": "demo"},
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert {name for name, _ in page.elements}.isdisjoint(
        {"script", "link", "iframe", "object", "base", "form"}
    )
    for _, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("data:image/png;base64,", "#"))
    style = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in style
    assert "url(" not in style
    assert "http:" not in style
    assert "https:" not in style
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    anchors = {a["href"] for a in page.all("a")}
    assert anchors == {f"#{s['id']}" for s in page.all("section")}
    assert anchors == {"#ratios", "#pictures", "#plan", "#analysis", "#frontier", "#losses", "#provenance"}


def test_everything_shown_has_words(tmp_path: Path) -> None:
    picture = Image.new("RGB", (24, 24))
    page = _write(
        tmp_path,
        redundancy=_redundancy(_stack("blocks", 8, ("image", "text"))),
        plan=_plan(),
        losses={"depth": {"e": [1.0, 0.5]}},
        ratios=_ratios(),
        pictures=PictureGrid(["p"], ["c"], [[picture]], [[False]]),
    )
    assert page.all("svg")
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))
    assert [img["alt"] for img in page.all("img")] == ["p by c, not accepted"]
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"


def test_no_text_from_files_becomes_markup(tmp_path: Path) -> None:
    stack = _stack(EVIL, 8, ("image", "text"))
    score = {EVIL: 0.5, "overall": 0.5}
    page = _write(
        tmp_path,
        redundancy=_redundancy(stack, model=EVIL),
        plan=_plan([EVIL]),
        losses={EVIL: {EVIL: [1.0, 0.5]}},
        ratios=[
            {"keep": 1.0, "name": EVIL, "params": 5, "score": score},
            {"params": 4, "name": EVIL, "score": score},
        ],
        pictures=PictureGrid([EVIL], [EVIL], [[Image.new("RGB", (2, 2))]]),
        title=EVIL,
        lead=EVIL,
        provenance={EVIL: EVIL},
    )
    assert page.all("script") == []
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert page.text.count(EVIL) >= 10


def test_analysis_alone_keeps_candidates_and_selected_apart(tmp_path: Path) -> None:
    redundancy = _redundancy(_stack("blocks", 8, ("image", "text")))
    alone = _write(tmp_path, redundancy=redundancy)
    assert {s["id"] for s in alone.all("section")} == {"analysis", "frontier", "provenance"}
    assert alone.words.count("open-ended") == 2  # one a stream
    assert "selected" not in alone.words
    chosen = _write(tmp_path, redundancy=redundancy, plan=_plan())
    assert chosen.words.count("selected") == 1  # [2, 4], on the stream that decides; the text stream's is not
    assert chosen.words.count("candidate") == 5
    part = Plan(edits=[DepthEdit(stack="blocks", first=5, last=6)])
    assert "selected: 5–6" in _write(tmp_path, redundancy=redundancy, plan=part).words


def test_the_frontier_is_drawn_with_what_each_step_gives_up(tmp_path: Path) -> None:
    redundancy = _redundancy(_stack("blocks", 8, ("image", "text")))
    page = _write(tmp_path, redundancy=redundancy, plan=_plan())
    points = frontier(redundancy, Options(budget=0))
    assert len(points) > 2
    assert f"{len(points)} sizes, from the whole teacher to {points[-1].params:,} parameters." in page.words
    assert f"{points[1].params:,}" in page.words
    given_up = [edit.id for edit in points[-1].edits]
    assert any(edit in words for edit in given_up for words in page.words)
    assert "the plan" in page.words


def test_heatmaps_have_a_cell_for_every_pair_of_every_stream(tmp_path: Path) -> None:
    page = _write(
        tmp_path,
        redundancy=_redundancy(_stack("a", 8, ("image", "text")), _stack("b", 9, ("image",), "b:5-13", 5)),
    )
    cells = [w for w in page.words if w.startswith("blocks ") and " and " in w]
    assert len(cells) == 2 * 8 * 8 + 9 * 9
    assert "blocks 5 and 13: 0.4493" in cells


def test_heatmap_leaves_undefined_pairs_empty() -> None:
    page = Page(drawn("heatmap", Heatmap([[1.0, None], [float("nan"), 0.5]], 0.0, 1.0, stream="image")))
    assert [w for w in page.words if w.startswith("blocks")] == [
        "blocks 0 and 0: 1.0000",
        "blocks 1 and 1: 0.5000",
    ]
    assert Heatmap.shade(0.0) == "#161848"
    assert Heatmap.shade(1.0) == Heatmap.shade(7.0) == "#fcec96"
    assert value_range([[[0.57, 1.0]], [[None, 0.73]]]) == (0.5, 1.0)


def test_edits_of_the_papers_plan_on_sixty_blocks() -> None:
    pairs = [(3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47), (48, 49)]
    pairs += [(52, 53), (54, 55), (56, 57)]
    depth = [DepthEdit(stack="blocks", first=a, last=b) for a, b in pairs]
    text = [TextStreamEdit(stack="blocks", source=a, last=b) for a, b in ((36, 37), (40, 41), (50, 59))]
    other = DepthEdit(stack="elsewhere", first=0, last=1)
    plan = Plan(model="m", teacher_params=9, params=5, edits=[*depth, *text, other], reason=[])
    edits = StackEdits(plan, _stack("blocks", 60, ("image", "text")))
    assert edits.intervals == pairs
    assert len(edits.removed) == 25
    assert sorted(edits.textless) == [37, 41, 51, 52, 54, 56, 58, 59]
    assert not StackEdits(plan, _stack("third", 8, ("image",)))


def test_edits_go_to_the_stack_that_holds_their_blocks() -> None:
    plan = Plan(
        model="m", teacher_params=9, params=5, edits=[DepthEdit(stack="blocks", first=9, last=10)], reason=[]
    )
    assert not StackEdits(plan, _stack("blocks", 8, ("image",), "blocks:0-7"))
    assert StackEdits(plan, _stack("blocks", 8, ("image",), "blocks:8-15", 8)).intervals == [(9, 10)]


def test_table_of_ratios_shows_what_was_measured(tmp_path: Path) -> None:
    page = _write(tmp_path, ratios=_ratios())
    assert len(page.all("tr")) == 4
    for words in (
        "100%",
        "50%, fine-tuned",
        "8 000",
        "1.5",
        "0.870",
        "3.3 %",
        "5.0",
        "2.00×",
        "2.0e-06",
        "attribute binding",
    ):
        assert words in page.words, words
    assert "–" not in page.words
    empty = _write(tmp_path, ratios=[{"keep": 0.7}])
    assert empty.words.count("–") == 8  # parameters, MiB, blocks, overall, drop, latency, speed-up, parity


def test_pictures_keep_their_pixels_and_lose_their_metadata(tmp_path: Path) -> None:
    picture = Image.new("RGB", (5, 4))
    picture.putdata([(i, 2 * i, 255 - i) for i in range(20)])
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "somebody's path")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=note)
    (tmp_path / "in.png").write_bytes(buffer.getvalue())
    grid = PictureGrid(["p"], list("abcd"), [[picture, buffer.getvalue(), tmp_path / "in.png", None]])
    page = _write(tmp_path, pictures=grid)
    sources = [img["src"] or "" for img in page.all("img")]
    assert len(sources) == 3
    for source in sources:
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert b"somebody" not in data
        assert Image.open(io.BytesIO(data)).tobytes() == picture.tobytes()
    assert page.classed("mark") == []


def test_bad_pictures_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PpclError, match="images of the picture grid must be 1 x 2"):
        PictureGrid(["p"], ["a", "b"], [[None]])
    with pytest.raises(PpclError, match="marks of the picture grid must be 1 x 1"):
        PictureGrid(["p"], ["a"], [[None]], [[True, False]])
    with pytest.raises(PpclError, match="a picture cannot be read"):
        write_report(tmp_path / "r.html", pictures=PictureGrid(["p"], ["a"], [[b"no picture"]]))
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PpclError) as error:
        write_report(tmp_path / "file" / "report.html", title="t")
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_loss_curves_are_means_of_equal_pieces(tmp_path: Path) -> None:
    assert smooth([1.0, 2.0, 3.0], 3) == ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert smooth([1.0, 3.0, 5.0, 7.0, 9.0], 3) == ([1.5, 3.5, 5.0], [2.0, 6.0, 9.0])
    page = _write(tmp_path, losses={"depth": {"a": [4.0] * 30, "b": [float("nan")] * 30}, "width": {}})
    assert "30 steps" in page.words
    assert page.words.count("4") >= 2
    assert "width " not in page.words


def test_empty_report_is_a_page(tmp_path: Path) -> None:
    page = _write(tmp_path, title="Nothing yet")
    assert page.all("section") == []
    assert page.words.count("Nothing yet") == 2  # title and heading


def test_charts_leave_gaps_and_say_when_there_is_nothing() -> None:
    def chart(x: list[float], y: list[float | None], log_y: bool = False) -> str:
        return drawn("line_chart", LineChart([Series("s", x, y)], title="t", labels=("x", "y"), log_y=log_y))

    assert len(Page(chart([0, 1, 2, 3], [1.0, None, 2.0, 3.0])).all("polyline")) == 2
    assert "no finite value" in chart([0, 1], [None, float("nan")])
    assert len(Page(chart([0, 1], [0.0, 0.1], log_y=True)).all("polyline")) == 1


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.3, 4.2, 12, whole=True) == [1, 2, 3, 4]
    assert ticks(2, 2, 4) == [2]
    assert [short(v) for v in (0, 0.25, 1e-4, 2.5e-5, 3e6)] == ["0", "0.25", "1e-4", "2.5e-5", "3e6"]


def test_contact_sheet_shows_the_pictures_in_their_places(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (24, 24), (255, 0, 0)), Image.new("RGB", (24, 24), (0, 0, 255))
    grid = PictureGrid(["one", "two"], ["teacher", "half"], [[red, None], [None, blue]])
    assert write_contact_sheet(tmp_path / "pictures", grid) == tmp_path / "pictures" / "grid.png"
    sheet = Image.open(tmp_path / "pictures" / "grid.png").convert("RGB")
    pixels = [sheet.getpixel((x, y)) for y in range(sheet.height) for x in range(sheet.width)]
    assert pixels.count((255, 0, 0)) == pixels.count((0, 0, 255)) == 96 * 96
    assert pixels.index((255, 0, 0)) < pixels.index((0, 0, 255))
