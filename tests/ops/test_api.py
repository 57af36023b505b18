"""What the operator refuses, and the words it uses."""

import logging

import numpy as np
import pytest
import torch
from operands import draw

from gdn2.ops import api, debug_checks, gated_delta_rule_2


def changed(name, value, **draw_options):
    operands = draw(**draw_options).to(torch.float32, grad=False)
    setattr(operands, name, value)
    return operands


WRONG = {
    "q rank": ("q", torch.zeros(2, 70, 12), r"q has shape \[2, 70, 12\]; expected 4 axes"),
    "q channels": ("q", torch.zeros(2, 70, 2, 13), r"q has shape \[2, 70, 2, 13\]; expected \[2, 70, 2, 12\]"),
    "q tokens": ("q", torch.zeros(2, 71, 2, 12), r"q has shape \[2, 71, 2, 12\]; expected \[2, 70, 2, 12\]"),
    "v heads": (
        "v",
        torch.zeros(2, 70, 3, 20),
        r"v has shape \[2, 70, 3, 20\]; expected \[2, 70, a multiple of 2, V\]",
    ),
    "no channels": ("v", torch.zeros(2, 70, 2, 0), r"v \[2, 70, 2, 0\]; expected at least one head and one channel"),
    "decay": ("log_decay", torch.zeros(2, 70, 2), r"log_decay has shape \[2, 70, 2\]; expected \[2, 70, 2, 12 or 1\]"),
    "erase": ("erase", torch.zeros(2, 70, 2, 20), r"erase has shape .*; expected \[2, 70, 2, 12 or 1\]"),
    "write": ("write", torch.zeros(2, 70, 2, 12), r"write has shape .*; expected \[2, 70, 2, 20 or 1\]"),
    "state": ("initial_state", torch.zeros(2, 2, 20, 12), r"initial_state has shape .*; expected \[2, 2, 12, 20\]"),
    "dtype": ("q", torch.zeros(2, 70, 2, 12, dtype=torch.int64), "q has dtype torch.int64; expected float64, float32"),
    "float8": ("erase", torch.zeros(2, 70, 2, 12).to(torch.float8_e4m3fn), "erase has dtype torch.float8_e4m3fn"),
    "mixed": (
        "k",
        torch.zeros(2, 70, 2, 12).double(),
        "k has dtype torch.float64 and v torch.float32; expected float64",
    ),
    "device": ("q", torch.zeros(2, 70, 2, 12, device="meta"), "q is on meta; expected cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tensor_that_does_not_fit_is_named(case):
    name, value, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        changed(name, value).call(gated_delta_rule_2)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 3, 71], r"cu_seqlens is \[0, 3, 71\]; expected non-decreasing offsets from 0 to T = 70"),
        ([1, 70], r"cu_seqlens is \[1, 70\]"),
        ([0, 50, 40, 70], r"cu_seqlens is \[0, 50, 40, 70\]"),
        ([0, *range(1, 20), 69], r"cu_seqlens is \[0, 1, 2, 3, \.\.\., 69\]"),
        ([[0, 70]], r"cu_seqlens has shape \[1, 2\].*; expected \[N \+ 1\], int32 or int64"),
        ([], r"cu_seqlens has shape \[0\]"),
        ([0.0, 70.0], r"dtype torch.float32; expected \[N \+ 1\], int32 or int64"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_offsets_that_do_not_fit_are_shown(bounds, message, backend):
    cu_seqlens = torch.tensor(bounds) if bounds else torch.tensor([], dtype=torch.int64)
    operands = draw(B=1).to(torch.float32)
    operands.initial_state = None
    with pytest.raises(ValueError, match=message):
        operands.call(gated_delta_rule_2, cu_seqlens=cu_seqlens, backend=backend)


def test_offsets_that_are_no_tensor_are_refused():
    x = draw(B=1).to(torch.float32, grad=False)
    with pytest.raises(ValueError, match=r"cu_seqlens is a list; expected a tensor \[N \+ 1\], int32 or int64"):
        x.call(gated_delta_rule_2, cu_seqlens=[0, 70])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_scale_is_a_number(backend):
    x = draw().to(torch.float32, grad=False)
    expected, _ = x.call(gated_delta_rule_2, scale=2.0, backend=backend)
    for number in (2, np.float32(2)):
        assert torch.equal(x.call(gated_delta_rule_2, scale=number, backend=backend)[0], expected)
    for other, name in ((torch.tensor(2.0, requires_grad=True), "Tensor"), ("2", "str")):
        with pytest.raises(ValueError, match=rf"scale is a {name}; expected a number, or None for K \*\* -0\.5"):
            x.call(gated_delta_rule_2, scale=other, backend=backend)


def test_offsets_on_another_device_are_refused():
    x = draw(B=1).to(torch.float32)
    x.initial_state = None
    with pytest.raises(ValueError, match="cu_seqlens is on meta; expected cpu, the device of v, or cpu"):
        x.call(gated_delta_rule_2, cu_seqlens=torch.tensor([0, 70], device="meta"))


def test_packing_needs_a_single_row():
    with pytest.raises(ValueError, match="B is 2; expected B = 1"):
        draw(B=2).to(torch.float32).call(gated_delta_rule_2, cu_seqlens=torch.tensor([0, 70]))


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of auto, reference, torch, triton"):
        draw().to(torch.float32).call(gated_delta_rule_2, backend="cuda")


@pytest.mark.parametrize("bad", [0.5, float("nan"), float("inf")])
def test_a_positive_log_decay_is_refused_in_debug_only(bad):
    operands = changed("log_decay", draw().log_decay.float())
    operands.log_decay[1, 3, 1, 2] = bad
    operands.call(gated_delta_rule_2)
    with debug_checks(), pytest.raises(ValueError, match=f"log_decay holds {bad}; expected nats <= 0"):
        operands.call(gated_delta_rule_2)
    with debug_checks(), debug_checks(False):
        operands.call(gated_delta_rule_2)


def test_auto_says_once_which_backend_runs(caplog, monkeypatch):
    monkeypatch.setattr(api, "_announced", set())
    with caplog.at_level(logging.INFO, logger="gdn2"):
        for _ in range(3):
            draw(T=1).to(torch.float32).call(gated_delta_rule_2)
    assert caplog.messages == ["backend 'auto' on cpu: torch"]
