"""How long the first call in a new process takes on this GPU, with Triton's cache empty and with it filled.

    python benchmarks/first_call.py

Seconds from `import gdn2` to the end of the first call, operands drawn between them, torch imported and CUDA started
before: of `gated_delta_rule_2`, forward and backward; of a layer's training pass; of a decoding step of a small model,
captured as a graph. Each in a process of its own, twice, with a cache folder of their own that is deleted afterwards.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time


def operator():
    import peers
    import torch

    tensors = peers.operands(2, 2048, 16, 128)
    do = torch.randn_like(tensors[2])
    return lambda: peers.ours().both(tensors, do)


def layer():
    import torch

    from gdn2.layers import GatedDeltaNet2

    module, x = GatedDeltaNet2(2048, 16).cuda(), torch.randn(2, 2048, 2048, device="cuda", requires_grad=True)

    def call():
        with torch.autocast("cuda", torch.bfloat16):
            y = module(x)[0]
        y.float().square().mean().backward()

    return call


def decode():
    import torch

    from gdn2 import LanguageModel
    from gdn2.config import ModelConfig
    from gdn2.decoding import DecodeStep

    model = LanguageModel(ModelConfig(num_layers=1)).to("cuda", torch.bfloat16).eval()
    return lambda: DecodeStep(model, 1)([0])


WORK = {"operator": operator, "layer": layer, "decode": decode}


def one(name):
    import torch

    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    WORK[name]()()
    torch.cuda.synchronize()
    print(f"{time.perf_counter() - start:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=WORK, help=argparse.SUPPRESS)
    name = parser.parse_args().one
    if name:
        return one(name)
    for name in WORK:
        with tempfile.TemporaryDirectory() as folder:
            command, environment = [sys.executable, __file__, "--one", name], os.environ | {"TRITON_CACHE_DIR": folder}
            cold, warm = (
                subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
                for _ in range(2)
            )
        print(f"{name}: {cold} s with an empty cache, {warm} s with a filled one", flush=True)


if __name__ == "__main__":
    main()
