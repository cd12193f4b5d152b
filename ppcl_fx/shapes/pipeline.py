"""A diffusers pipeline that draws pictures of shapes with a Qwen-Image transformer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.shapes.drawing import SIZE
from ppcl_fx.shapes.words import WordEncoder

PATCH = 3  # side of a patch in pixels
SIDE = SIZE // PATCH  # patches along each axis
CHANNELS = 3 * PATCH * PATCH  # channels of a token: the values of one patch
STEPS = 10  # default number of denoising steps
GUIDANCE = 1.5  # default guidance scale


def pack(pictures: torch.Tensor) -> torch.Tensor:
    """Cut pictures (batch, 3, 24, 24) into tokens (batch, 64, 27)."""
    cut = pictures.reshape(-1, 3, SIDE, PATCH, SIDE, PATCH).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(-1, SIDE * SIDE, CHANNELS)


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    """Put tokens (batch, 64, 27) back together into pictures (batch, 3, 24, 24)."""
    cut = tokens.reshape(-1, SIDE, SIDE, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(-1, 3, SIZE, SIZE)


class ShapesPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Text to 24x24 pictures, in pixel space, by diffusers' ``QwenImageTransformer2DModel`` or what is called alike."""

    def __init__(
        self,
        transformer: torch.nn.Module,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: WordEncoder,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, text_encoder=text_encoder)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def _velocity(self, tokens: torch.Tensor, words: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Call the transformer once, in its own dtype, and return its float32 answer."""
        dtype = self.transformer.dtype
        answer = self.transformer(
            hidden_states=tokens.to(dtype),
            encoder_hidden_states=words.to(dtype),
            timestep=sigma.expand(tokens.shape[0]).to(dtype),
            img_shapes=[[(1, SIDE, SIDE)]] * tokens.shape[0],
            return_dict=False,
        )[0]
        velocity: torch.Tensor = answer.float()
        return velocity

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw one picture for each prompt.

        Args:
            prompt: a caption or a list of captions; see ``ppcl_fx.shapes.captions``.
            num_inference_steps: denoising steps, at least 1.
            guidance_scale: how strongly to follow the prompt. Above 1 each step calls the
                transformer twice: with the captions, then with empty captions.
            generator: the source of the starting noise; a list has one for each prompt.
            output_type: "pil", "np" (batch, 24, 24, 3 in [0, 1]) or "pt" (batch, 3, 24, 24 in [0, 1]).
            return_dict: give an ``ImagePipelineOutput`` rather than a tuple.

        Raises:
            PpclError: a word is unknown, an argument is out of range, or the number of generators is wrong.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts:
            raise PpclError("prompt is an empty list; give at least one caption")
        if num_inference_steps < 1:
            raise PpclError(f"num_inference_steps is {num_inference_steps}; use 1 or more")
        if isinstance(generator, list) and len(generator) != len(texts):
            raise PpclError(f"generator has {len(generator)} entries for {len(texts)} prompts; give one for each")
        if output_type not in ("pil", "np", "pt"):
            raise PpclError(f"output_type is {output_type!r}; use 'pil', 'np' or 'pt'")
        device = self.text_encoder.device
        words = self.text_encoder.encode(texts).to(device)
        guided = guidance_scale > 1
        blank = self.text_encoder.encode([""] * len(texts)).to(device) if guided else None

        noise = randn_tensor((len(texts), 3, SIZE, SIZE), generator=generator, device=device)
        tokens = pack(noise)
        # Down to 1 / steps, as in the pipelines of FLUX and Qwen-Image: each step has its share of the way.
        sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        self.scheduler.set_begin_index(0)
        with self.progress_bar(total=num_inference_steps) as bar:
            for time in self.scheduler.timesteps:
                velocity = self._velocity(tokens, words, time / 1000)
                if blank is not None:
                    free = self._velocity(tokens, blank, time / 1000)
                    velocity = free + guidance_scale * (velocity - free)
                tokens = self.scheduler.step(velocity, time, tokens, return_dict=False)[0]
                bar.update()

        images = self.image_processor.postprocess(unpack(tokens), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
