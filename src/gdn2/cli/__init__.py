"""The command `gdn2`: each sub-command parses, builds the configuration and calls.

Bad input ends with exit code 2 and one line on standard error; training that cannot go on, with 1.
"""

from collections.abc import Sequence
from typing import Annotated

import typer

from gdn2.cli import describe, evaluate, export, generate, prepare, report, selftest, serve, train
from gdn2.cli.common import leave

app = typer.Typer(
    name="gdn2",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves by SystemExit."""
    try:
        app(arguments, prog_name="gdn2")
    except (ValueError, OSError) as error:
        leave(error, 2)


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


app.command()(prepare.prepare)
app.command()(train.train)
app.command("eval")(evaluate.evaluate)
app.command()(generate.generate)
app.command()(serve.serve)
app.command()(export.export)
app.command()(describe.info)
app.command()(describe.plot)
app.command()(report.report)
app.command()(selftest.selftest)
