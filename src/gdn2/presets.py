"""Named models: one table, a recurrent and a hybrid model per row.

The two of a row have the same shape and, by the width of their MLPs, the same number of parameters in their blocks,
which is what a size is called after ("tiny": about a million with everything).
"""

from dataclasses import replace

from gdn2.config import ConfigError, ModelConfig

# size: layers, d_model, mixer heads, head channels (K = V), attention heads, window, MLP width, hybrid's, vocabulary
_SIZES = {
    "1.3b": (18, 2_304, 16, 128, 18, 2_048, 6_208, 6_784, 32_000),
    "350m": (18, 1_152, 8, 128, 9, 2_048, 3_424, 3_744, 32_000),
    "150m": (18, 768, 6, 128, 6, 2_048, 1_920, 2_240, 32_000),
    "50m": (12, 512, 4, 128, 4, 1_024, 1_536, 1_792, 32_000),
    "10m": (10, 256, 4, 64, 4, 512, 704, 832, 32_000),
    "tiny": (4, 128, 2, 64, 4, 128, 288, 376, 257),
}


def _models() -> dict[str, ModelConfig]:
    models = {}
    for size, (layers, d_model, heads, channels, attention, window, width, hybrid_width, vocab) in _SIZES.items():
        recurrent = ModelConfig(
            vocab_size=vocab,
            d_model=d_model,
            num_layers=layers,
            mlp_width=width,
            cell=("mixer",),
            num_heads=heads,
            key_dim=channels,
            value_dim=channels,
            attention_heads=attention,
            window=window,
        )
        models[f"gdn2-{size}"] = recurrent
        models[f"gdn2-hybrid-{size}"] = replace(recurrent, cell=("mixer", "attention"), mlp_width=hybrid_width)
    return models


_MODELS = _models()


def preset_names() -> list[str]:
    """The names `preset` knows."""
    return list(_MODELS)


def preset(name: str) -> ModelConfig:
    """The configuration of a named model. ConfigError, a ValueError, for a name that is not in the table."""
    if name not in _MODELS:
        raise ConfigError(f"preset is {name!r}; expected one of {', '.join(_MODELS)}")
    return _MODELS[name]
