"""What the README shows is run: its Python, its command lines (on fewer tokens), the files and targets it names."""

import re
import shlex
from pathlib import Path

import pytest

from gdn2.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Appended to a command, so that it ends in seconds.
LESS = {"train": ["train.tokens=4096", "train.eval_tokens=512"], "eval": ["--samples", "4"], "generate": ["--tokens=9"]}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_the_readme_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_command_lines_of_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("sh")
    for line in block.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "gdn2"
        more = LESS.get(arguments[0], []) if "--resume" not in arguments else []
        with pytest.raises(SystemExit) as leaving:
            main([*arguments, *more])
        assert leaving.value.code == 0, f"{line}: {capsys.readouterr().err}"
    assert (tmp_path / "runs/first/plot.png").stat().st_size > 0


def test_files_and_targets_named_in_the_readme_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ {4}make ([a-z-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
