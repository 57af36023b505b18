"""What came before Gated DeltaNet-2: the delta rules in which one beta per head erases and writes alike, and none."""

from torch import Tensor

from gdn2.layers.delta import DeltaMixer
from gdn2.layers.gates import DecayGate, OpenGates, TiedGates
from gdn2.layers.linear import Linear, low_rank
from gdn2.layers.norm import GatedRMSNorm, RMSNorm, SigmoidGatedRMSNorm


class KimiDeltaAttention(DeltaMixer):
    """KDA (Kimi Linear, arXiv 2510.26692): a decay per key channel; the output is gated by a sigmoid, of low rank.

    Arguments as for `GatedDeltaNet2`; a lower bound replaces the decay's softplus by a sigmoid, as there.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        key_dim: int = 128,
        value_dim: int = 128,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        decay_lower_bound: float | None = None,
    ) -> None:
        super().__init__(d_model, num_heads, None, key_dim, value_dim, conv_width)
        decay = DecayGate(d_model, num_heads, key_dim, rank=value_dim, lower_bound=decay_lower_bound)
        self.gates = TiedGates(d_model, num_heads, decay, negative_eigenvalues)
        self.output_gate = low_rank(d_model, value_dim, num_heads * value_dim, bias=True)
        self.norm = SigmoidGatedRMSNorm(value_dim, norm_eps)
        self.out_proj = Linear(num_heads * value_dim, d_model, bias=False)
        self.reset_parameters()


class GatedDeltaNet(DeltaMixer):
    """Gated DeltaNet (arXiv 2412.06464): one decay per head; the output is gated by SiLU, of full rank.

    Arguments as for `GatedDeltaNet2`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        key_dim: int = 128,
        value_dim: int = 128,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, num_heads, None, key_dim, value_dim, conv_width)
        self.gates = TiedGates(d_model, num_heads, DecayGate(d_model, num_heads, 1, rank=None), negative_eigenvalues)
        self.output_gate = Linear(d_model, num_heads * value_dim, bias=False)
        self.norm = GatedRMSNorm(value_dim, norm_eps)
        self.out_proj = Linear(num_heads * value_dim, d_model, bias=False)
        self.reset_parameters()


class DeltaNet(DeltaMixer):
    """DeltaNet (arXiv 2406.06484): no decay; the output is normalised and not gated.

    Arguments as for `GatedDeltaNet2`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        key_dim: int = 128,
        value_dim: int = 128,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, num_heads, None, key_dim, value_dim, conv_width)
        self.gates = TiedGates(d_model, num_heads, None, negative_eigenvalues)
        self.norm = RMSNorm(value_dim, norm_eps)
        self.out_proj = Linear(num_heads * value_dim, d_model, bias=False)
        self.reset_parameters()

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(o)
        return normed


class LinearAttention(DeltaMixer):
    """Linear attention (arXiv 2006.16236): the memory adds what every token writes, nothing decays or is erased.

    All else is DeltaNet's, so that the two differ by the erasure alone. Arguments as for `GatedDeltaNet2`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        key_dim: int = 128,
        value_dim: int = 128,
        conv_width: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, num_heads, None, key_dim, value_dim, conv_width)
        self.gates = OpenGates(num_heads)
        self.norm = RMSNorm(value_dim, norm_eps)
        self.out_proj = Linear(num_heads * value_dim, d_model, bias=False)
        self.reset_parameters()

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(o)
        return normed
