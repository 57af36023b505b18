"""`gdn2 export`."""

from pathlib import Path
from typing import Annotated

import typer

from gdn2.cli.common import Run, load


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that tools should not go beyond unasked; else the length trained on."),
    ] = None,
) -> None:
    """Write a model for Hugging Face transformers, with its tokenizer and a model card.

    \b
    Examples:
      gdn2 export runs/first exported/first
      gdn2 export runs/first exported/first --max-length 8192
    """
    loaded = load(run, "cpu")
    try:
        from gdn2.integrations.export import export as write
    except ImportError as error:
        raise ValueError(f"export needs the packages of an extra: pip install 'gdn2[hf]' ({error})") from error
    typer.echo(write(loaded.model, loaded.tokenizer, loaded.config, out, max_length))
