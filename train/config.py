"""The config file of a training run: TOML on disk, `Options` in Python, with later values over earlier ones."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ppcl_fx.errors import PpclError, near
from ppcl_fx.files import write_text
from ppcl_fx.reading import read_text
from ppcl_fx.train.options import Options, TermWeights, plan_stages

CONFIG = "train.toml"
"""The complete config that a run used, in its folder."""
TOML_BYTES, LONGEST_LINE = 2**16, 4096
"""Bounds of a config file: what Python's reader of TOML takes grows with the square of a dotted name's length."""
NONE = "none"
"""TOML has no null; an option that is off is written so."""


def resolve(config: str | Path | Options | None = None, **options: Any) -> Options:
    """Return the options of a run: those of `config`, or the defaults, with the given ones on top.

    Args:
        config: A TOML file, options, or None for the defaults.
        **options: Options by name; `weights` may be a mapping or a `Weights` with some or all of the terms, `steps`
            a mapping from stage to steps.

    Raises:
        PpclError: The file cannot be read, or an option is unknown (the line names a near one) or makes no sense.
    """
    base: dict[str, Any] = {}
    if config is not None:
        base = config.model_dump() if isinstance(config, Options) else read(config)
    where = "" if config is None or isinstance(config, Options) else f"{config}: "
    options = {name: _plain(value) for name, value in options.items()}
    if "weights" in options and "weights" in base:
        options["weights"] = {**base["weights"], **_table(options["weights"])}
    merged = {**base, **options}
    check_names(merged, where)
    if "stages" in merged or "steps" in merged:
        defaults = Options()
        given = merged.get("stages", defaults.stages), merged.get("steps", defaults.steps)
        if all(isinstance(value, Sequence | Mapping) and not isinstance(value, str) for value in given):
            merged["stages"], merged["steps"] = plan_stages(*given)
    return validated(merged, where)


def read(path: str | Path) -> dict[str, Any]:
    """Return the options in a TOML file by name, unknown ones refused, values not checked yet.

    Raises:
        PpclError: The file is missing or no TOML, or an option is unknown.
    """
    path = Path(path)
    written = read_text(path, TOML_BYTES)
    if max(map(len, written.split("\n"))) > LONGEST_LINE:
        raise PpclError(f"{path}: has a line of more than {LONGEST_LINE} characters; write an option a line")
    try:
        found = tomllib.loads(written)
    except (ValueError, RecursionError) as error:  # numbers of many digits, and lists in lists in lists
        raise PpclError(f"{path}: not valid TOML ({error}); mend the file") from None
    check_names(found, f"{path}: ")
    return {name: _plain(value) for name, value in found.items()}


def check_names(options: Mapping[str, Any], where: str = "") -> None:
    """Raise a PpclError that begins with `where` and names a near option, when one of `options` is unknown."""
    _check(options, Options, where, "")
    weights = options.get("weights")
    if isinstance(weights, Mapping):
        _check(weights, TermWeights, where, "weights.")


def validated(options: Mapping[str, Any], where: str = "") -> Options:
    """Return `options` as `Options`. Raises PpclError, in one line, for a value that makes no sense."""
    try:
        return Options.model_validate(dict(options))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in fault["loc"])
        option = f"training option {name}: " if name else "training options: "
        if fault["type"] == "value_error":
            raise PpclError(f"{where}{option}{fault['ctx']['error']}; leave it out, or give another") from None
        raise PpclError(f"{where}{option}{fault['msg'].lower()}, not {fault['input']!r}") from None


def save(options: Options, path: str | Path) -> None:
    """Write the complete options as a TOML file that `resolve` reads back to the same."""
    write_text(path, text(options))


def text(options: Options) -> str:
    """Return the options as TOML, each with its description."""
    lines = [
        "# The options of `ppcl-fx train`, complete: give this file with --config to train in the same way."
    ]
    tables: list[str] = []
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if isinstance(value, BaseModel):
            tables += ["", f"[{name}]"]
            inner = type(value).model_fields
            tables += [f"{key} = {_toml(getattr(value, key))}  # {inner[key].description}" for key in inner]
        else:
            lines.append(f"{name} = {_toml(value)}  # {field.description}")
    return "\n".join([*lines, *tables]) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return json.dumps(NONE)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    # TOML's basic strings, booleans and integers are written as JSON's are.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check(given: Mapping[str, Any], model: type[BaseModel], where: str, prefix: str) -> None:
    known = list(model.model_fields)
    for name in given:
        if name not in known:
            raise PpclError(
                f"{where}unknown training option {prefix + name!r}{near(name, known)}; docs/training.md lists all"
            )


def _plain(value: Any) -> Any:
    if value == NONE:
        return None
    if isinstance(value, BaseModel):
        return value.model_dump()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _table(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {"weights": value}
