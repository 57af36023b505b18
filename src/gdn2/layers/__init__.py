"""The parts of a block: token mixers, normalisation and the MLP. They take keyword arguments, never a config."""

from gdn2.layers.attention import SlidingWindowAttention
from gdn2.layers.delta import GatedDeltaNet2
from gdn2.layers.mlp import SwiGLU
from gdn2.layers.norm import RMSNorm
from gdn2.layers.state import AttentionState, DeltaState

__all__ = ["AttentionState", "DeltaState", "GatedDeltaNet2", "RMSNorm", "SlidingWindowAttention", "SwiGLU"]
