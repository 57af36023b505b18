"""What the sub-commands share: a run's model made ready, a progress bar, and how to leave with an error."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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


def load(run: Path, device: str, settings: Sequence[str] = ()) -> Loaded:
    from gdn2.config import ConfigError, RunConfig, build, check_device, override, read_config, to_dict
    from gdn2.data import load_tokenizer
    from gdn2.model import LanguageModel, find_checkpoint
    from gdn2.training.checkpoint import verify
    from gdn2.training.train import resolve_device

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
    where, autocast, _ = resolve_device(replace(config, train=replace(config.train, device=device)), "--device")
    model = LanguageModel.from_checkpoint(folder, where, config.model if settings else None)
    return Loaded(model, load_tokenizer(folder), config, folder.name, where, autocast)


@contextmanager
def counting(task: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, for a callback that takes done and total; shown on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)
