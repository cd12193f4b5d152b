"""Where exports keep weights and manifests."""

from __future__ import annotations
