"""Generation beyond one batch: state to keep and return to, prefixes read once, drafts, and many requests at a time."""

from gdn2.decoding import DecodeStep
from gdn2.inference.engine import Completion, Engine, Event, Request, TokenScore
from gdn2.inference.memory_trace import HeadUpdate, MemoryTrace, TokenTrace, traced_blocks
from gdn2.inference.prefix_cache import PrefixCache
from gdn2.inference.session import Session, Snapshot, read_prompt
from gdn2.inference.speculative import Draft, DraftModel, PromptLookup, Round, speculate

__all__ = [
    "Completion",
    "DecodeStep",
    "Draft",
    "DraftModel",
    "Engine",
    "Event",
    "HeadUpdate",
    "MemoryTrace",
    "PrefixCache",
    "PromptLookup",
    "Request",
    "Round",
    "Session",
    "Snapshot",
    "TokenScore",
    "TokenTrace",
    "read_prompt",
    "speculate",
    "traced_blocks",
]
