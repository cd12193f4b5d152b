"""Where quantised weights wait for their file: in memory, or, of a model that does not fit there, in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from ppcl_fx.passes.quantisation.schemes import QuantisedWeight, Scheme


class Shelf(Mapping[str, QuantisedWeight]):
    """Quantised weights by parameter name.

    Args:
        scheme: how all of them are stored.
        folder: where they go, packed, one file each; None to hold them in memory.
    """

    def __init__(self, scheme: Scheme, folder: Path | None = None) -> None:
        self.scheme, self.folder = scheme, folder
        self._held: dict[str, QuantisedWeight | tuple[Path, float | None]] = {}

    def put(self, name: str, weight: QuantisedWeight) -> None:
        """Add a weight."""
        if self.folder is None:
            self._held[name] = weight
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{len(self._held):06d}.safetensors"
        save_file({"values": weight.packed().contiguous(), "scales": weight.scales.to(self.scheme.scale)}, path)
        self._held[name] = (path, weight.inputs)

    def __getitem__(self, name: str) -> QuantisedWeight:
        found = self._held[name]
        if isinstance(found, QuantisedWeight):
            return found
        path, inputs = found
        stored = load_file(path)
        return QuantisedWeight.unpacked(self.scheme, stored["values"], stored["scales"], inputs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)
