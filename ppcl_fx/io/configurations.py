"""Configurations from outside: compared with the signature of the class that they are for, before it is built."""

from __future__ import annotations

import inspect
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ppcl_fx.errors import PpclError, near

LARGEST = 2**24
"""The largest whole number in a configuration: sizes, counts and token numbers are below it by far."""
ADVICE = "mend it, or copy the file again"
ALIKE = 0.8
"""How near an unknown entry's name is to one that is missing, where it is taken for a slip."""
_NONE = type(None)
_JSON = ((_NONE, _NONE), (bool, bool), (int, int), (float, int | float), (str, str), (Mapping, Mapping))
"""What a value for such an annotation is in JSON; whole numbers may be written with a point."""


def check_config(kind: type[Any], config: Mapping[str, Any], where: str) -> None:
    """Compare a configuration with the arguments that a class takes: types, unknown names, absurd numbers.

    What a type may be follows from the annotation and from the default. Entries that the class does not know are
    ignored, as diffusers does (files of other versions have some), unless one looks like a missing entry's slip.
    """
    known = inspect.signature(kind.__init__).parameters
    try:
        hints = get_type_hints(inspect.unwrap(kind.__init__))
    except (NameError, TypeError, AttributeError):
        hints = {}  # an annotation of names that are only there for type checkers: then defaults alone speak
    absent = [name for name in known if name not in config]
    for name, value in config.items():
        if name.startswith("_"):
            continue
        if name not in known:
            if guess := near(name, absent, ALIKE):
                raise PpclError(f"{where}: {kind.__name__} takes no {name!r}{guess}; {ADVICE}")
            continue
        wanted, default = hints.get(name, Any), known[name].default
        if not _fits(value, wanted) and not _like(value, default):
            raise PpclError(f"{where}: {name} is {_short(value)}, and {kind.__name__} takes {_words(wanted)}; {ADVICE}")
        if _too_large(value) != default:
            check_numbers({name: value}, where)


def check_numbers(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration with a whole number that no model has; the PpclError names the file and the entry."""
    for name, value in config.items():
        big = _too_large(value)
        if big is not None:
            raise PpclError(f"{where}: {name} is {_short(big)}, beyond all that can be built; {ADVICE}")


def _fits(value: object, wanted: Any) -> bool:
    """Tell whether a JSON value may be for an annotation; lengths of tuples are seldom annotated right."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    plain = origin or wanted
    if not isinstance(plain, type) or plain is object:
        return True
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    for kind, given in _JSON:
        if issubclass(plain, kind):
            return isinstance(whole, given) and (kind is bool or not isinstance(value, bool))
    if issubclass(plain, Collection):
        return _each_fits(value, [one for one in inner if one is not Ellipsis] or [Any])
    return True


def _each_fits(value: object, wanted: Sequence[Any]) -> bool:
    return isinstance(value, list | tuple) and all(any(_fits(item, one) for one in wanted) for item in value)


def _like(value: object, default: object) -> bool:
    """Tell whether a JSON value is of the kind of a default: some annotations are narrower than their defaults."""
    if default is inspect.Parameter.empty or default is None:
        return value is None and default is None
    if isinstance(default, list | tuple):
        return _each_fits(value, [type(item) for item in default])
    return _fits(value, type(default))


def _too_large(value: object) -> int | None:
    """Return a whole number in a value that is larger than `LARGEST`, if there is one."""
    if isinstance(value, bool | str | bytes):
        return None
    if isinstance(value, int):
        return value if abs(value) > LARGEST else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence):
        return next((big for item in value if (big := _too_large(item)) is not None), None)
    return None


def _short(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "a number of many digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _words(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) and not get_args(wanted) else str(wanted).replace("typing.", "")
