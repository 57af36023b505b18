"""FSDP2 and HSDP are one process: initialisation, loss, gradients, clipping and the weights after a step."""

from pathlib import Path

import pytest
import ranks

WORKER = Path(__file__).with_name("sharding_worker.py")


TWO = "fsdp tied bf16 packed context-full tensor tensor-kda-full tensor-gdn-selective"
FOUR = "fsdp hsdp-full context-packed-selective tensor-bf16"


@pytest.mark.parametrize(("size", "scenarios"), [(2, TWO), (4, FOUR)])
def test_sharded_model_is_one_model(shards, size, scenarios):
    assert f"checked {scenarios}\n" in ranks.run_well(size, WORKER, shards)
