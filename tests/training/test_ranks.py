"""What a rank reads and where it stands; parallelism that does not fit is refused before any process waits."""

from itertools import chain

import pytest

from gdn2.config import ConfigError
from gdn2.data import Shards, TokenBatches
from gdn2.training import train
from gdn2.training.distributed import Ranks


@pytest.fixture
def as_rank(monkeypatch):
    def be(rank, size):
        for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))

    return be


def test_mesh_of_every_axis(make_config, as_rank):
    """Tensor varies fastest, then context, shards and replicas."""
    places = []
    for rank in range(16):
        as_rank(rank, 16)
        ranks = Ranks(
            make_config("train.batch_tokens=256", "parallel.replicas=2", "parallel.context=2", "parallel.tensor=2")
        )
        places.append((ranks.data_rank, ranks.context_rank))
        assert (ranks.replicas, ranks.shards, ranks.data_size, ranks.token_ranks) == (2, 2, 4, 8)
    assert places == [(data, context) for data in range(4) for context in range(2) for _ in range(2)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_step_reads_the_same_windows_with_any_number_of_ranks(make_config, as_rank, size):
    """Twelve sequences a step, micro-batches of at most four: all ranks together read them, in each of three steps."""
    config = make_config("train.batch_tokens=384", "train.micro_batch=4", "train.tokens=3840")
    whole = TokenBatches(Shards(config.data.path).split("train"), 32, 12, config.seed)
    expected = [next(whole).tokens.tolist() for _ in range(3)]
    steps = [[], [], []]
    for rank in range(size):
        as_rank(rank, size)
        ranks = Ranks(config)
        own = TokenBatches(Shards(config.data.path).split("train"), 32, ranks.micro_batch, config.seed, rank, size)
        for step in steps:
            step += chain.from_iterable(next(own).tokens.tolist() for _ in range(ranks.sequences // ranks.micro_batch))
        assert own.state_dict() == whole.state_dict()
    assert [sorted(step) for step in steps] == [sorted(step) for step in expected]


@pytest.mark.parametrize(
    ("size", "setting", "message"),
    [
        (4, "parallel.replicas=3", "replicas, shards, context and tensor is 3; expected the number of processes, 4"),
        (4, "parallel.shards=2", "is 2; expected the number of processes, 4"),
        (1, "parallel.context=2", "is 2; expected the number of processes, 1"),
        (3, "parallel.shards=3", "train.batch_tokens is 128; expected a multiple of data.seq_len for each of 3 ranks"),
        (2, "parallel.shards=0", "parallel.shards is 0; expected an integer >= 1"),
        (5, "parallel.context=5", r"data.seq_len is 32; expected a multiple of parallel.context \(5\)"),
        (2, "parallel.timeout=0", "parallel.timeout is 0.0; expected a finite number of seconds > 0"),
    ],
)
def test_what_does_not_fit_is_named(make_config, tmp_path, as_rank, size, setting, message):
    as_rank(0, size)
    with pytest.raises(ConfigError, match=message):
        train(make_config(setting), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.mixer=mamba3", "model.key_dim=16", "parallel.context=2"],
         "parallel.context is 2; expected 1 with the mixer mamba3"),
        (["model.mixer=mamba2", "parallel.tensor=2"], "parallel.tensor is 2; expected 1 with the mixer mamba2"),
        (["parallel.tensor=2"], "model.num_heads is 1; expected a multiple of parallel.tensor, 2"),
        (["model.num_heads=2", "parallel.tensor=2"], "model.attention_heads is 1; expected a multiple of"),
        (["model.cell=[attention]", "model.attention_heads=4", "model.mlp_width=18", "parallel.tensor=4"],
         "model.mlp_width is 18; expected a multiple of parallel.tensor, 4"),
        (["parallel.tensor=2", "parallel.context=2"], "parallel.context is 2; expected 1 with parallel.tensor 2"),
        (["train.sample_every=5", "parallel.context=2"], "train.sample_every is 5; expected 0 with parallel.context 2"),
        (["train.compile=true", "parallel.tensor=2"], "train.compile is True; expected false with parallel.tensor 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused(make_config, tmp_path, as_rank, settings, message):
    as_rank(0, 4)
    with pytest.raises(ConfigError, match=message):
        train(make_config(*settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
