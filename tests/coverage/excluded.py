"""Transformer classes that diffusers exports and the table leaves out, each with the reason."""

from __future__ import annotations

EXCLUDED: dict[str, str] = {
    "AceStepTransformer1DModel": "makes audio, not pictures or videos",
    "DreamLiteTransformer2DModel": "a part of a U-Net, not a model that a pipeline denoises with",
    "MiniMaxMusic3Transformer1DModel": "makes audio, not pictures or videos",
    "Transformer2DModel": "a part of U-Nets; the whole models it once was (DiT, PixArt) have rows of their own",
    "TransformerTemporalModel": "a part of video U-Nets, not a model that a pipeline denoises with",
    "WanAnimate2Transformer3DModel": "its calls take a cache object, no tensor, that an earlier call fills",
}
