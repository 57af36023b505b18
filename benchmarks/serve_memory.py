"""Does the memory of `gdn2 serve` stay flat over thousands of requests?

    python benchmarks/serve_memory.py --requests 10000

Starts a server of a small random model as a process of its own and sends it whole answers, streams, several prompts at
a time, log-probabilities, clients that leave in the middle, and bodies that are refused. Prints the server's resident
memory and open files as it goes, and a straight line through the second half.
"""

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from gdn2 import LanguageModel, ModelConfig
from gdn2.config import DataConfig, RunConfig, write_config
from gdn2.data import load_tokenizer

MODEL = ModelConfig(
    vocab_size=257, d_model=32, mlp_width=48, num_layers=2, num_heads=2, key_dim=8, value_dim=8, attention_heads=2,
    cell=("mixer", "attention"), window=16,
)  # fmt: skip
BAD = [b"{", b"\xff", b'{"max_tokens": 99999999}', b'{"prompt": [-1]}', b"x" * 2_000_000]


def save_run(folder: Path) -> Path:
    """A run's folder with random weights."""
    torch.manual_seed(0)
    checkpoint = folder / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    save_file(dict(LanguageModel(MODEL).named_parameters()), checkpoint / "model.safetensors")
    write_config(checkpoint, RunConfig(model=MODEL, data=DataConfig(seq_len=128)))
    load_tokenizer("bytes").save(checkpoint)
    return folder / "run"


async def ask(client: httpx.AsyncClient, kind: int, rng: random.Random) -> int:
    """One request of a kind; returns its status."""
    prompt = "".join(rng.choices("abcdef \n", k=rng.randint(1, 200)))
    body = {"prompt": prompt, "max_tokens": rng.randint(1, 12), "temperature": rng.choice([0, 1]), "stop": ["zz"]}
    if kind == 0:
        return (await client.post("/v1/completions", content=rng.choice(BAD), headers=JSON)).status_code
    if kind == 1:
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 4000}) as answer:
            async for _ in answer.aiter_lines():
                break
        return answer.status_code
    if kind == 2:
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            await answer.aread()
        return answer.status_code
    more = ({}, {"n": 3}, {"logprobs": 5, "echo": True}, {"prompt": [prompt, prompt[::-1]]})[kind - 3]
    return (await client.post("/v1/completions", json=body | more)).status_code


JSON = {"Content-Type": "application/json"}


async def load(url: str, requests: int, at_once: int, process: psutil.Process) -> list[tuple[int, float]]:
    """Send the requests; returns (requests done, the server's MB) from time to time."""
    rng, done, curve, statuses = random.Random(0), 0, [], {}
    gate, started = asyncio.Semaphore(at_once), time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=at_once)) as client:

        async def one(index: int) -> None:
            nonlocal done
            async with gate:
                status = await ask(client, index % 7, random.Random(rng.random()))
            statuses[status] = statuses.get(status, 0) + 1
            done += 1
            if done % max(1, requests // 20) == 0:
                megabytes = process.memory_info().rss / 1e6
                curve.append((done, megabytes))
                rate = done / (time.perf_counter() - started)
                print(
                    f"{done:>7,} requests  {megabytes:8.1f} MB  {process.num_fds():>4} files  {rate:6.1f} requests/s",
                    flush=True,
                )

        for start in range(0, requests, 1_000):
            await asyncio.gather(*(one(i) for i in range(start, min(start + 1_000, requests))))
    print("statuses:", dict(sorted(statuses.items())))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gdn2", "serve", str(save_run(Path(folder))), "--port", "0", "--slots", "16"]
        command += ["--queue", "1000", "--device", "cpu"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            url = server.stderr.readline().split(" at ")[1].split()[0]
            curve = asyncio.run(load(url, options.requests, options.at_once, psutil.Process(server.pid)))
            server.terminate()
    half = np.array(curve[len(curve) // 2 :])
    slope = np.polyfit(half[:, 0], half[:, 1], 1)[0]
    print(f"second half: {slope * 1e6:+.0f} bytes a request, {half[:, 1].min():.1f} to {half[:, 1].max():.1f} MB")


if __name__ == "__main__":
    main()
