"""How fast a device could train at best, and what share of that a run reaches."""

import torch

# Dense bf16 FLOPs per second that a maker states, by a part of the device's name; the first that fits counts.
PEAK_BF16 = {
    "GB200": 2.5e15, "B200": 2.25e15, "B100": 1.75e15, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """The device's stated bf16 FLOPs per second; None for a CPU and a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: arithmetic that the model needs (recomputation left out) over the device's peak."""
    return None if peak is None else tokens_per_second * flops_per_token / peak
