"""Launchers of kernels as `torch.library` ops, called without the library in between where nothing needs it.

The library's bookkeeping takes the host 0.1 ms a call, longer than many a kernel runs, and its first call loads torch's
compiler, seconds of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gdn2.ops.kernels.run import PLAIN
from gdn2.ops.tangents import differentiates_forward, refuse_tangents


class Op:
    """The op `name` of a function of tensors, lists of them and plain values, annotated as torch.library wants it.

    A call on plain tensors outside compilers, dispatch modes, transforms and tracing runs the function itself; all
    others run the op, `library`. Gradients of gradients and tangents are refused.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.library = torch.library.custom_op(name, function, mutates_args=())
        self._function = function
        self._with_gradients: Callable[..., Any] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results, as for torch.library; decorates."""
        return self.library.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Gradients, as for torch.library."""
        self.library.register_autograd(backward, setup_context=setup_context)
        function = self._function

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = function(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return backward(ctx, *gradients)

        self._with_gradients = Direct.apply

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not _plain(inputs):
            refuse_tangents(*inputs)
            return self.library(*inputs)
        if not torch.is_grad_enabled():
            return self._function(*inputs)
        if self._with_gradients is not None:
            return self._with_gradients(*inputs)
        # Within a backward pass that is to be differentiated itself: the library refuses that when it comes to it.
        asked = any(x.requires_grad for x in inputs if isinstance(x, Tensor))
        return self.library(*inputs) if asked else self._function(*inputs)


def _plain(inputs: tuple[Any, ...]) -> bool:
    if is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return False
    if differentiates_forward():
        return False
    # The memory of a negative view (`conj().imag`, and gradients of such) holds -x; the dispatcher resolves it.
    return all(type(x) in PLAIN and not x.is_neg() for x in inputs if isinstance(x, Tensor))


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Decorates a function to be the `Op` of that name."""
    return lambda function: Op(name, function)
