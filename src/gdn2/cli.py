"""The command `gdn2`: each sub-command parses, builds the configuration and calls.

Bad input ends with exit code 2 and one line on standard error; training that cannot go on, with 1.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

if TYPE_CHECKING:  # these import torch, which --help and shell completion need not wait for
    import torch

    from gdn2.config import RunConfig
    from gdn2.data import Tokenizer
    from gdn2.model import LanguageModel

NEEDLE_TOKENS = 512  # at most, in a needle document that `prepare` mixes in

app = typer.Typer(
    name="gdn2",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(help="A run's folder (its newest checkpoint is taken), or one checkpoint.")]
Device = Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu, cuda or cuda:N.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves by SystemExit."""
    try:
        app(arguments, prog_name="gdn2")
    except (ValueError, OSError) as error:
        leave(error, 2)


def leave(error: Exception, code: int) -> NoReturn:
    typer.echo(f"gdn2: error: {error}", err=True)
    raise SystemExit(code) from error


def show_keys(wanted: bool) -> None:
    if wanted:
        from gdn2.config import documented_keys
        from gdn2.presets import preset_names

        names = f"all the model's settings at once, one of {', '.join(preset_names())}"
        for key, default, doc in (("preset", "null", names), *documented_keys()):
            typer.echo(f"{key}={default}")
            typer.echo(fill(doc, 80, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))
        raise typer.Exit


def show_version(wanted: bool) -> None:
    if wanted:
        import gdn2

        typer.echo(f"gdn2 {gdn2.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Gated DeltaNet-2 language models: prepare text, train, evaluate, generate.

    \b
    The whole way, on the text of Python's own standard library:
      gdn2 prepare --corpus stdlib --out corpora/stdlib
      gdn2 train --preset gdn2-hybrid-tiny --run runs/first data.path=corpora/stdlib
      gdn2 eval runs/first
      gdn2 generate runs/first --prompt "def "
      gdn2 plot runs/first

    `gdn2 COMMAND --help` explains each.
    """


@app.command()
def prepare(
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    sources: Annotated[
        list[str] | None, typer.Argument(help="Files and folders: .jsonl and .parquet records, anything else as text.")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="A named text instead of files: stdlib.")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="'bytes', a tokenizer.json, a folder with one, or a Hugging Face name.")
    ] = "bytes",
    field: Annotated[str, typer.Option(help="The field of .jsonl and .parquet records that holds the text.")] = "text",
    val_share: Annotated[float, typer.Option(help="Share of the documents held out for validation; above 0.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the split and of what is mixed in.")] = 0,
    mix_recall: Annotated[
        int, typer.Option(min=0, help="Key-value documents to mix in; they teach what `eval --tasks recall` asks.")
    ] = 0,
    mix_needles: Annotated[
        int, typer.Option(min=0, help="Needle documents to mix in; they teach what `eval --tasks niah_single_1` asks.")
    ] = 0,
) -> None:
    """Turn text into token shards for training and validation.

    \b
    Examples:
      gdn2 prepare --corpus stdlib --out corpora/stdlib
      gdn2 prepare --corpus stdlib --mix-recall 50000 --out corpora/mixed
      gdn2 prepare books/ more.jsonl --tokenizer tokenizer.json --out corpora/books
    """
    from gdn2.data import load_tokenizer, prepare, show_progress
    from gdn2.evaluation.retrieval import needle_documents, recall_documents

    documents: dict[str, Iterable[str]] = {}
    if mix_recall:
        documents[f"{mix_recall} recall documents"] = recall_documents(mix_recall, seed)
    if mix_needles:
        needles = needle_documents(mix_needles, NEEDLE_TOKENS, load_tokenizer(tokenizer), seed)
        documents[f"{mix_needles} needle documents"] = needles
    with show_progress() as progress:
        meta = prepare(
            out,
            sources or (),
            corpus=corpus,
            documents=documents,
            tokenizer=tokenizer,
            field=field,
            val_share=val_share,
            seed=seed,
            progress=progress,
        )
    for name, split in (("train", meta.train), ("val", meta.val)):
        typer.echo(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes of text")


@app.command()
def train(
    run: Annotated[Path, typer.Option(help="The run's folder; for a new run empty or not there yet.")],
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
    """
    from gdn2.config import ConfigError, load_run
    from gdn2.presets import preset as named
    from gdn2.training import TrainingError, train

    files = [text for text in settings or () if "=" not in text or Path(text).is_file()]
    overrides = [text for text in settings or () if text not in files]
    if len(files) > 1:
        raise ConfigError(f"configurations {', '.join(files)}; expected one file, and overrides as key=value")
    if resume and (files or preset is not None):
        raise ConfigError("--resume takes the run's own configuration; leave out the file and --preset")
    if not (resume or files or preset is not None):
        raise ConfigError("no model was chosen; expected a configuration file, --preset, or --resume")
    if preset is not None:
        overrides.insert(0, f"preset={preset}")
    path = run / "config.yaml" if resume else files[0] if files else None
    try:
        outcome = train(load_run(path, overrides, named), run, resume)
    except TrainingError as error:
        leave(error, 1)
    if outcome.interrupted == "SIGINT":
        raise typer.Exit(130)


@app.command("eval")
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
            help="Comma-separated: perplexity, recall, niah_single_1, niah_single_2, niah_single_3, niah_multikey_1, "
            "and lm_eval:NAME for a task of lm-evaluation-harness."
        ),
    ] = "perplexity,recall",
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a window or needle prompt; else as in training, and 1024 for needles."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions of each recall task.")] = 100,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to score; else as the run's validation.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of token shards; else the run's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 0,
    task_path: Annotated[Path | None, typer.Option(help="Folder with further tasks of lm-evaluation-harness.")] = None,
    device: Device = "auto",
) -> None:
    """Measure a model on held-out text. The results are shown, and kept in RUN/eval.json.

    \b
    Examples:
      gdn2 eval runs/first
      gdn2 eval runs/first --tasks perplexity --length 8192
      gdn2 eval runs/first --length 8192 model.rope_scaling=ntk model.rope_factor=4
      gdn2 eval runs/first --tasks niah_single_1,niah_multikey_1 --length 2048 --samples 500
      gdn2 eval runs/first --tasks lm_eval:piqa,lm_eval:mine --task-path my_tasks
    """
    from rich.console import Console

    from gdn2.evaluation import report

    names = report.check_tasks([name.strip() for name in tasks.split(",")])
    changed = list(settings or ())
    harness = [name.removeprefix(report.HARNESS) for name in names if name.startswith(report.HARNESS)]
    own = [name for name in names if not name.startswith(report.HARNESS)]
    loaded = load(run, device, changed)
    val: Any = shards_of(data or loaded.config.data.path, loaded.tokenizer).split("val") if own else None
    results, shown = report.read(run / "eval.json"), list(own)
    for name in own:
        with loaded.autocast, counting(name) as progress:
            results[name] = {"checkpoint": loaded.checkpoint, "settings": changed} | report.evaluate(
                name,
                loaded.model,
                loaded.tokenizer,
                val,
                seq_len=loaded.config.data.seq_len,
                packed=loaded.config.data.packed,
                length=length,
                tokens=tokens or loaded.config.train.eval_tokens,
                samples=samples,
                seed=seed,
                device=loaded.device,
                progress=progress,
            )
        report.write(run / "eval.json", results)
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
                length or loaded.config.data.seq_len,
                task_path,
                progress=progress,
            )
        about = {"checkpoint": loaded.checkpoint, "settings": changed}
        found = {report.HARNESS + name: about | score for name, score in scores.items()}
        results |= found
        shown += found
        report.write(run / "eval.json", results)
    Console().print(report.table({name: results[name] for name in shown}))


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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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
