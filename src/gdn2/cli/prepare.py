"""`gdn2 prepare`: text to token shards."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

SHARD_TOKENS = 1 << 30  # as in gdn2.data.prepare, which --help need not wait for


def prepare(
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    sources: Annotated[
        list[str] | None, typer.Argument(help="Files and folders: .jsonl and .parquet records, anything else as text.")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="A named text instead of files: stdlib.")] = None,
    hub: Annotated[
        str | None,
        typer.Option(help="A data set of the Hugging Face hub, or a local folder in its layout, instead of files."),
    ] = None,
    hub_config: Annotated[str | None, typer.Option(help="Its configuration, such as sample-100BT.")] = None,
    hub_split: Annotated[str, typer.Option(help="Its split.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Its branch, tag or commit; else today's commit.")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="'bytes', a tokenizer.json, a folder with one, or a Hugging Face name.")
    ] = "bytes",
    field: Annotated[str, typer.Option(help="The field of .jsonl and .parquet records that holds the text.")] = "text",
    val_share: Annotated[float, typer.Option(help="Share of the documents held out for validation; above 0.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the split and of what is mixed in.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
    shard_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a file; a split of more lies in several.")
    ] = SHARD_TOKENS,
    mix_recall: Annotated[
        int, typer.Option(min=0, help="Key-value documents to mix in; they teach what `eval --tasks recall` asks.")
    ] = 0,
    mix_needles: Annotated[
        int, typer.Option(min=0, help="Needle documents to mix in; they teach what `eval --tasks niah_...` asks.")
    ] = 0,
    needle_tasks: Annotated[
        str, typer.Option(help="Their tasks, comma-separated and in turn: niah_single_1, niah_multikey_1, ...")
    ] = "niah_single_1",
    needle_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a needle document, or a few more.")] = 512,
    haystack: Annotated[
        Path | None, typer.Option(help="Text that needles hide in, for tasks with essays: a text file or JSON.")
    ] = None,
) -> None:
    """Turn text into token shards for training and validation. Killed, the same command goes on where it was.

    \b
    Examples:
      gdn2 prepare --corpus stdlib --out corpora/stdlib
      gdn2 prepare --corpus stdlib --mix-recall 50000 --out corpora/mixed
      gdn2 prepare fineweb/ --tokenizer tokenizer.json --workers 32 --out corpora/fineweb
      gdn2 prepare --hub HuggingFaceFW/fineweb-edu --hub-config sample-10BT --tokenizer gpt2 --out corpora/edu
      gdn2 prepare books/ more.jsonl --tokenizer tokenizer.json --out corpora/books
    """
    from gdn2.data import load_tokenizer, prepare, show_progress
    from gdn2.evaluation.needles import needle_documents, needle_task, read_haystack
    from gdn2.evaluation.retrieval import recall_documents

    documents: dict[str, Iterable[str]] = {}
    if mix_recall:
        documents[f"{mix_recall} recall documents"] = recall_documents(mix_recall, seed)
    if mix_needles:
        names = [name.strip() for name in needle_tasks.split(",")]
        for name in names:
            if needle_task(name).haystack == "essays" and haystack is None:
                raise ValueError(f"{name} hides its needles in essays; expected --haystack FILE")
        text = read_haystack(haystack) if haystack else None
        stream = f"documents {seed}"  # whatever seed `gdn2 eval` asks with, its answers are not in the text
        documents[f"{mix_needles} needle documents: {', '.join(names)}"] = needle_documents(
            mix_needles, needle_tokens, load_tokenizer(tokenizer), stream, names, text.text if text else None
        )
    with show_progress() as progress:
        meta = prepare(
            out,
            sources or (),
            corpus=corpus,
            hub=hub,
            hub_config=hub_config,
            hub_split=hub_split,
            revision=revision,
            documents=documents,
            tokenizer=tokenizer,
            field=field,
            val_share=val_share,
            seed=seed,
            workers=workers,
            shard_tokens=shard_tokens,
            progress=progress,
        )
    for name, split in (("train", meta.train), ("val", meta.val)):
        typer.echo(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes of text")
