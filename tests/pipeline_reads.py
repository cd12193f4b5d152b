"""Which attributes diffusers' pipelines read from their transformer, found in their source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import diffusers

ROOMS = ("pipelines", "modular_pipelines")
NAMED = re.compile(r"\.transformer(_\d+)?\b")


@dataclass
class Reads:
    """What pipelines read.

    Attributes:
        names: attributes of the transformer itself, each with the files that read it.
        config: entries of its configuration.
    """

    names: dict[str, set[str]] = field(default_factory=dict)
    config: dict[str, set[str]] = field(default_factory=dict)


def pipeline_reads() -> Reads:
    """Scan every pipeline of the installed diffusers."""
    found = Reads()
    root = Path(diffusers.__file__).parent
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            text = path.read_text()
            for function in _functions(ast.parse(text)) if NAMED.search(text) else ():
                aliases = _aliases(function)
                for node in ast.walk(function):
                    for owner, name in _read(node):
                        if _is_transformer(owner, aliases):
                            found.names.setdefault(name, set()).add(path.name)
                        elif (
                            isinstance(owner, ast.Attribute)
                            and owner.attr == "config"
                            and _is_transformer(owner.value, aliases)
                        ):
                            found.config.setdefault(name, set()).add(path.name)
    return found


def _functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Give the outermost functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        elif isinstance(node, (ast.ClassDef, ast.If, ast.Try)):
            yield from _functions(node)


def _read(node: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """Give the object and the name where a node reads an attribute: ``a.b``, ``getattr(a, "b")``, ``hasattr``."""
    match node:
        case ast.Attribute(value=owner, attr=name, ctx=ast.Load()):
            yield owner, name
        case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[owner, ast.Constant(value=str(name)), *_]):
            yield owner, name
        case _:
            pass


def _is_transformer(node: ast.expr, aliases: set[str]) -> bool:
    """Tell whether an expression is ``self.transformer``, ``components.transformer_2`` or a name for such a one."""
    match node:
        case ast.Attribute(attr=name):
            return re.fullmatch(r"transformer(_\d+)?", name) is not None
        case ast.Name(id=name):
            return name in aliases
        case ast.IfExp(body=one, orelse=other):
            return _is_transformer(one, aliases) or _is_transformer(other, aliases)
        case ast.BoolOp(values=values):
            return any(_is_transformer(value, aliases) for value in values)
        case _:
            return False


def _aliases(function: ast.AST) -> set[str]:
    """Return the local names that a function gives to a transformer."""
    names: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and _is_transformer(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
