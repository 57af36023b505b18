import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gdn2.data.text import NotTextError, Source, find_sources, read_documents

JsonlWriter = Callable[..., Path]


def documents(path: Path, field: str = "text") -> list[str]:
    return [text for text, _ in read_documents(Source(path, explicit=True), field)]


def shares(path: Path) -> list[float]:
    return [share for _, share in read_documents(Source(path, explicit=True))]


def test_folder_is_walked_in_sorted_order_without_hidden_entries(texts: Path) -> None:
    (texts / ".hidden").write_text("x")
    (texts / ".git").mkdir()
    (texts / ".git" / "config").write_text("x")
    names = [s.path.name for s in find_sources([texts])]
    assert names == [f"{i:02d}.txt" for i in [*range(0, 20, 2), *range(1, 20, 2)]]
    assert not any(s.explicit for s in find_sources([texts]))


def test_link_to_a_folder_is_not_followed_and_not_passed_over_in_silence(texts: Path) -> None:
    (texts / "sub" / "again").symlink_to(texts)
    found = find_sources([texts])
    assert [s.name for s in found if not s.path.is_file()] == [str(texts / "sub" / "again")]
    assert len(found) == 21
    with pytest.raises(NotTextError, match="again: a broken link, a link to a folder, or no regular file"):
        documents(texts / "sub" / "again")


def test_stdlib_is_megabytes_of_library_code_without_tests() -> None:
    paths = [s.path for s in find_sources([], "stdlib")]
    assert paths == sorted(paths)
    names = {p.name for p in paths}
    assert {"argparse.py", "decoder.py"} <= names
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(p.parts) for p in paths)
    assert sum(p.stat().st_size for p in paths) > 4_000_000


def test_sources_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give either files and folders or a corpus"):
        find_sources([])
    with pytest.raises(ValueError, match="give either files and folders or a corpus"):
        find_sources([tmp_path], "stdlib")
    with pytest.raises(ValueError, match="corpus is 'web'; expected one of stdlib"):
        find_sources([], "web")
    with pytest.raises(ValueError, match=r"missing\.txt' does not exist"):
        find_sources([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="holds no files"):
        find_sources([tmp_path])


def test_file_in_two_sources_is_refused_with_both(tmp_path: Path) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("tree/f1.txt", "tree/sub/f2.txt", "other/f1.txt"):
        (tmp_path / name).write_text("the same text")  # copies are files of their own
    (tmp_path / "link").symlink_to(tmp_path / "tree" / "sub")
    tree, sub = tmp_path / "tree", tmp_path / "tree" / "sub"
    for sources, file in (
        ([tree, tree / "f1.txt"], tree / "f1.txt"),
        ([sub, f"{tree}/"], sub / "f2.txt"),
        ([tree, tmp_path / "other", tmp_path / "link"], tmp_path / "link" / "f2.txt"),
        ([tree / "f1.txt", tree / "sub" / ".." / "f1.txt"], tree / "sub" / ".." / "f1.txt"),
    ):
        said = f"the file {str(file)!r} is in two sources, {str(sources[0])!r} and {str(sources[-1])!r}; expected each"
        with pytest.raises(ValueError, match=re.escape(said)):
            find_sources(sources)
    assert len(find_sources([tree / "f1.txt", sub, tmp_path / "other"])) == 3


def test_what_is_no_regular_file_is_no_text(tmp_path: Path) -> None:
    link, pipe = tmp_path / "a.txt", tmp_path / "b.txt"
    link.symlink_to(tmp_path / "gone.txt")
    os.mkfifo(pipe)
    for path in (link, pipe):
        assert Source(path, explicit=False).size == 0
        with pytest.raises(NotTextError, match=r"[ab]\.txt: a broken link, a link to a folder, or no regular file"):
            documents(path)


def test_name_leaves_out_the_root(tmp_path: Path) -> None:
    assert Source(tmp_path / "a" / "b", explicit=False).name == str(tmp_path / "a" / "b")
    assert Source(tmp_path / "a" / "b", explicit=False, root=tmp_path).name == str(Path("a", "b"))
    assert not any(Path(s.name).is_absolute() for s in find_sources([], "stdlib"))


def test_text_keeps_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes("a\r\nb\n\nç".encode())
    assert documents(path) == ["a\r\nb\n\nç"]


def test_undecodable_file_is_named_with_its_position(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\xff")
    with pytest.raises(NotTextError, match=r"a\.txt: not UTF-8 text \(invalid start byte at byte 2\)"):
        documents(path)


def test_jsonl_gives_the_field_of_each_line(tmp_path: Path, write_jsonl: JsonlWriter) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "one", "body": "1"}, "", {"text": "twö", "body": "2"})
    assert documents(path) == ["one", "twö"]
    assert documents(path, "body") == ["1", "2"]
    assert shares(path) == [pytest.approx(len('{"text": "one", "body": "1"}\n') / path.stat().st_size), 1.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: not a line of JSON"),
        ("[" * 10**6, "a.jsonl:2: not a line of JSON: "),
        ("[]", "a.jsonl:2: no text in field 'text'"),
        ('{"text": 3}', "a.jsonl:2: no text in field 'text'"),
        ('{"other": "x"}', "a.jsonl:2: no text in field 'text'"),
        ('{"text": "\\ud800"}', "a.jsonl:2: not Unicode text (surrogates not allowed at character 0)"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, message: str, write_jsonl: JsonlWriter) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        documents(write_jsonl(tmp_path / "a.jsonl", {"text": "fine"}, line))


def test_parquet_gives_the_column(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    rows = [f"row {i}" for i in range(600)]  # more than one batch
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "n": list(range(600)), "gap": [None, *rows[1:]]}), path)
    assert documents(path) == rows
    assert shares(path) == [i / 600 for i in range(1, 601)]
    with pytest.raises(ValueError, match="no column 'body'; expected one of text, n, gap"):
        documents(path, "body")
    with pytest.raises(ValueError, match="row 1 of column 'n' is int; expected text"):
        documents(path, "n")
    with pytest.raises(ValueError, match="row 1 of column 'gap' is NoneType; expected text"):
        documents(path, "gap")
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + b"\xff" * (len(whole) // 4) + whole[100 + len(whole) // 4 :])
    with pytest.raises(ValueError, match=r"a\.parquet: damaged after row 0"):
        documents(path)
    path.write_bytes(b"PAR0")
    with pytest.raises(ValueError, match="not a Parquet file"):
        documents(path)


def test_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match="needs the package pyarrow"):
        documents(tmp_path / "a.parquet")
