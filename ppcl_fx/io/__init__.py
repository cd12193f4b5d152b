"""Files: safetensors, checked JSON, fingerprints, memory, and the bounds of what comes from outside."""

from __future__ import annotations
