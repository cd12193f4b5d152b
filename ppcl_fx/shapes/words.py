"""The text encoder: a frozen table of random word vectors."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ppcl_fx.shapes.captions import MAX_WORDS, VOCABULARY, encode


class WordEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Look up one fixed vector, of length ``channels``, for each word of a caption.

    The vectors are drawn once and never trained; the transformer learns what they mean. They are saved with the
    pipeline, so that they do not depend on torch's random generator.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, channels: int = 64, words: int = len(VOCABULARY), seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(words, channels, generator=generator)
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return word vectors (batch, words, channels) for integer ids (batch, words)."""
        return nn.functional.embedding(ids, self.table)

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Return word vectors of shape (batch, 10, channels); the empty text is all pad words. Raises PpclError where a
        text has an unknown word or more than 10 words.
        """
        ids = torch.tensor([encode(text) for text in texts], dtype=torch.long).reshape(-1, MAX_WORDS)
        vectors: torch.Tensor = self(ids.to(self.table.device))
        return vectors
