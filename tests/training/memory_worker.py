"""Steps of two ranks: the bytes of each at most, held to what `gdn2 train --dry-run` plans for one of two devices."""

import os
import sys
from contextlib import nullcontext

import torch
from allocations import allocations

from gdn2.config import load_run
from gdn2.data import Shards, TokenBatches
from gdn2.model import LanguageModel
from gdn2.presets import preset
from gdn2.training.distributed import Ranks
from gdn2.training.optim import adamw
from gdn2.training.parallel import parallelize
from gdn2.training.plan import plan
from gdn2.training.recompute import recompute
from gdn2.training.sharding import local
from gdn2.training.step import accumulate_gradients

DEVICE = torch.device("cpu")
SCENARIOS = {
    "shards": [],
    "replicas": ["parallel.replicas=2"],
    "context": ["parallel.context=2"],
    "tensor": ["parallel.tensor=2"],
    "tensor full": ["parallel.tensor=2", "train.recompute=full"],
    "tensor selective": ["parallel.tensor=2", "train.recompute=selective"],
    "tensor kda bf16": ["parallel.tensor=2", "model.mixer=kda", "train.precision=bf16"],
    "tensor one micro-batch": ["parallel.tensor=2", "train.batch_tokens=1024"],
}
STEPS = 2


def config_of(data, changes):
    settings = [
        "preset=gdn2-hybrid-tiny", "model.num_layers=4", "model.d_model=64", "model.mlp_width=160", "model.num_heads=2",
        "model.key_dim=32", "model.value_dim=32", "model.attention_heads=2", "model.window=64", f"data.path={data}",
        "data.seq_len=256", "train.micro_batch=4", "train.batch_tokens=2048", "train.tokens=16384", "train.device=cpu",
        "train.precision=fp32", "optim.warmup_tokens=0",
    ]  # fmt: skip
    return load_run(None, [*settings, *changes], preset)


def measured(config):
    """Bytes of weights, of the optimizer's states, and of all that there is at once at most.

    Of the peaks of several steps it is the least: a thread of gloo lets go of what it sent whenever it comes to it.
    """
    ranks, precision = Ranks(config), config.train.precision
    ranks.start(DEVICE)
    torch.manual_seed(0)
    model = LanguageModel(config.model)
    parallelize(model, ranks, DEVICE, precision)
    recompute(model, config.train.recompute)
    optimizer = adamw(model, config.optim)
    tokens = Shards(config.data.path).split("train")
    batches = TokenBatches(tokens, config.data.seq_len, ranks.micro_batch, 0, ranks.data_rank, ranks.data_size)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    peaks = []
    for step in range(1 + STEPS):
        own = [next(batches) for _ in range(ranks.sequences // ranks.micro_batch)]
        with allocations() if step else nullcontext([0]) as totals:
            accumulate_gradients(model, own, batches.token_file, ranks, DEVICE, autocast)
        peaks.append(max(totals))
        optimizer.step()
        optimizer.zero_grad()
    weights = sum(local(p).nbytes for p in model.parameters())
    states = sum(local(t).nbytes for state in optimizer.state.values() for t in state.values())
    return weights, states, weights + states + min(peaks[1:])


def near(name, what, found, planned, tolerance):
    assert abs(found / planned - 1) <= tolerance, f"{name}: {what} {found / planned:.3f} times the plan"


torch.set_num_threads(1)
for name, changes in SCENARIOS.items():
    config = config_of(sys.argv[1], changes)
    weights, states, peak = measured(config)
    planned = plan(config, 2).memory[config.train.recompute]
    # What takes no weight decay is small, and whole on every rank; the plan shares it out too.
    near(name, "weights", weights, planned.weights, 0.01)
    near(name, "optimizer", states, planned.optimizer, 0.01)
    near(name, "peak", peak, planned.peak, 0.15)
if os.environ["RANK"] == "0":
    print("checked", len(SCENARIOS), flush=True)
