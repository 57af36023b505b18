"""The Triton kernels are held to the token-by-token reference in float64: outputs, final state, every gradient.

With a GPU they run there, else under the interpreter in float32. Tests marked `gpu` need the real thing.
"""

from dataclasses import replace

import pytest
import torch
from operands import DECAYS, assert_close, draw, relative, results

from gdn2.ops import gated_delta_rule_2
from gdn2.ops.kernels import chunks, configs, launch
from gdn2.ops.kernels.chunks import locate
from gdn2.ops.projected import rule_from_projections

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
# Relative L2 errors. float32: sums of a few hundred terms, each within 1e-7, in products of tf32 triples on the GPU.
# 16-bit: operands are rounded to 8 bits (0.2 % each, random), an output passes through three such products and a
# gradient through five; float16 tensors have bfloat16 operands.
BOUNDS = {torch.float32: (5e-6, 1e-5), torch.bfloat16: (5e-3, 1e-2), torch.float16: (5e-3, 1e-2)}


def by_kernels(*tensors, cu_seqlens=None, **options):
    """The rule on `DEVICE`; results come back to the CPU, where the reference's are."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(DEVICE)
    o, state = gated_delta_rule_2(*tensors, cu_seqlens=cu_seqlens, backend="triton", **options)
    return o.cpu(), state.cpu()


def on_device(operands, dtype, grad=True):
    """On `DEVICE` in `dtype`. Log-decay and state stay in float32, as the kernels' callers have them."""
    moved = operands.to(dtype, grad=False)
    for name, x in operands.tensors().items():
        kind = torch.float32 if name in ("log_decay", "initial_state") else dtype
        setattr(moved, name, x.detach().to(DEVICE, kind).requires_grad_(grad))
    return moved


def held_to_reference(operands, dtype=torch.float32, bounds=None, **options):
    ours = on_device(operands, dtype)
    # The reference sees the same rounded inputs, so that only the arithmetic is compared.
    rounded = operands.to(torch.float64)
    for name, x in ours.tensors().items():
        getattr(rounded, name).data = x.detach().double().cpu()
    expected = results(rounded, gated_delta_rule_2, backend="reference", **options)
    got = {name: x.cpu() for name, x in results(ours, by_kernels, **options).items()}
    output, gradient = bounds or BOUNDS[dtype]
    assert_close({n: got[n] for n in ("o", "state")}, {n: expected[n] for n in ("o", "state")}, output)
    # In the dtype of ours where that is float16: what is below 6e-8 is nothing there.
    expected = {n: x.half() if got[n].dtype == torch.float16 else x for n, x in expected.items()}
    assert_close(got, {n: x for n, x in expected.items() if n.startswith("d ")}, gradient)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 50])
def test_kernels_match_recurrent_for_any_length(T):
    held_to_reference(draw(B=1, T=T, H=1, K=16, V=16))


@pytest.mark.parametrize(
    ("H", "HV", "K", "V"), [(1, 1, 12, 20), (1, 2, 24, 16), (2, 2, 16, 40), (2, 2, 48, 16), (2, 2, 16, 48)]
)
def test_kernels_match_recurrent_for_any_heads(H, HV, K, V):
    held_to_reference(draw(B=2, T=20, H=H, HV=HV, K=K, V=V))


@pytest.mark.parametrize("decay", DECAYS)
def test_kernels_are_exact_for_every_decay(decay):
    held_to_reference(draw(B=1, T=36, H=1, K=16, V=16, decay=decay))


@pytest.fixture
def chunks_of_64():
    """As on a GPU, where the interpreter takes 16: the inverse doubles its blocks twice more."""
    name, config = configs.named_config(torch.float32, 16, 16, configs.shared_memory(torch.device(DEVICE)))
    with configs.using({name: replace(config, chunk=64)} if DEVICE == "cpu" else {}):
        yield


@pytest.mark.usefixtures("chunks_of_64")
@pytest.mark.parametrize("decay", ["layer", "-5", "mixed"])
def test_long_chunks_match_recurrent(decay):
    held_to_reference(draw(B=1, T=100, H=1, K=16, V=16, decay=decay))


@pytest.mark.parametrize("missing", ["log_decay", "erase", "write", "initial_state"])
def test_kernels_match_recurrent_without(missing):
    operands = draw(B=1, T=36, H=1, K=16, V=16)
    setattr(operands, missing, None)
    held_to_reference(operands)


def test_gates_shared_by_the_channels_match_recurrent():
    operands = draw(B=1, T=36, H=1, HV=2, K=24, V=24)
    for name in ("log_decay", "erase", "write"):
        setattr(operands, name, getattr(operands, name)[..., :1])
    held_to_reference(operands)


@pytest.mark.parametrize("erase", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("write", [0.0, 1.0])
def test_identical_keys_without_decay_match_recurrent(erase, write):
    operands = draw(B=1, T=36, H=1, K=16, V=16, decay="none")
    operands.k = operands.k[:, :1].expand_as(operands.k)
    operands.erase.fill_(erase)
    operands.write.fill_(write)
    # Without erasing, one key is written 36 times and read 36 times: gradients are sums that large.
    held_to_reference(operands, bounds=(5e-6, 5e-5))


def test_a_write_gate_may_be_wider_than_the_values():
    operands = draw(B=1, T=20, H=1, HV=2, K=16, V=16)
    call = {name: getattr(operands, name).to(torch.bfloat16) for name in ("q", "k", "v", "erase")}
    call |= {name: getattr(operands, name).float() for name in ("log_decay", "write")}
    with torch.no_grad():
        o, _ = gated_delta_rule_2(**{name: x.to(DEVICE) for name, x in call.items()}, backend="triton")
    expected, _ = gated_delta_rule_2(**{name: x.double() for name, x in call.items()}, backend="reference")
    assert relative(o.cpu(), expected) < 5e-3


def test_descriptors_are_of_whole_heads_at_aligned_addresses():
    x = torch.zeros(1, 32, 2, 64)
    assert launch._tiles(x, 16, 16).block_shape == [16, 16]
    assert launch._tiles(torch.zeros(1, 32, 2, 48), 16, 16).shape[-1] == 48  # padded to 64: read by pointers
    assert launch._tiles(torch.zeros(1, 32, 2, 24), 16, 16).shape[-1] == 24
    shifted = torch.zeros(x.numel() + 1)[1:].view_as(x)
    assert launch._tiles(shifted, 16, 16) is shifted
    assert launch._tiles(None, 16, 16) is None


@pytest.mark.parametrize("bounds", [[0, 20, 50], [0, 10, 20], [5, 40], [0, 30, 20, 40]])
def test_offsets_that_do_not_fit_are_named_and_touch_no_other_memory(bounds):
    operands = draw(B=1, T=40, H=1, K=16, V=16, N=len(bounds) - 1).to(torch.float32)
    with pytest.raises(ValueError, match="expected non-decreasing offsets from 0 to T = 40"):
        operands.call(gated_delta_rule_2, cu_seqlens=torch.tensor(bounds), backend="triton")
    chunks, spans, _ = locate(operands.k, torch.tensor(bounds), 16, 0)  # as offsets that stay on a GPU come
    assert bool((chunks.token[chunks.length > 0] >= 0).all())
    assert bool((chunks.token + chunks.length)[chunks.length > 0].le(40).all())
    assert spans.start.min() >= 0
    assert spans.start.max() <= 40
    assert spans.first.max() <= len(chunks.token)


def test_packed_sequences_match_recurrent():
    cu_seqlens = torch.tensor([0, 0, 17, 20, 36, 36, 40])
    held_to_reference(draw(B=1, T=40, H=1, HV=2, K=16, V=16, N=6), cu_seqlens=cu_seqlens)


@pytest.fixture
def few_heads_are_cut():
    """Sequences are cut into segments of two chunks, whatever their length."""
    with configs.using({}, segment=2):
        yield


@pytest.mark.usefixtures("few_heads_are_cut")
@pytest.mark.parametrize("missing", ["nothing", "log_decay", "erase", "initial_state"])
def test_segments_match_recurrent(missing):
    operands = draw(B=2, T=100, H=1, HV=2, K=24, V=20)
    setattr(operands, missing, None)
    held_to_reference(operands)


@pytest.mark.usefixtures("few_heads_are_cut")
def test_segments_of_packed_sequences_match_recurrent():
    cu_seqlens = torch.tensor([0, 0, 70, 73, 105, 105, 106])
    held_to_reference(draw(B=1, T=106, H=1, K=16, V=16, N=6), cu_seqlens=cu_seqlens)


def test_only_few_heads_and_long_sequences_are_cut():
    config, s = configs.plan(torch.bfloat16, torch.device("cpu"), 4, 16, 4, 16)
    chunks = 65536 // config.chunk
    length = configs.segment_length(config, chunks, 1, s)
    assert configs.SHORT <= length < chunks
    assert configs.segment_length(config, 64 * chunks, 64, s) == 0  # heads enough
    assert configs.segment_length(config, 8, 1, s) == 0  # short
    assert configs.segment_length(config, 0, 0, s) == 0


def test_packed_sequences_match_separate_ones_bit_for_bit():
    operands = on_device(draw(B=1, T=40, H=1, K=16, V=16, N=2), torch.float32, grad=False)
    packed, state = operands.call(by_kernels, cu_seqlens=torch.tensor([0, 23, 40]))
    for n, span in enumerate((slice(0, 23), slice(23, 40))):
        tensors = operands.tensors()
        initial_state = tensors.pop("initial_state")[n : n + 1]
        alone = [x[:, span] for x in tensors.values()]
        o, s = by_kernels(*alone, initial_state=initial_state, output_final_state=True)
        assert torch.equal(packed[:, span], o)
        assert torch.equal(state[n : n + 1], s)


def test_no_tokens_leave_the_state_as_it_was():
    operands = on_device(draw(B=2, T=0, H=1, K=16, V=16), torch.float32)
    o, state = operands.call(by_kernels)
    assert o.shape == (2, 0, 1, 16)
    assert torch.equal(state, operands.initial_state.cpu())
    (d_state,) = torch.autograd.grad(state.sum(), [operands.initial_state])
    assert torch.equal(d_state, torch.ones_like(d_state))


@pytest.fixture
def unusual_defaults():
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("segment", [0, 1])
def test_defaults_of_torch_change_nothing(segment, request):
    def call():
        leaves = [x.detach().requires_grad_() for x in tensors]
        with configs.using({}, segment):
            o, state = rule_from_projections(*leaves[:8], initial_state=leaves[8], **options)
        return [o, state, *torch.autograd.grad([o.sum(), state.sum()], leaves)]

    x = on_device(draw(B=1, T=41, H=1, K=16, V=16), torch.float32, grad=False)
    rate, delta = (torch.linspace(-1, 0, n, device=DEVICE) for n in (1, 16))
    tensors = x.q, x.k, x.v, x.log_decay, x.erase, x.write, rate, delta, x.initial_state
    options = {"output_final_state": True, "backend": "triton"}
    expected = call()
    chunks._equal.cache_clear()
    request.getfixturevalue("unusual_defaults")
    for a, b in zip(call(), expected):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("missing", ["", "log_decay", "erase", "write"])
def test_inference_gives_what_training_gives(missing):
    x = on_device(draw(B=1, T=36, H=1, HV=2, K=16, V=24), torch.float32, grad=False)
    if missing:
        setattr(x, missing, None)
    args = (x.q, x.k, x.v, x.log_decay, x.erase, x.write, 0.25, x.initial_state, None, True)
    o, state, residuals = launch.forward(*args, True)
    o_, state_, nothing = launch.forward(*args, False)
    assert nothing == ()
    assert torch.equal(o, o_)
    assert torch.equal(state, state_)
    specs = launch.residual_specs(x.k, x.v, x.erase, None)
    assert [(tuple(r.shape), r.dtype) for r in residuals] == specs


def test_strided_inputs_match_contiguous_ones():
    x = on_device(draw(B=1, T=20, H=2, K=16, V=16), torch.float32, grad=False)
    o, _ = x.call(by_kernels)
    x.q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    x.write = x.write.repeat(1, 1, 1, 2)[..., :16]
    assert torch.equal(x.call(by_kernels)[0], o)


def test_steps_match_a_whole_sequence():
    x = on_device(draw(B=2, T=5, H=1, HV=2, K=12, V=20), torch.float32, grad=False)
    o, state = x.call(by_kernels)
    pool = torch.zeros(4, *x.initial_state.shape[1:], device=DEVICE)
    slots = torch.tensor([3, 1], device=DEVICE)
    pool[slots] = x.initial_state
    gates = (x.q, x.k, x.v, x.log_decay, x.erase, x.write)
    for t in range(5):
        o_t = launch.step(*(g[:, t] for g in gates), 12**-0.5, pool, slots)
        assert relative(o_t.cpu(), o[:, t]) < 5e-6  # float32 rounding, twice
    assert relative(pool[slots].cpu(), state) < 5e-6
    assert torch.equal(pool[[0, 2]], torch.zeros_like(pool[[0, 2]]))


def test_a_step_without_gates_adds_to_the_state():
    x = on_device(draw(B=2, T=1, H=1, K=16, V=16), torch.float32, grad=False)
    state = x.initial_state.clone()
    o = launch.step(x.q[:, 0], x.k[:, 0], x.v[:, 0], None, None, None, 1.0, state)
    expected = x.initial_state + x.k[:, 0].unsqueeze(-1) * x.v[:, 0].unsqueeze(-2)
    assert relative(state, expected) < 1e-6  # one float32 product and sum
    assert relative(o, torch.einsum("bhkv,bhk->bhv", expected, x.q[:, 0])) < 1e-6


def test_unsupported_inputs_are_refused():
    x = on_device(draw(B=1, T=2, H=1, K=16, V=16), torch.float32, grad=False)
    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32 tensors, not torch\.float64"):
        configs.named_config(torch.float64, 16, 16)
    with pytest.raises(ValueError, match=r"head sizes from 1 to 256, not K = 257, V = 16"):
        configs.named_config(torch.float32, 257, 16)
    with pytest.raises(ValueError, match=r"state is torch\.float16 .*; expected contiguous float32"):
        launch.step(x.q[:, 0], x.k[:, 0], x.v[:, 0], None, None, None, 1.0, x.initial_state.half())
    with pytest.raises(ValueError, match=r"need 101376 bytes of shared memory a program; this GPU has 65536"):
        configs.named_config(torch.float32, 16, 16, shared=65536)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("decay", DECAYS)
def test_gpu_is_exact_for_every_decay(decay, dtype):
    held_to_reference(draw(B=1, T=200, H=2, K=128, V=128, decay=decay), dtype)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("HV", "K", "V"), [(2, 16, 16), (2, 48, 64), (4, 60, 100), (2, 128, 256), (2, 256, 64), (2, 256, 256), (2, 192, 96)]
)
def test_gpu_matches_recurrent_for_any_heads(HV, K, V, dtype):
    held_to_reference(draw(B=1, T=150, H=2, HV=HV, K=K, V=V), dtype)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
def test_gpu_wide_tiles_of_a_scan_are_exact_over_several_chunks(dtype):
    held_to_reference(draw(B=20, T=150, H=2, K=128, V=128), dtype)  # 80 programs


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("missing", ["log_decay", "erase", "write", "initial_state"])
def test_gpu_matches_recurrent_without(missing, dtype):
    operands = draw(B=2, T=150, H=2, HV=4, K=64, V=128)
    setattr(operands, missing, None)
    held_to_reference(operands, dtype)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("lengths", [[200], [100, 0, 3, 97]], ids=str)
@pytest.mark.parametrize(("HV", "K", "V"), [(2, 64, 64), (4, 60, 100), (2, 128, 128), (2, 256, 256)])
def test_gpu_inference_matches_recurrent(HV, K, V, lengths, dtype):
    drawn = draw(B=1, T=200, H=2, HV=HV, K=K, V=V, N=len(lengths))
    x, cu_seqlens = on_device(drawn, dtype, grad=False), torch.tensor([0, *lengths]).cumsum(0)
    o, state = x.call(by_kernels, cu_seqlens=cu_seqlens)
    rounded = drawn.to(torch.float64, grad=False)
    for name, tensor in x.tensors().items():
        setattr(rounded, name, tensor.double().cpu())
    expected = rounded.call(gated_delta_rule_2, backend="reference", cu_seqlens=cu_seqlens)
    assert_close({"o": o, "state": state}, dict(zip(("o", "state"), expected)), BOUNDS[dtype][0])


@needs_gpu
@pytest.mark.gpu
def test_gpu_gives_the_same_bits_twice():
    operands = draw(B=2, T=300, H=2, K=128, V=128)
    once, twice = (results(on_device(operands, torch.bfloat16), by_kernels) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@needs_gpu
@pytest.mark.gpu
def test_gpu_packs_thousands_of_documents():
    lengths = torch.arange(6000) % 9  # empty ones too; 96,000 programs of a scan
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    x = on_device(draw(B=1, T=int(lengths.sum()), H=16, K=16, V=16, N=6000), torch.bfloat16, grad=False)
    o, state = x.call(by_kernels, cu_seqlens=cu_seqlens)
    tensors = x.tensors()
    initial_state = tensors.pop("initial_state")[5999:]
    start = int(cu_seqlens[5999])
    last, s = by_kernels(
        *(t[:, start:] for t in tensors.values()), initial_state=initial_state, output_final_state=True
    )
    assert torch.equal(o[:, start:], last)
    assert torch.equal(state[5999:], s)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("most_of_the_memory")
def test_gpu_reaches_beyond_2_to_the_31_elements():
    H, K, tail = 16, 128, 100
    T = 2**31 // (H * K) + tail
    torch.manual_seed(0)
    q, k, v = (0.1 * torch.randn(1, T, H, d, device=DEVICE, dtype=torch.bfloat16) for d in (K, K, 16))
    cu_seqlens = torch.tensor([0, T - tail, T], device=DEVICE)
    o, _, _ = launch.forward(q, k, v, None, None, None, 1.0, None, cu_seqlens, False, False)
    alone, _, _ = launch.forward(*(x[:, -tail:] for x in (q, k, v)), None, None, None, 1.0, None, None, False, False)
    assert torch.equal(o[:, -tail:], alone)
