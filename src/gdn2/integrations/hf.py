"""gdn2 models in Hugging Face transformers (5.17 and later); importing this registers them with the Auto classes.

    import gdn2.integrations.hf
    model = AutoModelForCausalLM.from_pretrained("exported/")

- *Weights* are those of `LanguageModel` under "model." and "lm_head."; `gdn2 export` writes them.
- *Padding*: the tokens that the attention mask keeps are packed and read as sequences of their own, so that a padded
  batch, left or right, is exactly its rows alone in every mixer, and padding costs nothing. A step whose mask is all
  ones reads its rows as they are.
- *Cache*: a `Gdn2Cache` (`hf_cache.py`). Its keyword was renamed in 5.24 from `past_key_values` to `cache`: both names
  are taken, and results carry it under the one that the installed version reads.
- *Loading* builds on the meta device; there are no buffers to lose. What must be float32 stays so.
- *Saving* writes the stub `modeling_gdn2.py` and the `auto_map`, for loading with trust_remote_code where this module
  was not imported. Once it is imported, nothing from a checkpoint's folder is run.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from gdn2.config import ModelConfig, build, to_dict
from gdn2.integrations.hf_cache import Gdn2Cache
from gdn2.layers.linear import Linear, at_least_float32
from gdn2.model import LanguageModel

STUB_NAME = "modeling_gdn2"
STUB = '''"""Loads this checkpoint with the installed package gdn2; it holds no code of its own."""

from gdn2.integrations.hf import Gdn2Config, Gdn2ForCausalLM, Gdn2Model  # noqa: F401
'''
AUTO_MAP = {
    "AutoConfig": f"{STUB_NAME}.Gdn2Config",
    "AutoModel": f"{STUB_NAME}.Gdn2Model",
    "AutoModelForCausalLM": f"{STUB_NAME}.Gdn2ForCausalLM",
}
CACHE_NAME = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"


class Gdn2Config(PreTrainedConfig):
    """A `ModelConfig` as transformers wants it.

    Args:
        gdn2: the fields of `ModelConfig`, which decide; from them come hidden_size, num_hidden_layers,
            num_attention_heads, layer_types and mixer, which other tools read.
        vocab_size, tie_word_embeddings: None takes those of `gdn2`; else they decide, as after resizing embeddings.
        max_position_embeddings: tokens of a text that tools should not go beyond unasked; the model has no such limit.

    Raises:
        ValueError: a field that `ModelConfig` refuses.
    """

    model_type = "gdn2"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    gdn2: dict[str, Any] | None = None
    vocab_size: int | None = None
    tie_word_embeddings: bool | None = None
    max_position_embeddings: int = 2_048
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    layer_types: list[str] | None = None
    mixer: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.gdn2 = dict(self.gdn2 if self.gdn2 is not None else to_dict(ModelConfig()))
        given = {"vocab_size": self.vocab_size, "tie_embeddings": self.tie_word_embeddings}
        model = build(
            ModelConfig, self.gdn2 | {key: value for key, value in given.items() if value is not None}, "gdn2."
        )
        self.vocab_size, self.tie_word_embeddings = model.vocab_size, model.tie_embeddings
        self.hidden_size, self.num_hidden_layers = model.d_model, model.num_layers
        self.num_attention_heads, self.mixer = model.attention_heads, model.mixer
        attention = "sliding_attention" if model.window is not None else "full_attention"
        self.layer_types = [attention if kind == "attention" else "linear_attention" for kind in model.layer_kinds]
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    @classmethod
    def from_model(cls, config: ModelConfig, **settings: Any) -> "Gdn2Config":
        """The configuration of one of our models; `settings` are further arguments."""
        return cls(gdn2=to_dict(config), **settings)

    def model_config(self) -> ModelConfig:
        """Our configuration of this model."""
        own = {"vocab_size": self.vocab_size, "tie_embeddings": self.tie_word_embeddings}
        config: ModelConfig = build(ModelConfig, (self.gdn2 or {}) | own, "gdn2.")
        return config

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: also what equals today's defaults, which may change."""
        return super().to_diff_dict() | {"gdn2": self.gdn2, "vocab_size": self.vocab_size}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: transformers calls this after loading through the stub, and would save a copy of this file."""


class Gdn2PreTrainedModel(PreTrainedModel):
    """What the models below share."""

    config_class = Gdn2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "rate", "delta", "skip", "key_bias", "query_bias", "norm", "mixer_norm", "mlp_norm", "key_norm", "query_norm",
    ]  # fmt: skip

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the module's own parameters but for those that were loaded, which in-place maths would change."""
        reset = getattr(module, "reset_parameters", None)
        own = list(module.parameters(recurse=False))
        loaded = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
        if reset is None or len(loaded) == len(own):
            return
        reset()
        for parameter, value in loaded:
            parameter.copy_(value)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: transformers calls this after loading through the stub, and would save a copy of this file."""

    def save_pretrained(self, save_directory: Any, *arguments: Any, **settings: Any) -> None:
        """As transformers does, and the stub; `push_to_hub` comes through here."""
        super().save_pretrained(save_directory, *arguments, **settings)
        if settings.get("is_main_process", True):
            (Path(save_directory) / f"{STUB_NAME}.py").write_text(STUB, encoding="utf-8")


class Gdn2Model(Gdn2PreTrainedModel):
    """Embedding, blocks and final norm: the hidden states of a text."""

    def __init__(self, config: Gdn2Config) -> None:
        super().__init__(config)
        language = LanguageModel(config.model_config())
        self.embedding: nn.Module = language.embedding
        self.blocks, self.norm = language.blocks, language.norm
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        past_key_values: Gdn2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Gdn2Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens.

        Args:
            input_ids: [B, T], or inputs_embeds [B, T, hidden_size].
            attention_mask: [B, T] or, with a cache, [B, columns so far + T]; 0 leaves a token out. The last T columns
                count. A dict holds the same mask once per layer type.
            past_key_values, cache: two names of the cache; it is advanced in place.
            use_cache: return a cache. None means the configuration's choice, and none while training.
            cu_seq_lens_q: [N + 1] offsets that pack N sequences into B = 1, as flattening collators give them; without
                mask and cache, `position_ids` [1, T] that start anew at 0 mean the same. They leave no cache.

        Returns:
            Hidden states [B, T, hidden_size] (0 where the mask is), the cache, and if asked for the residual stream
            before each block and the normalised last one.

        Raises:
            ValueError: not exactly one of ids and embeddings, a mask or a cache of another kind, offsets with a mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds are both given or both missing; expected one of them")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = cache if cache is not None else past_key_values
        if cache is not None and not isinstance(cache, Gdn2Cache):
            raise ValueError(f"the cache is a {type(cache).__name__}; expected a Gdn2Cache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        B, T = x.shape[:2]
        kept = _kept(attention_mask, B, T)
        cu_seqlens = cu_seq_lens_q
        if cu_seqlens is not None and (kept is not None or cache is not None):
            raise ValueError("cu_seq_lens_q comes with a cache or a mask that leaves tokens out; expected it alone")
        if cu_seqlens is None and kept is None and cache is None:
            cu_seqlens = _restarts(unused.get("position_ids"), B, T)
        if cu_seqlens is not None or (self.gradient_checkpointing and self.training):
            use_cache = False
        if use_cache and cache is None:
            cache = Gdn2Cache()
        if kept is not None:
            rows = kept.flatten().nonzero().squeeze(1)
            cu_seqlens = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
            x = x.flatten(0, 1)[rows].unsqueeze(0)
        x, state, streams = self._blocks(x, None if cache is None else cache.state, cu_seqlens, use_cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = [self.norm(x)]
        if output_hidden_states:
            hidden = [*streams, *hidden]
        if kept is not None:
            hidden = [h.new_zeros(B * T, h.shape[-1]).index_copy(0, rows, h[0]).unflatten(0, (B, T)) for h in hidden]
        if use_cache and cache is not None:
            cache.advance(state, T)
        results: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        results |= {"last_hidden_state": hidden[-1], "hidden_states": tuple(hidden) if output_hidden_states else None}
        return BaseModelOutputWithPast(**results)

    def _blocks(
        self, x: Tensor, state: Any, cu_seqlens: Tensor | None, output_state: bool
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """The residual stream after the blocks, their states, and the stream before each."""
        if x.shape[1] == 0:  # every token is padding
            return x, state, [x] * len(self.blocks)
        streams, states = [], []
        for block, before in zip(self.blocks, state or (None,) * len(self.blocks)):
            streams.append(x)
            if self.gradient_checkpointing and self.training:
                x, after = self._gradient_checkpointing_func(block.__call__, x, before, cu_seqlens, output_state)
            else:
                x, after = block(x, before, cu_seqlens, output_state)
            states.append(after)
        return x, tuple(states) if output_state else None, streams


def _kept(mask: Tensor | dict[str, Tensor] | None, B: int, T: int) -> Tensor | None:
    """[B, T] bool, the tokens that are none of padding; None when all are. ValueError for another shape."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; expected [{B}, {T}] or more columns")
    kept = mask[:, -T:] != 0
    return None if bool(kept.all()) else kept


def _restarts(positions: Any, B: int, T: int) -> Tensor | None:
    """Offsets of the sequences packed into one row whose positions start anew at 0; None when there is but one."""
    if positions is None or B != 1 or positions.numel() != T:
        return None
    starts = (positions.flatten() == 0).nonzero().squeeze(1)
    if starts.numel() < 2 or int(starts[0]) != 0:
        return None
    return nn.functional.pad(starts, (0, 1), value=T)


class Gdn2ForCausalLM(Gdn2PreTrainedModel, GenerationMixin):
    """The language model: `Gdn2Model` and its output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: Gdn2Config) -> None:
        super().__init__(config)
        self.model = Gdn2Model(config)
        self.vocab_size = config.vocab_size
        own = config.model_config()
        self.lm_head = Linear(own.d_model, own.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_language_model(cls, model: LanguageModel, **settings: Any) -> "Gdn2ForCausalLM":
        """One of our models, whose weights it shares; `settings` go to the configuration."""
        config = Gdn2Config.from_model(model.config, **settings)
        with torch.device("meta"):
            twin = cls(config)
        names = {"head.weight": "lm_head.weight"}
        weights = {names.get(name, f"model.{name}"): weight for name, weight in model.state_dict().items()}
        weights.setdefault("lm_head.weight", weights["model.embedding.weight"])
        twin.load_state_dict(weights, assign=True)
        twin.tie_weights()
        return twin.train(model.training)

    def language_model(self) -> LanguageModel:
        """This model as one of ours, whose weights it shares."""
        with torch.device("meta"):
            model = LanguageModel(self.config.model_config())
        weights = {name.removeprefix("model."): weight for name, weight in self.state_dict().items()}
        head = weights.pop("lm_head.weight")
        if model.head is not None:
            weights["head.weight"] = head
        model.load_state_dict(weights, assign=True)
        return model.train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        past_key_values: Gdn2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Gdn2Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        **settings: Any,
    ) -> CausalLMOutputWithPast:
        """As `Gdn2Model.forward`, and

        Args:
            labels: [B, T]; the loss is that of each next label, -100 left out. `settings` such as num_items_in_batch
                go to transformers' loss.
            logits_to_keep: logits of the last so many tokens, 0 for all; or of the columns that a tensor names.

        Returns:
            logits [B, kept, vocab_size] float32, the loss, the cache and, if asked for, the hidden states.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache=cache if cache is not None else past_key_values,
            cu_seq_lens_q=cu_seq_lens_q,
            position_ids=settings.pop("position_ids", None),
            return_dict=True,
        )
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = at_least_float32(self.lm_head(out.last_hidden_state[:, columns]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **settings)
        results: dict[str, Any] = {CACHE_NAME: out.get(CACHE_NAME), "loss": loss, "logits": logits}
        return CausalLMOutputWithPast(**results, hidden_states=out.hidden_states)


AutoConfig.register(Gdn2Config.model_type, Gdn2Config, exist_ok=True)
AutoModel.register(Gdn2Config, Gdn2Model, exist_ok=True)
AutoModelForCausalLM.register(Gdn2Config, Gdn2ForCausalLM, exist_ok=True)
