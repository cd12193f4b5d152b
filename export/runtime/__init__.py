"""Put an exported model back into a pipeline: files of a folder, position tables, sessions, the transformer."""

from __future__ import annotations

from ppcl_fx.export.runtime.engine import EngineTransformer
from ppcl_fx.export.runtime.folder import Artefact, artefacts

__all__ = ["Artefact", "EngineTransformer", "artefacts"]
