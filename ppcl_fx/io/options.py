"""Options models: the one description of what a command, a Python function and a table of the docs take as options."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import ValidationError

from ppcl_fx.errors import OptionError, near
from ppcl_fx.io.memory import parse_size

MOST = 10**9
"""The largest count of anything that is counted: steps, calls, runs."""
MOST_STEPS = 10_000
"""The most denoising steps of one picture: ten times what schedulers are trained with."""


@dataclass(frozen=True)
class Flag:
    """How an options model's field is written on the command line, where its name and type do not say it.

    It may have other names, ``--stage`` for a field ``stages``; `metavar` stands for its value in the help.
    """

    name: str = ""
    also: tuple[str, ...] = ()
    metavar: str = ""
    hidden: bool = False


class Config(BaseModel):
    """An options model: frozen, without unknown names; a wrong value is an `OptionError`, one line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # type checkers take the signature from the fields

        def __init__(self, **values: Any) -> None:
            fields = type(self).model_fields.items()
            other = {flag[2:].replace("-", "_"): name for name, field in fields for flag in meta_of(field).also}
            try:
                super().__init__(**{other.get(name, name): value for name, value in values.items()})
            except ValidationError as error:
                raise option_error(error, type(self).model_fields) from None

    @classmethod
    def merged(cls, config: Self | None, options: Mapping[str, Any]) -> Self:
        """Return `options`, by the fields' names, over the options of `config` or over the defaults."""
        given = {} if config is None else {name: getattr(config, name) for name in config.model_fields_set}
        return cls(**{**given, **options})

    def given(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that somebody gave, in this order."""
        return [name for name in names if name in self.model_fields_set]


def option_error(error: ValidationError, known: Mapping[str, Any]) -> OptionError:
    """Return in one line the first thing that is wrong with the values of an options model of the fields `known`."""
    fault = error.errors(include_url=False)[0]
    place = fault["loc"]
    name = str(place[0]) if place else ""
    match fault["type"]:
        case "extra_forbidden":
            reason = f"there is no such option{near(name, known)}"
        case "value_error":
            reason = str(fault["ctx"]["error"])
        case "literal_error":
            names = [part.strip("'") for part in fault["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            reason = f"not one of {', '.join(names)}{near(str(fault['input']), names)}"
        case _:
            inner = "".join(f"{part}: " for part in place[1:] if isinstance(part, str))
            reason = f"{inner}{fault['msg'][:1].lower()}{fault['msg'][1:]}"
    return OptionError(name, reason, str(fault["input"]) if len(place) > 1 and isinstance(place[1], int) else "")


def flag_of(model: type[BaseModel], name: str) -> str:
    """Return the flag of a field: ``--check-calls``."""
    return meta_of(model.model_fields[name]).name or f"--{name.replace('_', '-')}"


def meta_of(field: FieldInfo) -> Flag:
    """Return what a field says of its flag, by itself or by its type."""
    return next((one for one in marks_of(field) if isinstance(one, Flag)), Flag())


def marks_of(field: FieldInfo) -> list[Any]:
    """Return what is annotated to a field and to the types that it is made of: flags, bounds, validators."""
    found, left = list(field.metadata), [field.annotation]
    while left:
        one = left.pop()
        for mark in getattr(one, "__metadata__", ()):
            found += mark.metadata if isinstance(mark, FieldInfo) else [mark]
        left += get_args(one)
    return found


def default_words(field: FieldInfo) -> str:
    """Return a field's default as a person writes it; empty where there is none."""
    value = field.get_default(call_default_factory=True)
    if value is None or value is False or value == "" or isinstance(value, dict):
        return ""
    if isinstance(value, BaseModel):
        return ", ".join(f"{name}={part:g}" for name, part in value)
    if isinstance(value, int) and value and value % 2**30 == 0:
        return f"{value >> 30}GiB"
    if value is True:
        return "true"
    if isinstance(value, tuple):
        return ", ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bytes(value: object, info: ValidationInfo) -> object:
    return parse_size(f"--{str(info.field_name).replace('_', '-')}", value) if isinstance(value, str) else value


def _number(value: object) -> object:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("not a number; give the share of parameters that stays, such as 0.5") from None


def _share(value: float) -> float:
    if not 0.0 < value <= 1.0:  # NaN fails too
        raise ValueError("the share of parameters that stays is above 0 and at most 1, such as 0.5")
    return value


def _each_once(values: tuple[float, ...]) -> tuple[float, ...]:
    doubled = sorted({value for value in values if values.count(value) > 1})
    if doubled or not values:
        raise ValueError(f"{doubled[0]} is there twice; give each share once" if doubled else "no share; give one")
    return values


Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0), Flag(metavar="SIZE")]
"""A size in bytes, or text such as ``12GiB``."""
Count = Annotated[int, Field(ge=1, le=MOST)]
Tolerance = Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Share = Annotated[float, BeforeValidator(_number), AfterValidator(_share), Flag(metavar="SHARE")]
Shares = Annotated[tuple[Share, ...], AfterValidator(_each_once), Flag(metavar="SHARES")]


def plain_type(annotation: Any) -> Any:
    """Return a type without None and without what is annotated to it."""
    if get_origin(annotation) is Annotated:
        return plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return plain_type(next(one for one in get_args(annotation) if one is not types.NoneType))
    return annotation


def is_config(kind: Any) -> bool:
    """Tell whether a type is an options model, whose fields are options of the model that it is in."""
    return isinstance(kind, type) and issubclass(kind, Config)
