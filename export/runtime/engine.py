"""An exported model in the place of a pipeline's transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ppcl_fx.errors import PpclError, near
from ppcl_fx.export.runtime.folder import artefacts
from ppcl_fx.export.runtime.input_adapter import InputAdapter
from ppcl_fx.export.runtime.model_spec import MODEL_SPEC, check_model_spec, pluggable_graph, read_model_spec
from ppcl_fx.export.runtime.options import RuntimeOptions
from ppcl_fx.export.runtime.sessions import (
    AUTO,
    SessionChoice,
    Sessions,
    choose,
    device_of,
    export_command,
    profile_of,
    sizes_of,
    typed,
)
from ppcl_fx.model.face import PipelineFace


class EngineTransformer(PipelineFace):
    """What ``ppcl-fx export`` wrote, called like the transformer it was made from::

        pipeline.transformer = EngineTransformer("ENGINES")
        pipeline.transformer.plug(keep=0.6)

    It holds no weights of its own. A ratio's file is opened when it is first called.

    Args:
        folder: the folder of the exported files.
        keep: the ratio to begin with; by default the largest.
        backend: ``tensorrt``, ``onnxruntime``, ``onnxruntime-tensorrt`` (onnxruntime's TensorRT provider) or ``torch``;
            ``tensorrt`` is the ratio's engine, with the library that built it, TensorRT for RTX perhaps;
            by default the first of TensorRT, onnxruntime and PyTorch that is there (`ppcl_fx.export.runtime.sessions`).
        device: where to run; by default the first GPU that PyTorch sees, else the CPU.
        options: how engines run there.

    Raises:
        PpclError: the folder is not one of an export, the ratio is not in it, or nothing here can run it.
    """

    KIND = "an exported model"

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: float | None = None,
        backend: str = AUTO,
        device: str | torch.device | None = None,
        options: RuntimeOptions | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._found = artefacts(self.folder)
        self._spec = read_model_spec(self.folder)
        self._backend = backend
        self._options = options
        self._device = device_of(device)
        self._sessions = Sessions()
        # A plain dictionary, so that torch does not take graphs without weights for submodules: type -> graph, and
        # (type, students, position inputs) -> input adapter.
        self.__dict__["_traced"] = {}
        self._choice = self._chosen(self.keeps[0] if keep is None else keep, self._device)
        self.eval()

    # ---- what pipelines ask ------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The transformer's configuration, as diffusers pipelines read it."""
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(self._spec.config)

    def _class_config(self) -> Any:
        return self._spec.config if "_spec" in self.__dict__ else None

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the file of the current ratio computes."""
        return self._choice.dtype

    @property
    def device(self) -> torch.device:
        """Where it runs. Inputs from elsewhere are moved there, and the output back."""
        return self._device

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Run on another device from now on; the files are opened again there. The type is the files' own.

        Raises:
            PpclError: another type is asked for, or the backend does not run on the device.
        """
        try:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PpclError(f"to(): {reason}; give cpu, cuda or cuda:1, for example") from error
        if dtype is not None and dtype != self.dtype:
            own, other = (str(one).removeprefix("torch.") for one in (self.dtype, dtype))
            raise PpclError(
                f"{self._choice.file.name} computes in {own}, and its type cannot be changed to {other}; export "
                "another one, and move the pipeline without a type"
            )
        place = self._device if device is None else device_of(device)
        if place != self._device:
            self._choice = self._chosen(self.keep, place)
            self._device = place
            self._sessions.close()
        return self

    def set_attention_backend(self, backend: str) -> None:
        """Refuse: there is no attention of diffusers to choose kernels for."""
        self._refuse("no kernels to choose: how attention is computed is part of its files; leave it out")

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
        """Refuse: the exported folder is how it is saved."""
        raise PpclError(f"an exported model is not saved again; copy the folder {self.folder} instead")

    # ---- ratios ------------------------------------------------------------------------------------------------

    @property
    def keeps(self) -> list[float]:
        """The ratios in the folder, the largest first."""
        return list(self._found)

    @property
    def keep(self) -> float:
        """The ratio that runs."""
        return self._choice.artefact.manifest.keep

    @property
    def backend(self) -> str:
        """What runs it."""
        return self._choice.backend

    @property
    def students(self) -> tuple[str, ...]:
        """The ids of the edits that are plugged in the current ratio."""
        return tuple(self._choice.artefact.manifest.students)

    def param_count(self) -> int:
        """Return the number of parameters of the current ratio, as the plan counts them."""
        return self._choice.artefact.manifest.params

    def plug(self, keep: float) -> EngineTransformer:
        """Go on with another ratio, and return the transformer itself; `PpclError` where there is no such ratio.

        Its file is opened at its first call and stays open where weights are shared.
        """
        self._choice = self._chosen(keep, self._device)
        return self

    def _chosen(self, keep: float, device: torch.device) -> SessionChoice:
        if keep not in self._found:
            names = [f"{known:g}" for known in self._found]
            raise PpclError(
                f"{self.folder}: no ratio {keep:g}{near(f'{keep:g}', names)}; it has {', '.join(names)}; for another: "
                f"{export_command(keep, self.folder)}"
            )
        check_model_spec(self._spec, self._found[keep].manifest, self.folder)
        return choose(self._found[keep], self._backend, device, self._options)

    # ---- running -----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Run the current ratio on the transformer's own arguments.

        Raises:
            GuardError: the call has arguments that the model was not exported with.
            PpclError: a shape is outside of what the file takes, or the file cannot be opened or run.
        """
        self._check_class()
        choice, adapter = self._choice, self._adapter()
        ports = {port.name: port for port in choice.manifest.inputs}
        bound = {
            name: typed(ports[name], value) if name in ports and isinstance(value, torch.Tensor) else value
            for name, value in adapter.bound(args, kwargs).items()
        }
        given = [port for name, port in ports.items() if name in bound]
        sizes_of(choice.file.name, given, bound)  # before the tables are made for them
        known = {**bound, **adapter.tables(bound)}
        lost = [name for name in ports if name not in known]
        if lost:
            raise PpclError(f"{choice.file} takes {lost[0]!r}, which {MODEL_SPEC} does not give; export again")
        feeds = {name: typed(port, known[name]) for name, port in ports.items()}
        sizes = sizes_of(choice.file.name, choice.manifest.inputs, feeds)
        wider = f"give wider ranges to: {choice.again}"
        profile = profile_of(choice.file.name, sizes, choice.profiles, wider)
        came_from = next(value.device for value in bound.values() if isinstance(value, torch.Tensor))
        session = self._sessions.get(choice, adapter)
        there = {name: tensor.to(self._device) for name, tensor in feeds.items()}
        result = session.run(there, sizes, profile).to(came_from)
        if not return_dict:
            return (result,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=result)

    def _adapter(self) -> InputAdapter:
        made: dict[Any, Any] = self.__dict__["_traced"]
        positions = self._choice.artefact.manifest.positions
        key = (self.dtype, self.students, *positions)
        if key not in made:
            if self.dtype not in made:
                manifests = [one.manifest for one in self._found.values()]
                made[self.dtype] = pluggable_graph(self._spec, self.dtype, self.folder, manifests)
            made[key] = InputAdapter(made[self.dtype], self.students, positions)
        adapter: InputAdapter = made[key]
        return adapter
