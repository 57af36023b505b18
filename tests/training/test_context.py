"""Context parallelism is exact: operator and mixers over four ranks against one process, in float64."""

from pathlib import Path

import ranks

WORKER = Path(__file__).with_name("context_worker.py")


def test_tokens_on_four_ranks_are_one_sequence():
    assert "checked 28\n" in ranks.run_well(4, WORKER)
