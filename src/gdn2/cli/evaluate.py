"""`gdn2 eval`."""

from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gdn2.cli.common import Device, Run, Weights, counting, load

if TYPE_CHECKING:
    from gdn2.data import Tokenizer


def evaluate(
    run: Run,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="model.KEY=VALUE",
            help="Settings of the model in place of the run's, for texts longer than in training: rope_scaling, ...",
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated: perplexity, recall, niah_single_1, _2, _3, niah_multikey_1, _2, _3, "
            "niah_multivalue, niah_multiquery; swde, squad, fda, triviaqa, nq, drop; and lm_eval:NAME for a task of "
            "lm-evaluation-harness."
        ),
    ] = "perplexity,recall",
    length: Annotated[
        str | None,
        typer.Option(
            metavar="INTEGER,...",
            help="Tokens of a window or needle prompt; else as in training, needles 1024. Needles take several.",
        ),
    ] = None,
    passages: Annotated[
        Path | None, typer.Option(help="Folder with swde.jsonl, squad.jsonl, ...: context, question and answers.")
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT,...",
            help="Where needles hide, for a heat map of depth and length; else drawn as in RULER.",
        ),
    ] = None,
    haystack: Annotated[
        Path | None,
        typer.Option(help="Text that needles hide in, or RULER's PaulGrahamEssays.json; else validation documents."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions of each recall task.")] = 100,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to score; else as the run's validation.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of token shards; else the run's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 0,
    task_path: Annotated[Path | None, typer.Option(help="Folder with further tasks of lm-evaluation-harness.")] = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Measure a model on held-out text. The results are shown, and kept in RUN/eval.json beside those that are there.

    \b
    Examples:
      gdn2 eval runs/first
      gdn2 eval runs/first --tasks perplexity --length 8192
      gdn2 eval runs/first --tasks perplexity --weights int8
      gdn2 eval runs/first --length 8192 model.rope_scaling=ntk model.rope_factor=4
      gdn2 eval runs/first --tasks niah_single_1,niah_multikey_1 --length 2048,4096 --samples 500
      gdn2 eval runs/first --tasks niah_single_2 --length 1024,2048,4096 --depths 0,25,50,75,100
      gdn2 eval runs/first --tasks swde,squad --passages my_passages --length 2048
      gdn2 eval runs/first --tasks lm_eval:piqa,lm_eval:mine --task-path my_tasks
    """
    from rich.console import Console

    from gdn2.evaluation import report, results
    from gdn2.evaluation.needles import read_haystack

    names = report.check_tasks([name.strip() for name in tasks.split(",")])
    lengths = numbers("--length", length, int, 1, inf)
    places = numbers("--depths", depths, float, 0, 100)
    text = read_haystack(haystack) if haystack else None
    changed = list(settings or ())
    harness = [name.removeprefix(results.HARNESS) for name in names if name.startswith(results.HARNESS)]
    own = [name for name in names if not name.startswith(results.HARNESS)]
    loaded = load(run, device, changed, weights)
    val: Any = shards_of(data or loaded.config.data.path, loaded.tokenizer).split("val") if own else None
    about = {"checkpoint": loaded.checkpoint, "settings": changed, "weights": loaded.weights}
    kept = results.read(run / "eval.json")
    shown = []

    def keep(result: results.Result) -> None:
        shown.append(result)
        results.put(kept, result)
        results.write(run / "eval.json", kept)

    for name in own:
        with loaded.autocast, counting(name) as progress:
            result = about | report.evaluate(
                name,
                loaded.model,
                loaded.tokenizer,
                val,
                seq_len=loaded.config.data.seq_len,
                packed=loaded.config.data.packed,
                lengths=lengths,
                depths=places,
                haystack=text,
                passage_data=passages,
                tokens=tokens or loaded.config.train.eval_tokens,
                samples=samples,
                seed=seed,
                device=loaded.device,
                progress=progress,
            )
        keep(result)
    if harness:
        try:
            from gdn2.integrations import lm_eval
        except ImportError as error:
            raise ValueError(f"lm_eval tasks need an extra: pip install 'gdn2[eval]' ({error})") from error
        with loaded.autocast, counting("lm_eval") as progress:
            scores = lm_eval.evaluate(
                loaded.model,
                loaded.tokenizer,
                harness,
                max(lengths, default=loaded.config.data.seq_len),
                task_path,
                progress=progress,
            )
        tasks_of = {"task_path": None if task_path is None else str(task_path)}
        for name, score in scores.items():
            keep({"task": results.HARNESS + name} | about | tasks_of | score)
    Console().print(report.table(shown))


def numbers(option: str, text: str | None, kind: type, low: float, high: float) -> list[Any]:
    """The comma-separated numbers of an option. ValueError for what is none, or outside [low, high]."""
    found = []
    for part in text.split(",") if text is not None else ():
        try:
            found.append(kind(part))
        except ValueError:
            found.append(nan)
        if not low <= found[-1] <= high:
            what = "integers" if kind is int else "numbers"
            bounds = f">= {low}" if high == inf else f"of {low} to {high}"
            raise ValueError(f"{option} is {text!r}; expected {what} {bounds}, separated by commas")
    return found


def shards_of(path: Path | str, tokenizer: "Tokenizer") -> Any:
    """The token shards of a folder, checked, once they are the given tokenizer's."""
    from gdn2.data import Shards, load_tokenizer

    shards = Shards(path)
    if load_tokenizer(shards.path).definition() != tokenizer.definition():
        raise ValueError(
            f"{str(shards.path)!r} was prepared with another tokenizer ({shards.meta.tokenizer!r}) than the model's; "
            "expected text prepared with the same"
        )
    shards.verify("val")
    return shards
