import io
import json
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gdn2.config import ModelConfig, RunConfig
from gdn2.data import Shards, TokenBatches
from gdn2.data.shards import Batch
from gdn2.layers import GatedDeltaNet2
from gdn2.layers.gates import ChannelGates, TiedGates
from gdn2.model import LanguageModel
from gdn2.presets import preset
from gdn2.training.metrics import (
    Display,
    MetricsFile,
    language_scores,
    layer_statistics,
    read_metrics,
    validate,
)

CPU = torch.device("cpu")


@pytest.fixture
def model(make_config: Callable[..., RunConfig]) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(make_config("model.num_layers=4").model)


def test_scores_of_a_uniform_guess() -> None:
    scores = language_scores(10 * math.log(256), 10, 10)
    assert scores["perplexity"] == pytest.approx(256)
    assert scores["bits_per_byte"] == pytest.approx(8)


def test_scores_of_a_huge_loss_do_not_fail() -> None:
    assert language_scores(1e6, 1, 1)["perplexity"] == math.inf


def test_targets_without_a_byte_have_no_bits_per_byte() -> None:
    assert language_scores(1.0, 2, 0)["bits_per_byte"] is None


@pytest.mark.parametrize("packed", [False, True])
def test_validation_loss_is_the_mean_over_all_targets(model: LanguageModel, shards: Path, packed: bool) -> None:
    batches = TokenBatches(Shards(shards).split("val"), 32, 3, seed=0, packed=packed)
    row = validate(model, batches, 32 * 8, CPU, nullcontext())
    nats, count, size = 0.0, 0, 0.0
    for b in map(batches.read, batches.spread(32 * 8)):
        nats += float(model.loss(b.tokens, b.targets, b.cu_seqlens, reduction="none").detach().sum())
        count += int((b.targets >= 0).sum())
        size += int(((b.targets >= 0) & (b.targets < 256)).sum())
    assert row["loss"] == pytest.approx(nats / count, rel=1e-6)  # float32 sums in another order
    assert row["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
    assert model.training
    assert len(row["layers"]) == 2


def test_fixed_gates_are_no_saturated_ones() -> None:
    """Linear attention writes everything and erases nothing: no sign of divergence."""
    model, tokens = LanguageModel(replace(preset("deltanet-tiny"), mixer="linear")), torch.randint(257, (2, 12))
    for row in layer_statistics(model, Batch(tokens, tokens, None)):
        assert (row["mean_erase"], row["mean_write"], row["mean_decay"]) == (0.0, 1.0, 1.0)
        assert (row["saturated_erase"], row["saturated_write"]) == (0.0, 0.0)


def test_layer_statistics_are_those_of_the_gates(model: LanguageModel) -> None:
    for module in model.modules():
        if isinstance(module, ChannelGates):  # constant gates: erase 1/2, write saturated, no decay
            torch.nn.init.zeros_(module.erase.weight)
            torch.nn.init.zeros_(module.write.weight)
            module.decay.rate.data.fill_(-100.0)
    tokens = torch.randint(257, (2, 12))
    rows = layer_statistics(model, Batch(tokens, tokens, None))
    assert len(rows) == sum(isinstance(m, GatedDeltaNet2) for m in model.modules()) == 2
    with torch.no_grad():
        _, states = model(tokens)
    for row, state in zip(rows, states[::2]):
        assert (row["mean_erase"], row["mean_write"], row["mean_decay"]) == (0.5, 0.5, 1.0)
        assert (row["saturated_erase"], row["saturated_write"]) == (0.0, 0.0)
        assert row["state_rms"] == pytest.approx(float(state.memory.square().mean().sqrt()))
        assert row["state_rms"] > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


SMALL = {"num_layers": 2, "num_heads": 1, "key_dim": 4, "value_dim": 4, "d_model": 8, "mlp_width": 8}


@pytest.mark.parametrize("mixer", ["mamba2", "mamba3"])
def test_memories_of_mamba_are_looked_at(mixer: str) -> None:
    model, tokens = LanguageModel(ModelConfig(vocab_size=9, mixer=mixer, **SMALL)), torch.randint(9, (2, 12))
    rows = layer_statistics(model, Batch(tokens, tokens, None))
    with torch.no_grad():
        _, states = model(tokens)
    assert len(rows) == 2
    for row, state in zip(rows, states):
        assert row == {"state_rms": pytest.approx(float(state.memory.square().mean().sqrt()))}
        assert row["state_rms"] > 0


@pytest.mark.parametrize("mixer", ["kda", "deltanet"])
def test_layer_statistics_of_the_other_mixers(mixer: str) -> None:
    """One beta erases and writes, doubled alike; no decay counts as one that keeps everything."""
    model = LanguageModel(ModelConfig(vocab_size=9, mixer=mixer, negative_eigenvalues=True, **SMALL))
    tokens = torch.randint(9, (2, 12))
    for gates in (m for m in model.modules() if isinstance(m, TiedGates)):
        torch.nn.init.zeros_(gates.beta.weight)
    rows = layer_statistics(model, Batch(tokens, tokens, None))
    assert len(rows) == 2
    for row in rows:
        assert row["mean_erase"] == row["mean_write"] == 1
        assert row["saturated_erase"] == row["saturated_write"] == 0
        assert (row["mean_decay"] == 1) == (mixer == "deltanet")


def test_saturation_is_counted_on_either_end_and_doubled_gates_by_their_range() -> None:
    from gdn2.training import metrics

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = GatedDeltaNet2(4, 1, key_dim=4, value_dim=4, negative_eigenvalues=True)
            fixed = torch.zeros(4), torch.tensor([0.001, 1.0, 1.999, 1.0]), torch.ones(4)
            self.mixer.gates.forward = lambda x: fixed  # type: ignore[method-assign]

        def forward(self, tokens: torch.Tensor, cu_seqlens: None) -> tuple[None, tuple[object, ...]]:
            _, state = self.mixer(torch.zeros(1, 1, 4))
            assert state is not None
            return None, (state._replace(memory=torch.full((1, 1, 2, 2), 3.0)),)

    tokens = torch.zeros(1, 1)
    (row,) = metrics.layer_statistics(Fixed(), Batch(tokens, tokens, None))
    assert (row["saturated_erase"], row["saturated_write"]) == (0.5, 1.0)
    assert row["state_rms"] == 3.0


def test_rows_are_json_and_non_finite_numbers_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"kind": "val", "step": 1, "loss": math.inf, "layers": [{"x": math.nan}]})
    assert read_metrics(tmp_path) == [{"kind": "val", "step": 1, "loss": None, "layers": [{"x": None}]}]


def test_rows_after_a_step_and_half_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).cut_after(3)  # nothing there yet
    rows = [{"kind": "train", "step": i} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "step": 3')
    assert read_metrics(tmp_path) == rows  # the last is being written
    MetricsFile(path).cut_after(3)
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in rows[:4])


@pytest.mark.parametrize("line", [b"garbage", b"\xff", b"[]", b'{"kind": "train"}', b'{"step": 1}'])
def test_line_that_is_no_row_is_named_and_kept(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"kind": "train", "step": 1}\n' + line + b"\n"
    path.write_bytes(content)
    message = r"metrics\.jsonl:2: (not a line of JSON|no row of metrics; expected an object with kind and step)"
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=message):
        MetricsFile(path).cut_after(0)
    assert path.read_bytes() == content


def test_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl; expected the folder of a training run"):
        read_metrics(tmp_path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROWS = [
    {"kind": "event", "step": 0, "event": "started"},
    {"kind": "train", "step": 5, "loss": 1.5, "bits_per_byte": 2.25, "tokens_per_second": 1234.0, "lr": 1e-3,
     "grad_norm": 0.5, "elapsed": 10.0},
    {"kind": "val", "step": 5, "loss": 1.25, "perplexity": 3.49, "bits_per_byte": 1.8},
    {"kind": "sample", "step": 5, "prompt": "def [bold]", "text": "main"},
]  # fmt: skip


def shown(stream: io.StringIO) -> str:
    with Display(20, 0, stream) as display:
        for row in ROWS:
            display.show(row)
            display.advance(row["step"])  # type: ignore[arg-type]
    return stream.getvalue()


def test_plain_lines_tell_loss_speed_and_time_left() -> None:
    lines = shown(io.StringIO()).splitlines()
    assert lines[0] == "step 0/20  started"
    assert lines[1].startswith("step 5/20  loss 1.5000  2.2500 bits per byte  1,234 tokens/s")
    assert lines[1].endswith("ETA 0:30")  # 15 steps at 2 s
    assert "perplexity 3.490  1.8000 bits per byte" in lines[2]
    assert "\x1b" not in "".join(lines)


def test_terminal_has_a_live_bar_and_keeps_text_verbatim() -> None:
    text = shown(Terminal())
    assert "5/20" in text
    assert "1,234 tokens/s" in text
    assert "def [bold]" in text
    assert "ETA" in text


@pytest.mark.parametrize("width", [60, 80])
def test_narrow_terminal_keeps_count_speed_and_time_whole(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    row = ROWS[1] | {"step": 123_456, "loss": 12.3456, "tokens_per_second": 123_456.0}
    with Display(1_000_000, 0, stream) as display:
        display.show(row)
        display.advance(123_456)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue())  # colours and cursor moves
    assert "123456/1000000 loss 12.3456  123,456 tokens/s ETA -:--:--" in text


def test_row_without_bytes_is_shown() -> None:
    stream = io.StringIO()
    display = Display(20, 0, stream)
    for row in ROWS[1:3]:
        display.show(row | {"bits_per_byte": None})
    assert stream.getvalue().count("  no bytes") == 2


def test_long_times_left_are_in_hours() -> None:
    stream = io.StringIO()
    Display(1000, 0, stream).show(ROWS[1] | {"elapsed": 100.0})
    assert stream.getvalue().rstrip().endswith("ETA 5:31:40")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk_names_the_file() -> None:
    with pytest.raises(OSError, match=r"/dev/full could not be written .*No space left on device"):
        MetricsFile(Path("/dev/full")).append({"kind": "train", "step": 1})
