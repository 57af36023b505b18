"""`gdn2 generate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gdn2.cli.common import Device, Run, load


def generate(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeat it for several.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file whose whole text is continued.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 samples as the model says.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0 means all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that reach this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text before which to end; repeat it for several.")] = None,
    device: Device = "auto",
) -> None:
    """Continue a text, shown as it comes. Without a prompt that is the text on standard input, or a new one.

    \b
    Examples:
      gdn2 generate runs/first --prompt "def main(" --tokens 400
      gdn2 generate runs/first --prompt "import " --prompt "class " --temperature 0
      gdn2 generate runs/first < story.txt
    """
    from gdn2.generate import generate_text

    prompts = list(prompt or ())
    if prompt_file is not None:
        try:
            prompts.append(prompt_file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(prompt_file)!r} is not UTF-8 text") from error
    if not prompts:
        prompts.append("" if sys.stdin.isatty() else sys.stdin.read())
    loaded = load(run, device)
    steps = generate_text(
        loaded.model,
        loaded.tokenizer,
        prompts,
        tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_strings=stop or (),
    )
    with loaded.autocast:
        if len(prompts) == 1:
            typer.echo(prompts[0], nl=False)
            for (piece,) in steps:
                typer.echo(piece, nl=False)
            typer.echo()
        else:
            texts = ["".join(pieces) for pieces in zip(*steps)]
            for number, (start, text) in enumerate(zip(prompts, texts), 1):
                typer.echo(f"--- {number} of {len(prompts)} ---\n{start}{text}")
