"""Generation beyond one batch: state to keep and return to, prefixes read once, drafts, and many requests at a time."""

from gdn2.decoding import DecodeStep
from gdn2.inference.engine import Completion, Engine, Event, Request, TokenScore
from gdn2.inference.memory_trace import BlockTrace, HeadUpdate, MemoryTrace, TokenTrace, trace_blocks, traced_blocks
from gdn2.inference.prefix_cache import PrefixCache
from gdn2.inference.session import Session, Snapshot, read_prompt
from gdn2.inference.speculative import Draft, DraftModel, PromptLookup, Round, speculate

__all__ = [
    "BlockTrace",
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
    "trace_blocks",
    "traced_blocks",
]
