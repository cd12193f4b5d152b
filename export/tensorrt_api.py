"""The one door to TensorRT and to TensorRT for RTX: every class, value, method and keyword is a literal string here.

A test reads those strings out of this package's source and looks each up in NVIDIA's compiled bindings, so a name that
does not exist is found on a machine without a GPU. That is why no other module may touch the libraries themselves.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import Any, Literal

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need

Kind = Literal["tensorrt", "rtx"]
"""Which of NVIDIA's two libraries, as ``--for`` names it."""


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's two libraries: what people call it, the module of its bindings, the module that has to be loaded
    before it, and the extra that brings both.
    """

    name: str
    module: str
    first: str
    extra: str


LIBRARIES: dict[Kind, Library] = {
    "tensorrt": Library("TensorRT", "tensorrt", "", "tensorrt"),
    "rtx": Library("TensorRT for RTX", "tensorrt_rtx_bindings", "tensorrt_rtx_libs", "rtx"),
}


@dataclass(frozen=True)
class Gpu:
    """What an engine is built for: its name and compute capability (``9.0``), and the newest CUDA that the driver takes
    (``13.0``).
    """

    name: str
    capability: str
    cuda: str


class Api:
    """One of the libraries, and the GPU that it builds for and runs on; None where it builds without one.

    Attributes:
        separate: whether builds run in a process of their own, as they do with a real library.
    """

    separate = True

    def __init__(self, module: Any, gpu: Gpu | None, kind: Kind = "tensorrt") -> None:
        self.module = module
        self.gpu = gpu
        self.kind: Kind = kind

    @property
    def version(self) -> str:
        """The library's version, ``11.4.0.106``."""
        return str(self.value("__version__"))

    @property
    def name(self) -> str:
        """What people call the library."""
        return LIBRARIES[self.kind].name

    def value(self, path: str) -> Any:
        """Return an enumeration member or a constant."""
        return attrgetter(path)(self.module)

    def has(self, path: str) -> bool:
        """Tell whether this version has a class, method or member. The newest version that is supported must."""
        try:
            return self.value(path) is not None
        except AttributeError:
            return False

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
        """Return an object of a class that TensorRT calls back, with functions for the methods that are overridden.

        They take no ``self``, and must not raise: TensorRT prints what it catches and goes on.
        """
        base = self.value(name)
        # NVIDIA's classes want their own __init__, not super()'s.
        body = {"__init__": lambda instance: base.__init__(instance)}
        body |= {method: staticmethod(function) for method, function in methods.items()}
        return type(f"Our{name}", (base,), body)()


def errors_of(api: Api, errors: Iterable[Any]) -> str:
    """Return the first of a parser's errors in one line: the operator, the module that it comes from, and why.

    The nodes of an exported graph are called by their module, ``transformer_blocks.0/4/node_Attention_7``.
    """
    found = []
    for error in islice(errors, 3):
        operator = str(api.call("ParserError.node_operator", error))
        node = str(api.call("ParserError.node_name", error))
        why = str(api.call("ParserError.desc", error))
        module = node.partition("/")[0] if "/" in node else ""
        parts = (operator, f"in {module}" if module else "", f"({node})" if node else "")
        where = " ".join(part for part in parts if part)
        found.append(f"{where}: {why}" if where else why)
    return "; ".join(found)


def short(words: str) -> str:
    """Return what a library says of a fault without its own functions, files and lines."""
    text = " ".join(words.split())
    text = re.sub(r"^(\w+::\w+: )?Error Code \d+: [\w /]*\(", "(", text)
    text = re.sub(r"\[\w+\.\w+:\d+: \w+\] ", "", text)
    text = re.sub(r"\s*In [\w:<>~]+(\(\))? at /\S+", "", text)
    text = text.removeprefix("(").strip().rstrip(".")
    while text.endswith(")") and text.count(")") > text.count("("):
        text = text[:-1].rstrip(" .")
    return text


def load_tensorrt(left: str, index: int = 0, kind: Kind = "tensorrt") -> Api:
    """Return a library on the GPU that CUDA counts as `index`.

    Args:
        left: what stays without them, for the message: "the ONNX files stay in ENGINES".

    Raises:
        PpclError: the library is not installed, or there is no NVIDIA GPU.
    """
    module = _module(kind, left)
    gpu = find_gpu(index)
    if gpu is None:
        library, which = LIBRARIES[kind], f" {index}" if index else ""
        does = "runs on one" if kind == "rtx" else "builds for the GPU it runs on"
        there = "there" if kind == "rtx" else "on a machine with one and export there"
        raise PpclError(
            f"there is no NVIDIA GPU{which} (or no driver) here, and {library.name} {does}: pip install "
            f'"ppcl-fx[{library.extra}]" {there}; {left}'
        )
    return Api(module, gpu, kind)


def load_builder(left: str, kind: Kind) -> Api:
    """Return a library that builds: TensorRT for the GPU of this machine, TensorRT for RTX without one; `PpclError` as
    `load_tensorrt`.
    """
    return Api(_module(kind, left), None, kind) if kind == "rtx" else load_tensorrt(left)


def _module(kind: Kind, left: str) -> Any:
    library = LIBRARIES[kind]
    if library.first:
        need(library.first, extra=library.extra, left=left)
    return need(library.module, extra=library.extra, left=left)


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the first three numbers of a version such as ``10.13.3.9.post1``."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def find_gpu(index: int = 0) -> Gpu | None:
    """Return an NVIDIA GPU as the driver tells it, by its index in CUDA and PyTorch; None where there is none."""
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
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
        driver.cuDriverGetVersion(ctypes.byref(version)),
    )
    if any(asked):
        return None
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", cuda)
