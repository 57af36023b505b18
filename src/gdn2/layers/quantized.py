"""Linears whose weights are kept in 8 bits, with a scale for each output: half of bfloat16's memory and traffic.

    W[o, i] = scale[o] * codes[o, i]        int8: codes in -127 .. 127        fp8: e4m3, up to 448

Scales are bfloat16 numbers, so that they are the same whatever the inputs' dtype. Inputs, sums and outputs stay as they
are: only what is stored is narrower. A few rows on a GPU are multiplied from the codes themselves; elsewhere the weight
is made anew for each product, which spares memory but no time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.decay import Float32Parameters
from gdn2.ops.fused import fused

LARGEST = {"int8": 127.0, "fp8": 448.0}


class QuantizedLinear(Float32Parameters):
    """What a Linear computes, from weights rounded to 8 bits; for inference.

    Args:
        linear: whose weight is taken; a row of zeros stays one.
        kind: "int8" or "fp8".

    Raises:
        ValueError: another kind, or a weight that is not finite.
    """

    float32_parameters = ("scale",)

    codes: Tensor
    scale: Tensor
    like: Tensor

    @torch.no_grad()
    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        if kind not in LARGEST:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(LARGEST)}")
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1)
        if not bool(largest.isfinite().all()):
            raise ValueError("a weight is not finite; expected numbers: the model's weights are broken")
        self.kind = kind
        self.register_buffer("like", torch.empty(0, dtype=linear.weight.dtype), persistent=False)  # follows casts
        self.out_features, self.in_features = weight.shape
        scale = _up_to_bfloat16(largest.clamp(min=1e-30) / LARGEST[kind])
        scaled = weight / scale[:, None]
        # fp8 is kept as its bytes: as a floating point type it would be cast with the model.
        codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self._mark()

    @property
    def values(self) -> Tensor:
        """The codes as numbers, [out, in] int8 or float8_e4m3fn."""
        return self.codes if self.kind == "int8" else self.codes.view(torch.float8_e4m3fn)

    @property
    def weight(self) -> Tensor:
        """[out, in], the weight that the codes stand for, in the dtype that the Linear would have by now."""
        return (self.values.float() * self.scale[:, None]).to(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)
        return self._multiply(rows).unflatten(0, x.shape[:-1])

    def _multiply(self, x: Tensor) -> Tensor:
        if fused(x) and not (torch.is_grad_enabled() and x.requires_grad):  # the kernel has no gradients
            from gdn2.ops.kernels import matvec

            if len(x) <= matvec.MOST_ROWS:
                return matvec.multiply(x, self.values, self.scale, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        wide = torch.float32 if x.dtype == torch.float16 else x.dtype  # codes and scales are exact in all but float16
        weight = self.values.to(wide) * self.scale.to(wide)[:, None]
        return F.linear(x, weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}, bias={self.bias is not None}"


def _up_to_bfloat16(x: Tensor) -> Tensor:
    """The next number of bfloat16 at or above each x > 0, in float32."""
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
