"""`gdn2 prepare`: text to token shards."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

NEEDLE_TOKENS = 512  # at most, in a needle document that `prepare` mixes in


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
