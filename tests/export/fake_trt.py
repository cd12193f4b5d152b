"""TensorRT without TensorRT: every call is checked against NVIDIA's bindings, and answered by the test.

It shows what our code does with TensorRT's answers. It cannot show that TensorRT gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ppcl_fx.export.tensorrt_api import Api, Gpu, Kind
from tests.export.trt_bindings import fitting, look

GPU = Gpu("NVIDIA Test", "9.0", "13.0")


@dataclass
class Thing:
    """An object of one of TensorRT's classes: what was set on it, and the functions it was given."""

    kind: str
    properties: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Callable[..., Any]] = field(default_factory=dict)


class Value(str):
    """An enumeration member, by its path."""

    def __int__(self) -> int:
        return {"ILogger.Severity.INTERNAL_ERROR": 0, "ILogger.Severity.ERROR": 1}.get(str(self), 0)


class FakeApi(Api):
    """Answers calls, and fails on one that the bindings would not take.

    Args:
        answers: for a method, class or property, a value, or a function of the owner and the keywords.
        version: what TensorRT calls itself.
        gpu: what it builds for.
        absent: names that this version has not, though the bindings have.
        kind: which of the two libraries it stands for.
    """

    separate = False

    def __init__(
        self, answers: dict[str, Any], version: str, absent: str, gpu: Gpu | None, kind: Kind = "tensorrt"
    ) -> None:
        self.kind = kind
        self.answers = answers
        self.number = version
        self.gpu = gpu
        self.absent = absent
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def names(self) -> list[str]:
        return [path for path, _ in self.calls]

    def value(self, path: str) -> Any:
        assert look([path], self.kind)[path] is not None, path
        return self.number if path == "__version__" else Value(path)

    def has(self, path: str) -> bool:
        assert look([path], self.kind)[path] is not None, path
        return path != self.absent

    def make(self, name: str, **keywords: Any) -> Any:
        self._check(name, keywords)
        return self._answer(name, None, keywords, Thing(name))

    def call(self, path: str, owner: Any, **keywords: Any) -> Any:
        assert path != self.absent
        assert isinstance(owner, Thing) and owner.kind == path.partition(".")[0], (path, owner)
        returns = self._check(path, keywords)
        kind = returns.rpartition(".")[2].rpartition("::")[2].removeprefix("I" * returns.endswith("IParserError"))
        return self._answer(path, owner, keywords, None if returns == "None" else Thing(kind))

    def get(self, path: str, owner: Any) -> Any:
        self._property(path, owner)
        return self._answer(path, owner, {}, owner.properties.get(path))

    def set(self, path: str, owner: Any, value: Any) -> None:
        self._property(path, owner)
        self.calls.append((path, {"value": value}))
        owner.properties[path] = value

    def implement(self, name: str, **methods: Callable[..., Any]) -> Any:
        for method in methods:
            assert look([f"{name}.{method}"], self.kind)[f"{name}.{method}"] is not None, method
        return Thing(name, methods=methods)

    def _property(self, path: str, owner: Any) -> None:
        found = look([path], self.kind)[path]
        assert found is not None and found["type"] == "property", path
        assert isinstance(owner, Thing) and owner.kind == path.partition(".")[0], (path, owner)

    def _check(self, path: str, keywords: dict[str, Any]) -> str:
        assert look([path], self.kind)[path] is not None, path
        signature = fitting(path, keywords, self.kind)
        assert signature is not None, f"{path} does not take {tuple(keywords)}"
        for name, given in keywords.items():
            if isinstance(given, Thing):
                wanted = signature.types[name].rpartition(".")[2].rpartition("::")[2]
                assert given.kind == wanted, f"{path}: {name} is to be {wanted}, not {given.kind}"
        return signature.returns

    def _answer(self, path: str, owner: Any, keywords: dict[str, Any], default: Any) -> Any:
        self.calls.append((path, keywords))
        if path not in self.answers:
            return default
        answer = self.answers[path]
        return answer(owner, **keywords) if callable(answer) else answer


def working(plan: bytes = b"plan", steps: int = 2, **more: Any) -> FakeApi:
    """TensorRT that parses everything, and builds `plan` in two pieces after some steps.

    It has one input for each of the class's answers to ``ITensor.name``.
    """

    def build(owner: Thing, network: Thing, config: Thing, writer: Thing) -> bool:
        monitor = config.properties["IBuilderConfig.progress_monitor"].methods
        monitor["phase_start"]("Building", None, steps)
        for step in range(steps):
            if not monitor["step_complete"]("Building", step):
                return False
        monitor["phase_finish"]("Building")
        half = len(plan) // 2
        return all(writer.methods["write"](part) == len(part) for part in (plan[:half], plan[half:]))

    def build_whole(owner: Thing, network: Thing, config: Thing) -> bytes:
        return plan

    names = ["hidden_states", "encoder_hidden_states"]
    answers = {
        "OnnxParser.parse_from_file": True,
        "ParserError.node_operator": "",
        "ParserError.node_name": "",
        "INetworkDefinition.num_layers": 1,
        "INetworkDefinition.num_inputs": len(names),
        "INetworkDefinition.get_input": lambda owner, index: Thing("ITensor", {"ITensor.name": names[index]}),
        "IBuilderConfig.add_optimization_profile": 0,
        "IBuilderConfig.set_timing_cache": True,
        "ITimingCache.serialize": b"timings",
        "Builder.build_serialized_network_to_stream": build,
        "Builder.build_serialized_network": build_whole,
        "Runtime.deserialize_cuda_engine": lambda owner, serialized_engine: Thing(
            "ICudaEngine", {"ICudaEngine.refittable": True}
        ),
        "OnnxParserRefitter.refit_from_file": True,
        "Refitter.get_missing_weights": [],
        "Refitter.refit_cuda_engine": True,
    }
    version, absent, gpu = more.pop("version", "11.4.0.106"), more.pop("absent", ""), more.pop("gpu", GPU)
    kind = more.pop("kind", "tensorrt")
    return FakeApi(answers | {key.replace("__", "."): value for key, value in more.items()}, version, absent, gpu, kind)
