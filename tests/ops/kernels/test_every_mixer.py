"""The mixers of the baselines on the operator's kernels, with their gates of one channel or none.

Without a GPU under the interpreter; convolutions and norms are then torch's, as `test_fused_layer` has them fused.
"""

from collections.abc import Callable

import pytest
import torch
from operands import assert_close
from torch import Tensor, nn

from gdn2.layers import DeltaNet, GatedDeltaNet, KimiDeltaAttention, LinearAttention, Mamba2, Mamba3
from gdn2.ops import library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative L2 of outputs and of gradients. float32: a few hundred roundings of 2^-24 along the way, and norms that raise
# them. bfloat16: a dozen roundings to 8 bits (0.2 % each), twice as many to a gradient; Mamba-3 has no output norm.
BOUNDS = {torch.float32: (1e-5, 4e-5), torch.bfloat16: (3e-2, 6e-2)}

MIXERS: dict[str, Callable[..., nn.Module]] = {
    "kda": KimiDeltaAttention,
    "gdn": GatedDeltaNet,
    "deltanet": DeltaNet,
    "linear": LinearAttention,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "mamba3-mimo": lambda *sizes: Mamba3(*sizes, mimo_rank=4),
}

# torch's own, where the first matrix product of a process happens to be one of a backward.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Have the kernels take everything but float64 on a CPU too; the list tells what they were given."""
    from gdn2.ops.kernels.library import forward

    chunk, seen = library.chunk, []

    def chosen(*arguments):  # type: ignore[no-untyped-def]
        *tensors, cu_seqlens, scale, save = arguments
        if tensors[2].dtype == torch.float64:
            return chunk(*arguments)
        seen.append(tensors[2].dtype)
        return forward(*tensors, None, None, cu_seqlens, scale, 1.0, 1.0, False, save, True)

    if DEVICE == "cpu":
        monkeypatch.setattr(library, "chunk", chosen)
    return seen


def results(
    mixer: nn.Module, x: Tensor, state: tuple[Tensor, ...], cu_seqlens: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and state, and the gradients of parameters, x and state."""
    y, after = mixer(x, state, cu_seqlens)
    outputs = {"y": y} | after._asdict()
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs.values()]
    leaves = dict(mixer.named_parameters()) | {"x": x} | {f"initial {n}": t for n, t in state._asdict().items()}
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    to_cpu = lambda named: {n: t.detach().double().cpu() for n, t in named.items()}  # noqa: E731
    return to_cpu(outputs), to_cpu({f"d {n}": g for n, g in zip(leaves, gradients)})


def held_to_float64(
    name: str, sizes: tuple[int, ...], tokens: int, lengths: list[int] | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    mixer = MIXERS[name](*sizes)
    for p in mixer.parameters():  # the paper's initialisation is so small that errors would hide
        if p.ndim > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    mixer = mixer.to(DEVICE, dtype)
    N = 2 if lengths is None else len(lengths)
    x = torch.randn(2 if lengths is None else 1, tokens, sizes[0], device=DEVICE, dtype=dtype, requires_grad=True)
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    state = type(s := mixer.initial_state(N))(*(torch.rand_like(t).requires_grad_() for t in s))
    got = results(mixer, x, state, None if cu_seqlens is None else cu_seqlens.to(DEVICE))
    wide = lambda t: t.detach().double().cpu().requires_grad_()  # noqa: E731
    expected = results(mixer.double().cpu(), wide(x), type(state)(*map(wide, state)), cu_seqlens)
    for a, b, bound in zip(got, expected, BOUNDS[dtype]):
        for outcome in (a, b):
            if "angles" in outcome:  # 0 and 2 pi are one angle
                outcome["angles"] = torch.stack([outcome["angles"].cos(), outcome["angles"].sin()])
        assert_close(a, b, bound)


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_on_the_kernels_matches_float64_with_all_gradients(name: str, kernels: list[torch.dtype]) -> None:
    held_to_float64(name, (6, 1, 8, 5), 5, [3, 2], torch.float32)
    assert kernels == [torch.float32] or DEVICE == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", MIXERS)
def test_gpu_mixer_matches_float64_with_all_gradients(name: str, dtype: torch.dtype) -> None:
    held_to_float64(name, (256, 4, 64, 64), 150, None, dtype)
    held_to_float64(name, (256, 4, 64, 64), 200, [0, 150, 3, 47], dtype)
