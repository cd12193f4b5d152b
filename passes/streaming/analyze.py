"""`analyze` for a model that does not fit in memory: the same numbers, one block's weights at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ppcl_fx import owned
from ppcl_fx.errors import PpclError
from ppcl_fx.files import need_room
from ppcl_fx.passes.analyze import check_stream, conclude
from ppcl_fx.passes.measure import MEMORY, SAMPLES, StreamSite, check_request, stream_sites
from ppcl_fx.passes.streaming.footprint import state_budget
from ppcl_fx.passes.streaming.ledger import Identity, Ledger
from ppcl_fx.passes.streaming.measure import Report, StreamedMeasurement, silent
from ppcl_fx.passes.streaming.states import States
from ppcl_fx.tracing import trace

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.redundancy import Redundancy
    from ppcl_fx.skeleton import Checkpoint


def analyze_streamed(
    checkpoint: Checkpoint,
    calls: Calls,
    work: str | Path,
    *,
    memory_limit: int | None = None,
    ridge: float = 1e-6,
    refine_steps: int = 0,
    stream: str = "image",
    report: Report = silent,
    max_samples: int = SAMPLES,
    memory: int = MEMORY,
    device: str | torch.device = "cpu",
    keep_work: bool = False,
) -> Redundancy:
    """Do what `ppcl_fx.analyze` does with the weights left on disk: all calls go through one block, then the next.

    Each block's sums are solved and dropped when the block is done. Probes, kept activations and results go to
    `work`; a run that was killed goes on from there, with the same result. `work` is removed at the end.

    Args:
        checkpoint: the teacher, from `ppcl_fx.sources.Source.checkpoint`.
        calls: recorded calls of it.
        work: a folder for what does not stay in memory; on a disk with room.
        memory_limit: bytes that this process may hold (memory-mapped weights, which the system takes back when it
            needs to, do not count). What does not fit goes to `work`. None for no limit.
        ridge: as in `ppcl_fx.analyze`.
        refine_steps: as in `ppcl_fx.analyze`.
        stream: as in `ppcl_fx.analyze`.
        report: told how far it is.
        max_samples: as in `ppcl_fx.analyze`.
        memory: bytes of activations kept for CKA, here on disk.
        device: where to compute.
        keep_work: leave `work` as it is: for a caller that writes the result down before it removes it.

    Raises:
        PpclError: as `ppcl_fx.analyze`; and the limit or the disk is too small, or `work` holds something else.
    """
    measurement = _measurement(
        checkpoint,
        calls,
        Path(work),
        memory_limit,
        (ridge, refine_steps),
        stream,
        report,
        (max_samples, memory),
        device,
    )
    measurement.run()
    found = conclude(measurement, calls, ridge=ridge, refine_steps=refine_steps, stream=stream)
    if not keep_work:
        owned.discard(Path(work), owned.ANALYSING)
    return found


def _measurement(
    checkpoint: Checkpoint,
    calls: Calls,
    work: Path,
    memory_limit: int | None,
    solving: tuple[float, int],
    stream: str,
    report: Report,
    keeping: tuple[int, int],
    device: str | torch.device,
    checkpoint_seconds: float | None = None,
) -> StreamedMeasurement:
    check_request(calls, keeping[0])
    owned.check_replaceable(work, owned.ANALYSING)
    if calls.model and calls.model != checkpoint.fingerprint:
        raise PpclError("the calls were recorded from another model; record calls of this one")
    gm = trace(checkpoint.model, calls.examples())
    gm.meta["ppcl"]["model"] = checkpoint.fingerprint
    check_stream(gm, stream)
    sites = stream_sites(gm)
    budget = 2**62 if memory_limit is None else state_budget(gm, calls, sites, memory_limit)
    identity = Identity(
        model=checkpoint.fingerprint,
        calls=calls.fingerprint,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        samples=keeping[0],
        memory=keeping[1],
        ridge=solving[0],
        refine_steps=solving[1],
    )
    need_room(work, _on_disk(sites, keeping[1]))
    where = torch.device(device)
    return StreamedMeasurement(
        gm,
        calls,
        Ledger(work, identity),
        States(work / "states", budget, where),
        checkpoint.tensor,
        release=checkpoint.shards.close,
        device=where,
        report=report,
        checkpoint_seconds=checkpoint_seconds,
    )


def _on_disk(sites: list[StreamSite], kept: int) -> int:
    """Bytes of probes, and of the activations of at least one sample."""
    total = 0
    for site in sites:
        value = site.outputs[0].meta["val"]
        total += len(site.outputs) * int(value.shape[-1]) ** 2 * 4
        total += min(kept, (len(site.outputs) + 1) * value[0].nbytes)
    return total
