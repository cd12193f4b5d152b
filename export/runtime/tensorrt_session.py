"""Run a TensorRT engine on PyTorch's memory and stream, with a CUDA graph for each kind of call that comes back."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.runtime.sessions import Choice
from ppcl_fx.export.tensorrt import load_engine
from ppcl_fx.export.tensorrt_api import Api

GRAPHS = 2
"""How many CUDA graphs are kept: each has an execution context of its own, and with it the memory of one."""

CAPTURED_AT = 2
"""At which call of the same shapes a CUDA graph is made: what is called once is not worth one."""


@dataclass
class _Captured:
    """A CUDA graph with the buffers that it reads and writes."""

    graph: Any
    context: Any
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


class TensorRTSession:
    """An engine, open.

    Args:
        choice: the engine and its GPU.

    Raises:
        PpclError: there is no TensorRT or no GPU, the engine is another GPU's or version's, or it is damaged.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice, self.device = choice, choice.device
        self._loaded = load_engine(choice.file)  # whole, because the engine needs what it keeps alive
        self.api, self.engine = self._loaded.api, self._loaded.engine
        self.context = self._context()
        self.outputs = _outputs(self.api, self.engine)
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._captured: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()

    def run(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int], profile: int) -> torch.Tensor:
        """Run the engine on the current stream.

        Raises:
            PpclError: TensorRT refuses the call.
        """
        del sizes
        key = tuple((name, tuple(tensor.shape)) for name, tensor in feeds.items())
        self._seen[key] += 1
        if key not in self._captured and self._seen[key] < CAPTURED_AT:
            self._take(self.context, profile)
            return self._first(self._execute(self.context, {n: t.contiguous() for n, t in feeds.items()}))
        if key not in self._captured:
            self._captured[key] = self._capture(feeds, profile)
            if len(self._captured) > GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        kept = self._captured[key]
        for name, tensor in feeds.items():
            kept.inputs[name].copy_(tensor)
        kept.graph.replay()
        return self._first(kept.outputs).clone()  # the next replay writes there again

    def _context(self) -> Any:
        context = self.api.call("ICudaEngine.create_execution_context", self.engine)
        if context is None:
            raise PpclError(f"{self.choice.file}: no GPU memory for running it; free some, or choose a smaller ratio")
        return context

    def _take(self, context: Any, profile: int) -> None:
        """Let a context use a profile, before shapes are set."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if not self.api.call(
            "IExecutionContext.set_optimization_profile_async", context, profile_index=profile, stream_handle=stream
        ):
            raise PpclError(f"{self.choice.file.name}: TensorRT does not take profile {profile}; its messages say why")

    def _execute(
        self, context: Any, inputs: Mapping[str, torch.Tensor], outputs: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Enqueue one run on the current stream; return the outputs, new ones where none are given."""
        for name, tensor in inputs.items():
            fits = self.api.call("IExecutionContext.set_input_shape", context, name=name, shape=tuple(tensor.shape))
            placed = self.api.call("IExecutionContext.set_tensor_address", context, name=name, memory=tensor.data_ptr())
            if not (fits and placed):
                raise PpclError(
                    f"{self.choice.file.name}: TensorRT does not take {name} of {list(tensor.shape)}; "
                    f"make an engine that does with: {self.choice.again}"
                )
        results = {} if outputs is None else outputs
        for name, dtype in self.outputs.items():
            if name not in results:
                shape = tuple(self.api.call("IExecutionContext.get_tensor_shape", context, name=name))
                results[name] = torch.empty(shape, dtype=dtype, device=self.device)
            self.api.call("IExecutionContext.set_tensor_address", context, name=name, memory=results[name].data_ptr())
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if not self.api.call("IExecutionContext.execute_async_v3", context, stream_handle=stream):
            raise PpclError(f"{self.choice.file.name}: TensorRT could not run; its messages above say why")
        return results

    def _capture(self, feeds: Mapping[str, torch.Tensor], profile: int) -> _Captured:
        """Record one run as a CUDA graph, on buffers and with a context that nothing else changes."""
        context = self._context()
        inputs = {name: tensor.contiguous().clone() for name, tensor in feeds.items()}
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._take(context, profile)
            # TensorRT settles what a new shape needs in the first run; that must not be part of the graph.
            outputs = self._execute(context, inputs)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._execute(context, inputs, outputs)
        return _Captured(graph, context, inputs, outputs)

    def _first(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        wanted = self.choice.artefact.manifest.outputs[0].name
        return outputs[wanted]


def _outputs(api: Api, engine: Any) -> dict[str, torch.dtype]:
    """Return the type of each output by name."""
    types = {
        api.value("DataType.FLOAT"): torch.float32,
        api.value("DataType.HALF"): torch.float16,
        api.value("DataType.BF16"): torch.bfloat16,
    }
    found = {}
    for index in range(api.get("ICudaEngine.num_io_tensors", engine)):
        name = str(api.call("ICudaEngine.get_tensor_name", engine, index=index))
        if api.call("ICudaEngine.get_tensor_mode", engine, name=name) == api.value("TensorIOMode.OUTPUT"):
            found[name] = types[api.call("ICudaEngine.get_tensor_dtype", engine, name=name)]
    return found

