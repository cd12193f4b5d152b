"""Everything this package uses of TensorRT, in one table; what is not in the table cannot be called."""

from __future__ import annotations

import ctypes
from typing import Any

CALLS: dict[str, tuple[str, ...]] = {
    "Logger": ("min_severity",),
    "Builder": ("logger",),
    "Builder.create_network": ("flags",),
    "Builder.create_builder_config": (),
    "Builder.create_optimization_profile": (),
    "Builder.build_serialized_network": ("network", "config"),
    "OnnxParser": ("network", "logger"),
    "OnnxParser.parse_from_file": ("model",),
    "OnnxParser.get_error": ("index",),
    "ParserError.desc": (),
    "INetworkDefinition.get_input": ("index",),
    "IOptimizationProfile.set_shape": ("input", "min", "opt", "max"),
    "IBuilderConfig.add_optimization_profile": ("profile",),
    "IBuilderConfig.set_memory_pool_limit": ("pool", "pool_size"),
    "IBuilderConfig.create_timing_cache": ("serialized_timing_cache",),
    "IBuilderConfig.set_timing_cache": ("cache", "ignore_mismatch"),
    "IBuilderConfig.get_timing_cache": (),
    "ITimingCache.serialize": (),
}
"""Classes and methods that are called, with the keywords they are called with."""

VALUES: tuple[str, ...] = (
    "ILogger.Severity.WARNING",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "MemoryPoolType.WORKSPACE",
    "__version__",
)
"""Enumeration members and constants that are read."""

PROPERTIES: tuple[str, ...] = (
    "OnnxParser.num_errors",
    "INetworkDefinition.num_inputs",
    "ITensor.name",
    "IBuilderConfig.builder_optimization_level",
)
"""Properties of objects that are read or set."""


class Api:
    """TensorRT, seen through the table.

    Args:
        module: the module ``tensorrt``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def value(self, path: str) -> Any:
        """Return an enumeration member or a constant."""
        _listed(path, VALUES)
        return self._find(path)

    def make(self, name: str, **keywords: Any) -> Any:
        """Create an object of a class."""
        self._keywords(name, keywords)
        return self._find(name)(**keywords)

    def call(self, path: str, owner: Any, **keywords: Any) -> Any:
        """Call the method ``Class.method`` of an object."""
        self._keywords(path, keywords)
        return getattr(owner, path.rpartition(".")[2])(**keywords)

    def get(self, path: str, owner: Any) -> Any:
        """Read the property ``Class.property`` of an object."""
        _listed(path, PROPERTIES)
        return getattr(owner, path.rpartition(".")[2])

    def set(self, path: str, owner: Any, value: Any) -> None:
        """Set the property ``Class.property`` of an object."""
        _listed(path, PROPERTIES)
        setattr(owner, path.rpartition(".")[2], value)

    def _find(self, path: str) -> Any:
        found = self.module
        for part in path.split("."):
            found = getattr(found, part)
        return found

    @staticmethod
    def _keywords(path: str, keywords: dict[str, Any]) -> None:
        _listed(path, CALLS)
        if tuple(keywords) != CALLS[path]:
            raise RuntimeError(f"{path} is listed with the keywords {CALLS[path]}, not {tuple(keywords)}")


def _listed(path: str, table: Any) -> None:
    if path not in table:
        raise RuntimeError(f"{path} is not in the table of ppcl_fx.export.tensorrt_api; add it there first")


def gpu_name() -> str | None:
    """Return the name of the first NVIDIA GPU as the driver tells it, or ``None`` where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0 or driver.cuDeviceGetName(name, len(name), device) != 0:
        return None
    return name.value.decode()
