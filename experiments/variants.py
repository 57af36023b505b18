"""The mixers that experiments compare, by name: the model's settings that make each."""

from typing import Any

MIXERS: dict[str, dict[str, Any]] = {
    name: {"mixer": name} for name in ("gdn2", "kda", "gdn", "deltanet", "linear", "mamba2", "mamba3")
}
# Table 5's ablations: which gate of Gated DeltaNet-2 gives how much. A scalar gate is the mean of the channels' gates,
# so parameters stay the same; "scalar-erase" writes by channel alone, "scalar-write" erases by channel alone.
ABLATIONS: dict[str, dict[str, Any]] = {
    "gdn2-scalar-erase": {"mixer": "gdn2", "channel_erase": False},
    "gdn2-scalar-write": {"mixer": "gdn2", "channel_write": False},
    "gdn2-scalar": {"mixer": "gdn2", "channel_erase": False, "channel_write": False},
    "gdn2-negative": {"mixer": "gdn2", "negative_eigenvalues": True},
}
MIXERS |= ABLATIONS


def chosen(names: str) -> list[str]:
    """Comma-separated names, "ablations" standing for Gated DeltaNet-2 and all of them. Each once."""
    groups = {"ablations": ("gdn2", *ABLATIONS)}
    return list(dict.fromkeys(name for given in names.split(",") for name in groups.get(given, (given,))))
