"""What every rank of a test needs, made before the ranks are forked."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp

from tests.train import world
from tests.train.pluggable import build
from tests.train.sources import taught

torch.set_num_threads(1)
build("qwen")
taught.warm()
MADE = world.STEPS
