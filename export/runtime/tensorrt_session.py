"""Run an engine on PyTorch's memory and stream, with a CUDA graph for each kind of call that comes back."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.runtime.rtx_contexts import RtxContexts
from ppcl_fx.export.runtime.sessions import SessionChoice
from ppcl_fx.export.tensorrt.loading import load_engine
from ppcl_fx.export.tensorrt_api import Api

LOG = logging.getLogger(__name__)

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
    """An engine, open; `without_graphs` says why no CUDA graphs are made any more, and is None where they are."""

    def __init__(self, choice: SessionChoice) -> None:
        self.choice, self.device = choice, choice.device
        self.without_graphs: str | None = None if choice.options.cuda_graphs else "the options switch them off"
        with torch.cuda.device(self.device):  # TensorRT works on CUDA's current GPU
            # Whole, because the engine needs what it keeps alive.
            self._loaded = load_engine(choice.file, gpu_index=self.device.index or 0)
            self.api, self.engine = self._loaded.api, self._loaded.engine
            self._rtx = None
            if self.api.kind == "rtx":
                self._rtx = RtxContexts(self._loaded, choice.file, choice.options)
                self.without_graphs = self.without_graphs or f"{self.api.name} makes its own"
            self.context = self._context()
            self._stream = torch.cuda.Stream(self.device)
        self.outputs = _outputs(self.api, self.engine, choice)
        self._first = choice.manifest.outputs[0].name
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._captured: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()

    def run(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int], profile: int) -> torch.Tensor:
        """Run the engine on the current stream; `PpclError` where TensorRT refuses the call."""
        key = tuple((name, tuple(tensor.shape)) for name, tensor in feeds.items())
        self._seen[key] += 1
        with torch.cuda.device(self.device):
            if key not in self._captured and self._seen[key] >= CAPTURED_AT and self.without_graphs is None:
                self._keep(key, feeds, profile)
            if key not in self._captured:
                self._take(self.context, profile)
                inputs = {name: tensor.contiguous() for name, tensor in feeds.items()}
                return self._execute(self.context, inputs)[self._first]
            self._captured.move_to_end(key)
            kept = self._captured[key]
            for name, tensor in feeds.items():
                kept.inputs[name].copy_(tensor)
            kept.graph.replay()
            return kept.outputs[self._first].clone()  # the next replay writes there again

    def _context(self) -> Any:
        context = self._new_context()
        if context is None:
            torch.cuda.empty_cache()  # what PyTorch keeps for later is of no use to TensorRT
            context = self._new_context()
        if context is None:
            raise PpclError(f"{self.choice.file}: no GPU memory for running it; free some, or choose a smaller ratio")
        return context

    def _new_context(self) -> Any:
        if self._rtx is not None:
            return self._rtx.make()
        return self.api.call("ICudaEngine.create_execution_context", self.engine)

    def _take(self, context: Any, profile: int) -> None:
        """Let a context use a profile, before shapes are set; changing it costs time."""
        if self.api.get("IExecutionContext.active_optimization_profile", context) == profile:
            return
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
            if not (fits and self._place(context, name, tensor)):
                raise PpclError(
                    f"{self.choice.file.name}: TensorRT does not take {name} of {list(tensor.shape)}; "
                    f"make an engine that does with: {self.choice.again}"
                )
        results = {} if outputs is None else outputs
        for name, dtype in self.outputs.items():
            if name not in results:
                shape = tuple(self.api.call("IExecutionContext.get_tensor_shape", context, name=name))
                results[name] = torch.empty(shape, dtype=dtype, device=self.device)
            if not self._place(context, name, results[name]):
                raise PpclError(f"{self.choice.file.name}: TensorRT does not write {name} where it is to be written")
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if not self.api.call("IExecutionContext.execute_async_v3", context, stream_handle=stream):
            raise PpclError(f"{self.choice.file.name}: TensorRT could not run; its messages above say why")
        return results

    def _place(self, context: Any, name: str, tensor: torch.Tensor) -> bool:
        address = tensor.data_ptr()
        return bool(self.api.call("IExecutionContext.set_tensor_address", context, name=name, memory=address))

    def _keep(self, key: tuple[Any, ...], feeds: Mapping[str, torch.Tensor], profile: int) -> None:
        """Make a CUDA graph for calls of these shapes. Where that fails, runs go on without graphs for good."""
        before = torch.cuda.current_stream(self.device)
        try:
            if len(self._captured) >= GRAPHS:
                before.synchronize()  # the oldest may still run
                self._captured.popitem(last=False)  # now, since its memory is wanted
            self._captured[key] = self._capture(feeds, profile)
        except (PpclError, RuntimeError) as error:
            self.without_graphs = " ".join(str(error).split())[:200]
            before.synchronize()
            self._captured.clear()
            LOG.warning("%s: runs without CUDA graphs (%s)", self.choice.file.name, self.without_graphs)
        finally:
            torch.cuda.set_stream(before)  # a capture that failed leaves its own

    def _capture(self, feeds: Mapping[str, torch.Tensor], profile: int) -> _Captured:
        """Record one run as a CUDA graph, on buffers and with a context that nothing else changes."""
        context = self._context()
        inputs = {name: tensor.contiguous().clone() for name, tensor in feeds.items()}
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._take(context, profile)
            # TensorRT settles what a new shape needs in the first run; that must not be part of the graph.
            outputs = self._execute(context, inputs)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: what other threads do on the GPU meanwhile does not spoil it.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._execute(context, inputs, outputs)
        return _Captured(graph, context, inputs, outputs)


def _outputs(api: Api, engine: Any, choice: SessionChoice) -> dict[str, torch.dtype]:
    types = {
        api.value("DataType.FLOAT"): torch.float32,
        api.value("DataType.HALF"): torch.float16,
        api.value("DataType.BF16"): torch.bfloat16,
        api.value("DataType.INT32"): torch.int32,
        api.value("DataType.INT64"): torch.int64,
        api.value("DataType.BOOL"): torch.bool,
    }
    found = {}
    for index in range(api.get("ICudaEngine.num_io_tensors", engine)):
        name = str(api.call("ICudaEngine.get_tensor_name", engine, index=index))
        if api.call("ICudaEngine.get_tensor_mode", engine, name=name) == api.value("TensorIOMode.OUTPUT"):
            kind = api.call("ICudaEngine.get_tensor_dtype", engine, name=name)
            if kind not in types:
                raise PpclError(f"{choice.file}: its output {name} is {kind}, which cannot be read here; export again")
            found[name] = types[kind]
    return found
