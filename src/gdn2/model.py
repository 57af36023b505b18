"""Language models: pre-norm residual blocks of a token mixer and an MLP, laid down by the configuration's cell."""

import re
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gdn2.config import MIXER_OPTIONS, ModelConfig, read_config
from gdn2.layers import (
    AttentionState,
    DeltaNet,
    DeltaState,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    LinearAttention,
    Mamba2,
    Mamba2State,
    Mamba3,
    Mamba3State,
    RMSNorm,
    SlidingWindowAttention,
    SwiGLU,
)
from gdn2.layers.few import few
from gdn2.layers.linear import Linear, at_least_float32
from gdn2.layers.quantized import QuantizedLinear
from gdn2.ops.cross_entropy import cross_entropy
from gdn2.ops.fused import fused

LayerState = DeltaState | Mamba2State | Mamba3State | AttentionState
ModelState = tuple[LayerState, ...]

IGNORED_TARGET = -100
# Tokens whose logits are held at once: with 32,000 words 262 MB in float32. Twice as many where operations are fused,
# and make no float32 copy of 16 bits: each chunk casts the head and adds to its gradient anew.
LOSS_CHUNK = 2_048


class Mixer(Protocol):
    """What a token mixer offers besides `forward`, whose face is that of `GatedDeltaNet2.forward`."""

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LayerState: ...

    def step(self, x: Tensor, state: Any) -> Tensor: ...

    def flops(self, context: int) -> float: ...


class Embedding(nn.Embedding):
    """Token embeddings that start normal with standard deviation 0.02.

    Blocks read the residual stream through a norm, so its scale only sets how much they change it: 0.02 is near the
    size of their own first outputs, so that they are heard from the first step; with tied weights it keeps the first
    logits near zero too.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)). `kind` is 'mixer' or 'attention'."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = build_mixer(config, kind)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.mlp_width)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        mixed, state = self.mixer(self.mixer_norm(x), state, cu_seqlens, output_state)
        x, normed = self.mlp_norm.of_sum(x, mixed)
        return x + self.mlp(normed), state

    def step(self, x: Tensor, added: Tensor | None, state: LayerState) -> tuple[Tensor, Tensor | None]:
        """`forward` of one token of each sequence, on x + added; `state` is written in place.

        The result is a sum too, of its two tensors: each sum is formed together with the norm that follows it. With few
        sequences it is one tensor, each sum formed by the product before it, each norm by the product after it.
        """
        mixer: Any = self.mixer
        able = isinstance(self.mixer, (GatedDeltaNet2, SlidingWindowAttention))
        if able and self.mlp.few(x) and mixer.few(x, state):
            x = x if added is None else x + added
            return self.mlp.step_sum(mixer.step_sum(x, self.mixer_norm, state), self.mlp_norm), None
        x, normed = (x, self.mixer_norm(x)) if added is None else self.mixer_norm.of_sum(x, added)
        x, normed = self.mlp_norm.of_sum(x, cast(Mixer, self.mixer).step(normed, state))
        return x, self.mlp.step(normed)


MIXERS: dict[str, type[nn.Module]] = {
    "gdn2": GatedDeltaNet2,
    "kda": KimiDeltaAttention,
    "gdn": GatedDeltaNet,
    "deltanet": DeltaNet,
    "linear": LinearAttention,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
}


def build_mixer(config: ModelConfig, kind: str) -> nn.Module:
    """The token mixer of a block of the given kind."""
    if kind == "attention":
        return SlidingWindowAttention(
            config.d_model, config.attention_heads, config.window, config.rope_base,
            config.rope_scaling, config.rope_factor, config.rope_length,
        )  # fmt: skip
    options = ["d_model", "num_heads", "key_dim", "value_dim", "norm_eps"]
    options += [name for name, mixers in MIXER_OPTIONS.items() if config.mixer in mixers]
    return MIXERS[config.mixer](**{name: getattr(config, name) for name in options})


class LanguageModel(nn.Module):
    """Embedding, blocks, final norm and output head, initialised as in the paper.

    To build a large model without filling it first: under ``torch.device("meta")``, then `to_empty` and either
    `reset_parameters` or `load_state_dict`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.layer_kinds)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        # Tied, the head is the embedding's own weight: a second name for it would come apart when leaving meta.
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)

    def reset_parameters(self) -> None:
        """Initialise every parameter anew, on whatever device it is."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()

    def mixers(self) -> list[Mixer]:
        """The token mixer of each block, first to last."""
        return [cast(Mixer, cast(Block, block).mixer) for block in self.blocks]

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """The state before the first token of `batch` sequences, one entry per block."""
        return tuple(mixer.initial_state(batch, device, dtype) for mixer in self.mixers())

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, ModelState | None]:
        """Read tokens.

        Args:
            tokens: [B, T] integers below the vocabulary's size.
            state: one entry per block, what an earlier call returned; None starts afresh.
            cu_seqlens: [N + 1] token offsets that pack N sequences into B = 1.
            output_state: without it the returned state is None, and its cost is saved.

        Returns:
            hidden [B, T, d_model] after the final norm, and the state after the last token of each sequence.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are {tokens.dtype} of shape {list(tokens.shape)}; expected integers [B, T]")
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"state has {len(state)} entries; expected one per block ({len(self.blocks)})")
        x = self.embedding(tokens)
        states = []
        for block, before in zip(self.blocks, state or (None,) * len(self.blocks)):
            x, after = block(x, before, cu_seqlens, output_state)
            states.append(after)
        return self.norm(x), tuple(states) if output_state else None

    def step(self, tokens: Tensor, state: ModelState) -> Tensor:
        """Read one token of each sequence, without gradients; `state` is written in place.

        It never waits for a GPU, so that a CUDA graph can capture it; `gdn2.inference.DecodeStep` does. With full
        attention the state must have an empty slot left for every sequence, as from `make_room`.

        Args:
            tokens: [N, 1] integers below the vocabulary's size.
            state: one entry per block, N rows each.

        Returns:
            The logits of the next token, as from `logits`: [N, vocab_size].
        """
        if tokens.dim() != 2 or tokens.shape[1] != 1:
            raise ValueError(f"tokens have shape {list(tokens.shape)}; expected [N, 1]")
        if len(state) != len(self.blocks):
            raise ValueError(f"state has {len(state)} entries; expected one for each of {len(self.blocks)} blocks")
        x, added = self.embedding(tokens), None
        for block, own in zip(self.blocks, state):
            x, added = cast(Block, block).step(x, added, own)
        head = self.embedding if self.head is None else self.head
        if added is None and few(x, head):
            from gdn2.ops.kernels.project import project

            weight = cast(Linear, head).weight
            return project(x[:, -1], weight, norm=self.norm.weight, eps=self.norm.eps, dtype=torch.float32)
        hidden: Tensor = self.norm(x) if added is None else self.norm.of_sum(x, added)[1]
        return self.logits(hidden[:, -1])

    def pack(self) -> None:
        """Put weights that `step` reads together side by side in memory; parameters become views, nothing is held
        twice, and results change by rounding at most. Moving, casting or quantizing the model undoes it.

        With few texts `step` takes kernels that reach over modules then, whose hooks are not called.
        """
        for module in self.modules():
            pack = getattr(module, "pack", None)
            if module is not self and pack is not None:
                pack()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d_model] -> [..., vocab_size] in float32 (float64 in a float64 model)."""
        return at_least_float32(self._logits(hidden))

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)
        return logits

    def loss(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """Cross-entropy of the targets, in nats.

        Logits are formed a few thousand tokens at a time, again in the backward pass, and never all held.

        Args:
            tokens, targets: [B, T] int64; a target of -100 is left out.
            cu_seqlens: as in `forward`.
            reduction: "mean" over the targets that count (0 when none does), or "none".

        Returns:
            A scalar, or [B, T] with zeros where targets are left out.

        Raises:
            ValueError: an unknown reduction, or shapes that do not fit.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'none'")
        if targets.shape != tokens.shape:
            raise ValueError(f"targets have shape {list(targets.shape)}; expected that of tokens {list(tokens.shape)}")
        hidden, _ = self(tokens, cu_seqlens=cu_seqlens, output_state=False)
        size = 2 * LOSS_CHUNK if fused(hidden) and hidden.element_size() == 2 else LOSS_CHUNK
        chunks = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size))
        losses = [
            checkpoint(self._chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
        ]
        nats = torch.cat(losses)
        if reduction == "none":
            return nats.view_as(targets)
        return nats.sum() / (targets != IGNORED_TARGET).sum().clamp(min=1)

    def _chunk_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self._logits(hidden), targets, IGNORED_TARGET)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._drop_packed()
        return self

    def _drop_packed(self) -> None:
        """Let go of packed matrices that the weights left."""
        for module in self.modules():
            packed = getattr(module, "_packed", None)
            if packed is not None and not packed.holds(cast(Any, module)._reads()):
                cast(Any, module)._packed = None

    def quantize(self, kind: str) -> Self:
        """Keep weights in 8 bits, "int8" or "fp8", a scale for each output; for inference, and not to be undone.

        They are those of the MLPs, of the mixers' projections of queries, keys, values and output, and of the head.
        Everything that gates, decays, convolves, normalises or embeds stays as it is, and so do the input projections
        of Mamba, which hold their gates.
        """
        for module in list(self.modules()):
            mlp = ("gate", "up", "down") if isinstance(module, SwiGLU) else ()
            for name in ("q_proj", "k_proj", "v_proj", "out_proj", "head", *mlp):
                if isinstance(getattr(module, name, None), nn.Linear):
                    setattr(module, name, QuantizedLinear(getattr(module, name), kind))
        self._drop_packed()
        return self

    def num_parameters(self) -> int:
        """All parameters, each counted once; weights in 8 bits too."""
        codes = sum(module.codes.numel() for module in self.modules() if isinstance(module, QuantizedLinear))
        return codes + sum(p.numel() for p in self.parameters())

    def num_block_parameters(self) -> int:
        """Parameters of the blocks alone: no embedding, output head or final norm. What presets are named after."""
        return sum(p.numel() for p in self.blocks.parameters())

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: torch.device | str = "cpu", config: ModelConfig | None = None
    ) -> "LanguageModel":
        """The model of a checkpoint folder, or of the newest checkpoint of a run's folder, in float32 and eval mode.

        `config` replaces the checkpoint's own, with another window, say, or other rotary positions for longer texts.
        ValueError when there is no checkpoint, or its weights do not fit the configuration.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = find_checkpoint(path)
        source = "its config.yaml" if config is None else "the given configuration"
        config = read_config(folder).model if config is None else config
        try:
            weights = load_file(folder / "model.safetensors", device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        expected = {name: list(p.shape) for name, p in model.state_dict().items()}
        found = {name: list(w.shape) for name, w in weights.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"{folder / 'model.safetensors'} does not fit {source}: {name} has shape "
                    f"{found.get(name, 'missing')}; expected {expected.get(name, 'no such parameter')}"
                )
        model.to_empty(device=device).load_state_dict(weights)
        return model.eval()


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself when it is a checkpoint (model.safetensors + config.yaml), else the newest one of the run in it.

    ValueError when there is neither.
    """
    path = Path(path)
    steps = [p for p in (path / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    for folder in [path, *sorted(steps, key=lambda p: int(p.name[5:]), reverse=True)]:
        if (folder / "model.safetensors").is_file() and (folder / "config.yaml").is_file():
            return folder
    raise ValueError(
        f"{str(path)!r} holds no checkpoint; expected a folder with model.safetensors and config.yaml, "
        "or a run's folder with checkpoints/step_XXXXXXXX"
    )
