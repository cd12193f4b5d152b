"""Run an ONNX file in onnxruntime, with inputs and outputs where PyTorch has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.runtime.sessions import ONNXRUNTIME_TENSORRT, TYPES, SessionChoice, provider
from ppcl_fx.export.verify.onnx_runner import exact_options, one_line, runtime_errors


def element_types() -> dict[torch.dtype, int]:
    """Return ONNX's numbers of types."""
    number = need("onnx").TensorProto.DataType.Value
    return {dtype: number(name.upper()) for name, dtype in TYPES.items()}


class OnnxSession:
    """An ONNX file, open in onnxruntime.

    Weights that lie beside the file are mapped, not read, and onnxruntime is told not to copy them into an order of its
    own: the ratios of a folder then share one copy in memory.
    """

    def __init__(self, choice: SessionChoice) -> None:
        runtime = need("onnxruntime")
        self.choice, self.device, self._index = choice, choice.device, choice.device.index or 0
        wanted = provider(choice.backend, choice.device)
        options = exact_options()
        options.add_session_config_entry("session.disable_prepacking", "1")
        names: list[str] = [wanted]
        if choice.backend == ONNXRUNTIME_TENSORRT:
            names.append("CUDAExecutionProvider")  # for operators that TensorRT does not take
        settings = [{"device_id": self._index}] * len(names) if self.device.type == "cuda" else [{}]
        try:
            self.session = runtime.InferenceSession(
                str(choice.file), options, providers=names, provider_options=settings
            )
        except runtime_errors() as error:
            raise PpclError(
                f"{choice.file}: onnxruntime does not open it ({one_line(error)}); is it whole, with its weights "
                f"beside it? make it anew with: {choice.again}"
            ) from error
        if wanted not in self.session.get_providers():
            raise PpclError(
                f"onnxruntime's {wanted} does not start here (are its CUDA libraries installed?); "
                "use backend='torch', or device='cpu'"
            )

    def run(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int], profile: int) -> torch.Tensor:
        """Run the file; `PpclError` where onnxruntime refuses the call."""
        binding, elements = self.session.io_binding(), element_types()

        def bind(how: str, name: str, tensor: torch.Tensor) -> None:
            kind, shape = elements[tensor.dtype], list(tensor.shape)
            getattr(binding, how)(name, self.device.type, self._index, kind, shape, tensor.data_ptr())

        # The binding holds addresses only.
        inputs = {name: tensor.contiguous() for name, tensor in feeds.items()}
        outputs = {}
        for port in self.choice.manifest.outputs:
            shape = [size if isinstance(size, int) else sizes[size] for size in port.shape]
            outputs[port.name] = torch.empty(shape, dtype=TYPES[port.dtype], device=self.device)
        for name, tensor in inputs.items():
            bind("bind_input", name, tensor)
        for name, tensor in outputs.items():
            bind("bind_output", name, tensor)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the inputs come from PyTorch's stream
        try:
            self.session.run_with_iobinding(binding)
        except runtime_errors() as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
            raise PpclError(
                f"{self.choice.file.name}: the model does not take this call ({shapes}): {one_line(error)}; "
                "call it as PyTorch's would be called"
            ) from error
        binding.synchronize_outputs()
        return next(iter(outputs.values()))
