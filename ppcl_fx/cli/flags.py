"""Flags from options models: one for each field, with its description as help, and its type and bounds as checks."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import OptionError, PpclError
from ppcl_fx.io.options import MOST, default_words, flag_of, is_config, marks_of, meta_of, plain_type

NONE = "none"
"""What switches off an option that may be off, as in a config file."""
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]


def flagged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as a command of typer.

    A parameter of the type of an options model gets one, made from the flags of its fields; of the type
    ``Annotated[dict[str, Any], Model]`` it gets what was typed, by field, unchecked. A parameter `Terminal` stands for
    ``--verbose`` and ``--json``.
    """
    hints = get_type_hints(function, include_extras=True)
    models: dict[str, tuple[type[BaseModel], bool]] = {}
    parameters: list[inspect.Parameter] = []
    shown: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        marks = [mark for mark in get_args(hint)[1:] if isinstance(mark, type) and issubclass(mark, BaseModel)]
        if marks or (isinstance(hint, type) and issubclass(hint, BaseModel)):
            models[name] = (marks[0], False) if marks else (hint, True)
            parameters += _flags(models[name][0])
        elif hint is Terminal:
            shown = [_parameter("verbose", Verbose, False), _parameter("json", Json, False)]
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    parameters += shown

    @wraps(function)
    def run(**typed: Any) -> Any:
        if "verbose" in typed:
            typed["terminal"] = Terminal(typed.pop("verbose"))
            del typed["json"]  # the boundary looks at it
        made = {}
        for name, (model, checked) in models.items():
            texts = {field: typed.pop(field) for field in _fields(model)}
            made[name] = _made(model, texts) if checked else _given(model, texts)
        return function(**typed, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flags(model: type[BaseModel]) -> list[inspect.Parameter]:
    found = []
    for name, (flag, field) in _fields(model).items():
        kind, mark = plain_type(field.annotation), meta_of(field)
        flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag, *mark.also]
        metavar = None if kind is bool else mark.metavar or _metavar(kind)
        option = typer.Option(*flags, metavar=metavar, help=_help(field), show_default=False)
        typed = bool if kind is bool else list[str] if _is_mapping(kind) else str
        found.append(_parameter(name, Annotated[typed | None, option]))
    return found


def _metavar(kind: Any) -> str:
    if _is_mapping(kind):
        return "NAME=VALUE"
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "N", float: "X"}.get(kind, "A,B,..." if get_origin(kind) is tuple else "TEXT")


_BOUNDS = (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below"))


def _help(field: FieldInfo) -> str:
    """Return what a field is, its default, and its bounds, but for those that nobody meets."""
    text, default = field.description or "", default_words(field)
    bounds = [(word, getattr(mark, name)) for mark in marks_of(field) for name, word in _BOUNDS if hasattr(mark, name)]
    words = [f"default: {default}"] if default else []
    words += dict.fromkeys(f"{word} {bound}" for word, bound in bounds if bound < MOST)
    first = text.split(" ")[0].rstrip(",;:")
    start = text[:1].upper() if first.isalpha() and first.islower() else text[:1]
    return f"{start}{text[1:]}." + (f"  [{'; '.join(words)}]" if words else "")


def _is_mapping(kind: Any) -> bool:
    return get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, BaseModel))


def _fields(model: type[BaseModel]) -> dict[str, tuple[str, FieldInfo]]:
    """Return the flags and the fields of a model, those of the models in it included, by their fields' names."""
    found: dict[str, tuple[str, FieldInfo]] = {}
    for name, field in model.model_fields.items():
        kind = plain_type(field.annotation)
        if is_config(kind):
            found |= _fields(kind)
        elif not meta_of(field).hidden:
            found[name] = flag_of(model, name), field
    return found


def _given(model: type[BaseModel], texts: Mapping[str, Any]) -> dict[str, Any]:
    """Return by field what was typed, of texts by field: lists and tables taken apart, the rest as it is."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = plain_type(field.annotation)
        if is_config(kind):
            inner = _given(kind, texts)
            found |= {name: inner} if inner else {}
        elif texts.get(name) not in (None, []):
            found[name] = _plain(flag_of(model, name), field, texts[name])
    return found


def _plain(flag: str, field: FieldInfo, text: Any) -> Any:
    annotation, kind = field.annotation, plain_type(field.annotation)
    if text == NONE and types.NoneType in get_args(annotation):
        return None
    if _is_mapping(kind):
        return _table(flag, text, meta_of(field).metavar or _metavar(kind))
    if get_origin(kind) is not tuple:
        return text
    parts = [part.strip() for part in text.split(",")]
    if plain_type(get_args(kind)[0]) is not int:
        return parts
    if not all(re.fullmatch("[0-9]{1,10}", part) and 0 < int(part) <= MOST for part in parts):
        raise PpclError(f"{flag} {text}: give whole numbers from 1 to {MOST} with commas between them")
    return [int(part) for part in parts]


def _table(flag: str, texts: Iterable[str], form: str) -> dict[str, str]:
    """Return name -> value of ``image=1,relative=0.5``."""
    found: dict[str, str] = {}
    for text in (part for whole in texts for part in whole.split(",")):
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise PpclError(f"{flag} {text}: give {form}, such as {name or 'image'}=1")
        if name in found:
            raise PpclError(f"{flag} {name}: is there twice; give each once")
        found[name] = value
    return found


def _made(model: type[BaseModel], texts: Mapping[str, Any]) -> BaseModel:
    try:
        return model(**_given(model, texts))
    except OptionError as error:
        raise typed_error(error, model, texts) from None


def typed_error(error: OptionError, model: type[BaseModel], texts: Mapping[str, Any]) -> PpclError:
    """Return an options model's refusal in the words of the command line: the flag and what was typed."""
    if not error.option:
        return error
    text = error.part or texts.get(error.option)
    typed = f" {','.join(text) if isinstance(text, list) else text}" if isinstance(text, (str, list)) else ""
    return PpclError(f"{_fields(model)[error.option][0]}{typed}: {error.reason}")
