"""Which modules stay whole in a trace, and which are looked into."""

from __future__ import annotations

from torch import nn


def has_attention(module: nn.Module) -> bool:
    """Tell whether a module holds attention: torch's own, diffusers' processor protocol, or q/k/v projections."""
    for child in module.modules():
        if isinstance(child, nn.MultiheadAttention) or hasattr(child, "set_processor"):
            return True
        names = {name for name, part in child.named_children() if isinstance(part, nn.Linear)}
        if names & {"qkv", "to_qkv"} or any({f"{p}q", f"{p}k", f"{p}v"} <= names for p in ("to_", "")):
            return True
    return False


def block_lists(model: nn.Module) -> list[str]:
    """Return the paths of a model's block lists: outermost `ModuleList`s whose elements all contain attention."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not isinstance(module, nn.ModuleList) or inside or len(module) == 0:
            continue
        if all(has_attention(element) for element in module):
            found.append(path)
    return found


def inlined_modules(model: nn.Module) -> set[str]:
    """Return the paths of the modules a trace looks into: the root, what holds a block list, the blocks themselves.

    Containers without a computation of their own (`nn.Sequential`) directly inside a block are looked into too, so
    that a modulation's linear layer is a node.
    """
    inlined = {""}
    for path in block_lists(model):
        parts = path.split(".")
        inlined |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
        for index, block in enumerate(model.get_submodule(path).children()):
            inner, name = block, f"{path}.{index}"
            inlined.add(name)
            # A block that is nothing but a wrapper around another module.
            while len(children := dict(inner.named_children())) == 1 and not list(inner.parameters(recurse=False)):
                (child_name, inner), *_ = children.items()
                name = f"{name}.{child_name}"
                inlined.add(name)
            inlined |= {f"{name}.{n}" for n, child in inner.named_children() if isinstance(child, nn.Sequential)}
    return inlined
