"""`gdn2 serve`."""

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from gdn2.cli.common import Device, Memories, Run, Weights, load_to_generate, memory_dtype

KEYS_VARIABLE = "GDN2_API_KEYS"


def serve(
    run: Run,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen at; 0 takes a free one.")] = 8_000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; else that of the run.")] = None,
    keys: Annotated[
        Path | None, typer.Option(help=f"File of API keys, one a line; the variable {KEYS_VARIABLE} may hold more.")
    ] = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Serve everyone, also beyond this machine, without a key.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file for /v1/chat/completions; else that of the tokenizer, if any.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Texts that run at a time.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more are answered with 429.")] = 64,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens read between two steps.")] = 512,
    cache: Annotated[int, typer.Option(min=0, help="MiB for states of prompts' beginnings; 0 keeps none.")] = 0,
    rate: Annotated[int, typer.Option(min=0, help="Requests a minute for each key or address; 0: any.")] = 0,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request at most.")] = 2**20,
    max_prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt at most.")] = 65_536,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a text at most.")] = 4_096,
    timeout: Annotated[float, typer.Option(help="Seconds for a whole answer.")] = 300.0,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that running requests get after SIGTERM.")] = 60,
    connections: Annotated[int, typer.Option(min=1, help="Open connections at a time.")] = 1_000,
    weights: Weights = None,
    memories: Memories = "float32",
    device: Device = "auto",
) -> None:
    """Serve a model as OpenAI's API, with a page to try it at /. SIGTERM ends it once running requests are answered.

    \b
    Examples:
      gdn2 serve runs/first
      gdn2 serve runs/first --port 8080 --slots 32 --cache 1024
      gdn2 serve runs/first --host 0.0.0.0 --keys keys.txt --rate 60
    """
    try:
        from gdn2.serving.app import create_app
        from gdn2.serving.run import serve as run_server
        from gdn2.serving.settings import ServerSettings, read_keys
    except ImportError as error:
        raise ValueError(f"serve needs the packages of an extra: pip install 'gdn2[serve]' ({error})") from error
    from gdn2.inference import Engine, PrefixCache

    known = read_keys(keys, os.environ.get(KEYS_VARIABLE, ""))
    if not (known or without_keys or _loopback(host)):
        raise ValueError(
            f"--host is {host!r} and there is no API key; expected --keys, {KEYS_VARIABLE} or --without-keys"
        )
    settings = ServerSettings(
        name=run.resolve().name if name is None else name,
        keys=known,
        hosts=() if known or without_keys else ("localhost", "127.0.0.1", "[::1]", host),
        queue=queue,
        rate=rate,
        max_body=max_body,
        max_prompt_tokens=max_prompt,
        max_new_tokens=max_tokens,
        timeout=timeout,
    )
    kept_in = memory_dtype(memories)
    loaded = load_to_generate(run, device, weights)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    template = tokenizer.chat_template if chat_template is None else chat_template.read_text(encoding="utf-8")

    def make_engine() -> Engine:
        kept = PrefixCache(cache * 2**20, chunk) if cache else None
        return Engine(model, tokenizer, slots, chunk, kept, memory_dtype=kept_in)

    app = create_app(settings, model, tokenizer, make_engine, template, loaded.autocast)

    def ready(address: str) -> None:
        typer.echo(f"serving {settings.name!r} on {loaded.device} at {address} (Ctrl-C ends it)", err=True)

    run_server(app, host, port, grace, connections, ready)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
