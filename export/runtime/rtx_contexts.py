"""Execution contexts of TensorRT for RTX: what is compiled on the card, when, and where the kernels are kept."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.export.runtime.options import RuntimeOptions
from ppcl_fx.export.store.names import kernel_cache_path
from ppcl_fx.export.tensorrt.loading import LoadedEngine
from ppcl_fx.export.tensorrt_api import Api
from ppcl_fx.io.files import new_file
from ppcl_fx.io.reading import read_bytes

LOG = logging.getLogger(__name__)

CACHE_BYTES = 2**31
"""A cache of kernels may be this large."""


class RtxContexts:
    """Makes the contexts of one engine, with the options of its runtime. The kernels that they compile are written
    beside the engine when this object goes, or the program ends.
    """

    def __init__(self, loaded: LoadedEngine, path: Path, options: RuntimeOptions) -> None:
        api, self.loaded = loaded.api, loaded
        self.config = api.call("ICudaEngine.create_runtime_config", loaded.engine)
        graphs = {
            True: api.value("CudaGraphStrategy.WHOLE_GRAPH_CAPTURE"),
            False: api.value("CudaGraphStrategy.DISABLED"),
        }
        kernels = {
            "lazy": api.value("DynamicShapesKernelSpecializationStrategy.LAZY"),
            "eager": api.value("DynamicShapesKernelSpecializationStrategy.EAGER"),
            "none": api.value("DynamicShapesKernelSpecializationStrategy.NONE"),
        }
        api.set("IRuntimeConfig.cuda_graph_strategy", self.config, graphs[options.cuda_graphs])
        api.set(
            "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy", self.config, kernels[options.specialisation]
        )
        if options.kernel_cache:
            self._keep(kernel_cache_path(path))

    def make(self) -> Any:
        """Return a new context; None where there is no memory for it."""
        api, engine = self.loaded.api, self.loaded.engine
        return api.call("ICudaEngine.create_execution_context", engine, runtime_config=self.config)

    def _keep(self, path: Path) -> None:
        api = self.loaded.api
        cache = api.call("IRuntimeConfig.create_runtime_cache", self.config)
        known = b""
        try:
            known = read_bytes(path, CACHE_BYTES) if path.is_file() else b""
        except PpclError as error:
            LOG.warning("%s", error)
        if known and not api.call("IRuntimeCache.deserialize", cache, blob=known):
            LOG.warning("%s: is of another card, driver or version; kernels are compiled again", path)
            known = b""
        if not api.call("IRuntimeConfig.set_runtime_cache", self.config, cache=cache):
            LOG.warning("%s: kernels are not kept: the library does not take the cache", path)
            return
        # The engine, with all that it needs, and its configuration have to outlive the cache.
        weakref.finalize(self, _save, api, cache, path, known, (self.config, self.loaded))


def _save(api: Api, cache: Any, path: Path, known: bytes, alive: Any) -> None:
    """Write the kernels down, where there are new ones; they are a gain in time alone, so a failure is a warning."""
    data = bytes(memoryview(api.call("IRuntimeCache.serialize", cache)))
    if data == known:
        return
    try:
        with new_file(path) as beside:
            beside.write_bytes(data)
    except (OSError, PpclError) as error:
        LOG.warning("%s: kernels are not kept (%s)", path, error)
