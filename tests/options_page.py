"""The page of all options, made from the options models: ``python -m tests.options_page`` writes it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from ppcl_fx.export.config import ExportConfig
from ppcl_fx.export.tensorrt.request import BuildConfig
from ppcl_fx.io.options import default_words, flag_of, is_config, meta_of, plain_type
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


def options_table(model: type[BaseModel], within: str = "") -> str:
    """Return the options of a model as a table in Markdown, for the docs; `within` comes before its fields' names."""
    rows = []
    for name, field in model.model_fields.items():
        kind = plain_type(field.annotation)
        if is_config(kind):
            rows += options_table(kind, f"{within}{name}.").splitlines()[2:]
        elif not meta_of(field).hidden:
            words = f"{default_words(field)} | {field.description}"
            rows.append(f"| `{flag_of(model, name)}` | `{within}{name}` | {words} |")
    return "\n".join(["| flag | field | default | what it is |", "| --- | --- | --- | --- |", *rows, ""])


def page() -> str:
    """Return the page."""
    parts = [f"## {name}: `{model.__module__}.{model.__name__}`\n\n{options_table(model)}" for name, model in COMMANDS]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
