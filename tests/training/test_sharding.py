"""FSDP2 and HSDP are one process: initialisation, loss, gradients, clipping and the weights after a step."""

from pathlib import Path

import pytest
import ranks

WORKER = Path(__file__).with_name("sharding_worker.py")


@pytest.mark.parametrize(("size", "scenarios"), [(2, "fsdp tied bf16 packed context"), (4, "fsdp hsdp context-packed")])
def test_sharded_model_is_one_model(shards, size, scenarios):
    assert f"checked {scenarios}\n" in ranks.run(size, WORKER, shards)
