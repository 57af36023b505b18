"""`gdn2 info` and `gdn2 plot`: what a model costs, and how its training went."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer


def info(
    model: Annotated[
        str, typer.Argument(metavar="PRESET|RUN", help="A preset (see `gdn2 train --keys`), or a run.")
    ] = "gdn2-1.3b",
    context: Annotated[int, typer.Option(help="Tokens of the sequence that the figures are for.")] = 4_096,
    compare: Annotated[
        bool, typer.Option("--compare", help="A table of all presets of the named one's size, a line each.")
    ] = False,
) -> None:
    """Show what a model costs. That is its parameters, state, arithmetic and memory.

    \b
    Examples:
      gdn2 info gdn2-1.3b
      gdn2 info runs/first --context 65536
      gdn2 info mamba3-mimo-350m --compare
    """
    from gdn2.config import read_config
    from gdn2.info import compare as table
    from gdn2.info import describe
    from gdn2.model import find_checkpoint
    from gdn2.presets import of_same_size, preset

    if compare:
        typer.echo(table(of_same_size(model), context))
        typer.echo(f"for sequences of {context:,} tokens; a cache is a whole state in bytes, of a model in bfloat16")
        return
    if "/" in model and not Path(model).is_dir():
        raise ValueError(f"model is {model!r}; expected a preset, or the folder of a run, and there is no such folder")
    config = read_config(find_checkpoint(model)).model if Path(model).is_dir() else preset(model)
    costs = describe(config, context)
    for name, value in (
        ("parameters", f"{costs.parameters:,}"),
        ("  in the blocks", f"{costs.block_parameters:,}"),
        ("  in embedding and head", f"{costs.embedding_parameters:,}"),
        ("weights", memory(costs.weight_bytes)),
        ("state of a sequence", f"{costs.state_floats:,} numbers, {memory(costs.state_bytes)}"),
        ("forward pass", f"{costs.forward_flops:,.0f} FLOPs per token"),
        ("training step", f"{costs.training_flops:,.0f} FLOPs per token"),
    ):
        typer.echo(f"{name:<24}{value}")
    typer.echo(f"for sequences of {context:,} tokens")


def memory(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{size / 2**20:,.1f} MiB in {dtype}" for dtype, size in sizes.items())


def plot(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path | None, typer.Option(help="The picture to write; else RUN/plot.png.")] = None,
) -> None:
    """Draw a run's loss, throughput and, once measured, recall.

    \b
    Examples:
      gdn2 plot runs/first
      gdn2 plot runs/first --out loss.png
    """
    from gdn2.training.plot import plot_run

    typer.echo(plot_run(run, out))
