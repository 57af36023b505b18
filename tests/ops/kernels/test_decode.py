"""The fused decoding step is held to the layer's torch path in float64; under the interpreter without a GPU."""

import pytest
import torch
from operands import assert_close

from gdn2.layers import DeltaState, GatedDeltaNet2
from gdn2.ops.kernels import decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "conv_q", "conv_k", "conv_v", "memory")
# Relative L2. float32: sums of a few hundred products. 16 bits: y is rounded once, to 8 bits (bfloat16: within 2^-8,
# and the interpreter truncates) or to 11; the state is not.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}


class Step:
    """A layer, one token of N sequences and their state, in float64; and the same rounded to `dtype` for the kernel."""

    def __init__(self, N=2, H=2, HV=2, K=16, V=16, width=4, negative=False, dtype=torch.float32, memory=torch.float32):
        torch.manual_seed(0)
        layer = GatedDeltaNet2(8, H, HV, K, V, width, negative, norm_eps=1e-4).double()
        for p in (layer.norm.weight, layer.conv_q, layer.conv_k, layer.conv_v):
            torch.nn.init.normal_(p)
        layer.out_proj = torch.nn.Identity()
        keys, values = H * K, HV * V
        normal = lambda *s, to=dtype: torch.randn(*s, dtype=torch.float64).to(to).to(DEVICE)  # noqa: E731
        widths = (keys, keys, values, keys, keys, values, values)
        self.token = decode.Token(*(normal(N, w) for w in widths))
        tails = [normal(N, width - 1, w) for w in widths[:3]]
        self.state = decode.State(*tails, normal(N, HV, K, V, to=memory))
        decay = layer.gates.decay
        self.weights = decode.Weights(
            *(p.detach().to(DEVICE, torch.float32)
              for p in (layer.conv_q, layer.conv_k, layer.conv_v, decay.rate, decay.delta, layer.norm.weight))
        )  # fmt: skip
        self.options = {"scale": K**-0.5, "largest_erase": layer.gates.largest_erase, "norm_eps": layer.norm.eps}
        self.layer = layer

    @torch.no_grad()
    def expected(self):
        """By the layer, its parameters and projections replaced by the step's own."""
        layer, token = self.layer, [t.double().cpu().unsqueeze(1) for t in self.token]
        decay = layer.gates.decay
        for p, w in zip(
            (layer.conv_q, layer.conv_k, layer.conv_v, decay.rate, decay.delta, layer.norm.weight), self.weights
        ):
            p.copy_(w)
        fixed = lambda x: lambda _: x  # noqa: E731
        layer.q_proj.forward, layer.k_proj.forward, layer.v_proj.forward = map(fixed, token[:3])
        decay.projection.forward, layer.gates.erase.forward, layer.gates.write.forward = map(fixed, token[3:6])
        layer.output_gate.forward = fixed(token[6])
        x = torch.zeros(token[0].shape[0], 1, 8, dtype=torch.float64)
        y, state = layer(x, DeltaState(*(t.double().cpu() for t in self.state)))
        return dict(zip(NAMES, (y.squeeze(1), *state)))

    def hold(self):
        y, state = decode.decode(self.token, self.weights, self.state, **self.options)
        got, expected = dict(zip(NAMES, (y.cpu(), *(t.cpu() for t in state)))), self.expected()
        assert_close({"y": got.pop("y")}, {"y": expected.pop("y")}, BOUNDS[y.dtype])
        assert_close({"memory": got["memory"]}, {"memory": expected["memory"]}, BOUNDS[got["memory"].dtype])
        for name in ("conv_q", "conv_k", "conv_v"):
            assert torch.equal(got[name].double(), expected[name])


@pytest.mark.parametrize(("H", "HV", "K", "V"), [(1, 1, 1, 3), (2, 2, 16, 16), (2, 4, 12, 20)])
def test_step_matches_the_layer_for_any_heads(H, HV, K, V):
    Step(3, H, HV, K, V).hold()


@pytest.mark.parametrize("width", [1, 2, 5])
def test_step_matches_the_layer_for_any_width(width):
    Step(width=width).hold()


def test_step_matches_the_layer_with_negative_eigenvalues():
    Step(negative=True).hold()


def test_heads_wider_than_a_tile_are_cut(monkeypatch):
    monkeypatch.setattr(decode, "TILE", 256)  # slices of 16 of the 40 value channels
    Step(1, 1, 2, 16, 40).hold()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_outputs_are_rounded_once(dtype):
    Step(dtype=dtype).hold()


@pytest.mark.parametrize("in_place", [False, True])
def test_memory_in_16_bits_is_rounded_once(in_place):
    step = Step(memory=torch.bfloat16)
    step.hold()
    y, after = decode.decode(step.token, step.weights, step.state, **step.options)
    assert after.memory.dtype == torch.bfloat16
    wide = step.state._replace(memory=step.state.memory.float())
    expected, _ = decode.decode(step.token, step.weights, wide, **step.options)
    assert torch.equal(y, expected)  # read before it is rounded
    if in_place:
        assert torch.equal(decode.decode_in_place(step.token, step.weights, step.state, **step.options), expected)
        assert torch.equal(step.state.memory, after.memory)


def test_slots_of_a_pool_are_updated_and_no_others():
    step = Step()
    y, after = decode.decode(step.token, step.weights, step.state, **step.options)
    slots = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    pool = decode.State(*(torch.randn(5, *t.shape[1:], device=DEVICE) for t in step.state))
    for rows, t in zip(pool, step.state):
        rows[slots.long()] = t
    before = [rows.clone() for rows in pool]
    y_ = decode.decode_in_place(step.token, step.weights, pool, slots, **step.options)
    assert torch.equal(y_, y)
    for rows, old, new in zip(pool, before, after):
        assert torch.equal(rows[slots.long()], new)
        assert torch.equal(rows[[0, 2, 4]], old[[0, 2, 4]])


def test_no_sequences_give_nothing():
    step = Step(N=0)
    y, _ = decode.decode(step.token, step.weights, step.state, **step.options)
    assert y.shape == (0, 32)


def test_opcheck_passes():
    step = Step()
    arguments = [list(step.token), list(step.weights), list(step.state)]
    torch.library.opcheck(decode._decode, (*arguments, 0.25, 1.0, 1e-5))
    slots = torch.tensor([1, 0], device=DEVICE)
    torch.library.opcheck(decode._decode_in_place, (*arguments, slots, 0.25, 1.0, 1e-5))


def test_bad_arguments_are_named():
    step = Step()
    token, weights, state = step.token, step.weights, step.state
    call = lambda t=token, w=weights, s=state: decode.decode(t, w, s, **step.options)  # noqa: E731
    with pytest.raises(ValueError, match=r"k has 31 and v 32 channels; expected multiples of 2 \(heads\) and 32"):
        call(token._replace(k=token.k[:, 1:]))
    with pytest.raises(ValueError, match=r"gate has shape \[2, 31\]; expected \[2, 32\]"):
        call(token._replace(gate=token.gate[:, 1:]))
    with pytest.raises(ValueError, match=r"delta has shape \[31\]; expected \[32\]"):
        call(w=weights._replace(delta=weights.delta[1:]))
    with pytest.raises(ValueError, match=r"memory has shape \[1, 2, 16, 16\]; expected \[2, 2, 16, 16\]"):
        call(s=state._replace(memory=state.memory[1:]))
    with pytest.raises(ValueError, match=r"memory of the state has dtype torch\.float16; expected torch\.float32"):
        call(s=state._replace(memory=state.memory.half()))
    with pytest.raises(ValueError, match=r"conv_k of the state has dtype torch\.float16; expected torch\.float32"):
        call(s=state._replace(conv_k=state.conv_k.half()))

    slots = torch.tensor([0, 1], device=DEVICE)
    in_place = lambda s, i: decode.decode_in_place(token, weights, s, i, **step.options)  # noqa: E731
    with pytest.raises(ValueError, match=r"slots is torch\.int64 of shape \[1\]; expected int32 or int64 of shape \[2"):
        in_place(state, slots[1:])
    with pytest.raises(ValueError, match=r"conv_v of the pool has strides .*; expected it contiguous"):
        in_place(state._replace(conv_v=state.conv_v.mT.contiguous().mT), slots)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("H", "HV", "K", "V"), [(16, 16, 128, 128), (4, 8, 60, 100), (2, 2, 256, 256), (2, 4, 64, 32), (2, 2, 16, 16)]
)
def test_gpu_matches_the_layer(H, HV, K, V, dtype):
    Step(9, H, HV, K, V, dtype=dtype).hold()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_step_replays_from_a_graph():
    step = Step(dtype=torch.bfloat16)
    pool = decode.State(*(t.clone() for t in step.state))
    slots = torch.tensor([1, 0], device=DEVICE)
    call = lambda: decode.decode_in_place(step.token, step.weights, pool, slots, **step.options)  # noqa: E731
    expected = [call(), call()]
    for rows, t in zip(pool, step.state):
        rows.copy_(t)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for e in expected:
        graph.replay()
        assert torch.equal(y, e)
