"""The parts of a block: token mixers, normalisation and the MLP. They take keyword arguments, never a config."""

from gdn2.layers.attention import SlidingWindowAttention
from gdn2.layers.delta import GatedDeltaNet2
from gdn2.layers.mamba2 import Mamba2
from gdn2.layers.mamba3 import Mamba3
from gdn2.layers.mlp import SwiGLU
from gdn2.layers.norm import RMSNorm
from gdn2.layers.state import AttentionState, DeltaState, Mamba2State, Mamba3State
from gdn2.layers.tied import DeltaNet, GatedDeltaNet, KimiDeltaAttention, LinearAttention

__all__ = [
    "AttentionState",
    "DeltaNet",
    "DeltaState",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "KimiDeltaAttention",
    "LinearAttention",
    "Mamba2",
    "Mamba2State",
    "Mamba3",
    "Mamba3State",
    "RMSNorm",
    "SlidingWindowAttention",
    "SwiGLU",
]
