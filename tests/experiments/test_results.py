"""The page of results holds what the rows say, and says when it does not."""

import json

import pytest
import results
from report.conftest import language_row, memory_row

COST = {"seconds": 90.0, "device": "cpu", "torch": "2.13.0", "code": {"source_sha256": "ab" * 32}}
PAGE = "# Results\n\nWords.\n\n<!-- rows: a -->\nold\n<!-- end -->\n\nMore words.\n\n<!-- rows: b -->\n<!-- end -->\n"


def test_the_page_in_docs_is_up_to_date():
    results.main(["--check"])


def test_tables_are_made_anew_between_the_marks_and_words_stay(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    rows = [memory_row(f"{seed}", "gdn2", 1e-2, seed) | COST for seed in (0, 1)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--page", str(page), "--rows", str(tmp_path)]
    with pytest.raises(SystemExit):
        results.main([*arguments, "--check"])
    assert "does not hold what" in capsys.readouterr().err
    assert page.read_text() == PAGE
    results.main(arguments)
    text = page.read_text()
    assert "2 rows, 3.0 minutes of cpu." in text
    assert "| gdn2 | 80.0 ± 14.1 | 25.0 ± 0.0 | 2 | 0.01 of 0.01 |" in text
    assert "old" not in text
    assert "Words.\n" in text
    assert text.endswith("<!-- rows: b -->\n\nNot measured yet.\n\n<!-- end -->\n")
    results.main([*arguments, "--check"])
    results.main(arguments)
    assert page.read_text() == text


def test_rows_of_several_machines_are_counted_and_texts_named(tmp_path):
    corpus = {"files": 2_304, "text_bytes": 48_000_000, "files_sha256": "cd" * 32, "train_sha256": "0123456789"}
    rows = [language_row("a", "gdn2", 1e-3, 0) | COST, language_row("b", "gdn2", 1e-3, 1) | COST | {"device": "H100"}]
    about = results.about([row | {"corpus": corpus} for row in rows])
    assert "2 rows, 3.0 minutes of cpu (1 rows), H100 (1 rows)." in about
    assert "Text 01234567: 2,304 files, 48,000,000 bytes, list of files cdcdcdcdcdcd." in about
