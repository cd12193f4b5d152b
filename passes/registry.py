"""Passes by name: which there are, what they take, and a pipeline from its text."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

import ppcl_fx.passes
from ppcl_fx.errors import PpclError, near
from ppcl_fx.passes.contract import REGISTRY, Kind, Numerics, Pass, Pipeline

GROUP = "ppcl_fx.passes"
"""The entry point group in which another package names the modules that hold its passes."""

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PASS = re.compile(rf'\s*([\w-]+)\s*(?:\{{((?:[^{{}}"]|{_QUOTED})*)\}})?\s*(,|$)')
_OPTION = re.compile(rf'\s*(\w+)\s*=\s*({_QUOTED}|[^\s,"{{}}=]+)\s*(,|$)')


@dataclasses.dataclass(frozen=True)
class Described:
    """What is known of a pass without running it."""

    name: str
    kind: Kind
    numerics: Numerics
    options: tuple[str, ...]
    """Its options with their types and defaults, as in ``first: int`` and ``init: str = 'first'``."""
    does: str
    """The first sentence of its docstring."""
    written: bool
    """Whether its text alone makes one; else an option takes an object, and it is made in Python."""


def registered() -> dict[str, type[Pass]]:
    """Return every pass by name: those of this package, and those of packages with an entry point in `GROUP`."""
    for module in pkgutil.walk_packages(ppcl_fx.passes.__path__, "ppcl_fx.passes."):
        importlib.import_module(module.name)
    for entry in entry_points(group=GROUP):
        entry.load()
    return dict(sorted(REGISTRY.items()))


def described(kind: type[Pass]) -> Described:
    """Describe a pass class."""
    options = tuple(_option(field) for field in dataclasses.fields(kind) if field.init)
    does = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    does = re.split(r"(?<=[.])\s", does)[0].rstrip(".")
    return Described(kind.name, kind.kind, kind.numerics, options, does, _adapter(kind) is not None)


def parse(text: str) -> Pipeline:
    """Make a pipeline of ``a{option=value,...},b``; `str` of it gives the text again.

    A value that is more than a word or a number stands in double quotes; ``+`` joins a collection's items.

    Raises:
        PpclError: it is no such text, a pass or option is unknown, or a value has the wrong type.
    """
    known, made = registered(), []
    for name, body in _matches(_PASS, text):
        if name not in known:
            raise PpclError(f"there is no pass {name!r}{near(name, known)}; 'ppcl-fx passes' lists them")
        made.append(_made(known[name], dict(_matches(_OPTION, body))))
    return Pipeline(made)


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """Yield the two groups of each item of a list separated by commas."""
    at, more = 0, bool(text.strip())
    while more:
        found = pattern.match(text, at)
        if found is None:
            raise PpclError(f"passes: cannot be read from {text[at:]!r} on; write a{{option=value,...}},b")
        yield found[1], found[2] or ""
        at, more = found.end(), bool(found[3])


def _made(kind: type[Pass], texts: dict[str, str]) -> Pass:
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    unknown = next((name for name in texts if name not in fields), None)
    if unknown is not None:
        has = f"it has {', '.join(fields)}" if fields else "it has none"
        raise PpclError(f"the pass {kind.name} has no option {unknown!r}{near(unknown, fields)}; {has}")
    adapter = _adapter(kind)
    if adapter is None:
        raise PpclError(f"the pass {kind.name} takes an object that no text can give; make it in Python")
    values = {name: json.loads(text) if text.startswith('"') else text for name, text in texts.items()}
    many = [name for name in values if str(fields[name].type).startswith(("frozenset", "tuple", "list", "set"))]
    listed = {name: values[name].split("+") if values[name] else [] for name in many}
    try:
        return adapter.validate_python({**values, **listed})
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0])
        if first["type"] == "missing":
            raise PpclError(f"the pass {kind.name} needs the option {_option(fields[option])}") from None
        raise PpclError(f"the pass {kind.name}: {option}={texts[option]}: {first['msg']}") from None


def _adapter(kind: type[Pass]) -> TypeAdapter[Pass] | None:
    """Return what makes a pass of text and checks the types; None where an option takes an object."""
    if kind is Pipeline:
        return None
    try:
        adapter: TypeAdapter[Pass] = TypeAdapter(kind)
        adapter.rebuild(raise_errors=True)
    except (PydanticUserError, NameError):
        return None
    return adapter


def _option(field: dataclasses.Field[Any]) -> str:
    default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
    return f"{field.name}: {field.type}{default}"
