"""Where a run computes, and in what precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

from gdn2.config import RunConfig, require


def resolve_device(config: RunConfig, key: str = "train.device") -> tuple[torch.device, AbstractContextManager, str]:
    """Device, autocast context and the precision's name. ConfigError, which calls it `key`, for one not here."""
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(device.type == "cpu" or (device.index or 0) < present, key, name, "a device of this machine")
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "bf16":
        return device, torch.autocast(device.type, torch.bfloat16), precision
    return device, nullcontext(), precision
