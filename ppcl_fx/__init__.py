"""Pruning diffusion transformers as compilation: trace, analyse, select, rewrite, distil, export.

The public surface::

    gm = ppcl_fx.trace(model, example_kwargs)     # a torch.fx graph that knows blocks and streams
    found = ppcl_fx.stacks(gm)                    # the runs of look-alike blocks
    calls = ppcl_fx.record(pipeline, prompts)     # what the transformer is called with
    analysis = ppcl_fx.analyze(gm, calls)         # a Redundancy: which blocks can be told from which
    plan = ppcl_fx.select(analysis, keep=0.5)     # a Plan: what to replace for half of the parameters
    model = ppcl_fx.rewrite(gm, plan)             # a PluggableModel: teacher and student parts side by side
    model.plug(keep=0.7).save(folder)             # choose a mixture; every one of them runs
    model = ppcl_fx.load(folder)
    pipe.transformer = ppcl_fx.EngineTransformer(engines)    # what ppcl_fx.export wrote, in a pipeline

The passes are in `ppcl_fx.passes`, training is in `ppcl_fx.train`, export in `ppcl_fx.export`. Names are imported when
they are first used, so that ``import ppcl_fx`` is quick and does not import torch.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from ppcl_fx._names import lazy
from ppcl_fx._version import __version__ as __version__
from ppcl_fx.errors import GuardError as GuardError
from ppcl_fx.errors import PpclError as PpclError
from ppcl_fx.errors import Refusal as Refusal

if TYPE_CHECKING:
    from ppcl_fx.calls.record import record as record
    from ppcl_fx.calls.store import Calls as Calls
    from ppcl_fx.export.runtime.engine import EngineTransformer as EngineTransformer
    from ppcl_fx.ir.stacks import Stack as Stack
    from ppcl_fx.ir.stacks import stacks as stacks
    from ppcl_fx.model.pluggable import PluggableModel as PluggableModel
    from ppcl_fx.model.pluggable import load as load
    from ppcl_fx.model.rewrite import rewrite as rewrite
    from ppcl_fx.passes.analysis.analyze import analyze as analyze
    from ppcl_fx.passes.selection.select import select as select
    from ppcl_fx.schema.analysis import Redundancy as Redundancy
    from ppcl_fx.schema.plan import Plan as Plan
    from ppcl_fx.tracing import trace as trace


_HOME = {
    "ppcl_fx.calls": ("Calls",),
    "ppcl_fx.calls.record": ("record",),
    "ppcl_fx.export.runtime.engine": ("EngineTransformer",),
    "ppcl_fx.ir.stacks": ("Stack", "stacks"),
    "ppcl_fx.model": ("PluggableModel", "load"),
    "ppcl_fx.model.rewrite": ("rewrite",),
    "ppcl_fx.passes.analysis.analyze": ("analyze",),
    "ppcl_fx.passes.selection.select": ("select",),
    "ppcl_fx.schema.analysis": ("Redundancy",),
    "ppcl_fx.schema.plan": ("Plan",),
    "ppcl_fx.tracing": ("trace",),
}
"""The names of each module."""

__all__ = sorted([*chain(*_HOME.values()), "GuardError", "PpclError", "Refusal", "__version__"])

if not TYPE_CHECKING:  # a type checker sees the imports above, and reports other names
    __getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
