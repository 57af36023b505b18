"""`gdn2 train`."""

from collections.abc import Sequence
from math import inf
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer

from gdn2.cli.common import leave

if TYPE_CHECKING:
    from gdn2.config import RunConfig


def show_keys(wanted: bool) -> None:
    if wanted:
        from gdn2.config import documented_keys
        from gdn2.presets import preset_names

        names = f"all the model's settings at once, one of {', '.join(preset_names())}"
        for key, default, doc in (("preset", "null", names), *documented_keys()):
            typer.echo(f"{key}={default}")
            typer.echo(fill(doc, 80, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))
        raise typer.Exit


def train(
    run: Annotated[
        Path,
        typer.Option("--run", "--run-dir", help="The run's folder; for a new run empty or not there yet."),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml|KEY=VALUE",
            help="A configuration file, and settings that override it, such as optim.lr=1e-3; --keys lists them.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The model, such as gdn2-hybrid-tiny or gdn2-1.3b; --keys lists them.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's newest checkpoint, with its configuration.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run will cost, and leave: nothing is allocated or written.")
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(help="With --dry-run: tokens per second that are expected, for the time; else assumed."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="With --dry-run: devices to plan for.")] = 1,
    keys: Annotated[
        bool, typer.Option("--keys", callback=show_keys, is_eager=True, help="List settings and presets, and leave.")
    ] = False,
) -> None:
    """Train a language model. Ctrl-C saves a checkpoint and ends; --resume goes on exactly there.

    Leaves with 0 when the run is finished or SIGTERM, as schedulers send it, stopped it; with 130 after Ctrl-C.

    \b
    Examples:
      gdn2 train --preset gdn2-hybrid-tiny --run runs/first data.path=corpora/stdlib
      gdn2 train config.yaml --run runs/second optim.lr=1e-3 train.tokens=5000000
      gdn2 train --run runs/second --resume
      gdn2 train examples/paper.yaml --run runs/paper --dry-run --devices 8 --rate 350000
      torchrun --nproc-per-node 8 -m gdn2 train config.yaml --run-dir runs/third

    torchrun takes --run for an option of its own: with it, say --run-dir.
    """
    from gdn2.config import ConfigError
    from gdn2.training import TrainingError, train
    from gdn2.training.opening import check_unused
    from gdn2.training.plan import show
    from gdn2.training.stopping import StopSignals

    if rate is not None and not (dry_run and 0 < rate < inf):
        raise ConfigError(f"--rate is {rate}; expected tokens per second above 0, together with --dry-run")
    if dry_run:
        config = read(run, settings or (), preset, resume)
        if not resume:
            check_unused(run)
        typer.echo(show(config, run, rate, devices))
        return
    with StopSignals() as stop:
        config = read(run, settings or (), preset, resume)
        try:
            outcome = train(config, run, resume, stop=stop)
        except TrainingError as error:
            leave(error, 1)
    if outcome.interrupted == "SIGINT":
        raise typer.Exit(130)


def read(run: Path, settings: Sequence[str], preset: str | None, resume: bool) -> "RunConfig":
    """The configuration that the command's arguments mean. ConfigError where they mean none."""
    from gdn2.config import ConfigError, load_run
    from gdn2.presets import preset as named

    files = [text for text in settings if "=" not in text or Path(text).is_file()]
    overrides = [text for text in settings if text not in files]
    if len(files) > 1:
        raise ConfigError(f"configurations {', '.join(files)}; expected one file, and overrides as key=value")
    if resume and (files or preset is not None):
        raise ConfigError("--resume takes the run's own configuration; leave out the file and --preset")
    if not (resume or files or preset is not None):
        raise ConfigError("no model was chosen; expected a configuration file, --preset, or --resume")
    if preset is not None:
        overrides.insert(0, f"preset={preset}")
    return load_run(run / "config.yaml" if resume else files[0] if files else None, overrides, named)
