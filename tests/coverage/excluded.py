"""Transformer classes that diffusers exports and the table leaves out, each with the reason."""

from __future__ import annotations

EXCLUDED: dict[str, str] = {
    "AceStepTransformer1DModel": "makes audio, not pictures or videos",
    "AnyFlowFARTransformer3DModel": "not tried yet: makes its video chunk by chunk with a cache",
    "DreamLiteTransformer2DModel": "a part of a U-Net, not a model that a pipeline denoises with",
    "Kandinsky6SRTransformer3DModel": "not tried yet: super-resolution with block-sparse attention",
    "MiniMaxH3Transformer3DModel": "not tried yet: it takes packed sequences of video, sound and text with indices",
    "MiniMaxMusic3Transformer1DModel": "makes audio, not pictures or videos",
    "SanaWMLTX2RefinerTransformer3DModel": "not tried yet: a refiner that reads a key-value cache",
    "SanaWMTransformer3DModel": "not tried yet: a world model that is driven by camera poses",
    "Transformer2DModel": "a part of U-Nets; the whole models it once was (DiT, PixArt) have rows of their own",
    "TransformerTemporalModel": "a part of video U-Nets, not a model that a pipeline denoises with",
    "WanAnimate2Transformer3DModel": "its calls take a cache object, no tensor, that an earlier call fills",
    "WanAnimateTransformer3DModel": "not tried yet: it needs a motion encoder's crops of a face beside the video",
}
