"""Summaries of experiments' rows compare fairly: one learning rate for all seeds, chosen away from what is shown."""

import json

import pytest
from report.conftest import language_row, memory_row

from gdn2.cli import main
from gdn2.report.experiments import (
    failures,
    language_entries,
    language_tables,
    memory_entries,
    memory_tables,
    memory_title,
)
from gdn2.report.sources import read_rows, read_sources
from gdn2.report.tables import mean_and_interval
from gdn2.report.write import write_report


def test_memory_rates_are_chosen_by_validation_and_test_questions_shown(experiments):
    gdn2, kda = memory_entries(list(read_rows(experiments / "memory.jsonl").values()))
    assert (gdn2.mixer, gdn2.lr, len(gdn2.rows)) == ("gdn2", 1e-2, 2)
    table, differences, rates = memory_tables([gdn2, kda])
    assert table.heads == ("mixer", "4", "8", "seeds", "lr, of those tried")
    assert table.rows[0] == ("gdn2", "80.0 ± 14.1", "25.0 ± 0.0", "2", "0.01 of 0.001, 0.01")
    assert "| gdn2 | 80.0 ± 14.1 | 25.0 ± 0.0 | 2 | 0.01 of 0.001, 0.01 |" in table.markdown()
    name = "mqar, memory 1 x 16 x 16 a layer, 2,000 steps of 64"
    assert differences.rows == ((f"{name}: kda", "+0.0 ± 0.0", "2"),)
    assert rates.heads == ("model", "lr", "%", "seeds")
    assert [row[:2] for row in rates.rows] == [
        (f"{name}: {mixer}", rate) for mixer in ("gdn2", "kda") for rate in ("0.001", "0.01")
    ]
    assert rates.rows[1] == (f"{name}: gdn2", "0.01", "52.5 ± 7.1", "2")


def test_differences_stand_in_the_order_of_the_tables():
    rows = [
        memory_row(f"{task} {name}", name, 1e-3, 0) | {"task": task} for name in ("gdn2", "kda", "gdn") for task in "ab"
    ]
    *tables, differences = memory_tables(memory_entries(rows))
    names = [f"{table.title.split(':')[0]}: {row[0]}" for table in tables for row in table.rows if row[0] != "gdn2"]
    assert [row[0] for row in differences.rows] == names


def test_a_rate_that_a_seed_lacks_is_not_compared():
    rows = [memory_row("a", "gdn2", 1e-3, 0), memory_row("b", "gdn2", 1e-3, 1), memory_row("c", "gdn2", 1e-2, 0)]
    (entry,) = memory_entries(rows)
    assert (entry.lr, len(entry.rows)) == (1e-3, 2)
    assert memory_tables([entry])[0].rows[0][-1] == "0.001 of 0.001, 0.01"
    (single,) = memory_tables(memory_entries(rows[2:]))
    assert single.rows == (("gdn2", "90.0", "25.0", "1", "0.01 of 0.01"),)  # one seed has no deviation


def test_rows_of_one_seed_are_never_taken_for_two():
    row = memory_row("a", "gdn2", 1e-3, 0)
    half = row | {"key": "b", "run": row["run"] | {"precision": "bf16"}}
    slow = row | {"key": "c", "run": row["run"] | {"optim": {"warmup_tokens": 250}}}
    entries = memory_entries([row, half, slow])
    assert [len(entry.rows) for entry in entries] == [1, 1, 1]
    title = "mqar, memory 1 x 16 x 16 a layer, 2,000 steps of 64"
    assert [memory_title(entry.group) for entry in entries] == [title, f"{title}, bf16", f"{title}, warm-up of 250"]
    with pytest.raises(ValueError, match=r"rows a and d are both gdn2's at learning rate 0\.001, seed 0, and differ"):
        memory_entries([row, row | {"key": "d"}])
    with pytest.raises(ValueError, match="report them apart"):
        language_entries([language_row(key, "kda", 1e-3, 1) for key in "ad"])


def test_language_rates_are_chosen_by_bits_and_kinds_stand_together(experiments):
    rows = list(read_rows(experiments / "language.jsonl").values())
    rows.append(language_row("h", "gdn2", 1e-3, 0) | {"kind": "hybrid"})
    tables = language_tables(language_entries(rows))
    assert [table.title.split(",")[0] for table in tables] == [
        "Bits per byte of held-out files; text 01234567", "niah_single_1", "niah_multikey_1",
        "Gated DeltaNet-2 less each model of its kind", "Each learning rate",
    ]  # fmt: skip
    assert [row[0] for row in tables[0].rows] == ["recurrent gdn2", "recurrent kda", "hybrid gdn2"]
    assert tables[0].rows[0] == (
        "recurrent gdn2",
        "1.6000 ± 0.1414",
        "1.7000 ± 0.1414",
        "2",
        "0.001 of 0.001, 0.01",
        "12.00M",
    )
    assert tables[1].rows[0] == ("recurrent gdn2", "40.0 ± 0.0", "40.0 ± 0.0", "2", "0.001 of 0.001, 0.01", "12.00M")
    assert tables[3].heads == ("compared with", "bits per byte", "niah_single_1, %", "niah_multikey_1, %", "seeds")
    assert tables[3].rows == (("recurrent kda", "-0.2000 ± 0.0000", "+0.0 ± 0.0", "+0.0 ± 0.0", "2"),)
    assert tables[4].heads == ("model", "lr", "bits per byte", "niah_single_1, %", "niah_multikey_1, %", "seeds")
    assert [row[:2] for row in tables[4].rows] == [
        (f"recurrent {mixer}", rate) for mixer in ("gdn2", "kda") for rate in ("0.001", "0.01")
    ]
    assert tables[4].rows[0] == ("recurrent gdn2", "0.001", "1.6000 ± 0.1414", "40.0 ± 0.0", "40.0 ± 0.0", "2")
    other = [row | {"key": "o", "corpus": {"train_sha256": "ffff"}} for row in rows[:1]]
    assert len(language_tables(language_entries(rows + other))) == 8  # another text is never mixed in


def test_failed_rows_are_named_and_counted_nowhere(tmp_path):
    failed = {key: value for key, value in language_row("a", "kda", 1e-2, 0).items() if key not in ("needles", "loss")}
    del failed["language"]
    rows = [failed | {"failed": "stopped at step 3"}, language_row("b", "kda", 1e-3, 0)]
    (entry,) = language_entries(rows)
    (table, *_) = language_tables([entry])
    assert table.rows == (("recurrent kda", "1.7000", "1.8000", "1", "0.001 of 0.001, 0.01 (1 failed)", "12.00M"),)
    assert failures(rows) == ["recurrent kda at learning rate 0.01, seed 0, failed: stopped at step 3"]
    lost = {
        key: value for key, value in memory_row("a", "kda", 1e-2, 1).items() if key not in ("by_load", "validation")
    }
    rows = [lost | {"failed": "the loss was not finite"}, memory_row("b", "kda", 1e-3, 0)]
    (entry,) = memory_entries(rows)
    assert memory_tables([entry])[0].rows == (("kda", "40.0", "25.0", "1", "0.001 of 0.001, 0.01 (1 failed)"),)
    name = "mqar, memory 1 x 16 x 16 a layer, 2,000 steps of 64: kda"
    assert failures(rows) == [f"{name} at learning rate 0.01, seed 1, failed: the loss was not finite"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = write_report([tmp_path / "rows.jsonl"], tmp_path / "report.html").read_text()
    assert f"<p>{name} at learning rate 0.01, seed 1, failed: the loss was not finite.</p>" in html


def test_differences_are_between_the_same_seeds_with_students_interval():
    base = [language_row(f"g{seed}", "gdn2", 1e-3, seed) for seed in (0, 1, 2)]
    other = [language_row(f"k{seed}", "kda", 1e-3, seed) for seed in (3, 2, 1, 0)]
    for row, less in zip(other, (9.0, 3.0, 2.0, 1.0)):  # seed 3 has nobody to compare with
        row["language"]["512"]["bits_per_byte"] = base[row["seed"] % 3]["language"]["512"]["bits_per_byte"] - less
    table = language_tables(language_entries([*base, *other]))[-1]
    assert table.rows[0][1] == "+2.0000 ± 2.4843"  # 4.303 times 1 / sqrt(3)
    assert table.rows[0][-1] == "3"
    assert mean_and_interval([0.25], 2) == "+0.25"


def test_what_is_no_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(memory_row("a", "gdn2", 1e-3, 0)) + '\n{"key": "half')
    assert list(read_rows(path)) == ["a"]
    for text, message in (
        ("[]\n", r"rows\.jsonl:1: no row of an experiment: all of it is \[\]; expected an object"),
        ('{"key": "a", "experiment": "speed"}\n', "1: no row of an experiment: experiment is 'speed'; expected one of"),
        (json.dumps(language_row("a", "gdn2", 1e-3, 0) | {"kind": "odd"}) + "\n", "kind is 'odd'; expected one of rec"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_sources([tmp_path / "nothing"])
    path.write_text("")
    with pytest.raises(ValueError, match="holds nothing new to report"):
        read_sources([tmp_path])
    path.write_text(json.dumps(memory_row("a", "gdn2", 1e-3, 0)) + "\n")
    assert len(read_sources([tmp_path]).rows["memory"]) == 1
    with pytest.raises(ValueError, match="holds nothing new"):
        read_sources([path, tmp_path])


def leaves(value, path=()):
    """The paths to every plain value of a row, the first item standing for all of a list."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list) and value:
        return leaves(value[0], (*path, 0))
    return [path]


@pytest.mark.parametrize("make", [memory_row, language_row])
@pytest.mark.parametrize("change", ["missing", "of another kind"])
def test_a_row_that_lacks_what_tables_show_is_named_with_its_line_and_field(tmp_path, capsys, make, change):
    """A command for the first field, the reader for all the others."""
    path = tmp_path / "rows.jsonl"
    whole = make("a", "gdn2", 1e-3, 0)
    unused = {("parameters",), ("validation", 0, "load")} if make is memory_row else set()
    for leaf in leaves(whole):
        if leaf in unused or (change == "missing" and isinstance(leaf[-1], int)):  # or a list that is shorter
            continue
        row = json.loads(json.dumps(whole))
        inside = row
        for step in leaf[:-1]:
            inside = inside[step]
        if change == "missing":
            del inside[leaf[-1]]
        else:
            inside[leaf[-1]] = ["x"]
        path.write_text(json.dumps(whole) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=rf"rows\.jsonl:2: no row of an experiment: .*{leaf[-1]}"):
            read_rows(path)
    with pytest.raises(SystemExit) as left:
        main(["report", str(path), "--out", str(tmp_path / "report.html")])
    assert left.value.code == 2
    assert "rows.jsonl:2: no row of an experiment: " in capsys.readouterr().err


def test_rows_that_were_asked_at_other_loads_or_lengths_share_no_table():
    rows = [memory_row("a", "gdn2", 1e-3, 0), memory_row("b", "kda", 1e-3, 0)]
    rows[1]["by_load"].pop()
    with pytest.raises(
        ValueError, match=r"rows a and b belong in one table, and one was asked \[4, 8\], the other \[4\]"
    ):
        memory_entries(rows)
    rows = [language_row("a", "gdn2", 1e-3, 0), language_row("b", "kda", 1e-3, 0)]
    rows[1]["needles"].pop()
    with pytest.raises(ValueError, match="rows a and b belong in one table"):
        language_entries(rows)
