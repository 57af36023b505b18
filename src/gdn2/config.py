"""Typed configuration: frozen dataclasses, YAML files and dotted overrides; every check is here, once.

`build` turns a plain mapping into a dataclass and refuses unknown keys, wrong types and values out of range with the
full dotted name of the offender. `load_run` reads a YAML file, applies ``key.sub=value`` overrides and builds a
`RunConfig`. Nothing reads configuration from the environment.
"""

import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

DELTA_RULES = ("gdn2", "kda", "gdn", "deltanet")
MIXERS = (*DELTA_RULES, "linear", "mamba2", "mamba3")
# Options of the mixer that only some have; with any other they must keep their default.
MIXER_OPTIONS = {
    "num_value_heads": ("gdn2",),
    "conv_width": (*DELTA_RULES, "linear", "mamba2"),
    "negative_eigenvalues": DELTA_RULES,
    "channel_erase": ("gdn2",),
    "channel_write": ("gdn2",),
    "decay_lower_bound": ("gdn2", "kda"),
    "mimo_rank": ("mamba3",),
    "rope_fraction": ("mamba3",),
}
ROPE_SCALINGS = ("none", "ntk", "yarn")
BLOCKS = ("mixer", "attention")
LOGS = ("tensorboard", "wandb")
OPTIMIZERS = ("adamw", "muon")
RECOMPUTE = ("none", "selective", "full")  # activation checkpointing


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its value and what was expected."""


def opt(default: Any, doc: str) -> Any:
    """A dataclass field with its documentation beside it."""
    return field(default=default, metadata={"doc": doc})


def require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{key} is {value!r}; expected {expected}")


def check_types(config: Any, prefix: str) -> None:
    """ConfigError for a field whose value is not of its annotated type, however the dataclass was made."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            require(isinstance(value, hint), prefix + name, value, hint.__name__)
        else:
            _coerce(hint, value, prefix + name)


def check_device(key: str, name: str) -> None:
    """ConfigError for a name of no form that a device has; whether it is there is asked when it is used."""
    require(re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None, key, name, "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class ModelConfig:
    """A language model: `cell` is repeated until `num_layers` blocks (token mixer + MLP) are laid down."""

    vocab_size: int = opt(32_000, "size of the vocabulary, tokens")
    d_model: int = opt(2_304, "width of the residual stream")
    num_layers: int = opt(18, "number of blocks; each is a token mixer and an MLP")
    mlp_width: int = opt(6_208, "hidden width of the SwiGLU MLP")
    mixer: str = opt("gdn2", f"token mixer of the 'mixer' blocks, one of {', '.join(MIXERS)}")
    cell: tuple[str, ...] = opt(("mixer",), "repeating pattern of blocks, each 'mixer' or 'attention'")
    num_heads: int = opt(16, "key heads of the mixer")
    num_value_heads: int | None = opt(None, "value heads of the mixer, a multiple of num_heads; null means num_heads")
    key_dim: int = opt(128, "key channels per head; what Mamba calls the state size")
    value_dim: int = opt(128, "value channels per head")
    conv_width: int = opt(4, "taps of the causal short convolution, tokens; mamba3 has none")
    negative_eigenvalues: bool = opt(False, "delta rules: double the erase gate, so that it lies in [0, 2]")
    channel_erase: bool = opt(True, "gdn2: erase by channel; false averages the gate over each head's channels")
    channel_write: bool = opt(True, "gdn2: write by channel; false averages the gate over each head's channels")
    decay_lower_bound: float | None = opt(None, "gdn2, kda: nats below 0 that bound each log-decay; null for no bound")
    mimo_rank: int = opt(1, "mamba3: keys, values and queries per token; 1 is SISO")
    rope_fraction: float = opt(0.5, "mamba3: share of the key channels that are rotated")
    attention_heads: int = opt(18, "heads of the sliding-window attention; head size is d_model / attention_heads")
    window: int | None = opt(2_048, "keys each query attends to, itself included; null means full causal attention")
    rope_base: float = opt(10_000.0, "base of the rotary position frequencies")
    rope_scaling: str = opt("none", "longer texts than trained on: 'none' (rotary as it is), 'ntk' or 'yarn'")
    rope_factor: float = opt(1.0, "ntk, yarn: how many times longer")
    rope_length: int = opt(4_096, "yarn: tokens of a sequence in training")
    norm_eps: float = opt(1e-5, "epsilon of every RMSNorm")
    tie_embeddings: bool = opt(False, "share the embedding with the output head")

    def __post_init__(self) -> None:
        check_types(self, "model.")
        for name in ("vocab_size", "d_model", "num_layers", "mlp_width", "num_heads", "key_dim", "value_dim",
                     "conv_width", "mimo_rank", "attention_heads", "rope_length"):  # fmt: skip
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "an integer >= 1")
        require(self.mixer in MIXERS, "model.mixer", self.mixer, f"one of {', '.join(MIXERS)}")
        require(
            len(self.cell) > 0 and all(b in BLOCKS for b in self.cell),
            "model.cell", self.cell, f"a non-empty list of {' or '.join(BLOCKS)}",
        )  # fmt: skip
        for name, mixers in MIXER_OPTIONS.items():
            default = type(self).__dataclass_fields__[name].default
            where = f"with the mixer {self.mixer}; it is an option of {', '.join(mixers)}"
            if "mixer" not in self.cell:
                mixers, where = (), "without a mixer in model.cell"
            require(
                self.mixer in mixers or getattr(self, name) == default, f"model.{name}", getattr(self, name),
                f"{json.dumps(default)} {where}",
            )  # fmt: skip
        require(self.decay_lower_bound is None or -inf < self.decay_lower_bound < 0, "model.decay_lower_bound",
                self.decay_lower_bound, "a finite number < 0, or null")  # fmt: skip
        require(
            self.mixer != "mamba3" or self.rope_fraction * self.key_dim in range(2, self.key_dim + 1, 2),
            "model.rope_fraction", self.rope_fraction, f"an even share of key_dim ({self.key_dim}), 2 channels or more",
        )  # fmt: skip
        if self.num_value_heads is not None:
            require(
                self.num_value_heads >= 1 and self.num_value_heads % self.num_heads == 0,
                "model.num_value_heads", self.num_value_heads, f"a multiple of num_heads ({self.num_heads})",
            )  # fmt: skip
        if "attention" in self.cell:
            require(
                self.d_model % self.attention_heads == 0 and (self.d_model // self.attention_heads) % 2 == 0,
                "model.attention_heads", self.attention_heads,
                f"a divisor of d_model ({self.d_model}) that leaves an even head size",
            )  # fmt: skip
        require(self.window is None or self.window >= 1, "model.window", self.window, "an integer >= 1, or null")
        require(1 < self.rope_base < inf, "model.rope_base", self.rope_base, "a finite number > 1")
        require(self.rope_scaling in ROPE_SCALINGS, "model.rope_scaling", self.rope_scaling,
                f"one of {', '.join(ROPE_SCALINGS)}")  # fmt: skip
        scaled = 1 <= self.rope_factor < inf if self.rope_scaling != "none" else self.rope_factor == 1
        require(scaled, "model.rope_factor", self.rope_factor, "a finite number >= 1, and 1 without rope_scaling")
        require(self.rope_scaling == "none" or "attention" in self.cell, "model.rope_scaling", self.rope_scaling,
                "'none' without attention in model.cell: nothing else has positions")  # fmt: skip
        require(0 < self.norm_eps < inf, "model.norm_eps", self.norm_eps, "a finite number > 0")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each block, 'mixer' or 'attention', first to last."""
        return tuple(self.cell[i % len(self.cell)] for i in range(self.num_layers))


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from (a folder written by `gdn2 prepare`) and how they are cut."""

    path: str = opt("corpora/stdlib", "folder of token shards written by `gdn2 prepare`")
    seq_len: int = opt(512, "tokens per training sequence")
    packed: bool = opt(False, "honour document boundaries: state, convolution and attention restart at each document")

    def __post_init__(self) -> None:
        check_types(self, "data.")
        require(self.seq_len >= 1, "data.seq_len", self.seq_len, "an integer >= 1")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its groups and its schedule. Lengths of the schedule are in tokens."""

    name: str = opt("adamw", "'adamw', or 'muon': Muon for the blocks' matrices, AdamW for the rest")
    lr: float = opt(4e-4, "peak learning rate")
    min_lr_ratio: float = opt(0.1, "last learning rate as a share of the peak")
    schedule: str = opt("cosine", "'cosine', 'wsd' (warm-up, stable, linear decay) or 'constant' (after the warm-up)")
    warmup_tokens: int = opt(0, "tokens of linear warm-up")
    decay_tokens: int = opt(0, "wsd: tokens of the final decay")
    betas: tuple[float, float] = opt((0.9, 0.95), "AdamW's moment decays")
    momentum: float = opt(0.95, "muon: decay of its momentum, Nesterov's")
    eps: float = opt(1e-8, "AdamW's epsilon")
    weight_decay: float = opt(0.1, "decay of matrices (embeddings too); vectors and the decay gates' own take none")
    clip: float = opt(1.0, "largest gradient norm; 0 turns clipping off")

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        require(self.name in OPTIMIZERS, "optim.name", self.name, f"one of {', '.join(OPTIMIZERS)}")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "a number in [0, 1)")
        require(0 < self.lr < inf, "optim.lr", self.lr, "a finite number > 0")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "a number in [0, 1]")
        require(
            self.schedule in ("cosine", "wsd", "constant"), "optim.schedule", self.schedule, "cosine, wsd or constant"
        )
        for name in ("warmup_tokens", "decay_tokens", "weight_decay", "clip"):
            require(0 <= getattr(self, name) < inf, f"optim.{name}", getattr(self, name), "a finite number >= 0")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        require(0 < self.eps < inf, "optim.eps", self.eps, "a finite number > 0")
        require(self.decay_tokens == 0 or self.schedule == "wsd", "optim.decay_tokens", self.decay_tokens,
                f"0 with the schedule {self.schedule}; only wsd has a decay of its own")  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how much at once, what is looked at and what is kept."""

    tokens: int = opt(2_000_000, "tokens to train on, rounded up to whole steps")
    batch_tokens: int = opt(8_192, "tokens per optimizer step, a multiple of micro_batch * seq_len")
    micro_batch: int = opt(16, "sequences per forward and backward pass; the rest of the batch is accumulated")
    device: str = opt("auto", "'auto' (cuda when present, else cpu), 'cpu', 'cuda' or 'cuda:N'")
    precision: str = opt("auto", "'auto' (bf16 on cuda, else fp32), 'fp32' or 'bf16' (autocast; weights stay fp32)")
    compile: bool = opt(False, "torch.compile each block")
    recompute: str = opt("none", "what a block's backward pass computes again: 'none', 'selective' or 'full'")
    eval_every: int = opt(100, "steps between validations; 0 only validates at the end")
    eval_tokens: int = opt(65_536, "validation tokens per evaluation")
    sample_every: int = opt(0, "steps between sampled continuations; 0 turns them off")
    sample_tokens: int = opt(128, "tokens of a sampled continuation")
    log_every: int = opt(10, "steps between metric rows")
    checkpoint_every: int = opt(200, "steps between checkpoints; one is always written at the end")
    keep_last: int = opt(2, "checkpoints kept; older ones are deleted after a newer one is safe")
    keep_every: int = opt(0, "steps between milestones: checkpoints never deleted; a multiple of checkpoint_every")
    background_checkpoints: bool = opt(False, "several processes: write checkpoints while training goes on")
    watch_every: int = opt(100, "steps between looks at the gates and memories of each layer; 0 turns them off")
    logs: tuple[str, ...] = opt((), "where metrics go besides metrics.jsonl: 'tensorboard', 'wandb'")
    wandb_project: str = opt("gdn2", "wandb: the project's name")
    wandb_offline: bool = opt(False, "wandb: keep everything in the run's folder, for `wandb sync`")
    peak_flops: float | None = opt(
        None, "FLOPs per second of one device, for MFU; null takes the maker's, of known GPUs"
    )
    max_bad_steps: int = opt(10, "non-finite steps in a row after which training stops with an error")

    def __post_init__(self) -> None:
        check_types(self, "train.")
        for name in ("tokens", "batch_tokens", "micro_batch", "eval_tokens", "sample_tokens", "log_every", "keep_last",
                     "max_bad_steps"):  # fmt: skip
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "an integer >= 1")
        for name in self.logs:
            require(name in LOGS, "train.logs", name, f"one of {', '.join(LOGS)}")
        require(self.peak_flops is None or 0 < self.peak_flops < inf, "train.peak_flops", self.peak_flops,
                "a finite number > 0, or null")  # fmt: skip
        for name in ("eval_every", "sample_every", "watch_every", "checkpoint_every", "keep_every"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "an integer >= 0")
        require(
            self.keep_every == 0 or (self.checkpoint_every > 0 and self.keep_every % self.checkpoint_every == 0),
            "train.keep_every", self.keep_every, f"a multiple of train.checkpoint_every ({self.checkpoint_every})",
        )  # fmt: skip
        check_device("train.device", self.device)
        require(self.precision in ("auto", "fp32", "bf16"), "train.precision", self.precision, "auto, fp32 or bf16")
        require(self.recompute in RECOMPUTE, "train.recompute", self.recompute, f"one of {', '.join(RECOMPUTE)}")


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of `torchrun` divide the work; replicas * shards * context * tensor is their number."""

    shards: int | None = opt(None, "FSDP: ranks that share out the weights; null for all that the others leave")
    replicas: int = opt(1, "HSDP: groups of shards, each with all of the weights; for several nodes")
    tensor: int = opt(1, "tensor parallelism: ranks that share out heads and MLP channels of each layer")
    context: int = opt(1, "context parallelism: ranks that share out the tokens of each sequence")
    timeout: float = opt(600.0, "seconds after which a rank that does not answer ends the run with an error")

    def __post_init__(self) -> None:
        check_types(self, "parallel.")
        for name in ("shards", "replicas", "tensor", "context"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"parallel.{name}", value, "an integer >= 1")
        require(0 < self.timeout < inf, "parallel.timeout", self.timeout, "a finite number of seconds > 0")

    def sizes(self, world: int) -> tuple[int, int, int, int]:
        """(replicas, shards, context, tensor) of a run on `world` processes. ConfigError where they do not fit."""
        rest = self.replicas * self.context * self.tensor
        shards = world // rest if self.shards is None else self.shards
        require(
            rest * shards == world and shards > 0, "the product of parallel.replicas, shards, context and tensor",
            rest * max(shards, 1),
            f"the number of processes, {world}; parallel.NAME=N on the command line divides a run anew",
        )  # fmt: skip
        return self.replicas, shards, self.context, self.tensor


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on. `gdn2 train` writes it into the run's folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = opt(0, "seed of initialisation, data order and sampling")

    def __post_init__(self) -> None:
        check_types(self, "")
        sequences = self.train.micro_batch * self.data.seq_len
        require(
            self.train.batch_tokens % sequences == 0,
            "train.batch_tokens", self.train.batch_tokens,
            f"a multiple of train.micro_batch * data.seq_len ({self.train.micro_batch} * {self.data.seq_len})",
        )  # fmt: skip
        total = self.steps * self.train.batch_tokens
        require(self.optim.warmup_tokens < total, "optim.warmup_tokens", self.optim.warmup_tokens,
                f"fewer than the run's {total} tokens")  # fmt: skip
        stable = total - self.optim.warmup_tokens
        require(self.optim.decay_tokens <= stable, "optim.decay_tokens", self.optim.decay_tokens,
                f"no more than the {stable} tokens after the warm-up")  # fmt: skip
        require(0 <= self.seed < 2**63, "seed", self.seed, "an integer in [0, 2**63)")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.train.tokens // self.train.batch_tokens)


def build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Build dataclass `cls` from a mapping. ConfigError for a key it does not have or a value of the wrong type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or cls.__name__} is {values!r}; expected a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ConfigError(f"unknown key {prefix}{unknown[0]}; expected one of {', '.join(sorted(hints))}")
    return cls(**{key: _coerce(hints[key], value, prefix + key) for key, value in values.items()})


def _coerce(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type `hint`, without guessing: 1 is a float, "1" and True are not an int."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, key)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, key + ".")
    if origin is tuple:
        require(isinstance(value, list | tuple), key, value, "a list")
        items = args if args[-1] is not Ellipsis else (args[0],) * len(value)
        require(len(items) == len(value), key, value, f"a list of {len(items)} values")
        return tuple(_coerce(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(items, value)))
    if hint in (int, float) and isinstance(value, str) and re.fullmatch(r"[+-]?\d+\.?\d*[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-3 as text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    expected = "text; YAML's words yes, no, on and off need quotes" if hint is str else hint.__name__
    require(isinstance(value, hint) and not (hint is int and isinstance(value, bool)), key, value, expected)
    return value


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=value`` assignments, values in YAML, to a nested mapping; returns a new mapping."""
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for text in assignments:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {text!r}; expected key.sub=value")
        node = out
        *parents, last = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override {text!r}: {parent} holds a value, not keys")
            node = child
        node[last] = _yaml(raw, f"override {text!r}")
    return out


def _yaml(text: str | bytes, name: str) -> Any:
    import yaml  # not at the top: `import gdn2` needs torch alone

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}") from error


def load_run(path: str | Path | None, assignments: Sequence[str], preset: Callable[[str], ModelConfig]) -> RunConfig:
    """A `RunConfig` from a YAML file (or the defaults) and overrides.

    The key `preset` names the model that the keys under `model` then change. ConfigError for what does not fit.
    """
    values: dict[str, Any] = {} if path is None else read_yaml(Path(path))
    values = override(values, assignments)
    name = values.pop("preset", None)
    if name is not None:
        require(isinstance(name, str), "preset", name, "the name of a model preset")
        changes = values.get("model") or {}
        require(isinstance(changes, dict), "model", changes, "a mapping of keys to values")
        values["model"] = to_dict(preset(name)) | changes
    return build(RunConfig, values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. ConfigError when it cannot be read or holds anything else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"configuration {str(path)!r} cannot be read: {error.strerror}") from error
    values = _yaml(content, f"configuration {str(path)!r}") or {}
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {str(path)!r} holds {type(values).__name__}; expected keys and values")
    return values


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run's or a checkpoint's folder. ConfigError when there is none or it does not fit."""
    config: RunConfig = build(RunConfig, read_yaml(folder / "config.yaml"))
    return config


def write_config(folder: Path, config: RunConfig) -> None:
    """Write it as `read_config` reads it; whole, or not at all."""
    import yaml

    temporary = folder / ".config.yaml"
    temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    os.replace(temporary, folder / "config.yaml")


def documented_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every dotted key of a configuration, its default as YAML reads it, and what it is."""
    for key in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[key.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from documented_keys(hint, f"{prefix}{key.name}.")
        else:
            default = key.default if isinstance(key.default, str) else json.dumps(key.default)
            yield prefix + key.name, default, key.metadata["doc"]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values that YAML and JSON can hold; `build` inverts it."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, list | tuple) else x

    return plain(dataclasses.asdict(config))
