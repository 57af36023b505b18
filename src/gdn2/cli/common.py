"""What the sub-commands share: a run's model made ready, a progress bar, and how to leave with an error."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

if TYPE_CHECKING:  # these import torch, which --help and shell completion need not wait for
    import torch

    from gdn2.config import RunConfig
    from gdn2.data import Tokenizer
    from gdn2.model import LanguageModel

Run = Annotated[Path, typer.Argument(help="A run's folder (its newest checkpoint is taken), or one checkpoint.")]
Device = Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu, cuda or cuda:N.")]

WEIGHTS = ("float32", "bfloat16", "int8", "fp8")
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(WEIGHTS),
        help="What weights are kept in; int8 and fp8 are for the large matrices, and leave gates and norms as they "
        "are. Else float32, or on a GPU what the run trained in.",
    ),
]
Memories = Annotated[
    str, typer.Option(metavar="float32|bfloat16", help="What recurrent memories are kept in from token to token.")
]


def leave(error: Exception, code: int) -> NoReturn:
    text = "; ".join([str(error), *getattr(error, "__notes__", ())])
    typer.echo(f"gdn2: error: {text}", err=True)
    raise SystemExit(code) from error


class Loaded(NamedTuple):
    """A checkpoint ready to use, and where it runs."""

    model: "LanguageModel"
    tokenizer: "Tokenizer"
    config: "RunConfig"
    checkpoint: str
    device: "torch.device"
    autocast: AbstractContextManager[Any]
    weights: str  # what they are kept in, and what they are computed in where that is another


def load(run: Path, device: str, settings: Sequence[str] = (), weights: str | None = None) -> Loaded:
    """The model of a run or checkpoint, with `settings` in place of its own.

    weights: one of `WEIGHTS`; None keeps float32, which the autocast of the run's precision narrows where it computes.
    """
    from gdn2.config import ConfigError, RunConfig, build, check_device, override, read_config, to_dict
    from gdn2.data import load_tokenizer
    from gdn2.model import LanguageModel, find_checkpoint
    from gdn2.training.checkpoint import verify
    from gdn2.training.device import resolve_device

    if weights not in (None, *WEIGHTS):
        raise ConfigError(f"--weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    check_device("--device", device)
    folder = find_checkpoint(run)
    if (folder / "trainer.json").is_file():  # it holds the checksums; weights without their training have none
        verify(folder, optimizer=False)
    config = read_config(folder)
    for setting in settings:
        if not setting.startswith("model."):
            raise ConfigError(f"setting {setting!r}; expected model.key=value")
    if settings:
        config = build(RunConfig, override(to_dict(config), settings))
    where, autocast, precision = resolve_device(replace(config, train=replace(config.train, device=device)), "--device")
    model = LanguageModel.from_checkpoint(folder, where, config.model if settings else None)
    if weights is not None:
        autocast = narrow(model, weights)
    kept = weights or ("float32" if precision == "fp32" else f"float32 computed in {precision}")
    return Loaded(model, load_tokenizer(folder), config, folder.name, where, autocast, kept)


def load_to_generate(run: Path, device: str, weights: str | None) -> Loaded:
    """As `load`; without `weights` in bfloat16 on a GPU where the run trained in that: a CUDA graph cannot autocast."""
    loaded = load(run, device, weights=weights)
    if weights is None and loaded.device.type == "cuda" and not isinstance(loaded.autocast, nullcontext):
        return loaded._replace(autocast=narrow(loaded.model, "bfloat16"), weights="bfloat16")
    return loaded


def memory_dtype(memories: str) -> "torch.dtype":
    """ValueError for another text than --memories takes."""
    import torch

    if memories not in ("float32", "bfloat16"):
        raise ValueError(f"--memories is {memories!r}; expected float32 or bfloat16")
    return torch.float32 if memories == "float32" else torch.bfloat16


def narrow(model: "LanguageModel", weights: str) -> AbstractContextManager[Any]:
    """Keep the model's weights in one of `WEIGHTS`; returns the context to run it in.

    Beside 8-bit matrices all else is bfloat16 on a GPU and float32 elsewhere.
    """
    import torch

    if weights in ("int8", "fp8"):
        model.quantize(weights)
    if weights == "bfloat16" or (weights != "float32" and next(model.parameters()).device.type == "cuda"):
        model.to(torch.bfloat16)
    return nullcontext()


@contextmanager
def counting(task: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, for a callback that takes done and total; shown on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)
