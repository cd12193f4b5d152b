"""One picture and its caption as a call of the transformer: the pipeline's own VAE, text encoders and layout."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ppcl_fx.calls.record import first_call, quiet
from ppcl_fx.calls.store import Call
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import config_of, fingerprint
from ppcl_fx.train.data.template import (
    STEPS,
    Noise,
    Template,
    Unsupported,
    find_template,
    is_laid_out,
    noted,
    plain_shape,
    standing_still,
    tensors_of,
)
from ppcl_fx.train.images.pictures import open_picture

LAYOUT = 2  # goes up when the same picture would be encoded differently
CLOSE = 0.02  # what a latent may lose on the way through a pipeline in 16 bits, relative to its largest value


class Encoder:
    """Turns pictures with captions into calls whose noisy latent is still clean, for a pipeline of a rectified flow.

    A picture is cut to the given size in pixels around its centre, after scaling; without a size it keeps its own, cut
    to what the pipeline takes. A pipeline without a VAE works on the pixels, in [-1, 1]. `arguments` are further ones
    of the pipeline (``guidance_scale``), part of what the cache belongs to.

    Raises:
        PpclError: One of height and width is given without the other, or is not a multiple of what the pipeline takes.
    """

    def __init__(
        self,
        pipeline: Any,
        height: int | None = None,
        width: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.template: Template | None = None
        self._given = dict(arguments or {})
        self._vae: Any = getattr(pipeline, "vae", None)
        known = inspect.signature(pipeline.__call__).parameters
        self._sized = "height" in known and "width" in known
        # Sides are multiples of this: pipelines of transformers take the latents in patches of two.
        self._step = 2 * int(getattr(pipeline, "vae_scale_factor", 1))
        self._size = self._wanted(height, width)
        self._only: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """The hash of all that the encoding depends on but the pictures.

        Of the transformer only its configuration counts: its weights are trained, and encode nothing.
        """
        parts: dict[str, Any] = {}
        for name, part in sorted(self.pipeline.components.items()):
            if name == "transformer":
                parts[name] = config_of(part)
            elif isinstance(part, nn.Module):
                parts[name] = fingerprint(part)
            elif part is not None:
                vocabulary = len(part) if hasattr(part, "__len__") else None  # a tokenizer's
                parts[name] = [type(part).__name__, config_of(part), vocabulary]
        plain = [LAYOUT, type(self.pipeline).__name__, parts, self._size, self._given]
        return hashlib.sha256(json.dumps(plain, sort_keys=True, default=repr).encode()).hexdigest()

    def encode(self, data: bytes, caption: str) -> tuple[Call, float | None]:
        """Return the call of one picture, and the `mu` of the scheduler's shift at its size. Raises Unsupported where
        nothing can be encoded for this pipeline, PpclError where this picture or caption is damaged.
        """
        pixels = self._pixels(open_picture(data), caption)
        size = self._arguments(pixels)
        if self.template is None:
            self.template = find_template(self.pipeline, caption, size)
            self._prove(pixels, caption, self.template)
        latent = self._latent(pixels)
        with Noise(latent) as noise, noted(self.pipeline.scheduler, "set_timesteps") as timesteps:
            call = first_call(self.pipeline, caption, **size)
        template = self.template
        tensors = tensors_of(call.kwargs)
        fits = noise.used == 1 and all(path in tensors for path in template.noisy)
        if not fits or not all(is_laid_out(tensors[p], latent, template.repeats) for p in template.noisy):
            raise Unsupported(
                self.pipeline,
                f"a latent of shape {list(latent.shape)} does not take the place of its noise "
                f"({', '.join(str(list(t.shape)) for t in noise.drawn) or 'none'})",
            )
        mu = timesteps[-1][1].get("mu") if timesteps and template.shift != "static" else None
        return call, None if mu is None else float(mu)

    def _prove(self, pixels: Tensor, caption: str, template: Template) -> None:
        """Let the pipeline decode what was encoded: the scale of its latents must come out right."""
        clean = self._latent(pixels)
        arguments = {**self._arguments(pixels), "num_inference_steps": STEPS, "output_type": "pt"}
        if "prompt_embeds" not in arguments:
            arguments["prompt"] = caption
        with (
            torch.no_grad(),
            quiet(self.pipeline),
            Noise(clean),
            standing_still(self.pipeline.transformer),
            noted(self._vae, "decode") as decoded,
        ):
            pictures = self.pipeline(**arguments).images
        if self._vae is None:
            came, wanted = torch.as_tensor(pictures), (pixels + 1) / 2
        elif decoded:
            args, kwargs = decoded[-1]
            came, wanted = args[0] if args else next(iter(kwargs.values())), self._raw(pixels)
        else:
            raise Unsupported(self.pipeline, "it does not decode its latents by vae.decode")
        came, wanted = came.detach().float().cpu().flatten(), wanted.float().cpu().flatten()
        limit = CLOSE * wanted.abs().max().clamp(min=1e-6)
        if came.numel() != wanted.numel() or not (came - wanted).abs().max() <= limit:  # NaN is not close either
            raise Unsupported(self.pipeline, "it does not decode a latent to what its VAE encoded")

    def _latent(self, pixels: Tensor) -> Tensor:
        """The picture (1, 3, h, w) as the clean latent x_0 of the flow."""
        if self._vae is None:
            return pixels
        raw, config = self._raw(pixels), self._vae.config
        scale, shift = config.get("scaling_factor"), config.get("shift_factor")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            sizes = [1, -1, *[1] * (raw.ndim - 2)]
            raw = (raw - torch.tensor(mean).to(raw).view(sizes)) / torch.tensor(std).to(raw).view(sizes)
            shift = None
        return (raw - (shift or 0.0)) * (1.0 if scale is None else scale)

    @torch.no_grad()
    def _raw(self, pixels: Tensor) -> Tensor:
        """What the VAE encodes the picture to: the mean, so that encoding twice is the same."""
        first = next((m for m in self._vae.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
        if isinstance(first, nn.Conv3d):
            pixels = pixels.unsqueeze(2)  # a VAE of videos: one frame
        encoded = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype))
        if hasattr(encoded, "latent_dist"):
            found = encoded.latent_dist.mode()
        elif hasattr(encoded, "latent"):
            found = encoded.latent
        else:
            raise Unsupported(self.pipeline, f"its {type(self._vae).__name__} encodes to no latent")
        latent: Tensor = found.float()
        return latent

    def _pixels(self, picture: Image.Image, caption: str) -> Tensor:
        wanted, step = self._size or self._only_size(caption), self._step
        height, width = wanted or (picture.height // step * step, picture.width // step * step)
        if not height or not width:
            raise PpclError(f"the picture is {picture.width}x{picture.height} and {step}x{step} is the smallest")
        if (picture.height, picture.width) != (height, width):
            scale = max(height / picture.height, width / picture.width)
            if wanted is not None and scale != 1.0:
                wide, high = round(picture.width * scale), round(picture.height * scale)
                picture = picture.resize((max(wide, width), max(high, height)), Image.Resampling.LANCZOS)
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return (values.float() / 127.5 - 1).unsqueeze(0)

    def _only_size(self, caption: str) -> tuple[int, int] | None:
        """The size of all pictures of a pipeline that cannot be asked for another."""
        if not self._sized and self._only is None:
            with Noise() as noise:
                first_call(self.pipeline, caption, **self._given)
            if not noise.drawn:
                raise Unsupported(self.pipeline, "it draws no noise with torch.randn")
            shape = plain_shape(noise.drawn[-1])
            factor = 1 if self._vae is None else int(self.pipeline.vae_scale_factor)
            self._only = (shape[-2] * factor, shape[-1] * factor)
        return self._only

    def _wanted(self, height: int | None, width: int | None) -> tuple[int, int] | None:
        if height is None and width is None:
            return None
        if height is None or width is None:
            raise PpclError("height and width belong together; give both, or neither for the pictures' own")
        if not self._sized:
            raise PpclError(f"{type(self.pipeline).__name__} draws pictures of one size; leave out height and width")
        if height < 1 or width < 1 or height % self._step or width % self._step:
            raise PpclError(f"pictures of {width}x{height}: sides must be multiples of {self._step}")
        return height, width

    def _arguments(self, pixels: Tensor) -> dict[str, Any]:
        size = {"height": pixels.shape[-2], "width": pixels.shape[-1]} if self._sized else {}
        return {**self._given, **size}
