"""The report in a browser and as text: it holds what was measured, asks nobody, fits phones, and trusts no name."""

import json
import re
from html.parser import HTMLParser

import pytest
from evaluation.test_results import ABOUT, NEEDLES, PERPLEXITY, PIQA, SWDE

from gdn2.cli import main
from gdn2.evaluation.results import name_of
from gdn2.report.runs import gate_means, groups_of, measures, overview
from gdn2.report.sources import read_sources
from gdn2.report.svg import Series, heat, lines, nice_ticks, short
from gdn2.report.write import write_report

RESULTS = {
    name_of(result): result
    for result in (
        NEEDLES | {"lengths": [128, 256], "depths": [0.0, 100.0], "grid": [[100.0, 50.0], [50.0, 0.0]]},
        PERPLEXITY | {"bits_per_byte": 1.25},
        ABOUT | {"task": "recall", "percent": 12.5, "samples": 100, "seed": 0},
        PIQA,
    )
}


@pytest.fixture
def whole(make_run, experiments, tmp_path):
    """A page of everything: two seeds of one model, another whose name is no name, and both experiments."""
    make_run("first", RESULTS, bits=2.0)
    make_run("second", RESULTS, seed=1, bits=2.2)
    make_run("<b onclick='x'>&amp;", cell=("mixer", "attention"), window=16)
    out = tmp_path / "report.html"
    return write_report([tmp_path / "runs", experiments], out, prompt="</pre><script>alert(1)</script>\n" * 3)


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.words, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words.append(data)


def test_page_holds_the_numbers_and_nothing_that_was_smuggled_in(whole):
    html = whole.read_text()
    page = Text()
    page.feed(html)
    words = " ".join(page.words)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<b onclick='x'>&amp;" in words
    for expected in (
        "first and 1 more seeds", "2.1000 ± 0.1414", "75.00 ± 0.00",
        "niah_single_2 at 128, %; 100 questions, depths 0/100 %, essays.json fedcba98",
        "lm_eval:piqa, acc, texts of at most 512",
        "gdn2, hybrid", "80.0 ± 14.1", "1.6000 ± 0.1414", "Needles by depth and length",
    ):  # fmt: skip
        assert expected in words, expected
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#|data:,)|https?://(?!www\.w3\.org/2000/svg)|url\((?!#)", html)


@pytest.mark.parametrize("width", [390, 1_280])
def test_page_fits_and_says_nothing_in_the_console(whole, browser, width):
    context = browser.new_context(viewport={"width": width, "height": 900})
    page, complaints, asked = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(whole.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') &&
        e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []
    cut = """[...document.querySelectorAll('svg')].filter(s => [...s.querySelectorAll('text')].some(t => {
        const [a, b] = [t.getBoundingClientRect(), s.getBoundingClientRect()];
        return a.right > b.right + 2 || a.left < b.left - 2 || a.bottom > b.bottom + 2 || a.top < b.top - 2;
    })).map(s => s.getAttribute('aria-label'))"""
    assert page.evaluate(cut) == []
    assert all(url == whole.as_uri() for url in asked if not url.startswith("data:"))
    assert complaints == []
    names = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.getAttribute('aria-label'))")
    assert len(names) >= 14
    assert all(names)
    for _ in range(3):  # links first, then the regions that scroll
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "A"
    context.close()


def test_command_writes_one_file_and_names_it(make_run, tmp_path, capsys, monkeypatch):
    run = make_run("mamba", mixer="mamba2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["report", str(run)])
    assert left.value.code == 0
    assert capsys.readouterr().out == "report.html\n"
    assert "Memory of" not in (tmp_path / "report.html").read_text()  # nothing erases there
    for arguments, message in (
        ([str(run), "--memory", str(run)], "expected a delta rule"),
        ([str(run), "--out", "report.pdf"], "expected a name that ends in .html"),
        ([str(tmp_path / "no")], "does not exist"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["report", *arguments])
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_a_run_without_metrics_and_repetitions_of_a_seed_are_told_apart(make_run, tmp_path):
    make_run("begun", mixer="kda")
    (tmp_path / "runs" / "begun" / "metrics.jsonl").write_text("")
    for name, seed, bits in (("a", 0, 2.0), ("b", 1, 2.2), ("c", 0, 2.4)):
        make_run(name, seed=seed, bits=bits)
    found = {row[0]: row for row in overview(groups_of(read_sources([tmp_path / "runs"]).runs)).rows}
    assert set(found) == {"begun", "a and 1 more seeds", "c"}
    assert found["a and 1 more seeds"][1] == "2.1000 ± 0.1414"
    assert found["c"][1] == "2.4000"
    assert found["begun"][1] == found["begun"][6] == "–"
    html = write_report([tmp_path / "runs"], tmp_path / "report.html").read_text()
    assert "begun" in html


def test_memories_of_mamba_stand_beside_the_gates_of_others(make_run, tmp_path):
    make_run("gated")
    path = make_run("mamba", mixer="mamba2") / "metrics.jsonl"
    *rows, val = map(json.loads, path.read_text().splitlines())
    val["layers"] = [{"state_rms": 0.25}, {"state_rms": 0.75}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, val]))
    table = gate_means(groups_of(read_sources([tmp_path / "runs"]).runs))
    assert table.rows == (
        ("gated", "0.500", "0.250", "0.900", "0.000", "0.125", "0.062"),
        ("mamba", *"–" * 5, "0.500"),
    )


def test_numbers_that_cannot_be_compared_have_names_of_their_own():
    text = "4,096 tokens, text 01234567"
    assert measures([PERPLEXITY]) == {f"perplexity, windows of 512; {text}": 9.5}
    rounded = PERPLEXITY | {"weights": "int8", "settings": ["model.rope_factor=4"]}
    assert measures([rounded]) == {f"perplexity, windows of 512; {text}, int8, model.rope_factor=4": 9.5}
    assert measures([SWDE, PIQA]) == {
        "swde at 2,048, %; 90 questions, text aaaaaaaa": 5.0, "lm_eval:piqa, acc, texts of at most 512": 0.5,
    }  # fmt: skip
    again = NEEDLES | {"lengths": [2_048, 4_096], "percent_by_length": [30.0, 5.0]}
    assert measures([NEEDLES, again]) == {
        f"niah_single_2 at {length}, %; 100 questions, essays.json fedcba98": percent
        for length, percent in (("1,024", 75.0), ("2,048", 30.0), ("4,096", 5.0))
    }


def test_the_memory_of_gated_deltanet_2_is_looked_into_before_others(make_run, tmp_path):
    make_run("a-kda", mixer="kda")
    make_run("b-mamba2", mixer="mamba2")
    make_run("c-gdn2")
    html = write_report([tmp_path / "runs"], tmp_path / "report.html").read_text()
    assert "Memory of c-gdn2" in html
    assert "Memory of a-kda" not in html
    chosen = [tmp_path / "runs" / "a-kda", tmp_path / "runs" / "c-gdn2"]
    html = write_report([tmp_path / "runs"], tmp_path / "report.html", chosen).read_text()
    assert html.index("Memory of a-kda") < html.index("Memory of c-gdn2")


def test_a_mixer_looks_the_same_in_every_picture_and_each_picture_names_its_text(experiments, tmp_path):
    rows = [json.loads(line) for line in (experiments / "language.jsonl").read_text().splitlines()]
    other = [row | {"key": f"other {row['key']}", "corpus": {"train_sha256": "fedcba987"}} for row in rows]
    other = [row for row in other if row["mixer"] == "kda"]  # alone, so that its place among the lines is another
    (experiments / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    html = write_report([experiments], tmp_path / "report.html").read_text()
    in_list = r'class="line (c\d)" stroke-dasharray="([^"]*)"/>\n<(\w+)[^>]*class="mark (c\d)"[^>]*>\n<text[^>]*>kda<'
    styles = re.findall(in_list, html)
    assert len(styles) == 3  # accuracy by load, and the curves of two texts
    assert len(set(styles)) == 1
    for name in ("figcaption", "summary"):
        titles = re.findall(rf"<{name}>(.*?)</{name}>", html)
        about = [title for title in titles if "tokens each" in title]
        assert len(about) == len(set(about)) >= 2, about


def test_pictures_hold_for_what_is_missing_or_the_same():
    assert lines("none", [Series("a", [(1, None)])], "x", "y") == ""
    flat = lines("flat", [Series("a", [(1, 2.0)]), Series("b", [(1, 2.0), (2, None), (3, 2.0)])], "x", "y")
    assert "nan" not in flat
    assert flat.count("<polyline") == 5  # three pieces, and a line in the list for each name
    one = lines("one", [Series("a", [(4, 0.5), (64, 1.5)])], "load", "y", log_x=True)
    assert one.count(">4<") == one.count(">64<") == 1
    grid = heat("map", [[None, 0.0], [100.0, 130.0]], ["a", "b"], ["1", "2"], "depth", "tokens")
    assert grid.count('class="heat"') == 3
    assert 'fill-opacity="0.70"' in grid
    assert nice_ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(3, 3, 5) == [3]
    assert [short(value) for value in (60_000_000, 1_500, 0.25)] == ["60M", "1.5k", "0.25"]
