"""The tables: which tiles, warps and pipeline stages the kernels run with, by operand, head size and shared memory.

The values for 227 KB of shared memory a program (H100, B200) were measured on an H100, those for 99 KB (A100, A10, L4,
RTX 30 to 50) follow by calculation: what Triton says each kernel takes when compiled for those. `gdn2 selftest` checks
all that a GPU can run.
"""

from dataclasses import dataclass
from typing import Any

H100_SHARED = 227 * 1024  # bytes of shared memory a program
LEAST_SHARED = 99 * 1024


@dataclass(frozen=True)
class Config:
    """Tokens per chunk, and for each kernel its channels per tile (BK, BV), warps and pipeline stages."""

    chunk: int
    prepare: tuple[int, int, int, int]
    strong_prepare: tuple[int, int, int, int]
    scan: tuple[int, int, int]  # BV, warps, stages; `scan_back` and the kernels for segments too
    narrow_scan: tuple[int, int, int]
    value: tuple[int, int, int]  # BV, warps, stages
    key: tuple[int, int, int, int]
    strong_key: tuple[int, int, int, int]

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Config":
        """From what `dataclasses.asdict` and JSON made of one. TypeError for other fields and values."""
        fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
        config = cls(**fields)
        for name, x in fields.items():
            like = getattr(INTERPRETED, name)
            numbers, expected = ((y,) if isinstance(like, int) else y for y in (x, like))
            if not isinstance(numbers, tuple) or [type(n) for n in numbers] != [int] * len(expected):
                raise TypeError(f"{name} is {x!r}")
        return config


# By bytes of an operand: (largest padded head size, bytes of shared memory needed, configuration), first match.
CONFIGS = {
    2: (
        (128, H100_SHARED, Config(64, (64, 64, 4, 3), (64, 64, 4, 1), (64, 4, 3), (32, 4, 3), (128, 4, 1),
                                  (64, 64, 4, 3), (64, 64, 4, 1))),
        (128, LEAST_SHARED, Config(64, (64, 64, 4, 2), (64, 64, 4, 1), (64, 4, 2), (32, 4, 2), (64, 4, 1),
                                   (64, 64, 4, 3), (64, 64, 4, 1))),
        (256, LEAST_SHARED, Config(32, (64, 64, 4, 1), (64, 64, 4, 1), (64, 4, 2), (64, 4, 2), (64, 4, 1),
                                (64, 64, 4, 3), (64, 64, 4, 1))),
    ),
    4: (
        (128, LEAST_SHARED, Config(32, (32, 32, 4, 1), (32, 32, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1),
                                (32, 32, 4, 1), (32, 32, 4, 1))),
        (256, H100_SHARED, Config(16, (32, 32, 4, 1), (32, 32, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1),
                                  (32, 32, 4, 1), (32, 32, 4, 1))),
        (256, LEAST_SHARED, Config(16, (32, 32, 4, 1), (32, 32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1),
                                (32, 32, 4, 1), (32, 32, 4, 1))),
    ),
}  # fmt: skip
MAX_HEAD = 256
INTERPRETED = Config(
    16, (16, 16, 1, 1), (16, 16, 1, 1), (16, 1, 1), (16, 1, 1), (16, 1, 1), (16, 16, 1, 1), (16, 16, 1, 1)
)
