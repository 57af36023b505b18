"""Named models: a recurrent and a hybrid one of each mixer at each size, and Transformers of window and full attention.

All of a size have the same blocks, width and depth, recurrent memories of as many numbers a layer and, by the width of
their MLPs, as many parameters in their blocks, which is what a size is called after ("tiny": about a million with
everything). Mamba's memories are four times the heads with half the channels (91).
"""

from difflib import get_close_matches
from typing import Any

from gdn2.config import ConfigError, ModelConfig

# size: layers, d_model, heads and channels (K = V) of the delta mixers, attention heads, window, vocabulary
_SHAPES = {
    "1.3b": (18, 2_304, 16, 128, 18, 2_048, 32_000),
    "350m": (18, 1_152, 8, 128, 9, 2_048, 32_000),
    "150m": (18, 768, 6, 128, 6, 2_048, 32_000),
    "50m": (12, 512, 4, 128, 4, 1_024, 32_000),
    "10m": (10, 256, 4, 64, 4, 512, 32_000),
    "tiny": (4, 128, 2, 64, 4, 128, 257),
}

# MLP widths by size, of the recurrent and of the hybrid models, solved once: at 1.3b gdn2's are the published ones, the
# others come closest to 1.3e9 parameters in the blocks; below that they come closest to gdn2's recurrent model. Widths
# are multiples of 32 at 1.3b, 16 at 350m and 150m, 8 at 50m and 10m, 4 at tiny.
_WIDTHS: dict[str, tuple[tuple[int, ...], ...]] = {
    "gdn2": ((6_208, 3_424, 1_920, 1_536, 704, 288), (6_784, 3_760, 2_256, 1_792, 832, 376)),
    "kda": ((7_552, 4_096, 2_432, 1_872, 872, 372), (7_456, 4_096, 2_512, 1_968, 920, 420)),
    "gdn": ((7_008, 3_920, 2_336, 1_872, 872, 416), (7_200, 4_016, 2_480, 1_968, 920, 440)),
    "deltanet": ((7_712, 4_272, 2_608, 2_048, 960, 460), (7_552, 4_176, 2_608, 2_048, 960, 460)),
    "mamba2": ((6_272, 3_536, 2_048, 1_656, 760, 352), (6_816, 3_824, 2_320, 1_856, 864, 408)),
    "mamba3": ((6_240, 3_504, 2_016, 1_648, 752, 344), (6_816, 3_808, 2_320, 1_848, 856, 404)),
    "mamba3-mimo": ((6_112, 3_376, 1_888, 1_504, 680, 268), (6_752, 3_728, 2_240, 1_776, 824, 368)),
    "transformer": ((7_392, 4_096, 2_608, 2_056, 968, 464),),
    "transformer-full": ((7_392, 4_096, 2_608, 2_056, 968, 464),),
}
_CELLS: dict[str, tuple[str, ...]] = {"": ("mixer",), "hybrid-": ("mixer", "attention")}


def _models() -> dict[str, ModelConfig]:
    models = {}
    for mixer, widths in _WIDTHS.items():
        for size, column in zip(_SHAPES, zip(*widths)):
            for (name, cell), width in zip(_CELLS.items(), column):
                models[f"{mixer}-{name}{size}"] = _model(mixer, size, cell, width)
    return models


def _model(mixer: str, size: str, cell: tuple[str, ...], mlp_width: int) -> ModelConfig:
    layers, d_model, heads, channels, attention_heads, keys, vocab = _SHAPES[size]
    window: int | None = keys
    options: dict[str, Any] = {"mixer": mixer}
    if mixer.startswith("transformer"):
        options, cell = {}, ("attention",)
        window = None if mixer == "transformer-full" else window
    elif mixer.startswith("mamba"):
        heads, channels = 4 * heads, channels // 2
        if mixer == "mamba3-mimo":
            options = {"mixer": "mamba3", "mimo_rank": 4}
    return ModelConfig(
        vocab_size=vocab,
        d_model=d_model,
        num_layers=layers,
        mlp_width=mlp_width,
        cell=cell,
        num_heads=heads,
        key_dim=channels,
        value_dim=channels,
        attention_heads=attention_heads,
        window=window,
        **options,
    )


_MODELS = _models()


def preset_names() -> list[str]:
    """The names `preset` knows."""
    return list(_MODELS)


def of_same_size(name: str) -> dict[str, ModelConfig]:
    """All presets of the size of the named one, by name. ConfigError for a name that is not in the table."""
    preset(name)
    size = name.rsplit("-", 1)[1]
    return {other: config for other, config in _MODELS.items() if other.endswith(f"-{size}")}


def preset(name: str) -> ModelConfig:
    """The configuration of a named model. ConfigError, a ValueError, for a name that is not in the table."""
    if name not in _MODELS:
        kinds, sizes = (dict.fromkeys(part) for part in zip(*(known.rsplit("-", 1) for known in _MODELS)))
        near = get_close_matches(name, _MODELS, n=3)
        hint = f", such as {', '.join(near)}" if near else ""
        parts = f"KIND one of {', '.join(kinds)} and SIZE one of {', '.join(sizes)}"
        raise ConfigError(f"preset is {name!r}; expected KIND-SIZE{hint}, with {parts}")
    return _MODELS[name]
