"""The one door to TensorRT: every class, value, method and keyword is named here by a literal string.

A test reads those strings out of this package's source and looks each up in NVIDIA's compiled bindings, so a name that
does not exist is found on a machine without a GPU. That is why no other module may touch ``tensorrt`` itself.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Api:
    """TensorRT.

    Args:
        module: the module ``tensorrt``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def version(self) -> tuple[int, ...]:
        """The version as numbers, ``(11, 4, 0)``."""
        return version_numbers(str(self.value("__version__")))

    def value(self, path: str) -> Any:
        """Return an enumeration member or a constant."""
        found = self.module
        for part in path.split("."):
            found = getattr(found, part)
        return found

    def has(self, path: str) -> bool:
        """Tell whether this version has a class, method or member. The newest version that is supported must."""
        found = self.module
        for part in path.split("."):
            found = getattr(found, part, None)
        return found is not None

    def make(self, name: str, **keywords: Any) -> Any:
        """Create an object of a class."""
        return self.value(name)(**keywords)

    def call(self, path: str, owner: Any, **keywords: Any) -> Any:
        """Call the method ``Class.method`` of an object."""
        return getattr(owner, path.rpartition(".")[2])(**keywords)

    def get(self, path: str, owner: Any) -> Any:
        """Read the property ``Class.property`` of an object."""
        return getattr(owner, path.rpartition(".")[2])

    def set(self, path: str, owner: Any, value: Any) -> None:
        """Set the property ``Class.property`` of an object."""
        setattr(owner, path.rpartition(".")[2], value)

    def implement(self, name: str, **methods: Callable[..., Any]) -> Any:
        """Return an object of a class that TensorRT calls back.

        Args:
            name: the class.
            methods: a function for each method that is overridden, without ``self``. It must not raise: TensorRT
                prints what it catches and goes on.
        """
        base = self.value(name)

        def begin(instance: Any) -> None:
            base.__init__(instance)  # NVIDIA's classes want their own, not super()'s

        body = {"__init__": begin, **{method: _bound(function) for method, function in methods.items()}}
        return type(f"Our{name}", (base,), body)()


def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(_: Any, *args: Any) -> Any:
        return function(*args)

    return method


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the first three numbers of a version such as ``10.13.3.9.post1``."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


@dataclass(frozen=True)
class Gpu:
    """What an engine is built for.

    Attributes:
        name: as the driver tells it.
        capability: the compute capability, ``9.0``.
        cuda: the newest version of CUDA that the driver takes, ``13.0``.
    """

    name: str
    capability: str
    cuda: str


_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the driver's interface."""


def find_gpu(index: int = 0) -> Gpu | None:
    """Return an NVIDIA GPU as the driver tells it, or ``None`` where there is none.

    Args:
        index: which, in the order of CUDA and PyTorch: ``CUDA_VISIBLE_DEVICES`` counts.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value <= index:
        return None
    asked = (
        driver.cuDeviceGet(ctypes.byref(device), index),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        driver.cuDriverGetVersion(ctypes.byref(version)),
    )
    if any(asked):
        return None
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", cuda)


def gpu_name() -> str | None:
    """Return the name of the first NVIDIA GPU, or ``None`` where there is none."""
    gpu = find_gpu()
    return None if gpu is None else gpu.name
