"""A checkpoint as a folder that transformers, and tools built on it, can load.

config.json, generation_config.json, model.safetensors    the model
tokenizer.json, tokenizer_config.json                     the same ids as in training, also for bytes
modeling_gdn2.py                                          the stub for trust_remote_code
README.md                                                 the model card
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast

import gdn2
from gdn2.config import RunConfig, to_dict
from gdn2.data.disk import share_alike
from gdn2.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from gdn2.integrations.hf import Gdn2ForCausalLM
from gdn2.model import LanguageModel

END_OF_TEXT = "<|endoftext|>"  # the name of the byte-level tokenizer's one special token
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gdn2
- linear-attention
---

# {name}

A language model of {parameters:,} parameters: {layers} blocks of width {d_model}, mixer `{mixer}`, vocabulary
{vocab:,} ({tokenizer}). Trained on sequences of {seq_len:,} tokens, for {tokens:,} tokens in all. Written by gdn2
{version}.

```python
import gdn2.integrations.hf  # registers the model; nothing in this folder is run
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

Without the import, `trust_remote_code=True` runs `modeling_gdn2.py`, which does nothing but that import. Pad on the
left for generation; a padded batch gives exactly what its rows give alone.

## The run's configuration

```json
{config}
```
"""


def export(
    model: LanguageModel, tokenizer: Tokenizer, config: RunConfig, out: Path, max_length: int | None = None
) -> Path:
    """Write the folder `out`, whole or not at all; returns it.

    Args:
        config: the run's; `config.model` is the model's.
        max_length: what the configuration calls max_position_embeddings, tokens that tools such as lm-eval do not go
            beyond; None means the length trained on.

    Raises:
        ValueError: `out` exists, max_length is below 1, or the tokenizer's ids do not fit the model.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{str(out)!r} exists already; expected a folder that does not")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; expected an integer >= 1")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids; expected at most the model's {model.config.vocab_size}"
        )
    length, end = max_length or config.data.seq_len, tokenizer.end_of_text
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    twin = Gdn2ForCausalLM.from_language_model(model, max_position_embeddings=length, **ids)
    twin.generation_config = GenerationConfig(**ids, do_sample=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        twin.save_pretrained(temporary)
        transformers_tokenizer(tokenizer, length).save_pretrained(temporary)
        (temporary / "README.md").write_text(_card(model, tokenizer, config, out.name), encoding="utf-8")
        share_alike(temporary, "README.md")
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def transformers_tokenizer(tokenizer: Tokenizer, max_length: int) -> Any:
    """The tokenizer as transformers', with the same ids for every text: special tokens in a text are plain text."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        inner, end = tokenizer.inner, tokenizer.end_of_text_name
    elif isinstance(tokenizer, ByteTokenizer):
        inner, end = _bytes(), END_OF_TEXT
    else:
        raise ValueError(f"the tokenizer is a {type(tokenizer).__name__}; expected bytes or a Hugging Face tokenizer")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def _bytes() -> Any:
    """A `tokenizers.Tokenizer` whose ids 0 to 255 are the bytes and 256 end-of-text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Byte-level tokenizers write a byte as one printable character: itself where it is one, else one from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocabulary = {characters[byte]: byte for byte in range(256)} | {END_OF_TEXT: ByteTokenizer.end_of_text}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return inner


def _card(model: LanguageModel, tokenizer: Tokenizer, config: RunConfig, name: str) -> str:
    settings = to_dict(config)
    del settings["data"]["path"]  # of the machine that it was trained on
    return CARD.format(
        name=name,
        parameters=model.num_parameters(),
        layers=model.config.num_layers,
        d_model=model.config.d_model,
        mixer=model.config.mixer,
        vocab=model.config.vocab_size,
        tokenizer=f"tokenizer {tokenizer.name}" if tokenizer.name == "bytes" else "a Hugging Face tokenizer",
        seq_len=config.data.seq_len,
        tokens=config.train.tokens,
        version=gdn2.__version__,
        config=json.dumps(settings, indent=2),
    )
