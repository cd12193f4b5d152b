"""An export in one flat folder: ``keep-0.7.onnx`` and ``keep-0.7.json``, the weights in subfolders."""

from __future__ import annotations

import json
from pathlib import Path

import onnx


def flat(folder: Path) -> Path:
    """Bring ``keep-0.7/transformer.onnx`` into that layout, where the export did not write it so itself."""
    for ratio in sorted(path for path in folder.glob("keep-*") if (path / "transformer.onnx").is_file()):
        graph = onnx.load(ratio / "transformer.onnx", load_external_data=False)
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{ratio.name}/{entry.value}"
        onnx.save(graph, folder / f"{ratio.name}.onnx")
        manifest = json.loads((ratio / "transformer.json").read_text())
        manifest["file"] = f"{ratio.name}.onnx"
        (folder / f"{ratio.name}.json").write_text(json.dumps(manifest))
        (ratio / "transformer.onnx").unlink()
        (ratio / "transformer.json").unlink()
    return folder
