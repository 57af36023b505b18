"""Gated DeltaNet-2: the operator, the layer, language models, training, evaluation and generation."""

__version__ = "0.1.0"
