"""How many tokens a second does training take on this CPU? Whole optimizer steps, by model and by `train.recompute`.

    python benchmarks/train_cpu.py [--preset NAME ...] [--tokens T] [--micro-batch B] [--rounds N] [--threads N]

A step is what `gdn2 train` does with a batch of B sequences of T tokens: forward, backward, clipping, AdamW. Medians
over rounds, in each of which every setting has its turn, after one step to warm up. Beside them the memory that
`gdn2 train --dry-run` says. float32, random tokens.
"""

import argparse
import statistics
import time

import torch

from gdn2 import LanguageModel, preset
from gdn2.config import RECOMPUTE, DataConfig, RunConfig, TrainConfig
from gdn2.info import describe
from gdn2.training.memory import estimate
from gdn2.training.optim import build_optimizer
from gdn2.training.recompute import recompute


def stepper(name, mode, config):
    """One optimizer step of a model, as a function of no arguments."""
    torch.manual_seed(0)
    model = LanguageModel(config.model)
    recompute(model, mode)
    optimizer = build_optimizer(model, config.optim)
    shape = (config.train.micro_batch, config.data.seq_len)
    tokens = torch.randint(0, config.model.vocab_size, shape)

    def step():
        model.loss(tokens, tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["gdn2-hybrid-tiny", "gdn2-tiny", "transformer-tiny"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch = options.tokens * options.micro_batch
    steps, plans, seconds = {}, {}, {}
    for name in options.preset:
        data, train = (
            DataConfig(seq_len=options.tokens),
            TrainConfig(batch_tokens=batch, micro_batch=options.micro_batch),
        )
        config = RunConfig(model=preset(name), data=data, train=train)
        for mode in RECOMPUTE:
            steps[name, mode] = stepper(name, mode, config)
            memory = estimate(config, mode, on_gpu=False, precision="fp32")
            plans[name, mode] = memory.peak, describe(config.model, options.tokens).training_flops
    for step in steps.values():
        step()
    for _ in range(options.rounds):
        for key, step in steps.items():
            began = time.perf_counter()
            step()
            seconds.setdefault(key, []).append(time.perf_counter() - began)
    print(f"{options.threads} threads, {options.micro_batch} x {options.tokens} tokens, torch {torch.__version__}")
    print(f"{'model':<24}{'recompute':<12}{'tokens/s':>10}{'GFLOP/s':>10}{'planned peak':>14}")
    for (name, mode), (peak, flops) in plans.items():
        rate = batch / statistics.median(seconds[name, mode])
        print(f"{name:<24}{mode:<12}{rate:>10,.0f}{rate * flops / 1e9:>10.1f}{peak / 2**20:>10,.0f} MiB")


if __name__ == "__main__":
    main()
