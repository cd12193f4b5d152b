"""The page of all options, made from the options models: ``python -m tests.options_page`` writes it."""

from __future__ import annotations

from pathlib import Path

from ppcl_fx.export.config import ExportConfig
from ppcl_fx.export.tensorrt.request import BuildConfig
from ppcl_fx.io.options import options_table
from ppcl_fx.passes.options import AnalyzeConfig, RewriteConfig
from ppcl_fx.train.config import TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
COMMANDS = (
    ("analyze", AnalyzeConfig),
    ("rewrite", RewriteConfig),
    ("train", TrainConfig),
    ("export", ExportConfig),
    ("build", BuildConfig),
)
HEAD = """# Options

The options of each command are the fields of one model. Its fields are the flags, what Python takes
(`export(model, "ENGINES", ExportConfig(dtype="bf16"))`), and for `train` the lines of a TOML file. "none" switches an
option off where that makes sense. This page is made from the models: `python -m tests.options_page`.
"""


def page() -> str:
    """Return the page."""
    parts = [f"## {name}: `{model.__module__}.{model.__name__}`\n\n{options_table(model)}" for name, model in COMMANDS]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
