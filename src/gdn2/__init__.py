"""Gated DeltaNet-2: the operator, the layer, language models, training, evaluation and generation."""

from gdn2.config import ModelConfig
from gdn2.model import LanguageModel
from gdn2.presets import preset

__all__ = ["LanguageModel", "ModelConfig", "__version__", "preset"]

__version__ = "0.1.0"
