"""Teach the shapes model from nothing: ``python -m ppcl_fx.shapes.teach --out DIR``.

The transformer learns by flow matching. It starts with a quarter of its blocks and is grown twice by doubling
(``course.grow``), because early steps then cost less. The learning rate and the growth follow the share of the time
budget that is used up, so a run takes the same time on any machine, and a slower machine takes fewer steps.

DIR holds ``latest/``, a pipeline folder with the averaged weights, and the state from which ``--resume`` goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.shapes.captions import CATEGORIES, every_prompt
from ppcl_fx.shapes.course import LATEST, STATE, Course, begin, grown, pipeline_of, read_weights, resume, save
from ppcl_fx.shapes.drawing import draw_prompts
from ppcl_fx.shapes.pipeline import SIDE, pack
from ppcl_fx.shapes.score import score
from ppcl_fx.shapes.words import WordEncoder

SHARES = (1.0, 1.5, 3.0, 1.0, 3.0, 2.5)  # how often each category is taught, in the order of ``CATEGORIES``
DROPOUT = 0.1  # share of captions that are replaced by the empty one
WARM_UP = 100  # steps over which the learning rate rises, at the start and after each growth


def blocks_at(share: float, blocks: int, growth: tuple[float, float]) -> int:
    """Return the number of blocks at a share of the time budget, in the end ``blocks``."""
    return blocks // (4 if share < growth[0] else 2 if share < growth[1] else 1)


def rate_at(share: float, stage_step: int, peak: float) -> float:
    """Return the learning rate: one cosine over the budget, and a short warm-up at each stage."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return peak * min(1.0, (stage_step + 1) / WARM_UP) * max(0.002, cosine)


def _slope(course: Course, words: WordEncoder, args: argparse.Namespace) -> torch.Tensor:
    """Compute the gradients of one step, whose number alone decides its data, and return its loss."""
    source = random.Random(f"{args.seed}/{course.step}/{args.worker}")
    names = source.choices(CATEGORIES, args.shares, k=args.batch)
    prompts = [source.choice(every_prompt(name)) for name in names]
    texts = ["" if source.random() < DROPOUT else prompt.text for prompt in prompts]
    generator = torch.Generator().manual_seed((args.seed * 64 + args.worker) * 10_000_019 + course.step)
    # Noise levels lean towards noise: that is where the layout is decided.
    level = torch.sigmoid(torch.randn(args.batch, generator=generator) * 1.1 + args.lean)
    pictures = pack(draw_prompts(prompts, source))
    noise = torch.randn(pictures.shape, generator=generator)
    mix = level[:, None, None]
    # The fused CPU kernel's bfloat16 backward is many times slower than plain products.
    with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32), sdpa_kernel(SDPBackend.MATH):
        velocity = course.model(
            hidden_states=(1 - mix) * pictures + mix * noise,
            encoder_hidden_states=words.encode(texts),
            timestep=level,
            img_shapes=[[(1, SIDE, SIDE)]] * args.batch,
            return_dict=False,
        )[0]
    loss = functional.mse_loss(velocity.float(), noise - pictures)
    loss.backward()
    for weight in course.model.parameters():
        if weight.grad is None:  # The last block's words go nowhere.
            weight.grad = torch.zeros_like(weight)
    return loss.detach()


def _share(course: Course) -> None:
    """Give all workers the mean of their gradients, and the first worker's clock."""
    slopes = [weight.grad for weight in course.model.parameters()]
    clock = torch.tensor([course.seconds if distributed.get_rank() == 0 else 0.0])
    flat = torch.nn.utils.parameters_to_vector([*slopes, clock])
    distributed.all_reduce(flat)
    course.seconds = float(flat[-1])
    torch.nn.utils.vector_to_parameters(flat[:-1] / distributed.get_world_size(), slopes)


def _learn(course: Course, words: WordEncoder, args: argparse.Namespace, rate: float) -> float:
    loss = _slope(course, words, args)
    if args.workers > 1:
        _share(course)
    torch.nn.utils.clip_grad_norm_(course.model.parameters(), 1.0)
    for optimizer in course.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    decay = min(args.average, (1 + course.step) / (10 + course.step))
    weights = course.weights()
    torch._foreach_lerp_(list(course.average.values()), [weights[name] for name in course.average], 1 - decay)
    course.step += 1
    course.stage_step += 1
    return float(loss)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def teach(args: argparse.Namespace) -> None:
    """Teach until the time budget is used up; with several workers, this is what each of them does.

    Raises:
        PpclError: ``--resume`` is given and there is no checkpoint.
    """
    words, out, first = WordEncoder(), Path(args.out), args.worker == 0
    budget, compiled = args.minutes * 60, not args.no_compile
    if args.resume:
        course = resume(out, compiled)
    elif args.start:
        course = begin(args.blocks, args.seed, compiled, read_weights(Path(args.start)))
    else:
        course = begin(args.blocks // 4, args.seed, compiled)
    for turn in (True, False):  # compile: the first worker alone, then the others, who find its work in the cache
        if turn == first:
            _slope(course, words, args)
        if args.workers > 1:
            distributed.barrier()
    course.model.zero_grad(set_to_none=True)

    def report(head: str) -> None:
        if args.score_prompts:
            means = score(pipeline_of(course.average, course.blocks, words), args.score_prompts)
            _say(f"{head} {json.dumps({name: round(value, 3) for name, value in means.items()})}")

    saved = tested = clock = time.monotonic()
    total = 0.0
    while course.seconds < budget:
        share = course.seconds / budget
        if blocks_at(share, args.blocks, args.grow) > course.blocks:
            course = grown(course, compiled)
        rate = rate_at(share, course.stage_step, args.rate)
        # The clock runs before the step, in which workers agree on it: all must stop at the same step.
        now = time.monotonic()
        course.seconds += now - clock
        clock = now
        total += _learn(course, words, args, rate)
        if not first:
            continue
        if course.step % 50 == 0:
            _say(
                f"step {course.step} blocks {course.blocks} loss {total / 50:.4f} rate {rate:.2e} "
                f"minutes {course.seconds / 60:.1f}"
            )
            total = 0.0
        if now - saved > args.save_every * 60:
            save(course, out, words, args.blocks)
            saved = now
        if now - tested > args.score_every * 60:
            report("score")
            tested = now
    if first:
        save(course, out, words, args.blocks)
        report("final score")


def _work(worker: int, args: argparse.Namespace) -> None:
    args.worker = worker
    torch.set_num_threads(args.threads)
    if args.workers > 1:
        distributed.init_process_group("gloo", args.meeting, rank=worker, world_size=args.workers)
    teach(args)


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises PpclError where the number of blocks cannot be grown to from a quarter of it."""
    parser = argparse.ArgumentParser(description="teach the shapes model from nothing")
    parser.add_argument("--out", required=True, help="folder for checkpoints and the pipeline")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--start", help="pipeline folder whose weights to start from, with all blocks")
    parser.add_argument("--minutes", type=float, default=60.0, help="time budget, over all resumed runs")
    parser.add_argument("--blocks", type=int, default=16, help="blocks in the end; a multiple of 4")
    parser.add_argument("--grow", type=float, nargs=2, default=(0.42, 0.66), help="shares of the budget")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step, for each worker")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--lean", type=float, default=0.5, help="lean of noise levels towards noise")
    parser.add_argument("--shares", type=float, nargs=6, default=SHARES, help="how often each category comes")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the weights' average")
    parser.add_argument("--seed", type=int, default=0, help="of the starting weights and all data")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the work")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each worker")
    parser.add_argument("--save-every", type=float, default=6.0, help="minutes between checkpoints")
    parser.add_argument("--score-every", type=float, default=15.0, help="minutes between quick scores")
    parser.add_argument("--score-prompts", type=int, default=16, help="prompts a category; 0 for no scores")
    parser.add_argument("--float32", action="store_true", help="compute all products in float32")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.set_defaults(worker=0)
    args = parser.parse_args(words)
    if args.blocks < 4 or args.blocks % 4:
        raise PpclError(f"--blocks is {args.blocks}; use a multiple of 4, because the model is grown twice")
    return args


def main() -> None:
    """Read the command line and teach."""
    try:
        args = read_arguments()
        out = Path(args.out)
        if (out / STATE).exists() and not args.resume:
            raise PpclError(f"{out / STATE}: a checkpoint is there; go on with --resume, or choose another --out")
        owned.check_replaceable(out / LATEST, owned.PIPELINE)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as meeting:
            args.meeting = f"file://{meeting}/workers"
            if args.workers == 1:
                _work(0, args)
            else:
                spawn(_work, (args,), nprocs=args.workers)
    except PpclError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
