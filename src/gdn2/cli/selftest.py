"""`gdn2 selftest`: are the kernels right on this GPU, and which configurations are fastest?"""

import json
from pathlib import Path
from typing import Annotated

import typer


def selftest(
    quick: Annotated[bool, typer.Option(help="Heads of 128 alone, in a minute; refuses and keeps nothing.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Cases at a time; a CPU core each, up to 8.")] = None,
    tune: Annotated[bool, typer.Option(help="Then time other configurations and keep right ones that win.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings here too.")] = None,
) -> None:
    """Check every configuration of the kernels on this GPU against float64, all gradients, and print a table.

    What is wrong is refused by the operator from then on. Compiling takes most of the time, some minutes.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("gdn2 selftest checks the kernels on a GPU, and torch finds none here")
    from gdn2.ops.kernels import verdicts
    from gdn2.selftest import check
    from gdn2.selftest import tune as tuning

    device = torch.device("cuda", torch.cuda.current_device())
    typer.echo(f"{torch.cuda.get_device_name(device)}: relative L2 errors against float64, the worst head of each case")
    found = []
    for finding in check.selftest(device, quick, jobs):
        found.append(finding)
        numbers = [f"{x:8.1e}" if x is not None else "     -  " for x in (finding.output, finding.gradient)]
        verdict = f"WRONG: {finding.wrong}" if finding.wrong else "ok"
        case = f"{finding.name:35} {finding.what:75}"
        typer.echo(f"{case} {' '.join(numbers)} {finding.seconds:5.0f} s  {verdict}")
    wrong = [finding for finding in found if finding.wrong]
    typer.echo(f"{len(found) - len(wrong)} of {len(found)} right" + ("" if quick else f"; kept in {verdicts.path()}"))
    if json_file is not None:
        json_file.write_text(json.dumps([finding._asdict() for finding in found], indent=1))
    if tune:
        for line in tuning.tune(device, quick, jobs):
            typer.echo(line)
    if wrong:
        raise typer.Exit(1)
