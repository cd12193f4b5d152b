"""Names of packages: public ones are imported when they are first used, and former names of modules still work."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

from ppcl_fx.errors import near

MOVED = {
    "ppcl_fx.calls.held_out": "ppcl_fx.calls.store",
    "ppcl_fx.fingerprint": "ppcl_fx.io.fingerprint",
    "ppcl_fx.folders": "ppcl_fx.formats",
    "ppcl_fx.folders.released": "ppcl_fx.formats.released",
    "ppcl_fx.formats.likeness": "ppcl_fx.formats.stock",
    "ppcl_fx.formats.numbering": "ppcl_fx.formats.pruned",
    "ppcl_fx.formats.release": "ppcl_fx.formats.released",
    "ppcl_fx.io.long_files": "ppcl_fx.io.shards",
    "ppcl_fx.memory": "ppcl_fx.io.memory",
    "ppcl_fx.passes.analysis.comparers": "ppcl_fx.passes.analysis.similarity",
    "ppcl_fx.passes.analysis.ffn_fit": "ppcl_fx.passes.analysis.annotate",
    "ppcl_fx.passes.analysis.text_similarity": "ppcl_fx.passes.analysis.annotate",
    "ppcl_fx.lora.convert": "ppcl_fx.lora.keys",
    "ppcl_fx.model.finetuned": "ppcl_fx.model.student_folder",
    "ppcl_fx.model.offload": "ppcl_fx.model.face",
    "ppcl_fx.model.pipeline_model": "ppcl_fx.model.face",
    "ppcl_fx.model.streamed_rewrite": "ppcl_fx.model.rewrite",
    "ppcl_fx.passes.damage": "ppcl_fx.passes.selection.sensitivity",
    "ppcl_fx.passes.depth": "ppcl_fx.passes.edits.depth",
    "ppcl_fx.passes.edits.insertion": "ppcl_fx.passes.edits.plug",
    "ppcl_fx.passes.edits.width_rules": "ppcl_fx.passes.selection.rules",
    "ppcl_fx.passes.ffn": "ppcl_fx.passes.edits.ffn",
    "ppcl_fx.passes.frontier": "ppcl_fx.passes.selection.frontier",
    "ppcl_fx.passes.lowering.clamp_half": "ppcl_fx.passes.lowering.lowering",
    "ppcl_fx.passes.lowering.precision": "ppcl_fx.passes.calibration.normal_sums",
    "ppcl_fx.passes.outline": "ppcl_fx.passes.edits.outline",
    "ppcl_fx.passes.rewrite": "ppcl_fx.model.rewrite",
    "ppcl_fx.passes.select": "ppcl_fx.passes.selection.select",
    "ppcl_fx.passes.text_stream": "ppcl_fx.passes.edits.text_stream",
    "ppcl_fx.plan": "ppcl_fx.schema.plan",
    "ppcl_fx.plans": "ppcl_fx.model.paper_plans",
    "ppcl_fx.recording": "ppcl_fx.calls.record",
    "ppcl_fx.redundancy": "ppcl_fx.schema.analysis",
    "ppcl_fx.shards": "ppcl_fx.io.shards",
    "ppcl_fx.shapes.fastpath": "ppcl_fx.shapes.course",
    "ppcl_fx.shapes.scenes": "ppcl_fx.shapes.drawing",
    "ppcl_fx.sites": "ppcl_fx.ir.sites",
    "ppcl_fx.skeleton": "ppcl_fx.tracing.meta_model",
    "ppcl_fx.tracing.loadable": "ppcl_fx.tracing.held",
    "ppcl_fx.tracing.values": "ppcl_fx.tracing.examples",
    "ppcl_fx.train.data.bad_samples": "ppcl_fx.train.data.source",
    "ppcl_fx.train.data.parts": "ppcl_fx.train.data.prompts",
    "ppcl_fx.train.data.probing": "ppcl_fx.train.data.template",
    "ppcl_fx.train.data.sampler": "ppcl_fx.train.data.source",
    "ppcl_fx.train.images.webdataset": "ppcl_fx.train.images.captions",
    "ppcl_fx.train.ranks": "ppcl_fx.train.distributed.process_group",
    "ppcl_fx.train.shares": "ppcl_fx.train.distributed.batch_split",
    "ppcl_fx.train.sources": "ppcl_fx.train.data",
    "ppcl_fx.train.sources.encode": "ppcl_fx.train.images.encode",
    "ppcl_fx.train.sources.flow": "ppcl_fx.train.images.flow",
    "ppcl_fx.train.sources.images": "ppcl_fx.train.images.images",
    "ppcl_fx.train.sources.pairs": "ppcl_fx.train.images.captions",
    "ppcl_fx.train.sources.prompts": "ppcl_fx.train.data.prompts",
    "ppcl_fx.train.sources.source": "ppcl_fx.train.data.source",
    "ppcl_fx.uncached": "ppcl_fx.model.face",
}
"""Former name -> name, of modules: those that the documents of version 0.1 named, and of later ones."""


def lazy(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` (PEP 562), which imports a public name when it is first used.

    `names` has the public names of each module.
    """
    home = {name: module for module, inside in names.items() for name in inside}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}{near(name, home)}")
        value = getattr(importlib.import_module(home[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


class Former(MetaPathFinder, Loader):
    """Finds modules by their former names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how a former name is loaded; None for any other."""
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module itself, so that there is one of each class."""
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own name back: it has run already."""
        spec = module.__spec__
        assert spec is not None
        module.__spec__ = spec.loader_state


sys.meta_path.insert(0, Former())
