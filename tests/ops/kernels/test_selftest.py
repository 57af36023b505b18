"""The self-test: it finds wrong kernels, keeps what it found, and the operator refuses them."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gdn2.cli import main
from gdn2.layers import GatedDeltaNet2
from gdn2.ops import gated_delta_rule_2
from gdn2.ops.kernels import configs, launch, tables, verdicts
from gdn2.selftest import check as selftest
from gdn2.selftest import tune

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = selftest.Case("float32", 16, 16)
NAME = "float32, heads up to 128"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GDN2_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def forget():
    verdicts._remembered.cache_clear()
    configs.plan.cache_clear()


def call():
    q, k, v = torch.ones(3, 1, 4, 1, 16, device=DEVICE).unbind()
    return gated_delta_rule_2(q, k, v, None, None, None, backend="triton")[0]


def keep(verdict):
    verdicts.update(DEVICE, lambda _: verdict)


def found(run, number=0):
    return selftest.find(number, tables.H100_SHARED, run)


@pytest.mark.parametrize("change", [{}, {"projected": True}, {"cut": True, "group": 2}], ids=str)
def test_right_kernels_pass(change, monkeypatch):
    monkeypatch.setattr(selftest, "LONG", [20, 0, 17])
    monkeypatch.setattr(selftest, "MANY", [3, 0, 1])
    output, gradient, _ = selftest.measure(replace(SMALL, **change), DEVICE)
    assert 0 < output < 1e-5
    assert 0 < gradient < 5e-5


def test_a_wrong_gradient_is_found(monkeypatch):
    right = launch.backward

    def wrong(*args):
        dq, *rest = right(*args)
        dq[..., 1, :] *= 1.01  # one head of two
        return (dq, *rest)

    monkeypatch.setattr(selftest, "LONG", [9])
    monkeypatch.setattr(selftest, "MANY", [2])
    monkeypatch.setattr(launch, "backward", wrong)
    number = next(n for n, case in enumerate(selftest.CASES) if case.dtype == "float32")
    finding = found(lambda _: selftest.measure(SMALL, DEVICE), number)
    assert "d q is off by 1.0e-02" in finding.wrong


def test_a_wrong_step_of_one_token_is_found(monkeypatch):
    right = launch.step

    def wrong(*args):
        o = right(*args)
        o[:, 1] *= 1.01  # one head of two
        return o

    monkeypatch.setattr(selftest, "LONG", [9])
    monkeypatch.setattr(selftest, "MANY", [2])
    monkeypatch.setattr(launch, "step", wrong)
    output, _, _ = selftest.measure(SMALL, DEVICE)
    assert 0.009 < output < 0.011


@pytest.mark.parametrize("argument", ["state", "cu_seqlens"])
def test_a_layer_that_is_wrong_in_pieces_or_packed_is_found(argument, monkeypatch):
    right = GatedDeltaNet2.forward

    def wrong(self, x, state=None, cu_seqlens=None):
        y, after = right(self, x, state, cu_seqlens)
        here = (state if argument == "state" else cu_seqlens) is not None and x.dtype == torch.float32
        return (y * 1.01 if here else y), after

    monkeypatch.setattr(GatedDeltaNet2, "forward", wrong)
    output, _, _ = selftest.measure(selftest.LayerCase("float32"), torch.device("cpu"))
    assert 0.005 < output < 0.011


def test_layers_pass():
    for case in (selftest.LayerCase("float32"), selftest.StepCase("float32")):
        output, gradient, _ = selftest.measure(case, torch.device("cpu"))  # the torch path where there is no GPU
        assert output < 1e-5
        assert gradient < 5e-5


def test_a_case_that_crashes_or_is_not_a_number_is_wrong():
    def crash(number):
        raise subprocess.SubprocessError("an illegal memory access was encountered")

    assert found(crash).wrong == "an illegal memory access was encountered"
    assert "outputs are off by nan" in found(lambda _: (float("nan"), 0.0, "d q")).wrong
    assert "d q is off by inf" in found(lambda _: (0.0, float("inf"), "d q")).wrong
    assert found(lambda _: (0.0, 0.0, "d q")).wrong == ""


def test_what_was_found_wrong_is_refused_from_then_on(empty_cache):
    call()
    keep(verdicts.Verdict(True, {NAME: "d k is off by 0.54"}))
    with pytest.raises(ValueError, match=r"'float32, heads up to 128' are wrong on this GPU.*d k is off by 0\.54"):
        call()
    with configs.using({}):  # the self-test itself
        call()
    keep(verdicts.Verdict(True))
    call()
    assert len(json.loads((empty_cache / "kernels.json").read_text())) == 1


def test_tuned_configurations_are_used():
    config = replace(tables.INTERPRETED, chunk=32)
    keep(verdicts.Verdict(tuned={NAME: config}))
    assert configs.plan(torch.float32, DEVICE, 1, 16, 1, 16)[0] == config


def test_another_version_of_triton_has_no_verdict(monkeypatch):
    keep(verdicts.Verdict(True, {NAME: "wrong"}))
    monkeypatch.setattr(verdicts.triton, "__version__", "0")
    assert verdicts.load(DEVICE) == verdicts.Verdict()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[" * 100_000, "is not JSON"), (b"[]", "no JSON object")],
    ids=["half", "no text", "deep", "a list"],
)
def test_a_damaged_file_is_reported(content, words, empty_cache):
    (empty_cache / "kernels.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {"wrong": ["no pairs"]},
        {"tuned": {NAME: {"chunk": 16}}},
        {"tuned": {NAME: asdict(tables.INTERPRETED) | {"chunk": "16"}}},
        {"tuned": {NAME: asdict(tables.INTERPRETED) | {"scan": [16, 1]}}},
        {"tuned": {NAME: asdict(tables.INTERPRETED) | {"scan": 16}}},
    ],
    ids=str,
)
def test_an_entry_of_another_kind_is_reported(entry, empty_cache):
    (empty_cache / "kernels.json").write_text(json.dumps({verdicts._key(DEVICE): entry}))
    with pytest.raises(ValueError, match=r"is not from `gdn2 selftest`.*delete it"):
        call()


def test_every_configuration_of_every_gpu_has_a_case():
    for shared in (tables.H100_SHARED, tables.LEAST_SHARED):
        names = {case.name(shared) for case in selftest.CASES}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for bound, _, _ in tables.CONFIGS[dtype.itemsize]:
                assert configs.named_config(dtype, bound, bound, shared)[0] in names


def test_trials_change_one_kernel_each():
    (_, _, config), *_ = tables.CONFIGS[2]
    trials = list(tune.trials(config))
    assert len(set(trials)) == len(trials)
    assert all(getattr(config, field) != value for field, value in trials)


def test_tuning_keeps_what_is_right_and_faster(monkeypatch):
    refused = "float32, heads up to 256"
    keep(verdicts.Verdict(True, {refused: "d k is off by 0.54"}))
    (_, _, config), *_ = tables.CONFIGS[2]
    monkeypatch.setattr(
        tune, "named_config", lambda dtype, K, V, shared: (configs.named_config(dtype, K, V)[0], config)
    )

    best = replace(config, scan=(*config.scan[:2], 2))

    def wrong(work, tried, case):
        return "d q is off by 0.3" if tried.value != config.value else ""

    def raced(work, tried, right):
        assert not any(kernel == "value" for kernel, _ in right)
        return tune.race(times, tried, right)

    def times(least, tried):  # the last is within noise
        return tuple(2.0 - 0.5 * (x.scan == best.scan) - 0.001 * (x.key != config.key) for x in (least, tried))

    monkeypatch.setattr(tune, "_wrong", wrong)
    monkeypatch.setattr(tune, "_raced", raced)
    lines = "\n".join(tune.tune(DEVICE))
    assert f"{refused}: refused by the self-test, not tuned" in lines
    assert "d q is off by 0.3" in lines
    assert f"scan {best.scan}: 1.500 ms forward and backward, 0.750 of the best so far" in lines
    verdict = verdicts.load(DEVICE)
    assert verdict.wrong.keys() == {refused}
    assert verdict.checked
    quick = list(tune.tune(DEVICE, quick=True, jobs=2))
    assert quick[-1] == f"  best {best}"
    assert verdicts.load(DEVICE) == verdict
    tuned = ("bfloat16, heads up to 128", "bfloat16, heads up to 256", "float32, heads up to 128")
    assert verdict.tuned == dict.fromkeys(tuned, best)


def test_winners_that_are_wrong_together_in_any_case_are_not_kept(monkeypatch):
    (_, _, config), *_ = tables.CONFIGS[2]
    best = replace(config, scan=(*config.scan[:2], 2), key=(*config.key[:3], 1))
    held = []

    def wrong(work, tried, case):
        if tried == best:
            held.append(case)
        return "d k is off by 0.5" if tried == best and case.cut else ""

    monkeypatch.setattr(tune, "_wrong", wrong)
    monkeypatch.setattr(tune, "_raced", lambda work, tried, right: (best, []))
    monkeypatch.setattr(tune, "HEAD_SIZES", (128,))
    lines = list(tune.tune(DEVICE))
    for dtype in ("bfloat16", "float32"):
        cut = selftest.Case(dtype, cut=True)
        assert f"  together the winners are wrong, nothing is kept: {cut}: d k is off by 0.5" in lines
    assert set(held) == {
        case
        for case in selftest.CASES
        if isinstance(case, selftest.Case) and case.dtype != "float16" and max(case.K, case.V) <= 128
    }
    assert verdicts.load(DEVICE).tuned == {}


def test_the_selftest_checks_what_was_tuned_and_drops_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(verdicts, "_key", lambda device: "a GPU")
    tuned = {NAME: tables.INTERPRETED, "another": tables.INTERPRETED}
    keep(verdicts.Verdict(tuned=tuned))
    monkeypatch.setattr(selftest, "measure", lambda case, device, configs: list(configs))
    monkeypatch.setattr(sys, "argv", ["check", "0"])
    selftest.main()
    assert json.loads(capsys.readouterr().out) == list(tuned)
    case = next(n for n, case in enumerate(selftest.CASES) if case.name(tables.H100_SHARED) == NAME)
    monkeypatch.setattr(selftest, "_in_a_process", lambda number: (float(number == case), 0.0, ""))
    assert sum(bool(finding.wrong) for finding in selftest.selftest(DEVICE)) == 1
    verdict = verdicts.load(DEVICE)
    assert verdict.checked
    assert verdict.wrong.keys() == {NAME}
    assert verdict.tuned.keys() == {"another"}


def test_verdicts_that_are_kept_at_the_same_time_are_all_kept(monkeypatch, empty_cache):
    monkeypatch.setattr(verdicts, "_key", lambda device: f"GPU {device.index}")

    def keep(number):
        def change(verdict):
            time.sleep(0.02)
            return verdicts.Verdict(True)

        verdicts.update(torch.device("cuda", number), change)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(keep, range(8)))
    assert len(json.loads((empty_cache / "kernels.json").read_text())) == 8
    assert {file.name for file in empty_cache.iterdir()} == {"kernels.json", "kernels.lock"}


def test_without_a_home_folder_the_operator_runs_and_the_selftest_says_what_is_missing(monkeypatch, caplog):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GDN2_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    call()
    call()
    (record,) = caplog.records
    assert "GDN2_CACHE may name one" in record.message
    with pytest.raises(FileNotFoundError, match="GDN2_CACHE may name one"):
        next(selftest.selftest(DEVICE))


def test_a_trial_that_fails_in_its_process_is_wrong():
    (_, _, config), *_ = tables.CONFIGS[2]
    work = tune.Work("bfloat16, heads up to 128", "bfloat17", 128)
    assert "bfloat17" in tune._wrong(work, config, selftest.Case("bfloat17"))
    assert "bfloat17" in tune._raced(work, config, [])[1][0]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="no CUDA device")
def test_gpu_times_two_configurations():
    name, config = configs.named_config(torch.bfloat16, 128, 128, configs.shared_memory(DEVICE))
    work = tune.Work(name, "bfloat16", 128)
    assert tune._wrong(work, config, selftest.Case("bfloat16")) == ""
    kernel, value = next(tune.trials(config))
    best, (line,) = tune._raced(work, config, [(kernel, value)])
    assert best in (config, replace(config, **{kernel: value}))
    assert line.startswith(f"{kernel} {value}: ")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_the_command_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as leave:
        main(["selftest"])
    assert leave.value.code == 2
    assert "torch finds none here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("number", range(len(selftest.CASES)))
def test_gpu_passes(number):
    command = [sys.executable, "-m", "gdn2.selftest.check", str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    finding = found(lambda _: json.loads(done.stdout.splitlines()[-1]), number)
    assert finding.wrong == ""
