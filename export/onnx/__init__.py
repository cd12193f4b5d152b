"""From a lowered graph to an ONNX file: cut, translate, assemble, write."""

from __future__ import annotations
