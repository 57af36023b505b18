"""The chunkwise operator is held to the token-by-token reference in float64: outputs, final state, every gradient."""

import itertools

import pytest
import torch
from operands import DECAYS, assert_close, draw, relative, results

from gdn2.ops import chunk_torch, gated_delta_rule_2

# Both sides are float64 and differ only in the order of sums: a few hundred of them, each within 1e-16.
EXACT = 1e-13


def held_to_reference(operands, dtype=torch.float64, bound=EXACT, **options):
    # The reference sees the same rounded inputs, so that only the arithmetic is compared.
    rounded = operands.to(dtype, grad=False).to(torch.float64)
    expected = results(rounded, gated_delta_rule_2, backend="reference", **options)
    assert_close(results(operands.to(dtype), gated_delta_rule_2, backend="torch", **options), expected, bound)


def subsets(names):
    """Every choice of one or more of `names`."""
    return [list(c) for n in range(1, len(names) + 1) for c in itertools.combinations(names, n)]


@pytest.mark.parametrize("T", [1, 2, 3, 5, 31, 63, 64, 65, 127, 128, 129, 200])
def test_chunk_matches_recurrent_for_any_length(T):
    held_to_reference(draw(T=T))


@pytest.mark.parametrize(
    ("H", "HV", "K", "V"), [(1, 1, 1, 1), (2, 2, 16, 16), (3, 3, 7, 5), (2, 6, 8, 12), (1, 4, 60, 100)]
)
def test_chunk_matches_recurrent_for_any_heads(H, HV, K, V):
    held_to_reference(draw(H=H, HV=HV, K=K, V=V))


@pytest.mark.parametrize("decay", DECAYS)
def test_chunk_is_exact_for_every_decay(decay):
    held_to_reference(draw(T=150, decay=decay))


@pytest.mark.parametrize("missing", subsets(["log_decay", "erase", "write", "initial_state"]), ids="+".join)
def test_chunk_matches_recurrent_without(missing):
    operands = draw()
    for name in missing:
        setattr(operands, name, None)
    held_to_reference(operands)


@pytest.mark.parametrize("shared", subsets(["log_decay", "erase", "write"]), ids="+".join)
def test_gates_shared_by_the_channels_match_recurrent(shared):
    operands = draw(HV=4)
    for name in shared:
        setattr(operands, name, getattr(operands, name)[..., :1])
    held_to_reference(operands)


@pytest.mark.parametrize("erase", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("write", [0.0, 1.0])
def test_gates_at_their_ends_match_recurrent(erase, write):
    operands = draw()
    operands.erase.fill_(erase)
    operands.write.fill_(write)
    held_to_reference(operands)


@pytest.mark.parametrize("erase", [1.0, 2.0])
def test_one_key_repeated_without_decay_stays_exact(erase):
    operands = draw(T=130, decay="none")
    operands.k.copy_(operands.k[:, :1].expand_as(operands.k))
    operands.erase.fill_(erase)
    # With erase 2 every step is a reflection, so errors neither shrink nor grow: still only rounding.
    held_to_reference(operands)


def test_zero_vectors_give_finite_gradients():
    operands = draw()
    for x in (operands.q, operands.k, operands.v):
        x[:, ::3] = 0
    held_to_reference(operands)


@pytest.mark.parametrize("bounds", [[0, 70], [0, 1, 2, 70], [0, 64, 70], [0, 0, 3, 3, 67, 70, 70], [0] * 3 + [70]])
def test_packed_matches_recurrent(bounds):
    cu_seqlens = torch.tensor(bounds)
    held_to_reference(draw(B=1, HV=4, N=len(bounds) - 1), cu_seqlens=cu_seqlens)


def test_packed_matches_separate():
    bounds = [0, 5, 5, 69, 70, 170]
    packed = draw(B=1, T=170, N=5).to(torch.float64)
    o, states = packed.call(gated_delta_rule_2, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone = draw(B=1, T=170, N=5).to(torch.float64)
        for name in ("q", "k", "v", "log_decay", "erase", "write"):
            setattr(alone, name, getattr(alone, name)[:, start:end])
        alone.initial_state = alone.initial_state[n : n + 1]
        o_n, state_n = alone.call(gated_delta_rule_2)
        assert relative(o[:, start:end], o_n) < EXACT or start == end
        assert relative(states[n : n + 1], state_n) < EXACT


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 129])
def test_split_sequence_matches_whole(cut):
    whole = draw(T=130).to(torch.float64)
    expected = results(whole, gated_delta_rule_2)

    def in_two(q, k, v, g, b, w, initial_state, output_final_state):
        first, second = ([x[:, :cut] for x in (q, k, v, g, b, w)], [x[:, cut:] for x in (q, k, v, g, b, w)])
        o1, state = gated_delta_rule_2(*first, initial_state=initial_state, output_final_state=True)
        o2, state = gated_delta_rule_2(*second, initial_state=state, output_final_state=output_final_state)
        return torch.cat((o1, o2), dim=1), state

    assert_close(results(whole, in_two), expected, EXACT)


@pytest.mark.parametrize("bounds", [None, [0, 9, 9, 230, 300]])
def test_segments_match_recurrent(bounds, monkeypatch):
    monkeypatch.setattr(chunk_torch, "SEGMENT", 128)  # rows: one or two steps of the scan
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    held_to_reference(draw(B=2 if bounds is None else 1, T=300, N=4 if bounds else None), **options)


def test_no_tokens_return_the_initial_state():
    operands = draw(T=0).to(torch.float64)
    o, state = operands.call(gated_delta_rule_2)
    assert o.shape == (2, 0, 2, 20)
    assert torch.equal(state, operands.initial_state)
    (gradient,) = torch.autograd.grad(state.sum(), operands.initial_state)
    assert torch.equal(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_sequences_give_nothing(backend):
    operands = draw(B=1, T=0, N=1).to(torch.float64)
    operands.initial_state = None
    o, state = operands.call(gated_delta_rule_2, cu_seqlens=torch.tensor([0]), backend=backend)
    assert o.shape == (1, 0, 2, 20)
    assert state.shape == (0, 2, 12, 20)


def test_final_state_comes_only_when_asked_for():
    operands = draw()
    _, state = gated_delta_rule_2(*list(operands.tensors().values())[:6])
    assert state is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_without_gradients_match_whole(dtype):
    operands = draw(T=40, HV=4).to(dtype, grad=False)
    o, state = operands.call(gated_delta_rule_2)
    S, steps = operands.initial_state, []
    for t in range(40):
        token = [x[:, t : t + 1] for name, x in operands.tensors().items() if name != "initial_state"]
        o_t, S = gated_delta_rule_2(*token, initial_state=S, output_final_state=True)
        steps.append(o_t)
    bound = EXACT if dtype == torch.float64 else 2e-4  # rare flips in the last rounding of o to bf16
    assert relative(torch.cat(steps, dim=1), o) < bound
    assert relative(S, state) < 1e-6


@pytest.mark.parametrize("decay", ["layer", "mixed", "-inf"])
def test_float32_is_accurate_to_its_rounding(decay):
    # 300 tokens in chunks: a few hundred float32 roundings of 6e-8, adding up like a random walk.
    held_to_reference(draw(T=300, K=64, V=64, decay=decay), torch.float32, bound=2e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_half_precision_rounds_inputs_and_outputs_only(dtype, bound):
    # Sums and state are float32, so all that remains is the last rounding of outputs and gradients: 2^-9 and 2^-12.
    held_to_reference(draw(T=130, K=32, V=32), dtype, bound=bound)


def test_half_precision_takes_a_float32_log_decay_and_keeps_a_float32_state():
    operands = draw().to(torch.bfloat16)
    operands.log_decay = operands.log_decay.detach().float().requires_grad_()
    o, state = operands.call(gated_delta_rule_2)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    (o.float().sum() + state.sum()).backward()
    assert (operands.log_decay.grad.dtype, operands.k.grad.dtype) == (torch.float32, torch.bfloat16)


def test_strided_and_expanded_inputs_match_their_copies():
    plain = draw(HV=4)
    plain.erase = plain.erase[..., :1].expand_as(plain.erase)
    plain.write = plain.write[:1, :1].expand_as(plain.write)
    plain.log_decay = plain.log_decay[:, :, :1, :1].expand_as(plain.log_decay)
    for name in ("q", "k", "v", "initial_state"):
        x = getattr(plain, name)
        setattr(plain, name, x.transpose(-1, -2).contiguous().transpose(-1, -2))
    strided = draw()
    for name, x in plain.tensors().items():
        setattr(strided, name, x.detach().requires_grad_())
    assert strided.erase.stride(-1) == 0
    expected = results(plain.to(torch.float64), gated_delta_rule_2, backend="reference")
    assert_close(results(strided, gated_delta_rule_2), expected, EXACT)


def test_strided_inputs_are_copied_once_and_not_for_every_segment():
    x = draw()
    strided = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in x.tensors().items() if t.ndim == 4}
    strided["erase"] = x.erase[..., :1].transpose(1, 2).contiguous().transpose(1, 2).expand_as(x.erase)
    del strided["initial_state"]
    inputs = chunk_torch.Inputs(**strided, scale=1.0).tensors()
    assert inputs.pop("erase")[..., :1].is_contiguous()
    assert all(t.is_contiguous() for t in inputs.values())


@pytest.mark.parametrize(("T", "decay"), [(6, "layer"), (6, "mixed"), (70, "layer")])
def test_gradients_pass_gradcheck(T, decay):
    operands = draw(B=1, T=T, H=1, HV=2, K=2, V=2, decay=decay)
    if decay == "mixed":  # a step of 1e-6 must not cross g = 0
        operands.log_decay.clamp_(max=-1e-3)
    tensors = list(operands.to(torch.float64).tensors().values())

    def call(*x):
        return gated_delta_rule_2(*x[:6], initial_state=x[6], output_final_state=True, backend="torch")

    assert torch.autograd.gradcheck(call, tensors)


def test_no_work_grows_with_chunk_squared_times_channels():
    # A [C, C, K] tensor for every chunk would take 64 times the memory of k. The profiler sees each allocation.
    operands = draw(B=1, T=8192, H=1, K=256, V=16).to(torch.float32)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        results(operands, gated_delta_rule_2)
    assert any("chunk_backward" in event.name for event in profile.events())
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * operands.k.numel() * 4


def test_same_inputs_give_the_same_bits():
    first, second = (results(draw(T=130).to(torch.float32), gated_delta_rule_2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
