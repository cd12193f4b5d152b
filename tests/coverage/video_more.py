"""More video classes: those that take more than a video, a timestep and a text."""

from __future__ import annotations

import torch

from tests.coverage.case import AXES, HEAD_DIM, HEADED, HEADS, TEXT_CHANNELS, WIDTH, Case, Draw, Kwargs, small
from tests.coverage.video import VISION, WAN, clip, frames_first, picture

GRID = 8
"""Kandinsky's block-sparse attention takes grids of tokens that are whole multiples of this."""


def chunked(draw: Draw) -> Kwargs:
    """The third chunk of a video, as it is denoised: a cache holds keys and values of the two before it.

    The chunks before have one frame each; the older one is compressed.
    """
    s = draw.shape

    def cached(tokens: int) -> torch.Tensor:
        return draw.normal(2, s.batch, HEADS, tokens, HEAD_DIM)

    return frames_first(
        draw,
        timestep=draw.steps()[:, None].repeat(1, s.frames),
        r_timestep=draw.steps()[:, None].repeat(1, s.frames),
        chunk_partition=[1, 1, s.frames],
        kv_cache={i: {"full_cache": cached(2 * s.tokens), "compressed_cache": cached(s.tokens)} for i in range(3)},
        kv_cache_flag={"num_cached_chunks": 2, "is_cache_step": False},
    )


def super_resolution(draw: Draw) -> Kwargs:
    """Latents, their anchor and the anchor's mask, the channels last."""
    s = draw.shape
    rows, columns = (GRID * -(-size // GRID) for size in (s.height, s.width))
    return {
        "hidden_states": draw.normal(s.batch, s.frames, rows, columns, 2 * 4 + 1),
        "timestep": draw.times(1000),
    }


def packed(draw: Draw) -> Kwargs:
    """One sequence of text, video and sound in turn; the first frame is a condition without noise."""
    s = draw.shape
    video, sound = s.frames * s.tokens, 2 * s.frames
    tags = torch.tensor([1] * s.text + [0] * video + [2] * sound)
    length = len(tags)
    noise = torch.ones(length, dtype=torch.long)
    noise[: s.text + s.tokens] = 0
    noise[s.text + video :] = 2
    return {
        "hidden_states": draw.normal(s.batch, video, 16),
        "audio_hidden_states": draw.normal(s.batch, sound, 6),
        "encoder_hidden_states": draw.text(),
        "timestep": torch.cat([torch.zeros(1), torch.rand(2, generator=draw.generator)]),
        "timestep_indices": noise,
        "token_tags": tags,
        "position_ids": torch.randint(0, 20, (length, 3), generator=draw.generator),
        "video_indices": torch.arange(s.text, s.text + video),
        "audio_indices": torch.arange(s.text + video, length),
        "text_indices": torch.arange(s.text),
    }


def cameras(draw: Draw) -> torch.Tensor:
    """A pose (rotation and place) and the focal lengths and centre of a camera for each frame."""
    s = draw.shape
    poses = torch.eye(4).repeat(s.batch, s.frames, 1, 1)
    poses[..., :3, :3] = torch.linalg.qr(draw.normal(s.batch, s.frames, 3, 3))[0]
    poses[..., :3, 3] = draw.normal(s.batch, s.frames, 3)
    lens = torch.tensor([1.2 * s.width, 1.1 * s.height, s.width / 2, s.height / 2]).repeat(s.batch, s.frames, 1)
    return torch.cat([poses.flatten(2), lens], dim=-1)


def world(draw: Draw) -> Kwargs:
    s = draw.shape
    return clip(
        draw,
        encoder_hidden_states=draw.text()[:, None],
        encoder_attention_mask=draw.mask(torch.long),
        timestep=draw.steps()[:, None, None].repeat(1, 1, s.frames),
        camera_conditions=cameras(draw),
        chunk_plucker=draw.video(12),
    )


def refiner(draw: Draw) -> Kwargs:
    """Tokens of a block of frames, a timestep for each, and the cosines and sines of their positions."""
    s = draw.shape
    tokens = s.frames * s.tokens
    angles = draw.normal(s.batch, tokens, WIDTH // 2).repeat_interleave(2, dim=-1)
    return {
        "hidden_states": draw.normal(s.batch, tokens, 8),
        "encoder_hidden_states": draw.text(),
        "timestep": draw.steps()[:, None].repeat(1, tokens),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": draw.mask(torch.long),
    }


def animate(draw: Draw) -> Kwargs:
    """A video whose first frame is the character, the poses of the others, and crops of a face in all pictures."""
    s = draw.shape
    pictures = 4 * (s.frames - 2) + 1
    return clip(
        draw,
        channels=2 * 4 + 4,
        # The attention holds all but the last 512 tokens for those of the picture.
        encoder_hidden_states=draw.normal(s.batch, 507 + s.text, TEXT_CHANNELS),
        encoder_hidden_states_image=picture,
        pose_hidden_states=draw.normal(s.batch, 4, s.frames - 1, s.height, s.width),
        face_pixel_values=draw.normal(s.batch, 3, pictures, 16, 16),
    )


CASES: list[Case] = [
    small(
        "AnyFlowFARTransformer3DModel",
        {**WAN, "full_chunk_limit": 2},
        chunked,
    ),
    small(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": WIDTH, "ff_dim": 2 * WIDTH,
            "num_visual_blocks": 3, "axes_dims": AXES, "nabla_threshold": 0.3, "nabla_window": (1, 1, 1),
        },
        super_resolution,
    ),
    small(
        "MiniMaxH3Transformer3DModel",
        {
            **HEADED, "hidden_size": WIDTH, "num_layers": 3, "num_refiner_layers": 2, "ffn_dim": 2 * WIDTH,
            "in_channels": 4, "audio_in_channels": 6, "text_dim": TEXT_CHANNELS, "freq_dim": 16,
            "time_embed_hidden_dim": WIDTH, "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        packed,
    ),
    small(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4, "num_layers": 5, "softmax_every_n": 3, "hidden_size": WIDTH, "num_attention_heads": HEADS,
            "linear_head_dim": HEAD_DIM, "chunk_plucker_channels": 12, "caption_channels": TEXT_CHANNELS,
        },
        world,
    ),
    small(
        "SanaWMLTX2RefinerTransformer3DModel",
        {
            **HEADED, "in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH, "num_layers": 3,
            "caption_channels": TEXT_CHANNELS, "audio_in_channels": 8, "audio_out_channels": 8,
            "audio_num_attention_heads": HEADS, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
        },
        refiner,
        "without a cache",
    ),
    small(
        "WanAnimateTransformer3DModel",
        {
            **WAN, **VISION, "in_channels": 12, "latent_channels": 4, "num_layers": 4,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
        },
        animate,
    ),
]  # fmt: skip
