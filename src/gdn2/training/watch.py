"""Signs that a run is about to diverge, from numbers that training has anyway; each is a sentence for the log."""

import math
import sys
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

HISTORY = 50  # good steps that a new one is compared with
ENOUGH = 10  # of them before anything is compared
SPIKE = 8.0  # deviations from the median, and
LEAST_SPIKE = 0.3  # nats, that make a loss a spike
STEEP = 10.0  # times the median that make a gradient norm one
ABOVE_GUESSING = 1.0  # nats over log(vocabulary)
SATURATED = 0.95  # share of a layer's gates at an end of their range
GROWN = 30.0  # times a layer's first memory
QUIET = 50  # steps until the same warning is given again


class Watch:
    """Looks at every step's loss and gradient norm, and now and then at the layers' gates and memories.

    A loss is a spike when it is more than 8 deviations (scaled median absolute deviation) and 0.3 nats above the median
    of the last 50 good steps; a gradient norm when it is ten times their median. A loss of one nat above that of
    guessing, log(vocabulary), needs no history.
    """

    def __init__(self, vocab_size: int) -> None:
        self._guess = math.log(vocab_size)
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._norms: deque[float] = deque(maxlen=HISTORY)
        self._first_memory: dict[int, float] = {}
        self._given: dict[str, int] = {}

    def step(self, step: int, loss: float, norm: float) -> list[str]:
        """Warnings about a step's mean loss in nats and its gradient norm before clipping, both finite."""
        found = {}
        if loss > self._guess + ABOVE_GUESSING:
            found["guess"] = f"loss {loss:.3f} is above {self._guess:.3f}, that of guessing"
        if len(self._losses) >= ENOUGH:
            middle = median(self._losses)
            deviation = 1.4826 * median(abs(x - middle) for x in self._losses)
            if loss > middle + max(SPIKE * deviation, LEAST_SPIKE):
                found["loss"] = f"loss {loss:.3f} is a spike: the median of the last steps is {middle:.3f}"
            usual = median(self._norms)
            if norm > STEEP * usual:
                found["norm"] = f"gradient norm {norm:.3g} is a spike: the median of the last steps is {usual:.3g}"
        self._losses.append(loss)
        self._norms.append(norm)
        return self._new(step, found)

    def layers(self, step: int, layers: Sequence[dict[str, Any]]) -> list[str]:
        """Warnings about `metrics.layer_statistics`."""
        found = {}
        for i, layer in enumerate(layers):
            memory = layer["state_rms"]
            for gate in ("erase", "write"):
                share = layer.get(f"saturated_{gate}", 0.0)  # Mamba has no such gates
                if share > SATURATED:
                    found[f"{gate} {i}"] = f"{share:.0%} of the {gate} gates of mixer {i} are at an end of their range"
            first = self._first_memory.setdefault(i, memory)
            if not memory <= GROWN * first:  # NaN too
                found[f"memory {i}"] = f"the memory of mixer {i} has grown from {first:.3g} to {memory:.3g} (rms)"
        return self._new(step, found)

    def _new(self, step: int, found: dict[str, str]) -> list[str]:
        fresh = [key for key in found if step - self._given.get(key, -QUIET) >= QUIET]
        self._given |= dict.fromkeys(fresh, step)
        return [f"warning: {found[key]}" for key in fresh]


def peak_memory(device: torch.device) -> int:
    """Bytes at most: of tensors on a GPU since the last call, of the whole process on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
