"""`gdn2 generate`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gdn2.cli.common import Device, Loaded, Memories, Run, Weights, load_to_generate, memory_dtype

if TYPE_CHECKING:
    from gdn2.inference import Draft


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
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|lookup",
            help="Guess ahead, with a smaller model of the same tokenizer or by looking up what followed before: the "
            "same text in fewer passes. Needs --temperature 0.",
        ),
    ] = None,
    weights: Weights = None,
    memories: Memories = "float32",
    device: Device = "auto",
) -> None:
    """Continue a text, shown as it comes. Without a prompt that is the text on standard input, or a new one.

    \b
    Examples:
      gdn2 generate runs/first --prompt "def main(" --tokens 400
      gdn2 generate runs/first --prompt "import " --prompt "class " --temperature 0
      gdn2 generate runs/first < story.txt
      gdn2 generate runs/large --prompt "import " --temperature 0 --draft runs/small
      gdn2 generate runs/large --prompt "import " --weights int8
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
    if draft is not None and (temperature, top_k, top_p) != (0, 0, 1):
        raise ValueError("--draft is for greedy text; expected --temperature 0, and neither --top-k nor --top-p")
    if draft is not None and memories != "float32":
        raise ValueError(f"--memories is {memories!r} with --draft; expected float32")
    kept_in = memory_dtype(memories)
    loaded = load_to_generate(run, device, weights)
    if draft is not None:
        guesser = _guesser(loaded, draft, weights)
        with loaded.autocast:
            for number, text in enumerate(prompts, 1):
                if len(prompts) > 1:
                    typer.echo(f"--- {number} of {len(prompts)} ---")
                _with_draft(loaded, text, tokens, stop or (), guesser)
        return
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
        memory_dtype=kept_in,
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


def _guesser(loaded: Loaded, draft: str, weights: str | None) -> "Draft":
    """What `--draft` asks for."""
    from gdn2.inference import DraftModel, PromptLookup

    if draft == "lookup":
        return PromptLookup()
    small = load_to_generate(Path(draft), str(loaded.device), weights)
    if small.tokenizer.definition() != loaded.tokenizer.definition():
        raise ValueError(f"--draft {draft!r} has another tokenizer than the run; expected the same")
    return DraftModel(small.model.eval())


def _with_draft(loaded: Loaded, prompt: str, tokens: int, stops: Sequence[str], guesser: "Draft") -> None:
    """Continue one text greedily, shown as it comes; standard error tells in how many passes."""
    from gdn2.generate import StopStrings
    from gdn2.inference import speculate

    tokenizer, stop = loaded.tokenizer, StopStrings(stops)
    stream, end = tokenizer.stream(), tokenizer.end_of_text
    rounds = speculate(loaded.model.eval(), tokenizer.encode(prompt) or [end], tokens, guesser, stop_tokens=[end])
    said = passes = 0
    typer.echo(prompt, nl=False)
    for new, _ in rounds:
        passes += 1
        for token in new:
            typer.echo(stop.feed(stream.feed(token)), nl=False)
            said += 1
            if stop.stopped:
                break
        if stop.stopped:
            break
    typer.echo(stop.feed(stream.flush()) + stop.flush())
    typer.echo(f"{said} tokens in {passes} passes", err=True)
