"""The operator and the rules that are gate settings of it."""

from gdn2.ops.api import debug_checks
from gdn2.ops.mamba3 import Mamba3Memory, mamba3
from gdn2.ops.projected import rule_from_projections
from gdn2.ops.rules import delta_rule, gated_delta_rule, gated_delta_rule_2, kda, mamba2

__all__ = [
    "Mamba3Memory",
    "debug_checks",
    "delta_rule",
    "gated_delta_rule",
    "gated_delta_rule_2",
    "kda",
    "mamba2",
    "mamba3",
    "rule_from_projections",
]
