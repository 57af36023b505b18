"""FSDP2 and HSDP are one process: initialisation, loss, gradients, clipping, the weights after a step
and what is watched of each layer."""

from pathlib import Path

import pytest
import ranks
import torch

WORKER = Path(__file__).with_name("sharding_worker.py")


TWO = (
    "fsdp tied bf16 packed context-full context-packed context-mamba2 tensor tensor-kda-full tensor-gdn-selective "
    "tensor-deltanet tensor-linear"
)
FOUR = "fsdp hsdp-full context-packed-selective tensor-bf16"


@pytest.mark.parametrize(("size", "scenarios"), [(2, TWO), (4, FOUR)])
def test_sharded_model_is_one_model(shards, size, scenarios):
    assert f"checked {scenarios}\n" in ranks.run_well(size, WORKER, shards, "cpu", *scenarios.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted; on GPUs the test below runs them")
def test_kernels_of_a_model_split_by_heads_take_what_collectives_give():
    pytest.importorskip("triton")
    assert "checked\n" in ranks.run_well(2, WORKER.with_name("fused_worker.py"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("scenario", TWO.split())  # one at a time: each compiles kernels for some half a minute
def test_sharded_model_on_two_gpus_is_one_model(shards, scenario):
    assert f"checked {scenario}\n" in ranks.run_well(2, WORKER, shards, "cuda", scenario)
