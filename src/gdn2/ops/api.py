"""One entry to the operator: arguments checked, backend chosen, called."""

import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor

from gdn2.ops import library
from gdn2.ops.fused import is_planning
from gdn2.ops.layout import sequence_bounds
from gdn2.ops.reference import recurrence
from gdn2.ops.tangents import refuse_tangents

BACKENDS = ("auto", "reference", "torch", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON = importlib.util.find_spec("triton") is not None

_log = logging.getLogger("gdn2")
_announced: set[str] = set()
_debug = False


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Within this context the operator also reads its inputs, and waits for a GPU to do so: a log-decay above zero or
    NaN is a ValueError, as are offsets `cu_seqlens` that are no partition of the tokens."""
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def operator(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None, *,
    scale: float | None, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The recurrence (9) with any gate left out (None): no decay, no erasing, everything written. See `rules`."""
    check(q, k, v, log_decay, erase, write, initial_state, cu_seqlens)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        on_gpu = v.device.type == "cuda" or is_planning()
        backend = "triton" if on_gpu and without_kernels(k, v) is None else "torch"
        _announce(f"backend 'auto' on {v.device.type}: {backend}")
    scale = k.shape[-1] ** -0.5 if scale is None else _number(scale)
    if backend == "reference":
        o, state = _reference(q, k, v, log_decay, erase, write, scale, initial_state, cu_seqlens)
    else:
        inputs = (q, k, v, log_decay, erase, write, initial_state)
        if backend == "torch":
            refuse_tangents(*inputs)
            o, state, *_ = library.chunk(*inputs, cu_seqlens, scale, wants_gradient(*inputs))
        else:
            o, state = kernels(k, v)(
                *inputs, None, None, cu_seqlens, scale, 1.0, 1.0, False, wants_gradient(*inputs), output_final_state
            )
    return o, state if output_final_state else None


def _number(scale: float) -> float:
    """ValueError for a tensor: reading it would wait for a GPU, and no gradient would reach it."""
    if not isinstance(scale, Real):
        raise ValueError(f"scale is a {type(scale).__name__}; expected a number, or None for K ** -0.5")
    return float(scale)


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def without_kernels(k: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels cannot run here; None if they can."""
    if not TRITON:
        return "need the package triton, which is not installed"
    from gdn2.ops.kernels.library import obstacle

    return obstacle(v, k.shape[-1])


def kernels(k: Tensor, v: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator's kernels, `ops.kernels.library.rule`. ValueError where they cannot run."""
    reason = without_kernels(k, v)
    if reason is not None:
        raise ValueError(f"backend is 'triton', whose kernels {reason}; expected 'auto' or 'torch' here")
    from gdn2.ops.kernels.library import rule

    return rule


def _announce(text: str) -> None:
    if not torch.compiler.is_compiling() and text not in _announced:
        _announced.add(text)
        _log.info(text)


@library.without_autocast
def _reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None,
    scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`recurrence` over each packed sequence in turn."""
    bounds = [0, k.shape[1]] if cu_seqlens is None else sequence_bounds(cu_seqlens, k.shape[1]).tolist()
    no_state = v.new_empty(0, v.shape[2], k.shape[3], v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32))
    outputs, states = [v[:, :0]], [no_state]
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):

        def cut(x: Tensor | None, tokens: slice = slice(begin, end)) -> Tensor | None:
            return None if x is None else x[:, tokens]

        start = initial_state if initial_state is None or cu_seqlens is None else initial_state[n : n + 1]
        packed = q[:, begin:end], k[:, begin:end], v[:, begin:end]
        o, state = recurrence(*packed, cut(log_decay), cut(erase), cut(write), scale, start)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1).to(v.dtype), torch.cat(states)


def check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, erase: Tensor | None = None,
    write: Tensor | None = None, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> None:  # fmt: skip
    """ValueError naming the first tensor whose shape, dtype or device does not fit, and what was expected."""
    for name, main in (("q", q), ("k", k), ("v", v)):
        if main.dim() != 4:
            raise ValueError(f"{name} has shape {_show(main)}; expected 4 axes, [B, T, heads, channels]")
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    if min(H, K, HV, V) < 1:
        raise ValueError(f"k has shape {_show(k)} and v {_show(v)}; expected at least one head and one channel")
    if v.shape[:2] != (B, T) or HV % H:
        raise ValueError(f"v has shape {_show(v)}; expected [{B}, {T}, a multiple of {H}, V] to go with k {_show(k)}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], int]] = {
        "q": (q, (K,), H),
        "log_decay": (log_decay, (K, 1), H),
        "erase": (erase, (K, 1), H),
        "write": (write, (V, 1), HV),
    }
    for name, (x, widths, heads) in expected.items():
        if x is not None and not (x.dim() == 4 and x.shape[:3] == (B, T, heads) and x.shape[3] in widths):
            last = " or ".join(str(w) for w in dict.fromkeys(widths))
            raise ValueError(f"{name} has shape {_show(x)}; expected [{B}, {T}, {heads}, {last}]")
    _check_sequences(B, T, cu_seqlens, initial_state, (HV, K, V), v.device)
    floats = {name: x for name, (x, _, _) in expected.items()} | {"k": k, "v": v, "initial_state": initial_state}
    for name, x in floats.items():
        if x is None:
            continue
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; expected float64, float32, bfloat16 or float16")
        if (x.dtype == torch.float64) != (v.dtype == torch.float64):
            raise ValueError(
                f"{name} has dtype {x.dtype} and v {v.dtype}; expected float64 for all tensors or for none"
            )
        if x.device != v.device:
            raise ValueError(f"{name} is on {x.device}; expected {v.device}, the device of v")
    if _debug and log_decay is not None and not torch.compiler.is_compiling() and not bool((log_decay <= 0).all()):
        first = log_decay.detach()[~(log_decay <= 0)][0].item()
        raise ValueError(f"log_decay holds {first}; expected nats <= 0 everywhere")


def _check_sequences(
    B: int, T: int, cu_seqlens: Tensor | None, initial_state: Tensor | None, state: tuple[int, int, int],
    device: torch.device,
) -> None:  # fmt: skip
    N = B
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor):
            raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}; expected a tensor [N + 1], int32 or int64")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            found = f"cu_seqlens has shape {_show(cu_seqlens)} and dtype {cu_seqlens.dtype}"
            raise ValueError(f"{found}; expected [N + 1], int32 or int64")
        if cu_seqlens.device not in (device, torch.device("cpu")):
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; expected {device}, the device of v, or cpu")
        if B != 1:
            raise ValueError(f"cu_seqlens packs sequences into one row, but B is {B}; expected B = 1")
        readable = type(cu_seqlens) is Tensor and not (torch.compiler.is_compiling() or is_planning())
        if readable and (_debug or cu_seqlens.device.type == "cpu"):  # on a GPU, reading it would wait
            sequence_bounds(cu_seqlens, T)
        N = cu_seqlens.shape[0] - 1
    if initial_state is not None and initial_state.shape != (N, *state):
        raise ValueError(f"initial_state has shape {_show(initial_state)}; expected {[N, *state]}")


def _show(x: Tensor) -> list[int]:
    return list(x.shape)
