"""Text to token shards (`prepare`), shards to batches (`Shards`, `TokenBatches`), and the tokenizers between."""

from gdn2.data.prepare import prepare
from gdn2.data.progress import show_progress
from gdn2.data.shards import Batch, Meta, Shards, TokenBatches, TokenFile
from gdn2.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Meta",
    "Shards",
    "TokenBatches",
    "TokenFile",
    "Tokenizer",
    "load_tokenizer",
    "prepare",
    "show_progress",
]
