"""eval.json keeps every measurement under a name of its own, whole, and says what is wrong with a file that is none."""

import json

import pytest

from gdn2.evaluation.results import name_of, put, read, write

ABOUT = {"checkpoint": "step_1", "settings": [], "weights": "float32"}
PERPLEXITY = ABOUT | {
    "task": "perplexity", "perplexity": 9.5, "bits_per_byte": None, "length": 512, "tokens": 4_096, "packed": False,
    "data_sha256": "0123456789",
}  # fmt: skip
NEEDLES = ABOUT | {
    "task": "niah_single_2", "percent": 50.0, "percent_by_length": [75.0, 25.0], "grid": [[75.0], [25.0]],
    "lengths": [1_024, 2_048], "depths": [], "samples": 100, "seed": 0, "haystack": "essays.json",
    "haystack_sha256": "fedcba98765",
}  # fmt: skip
SWDE = ABOUT | {"task": "swde", "percent": 5.0, "length": 2_048, "samples": 90, "data_sha256": "aaaaaaaabbbb"}
PIQA = ABOUT | {"task": "lm_eval:piqa", "acc": 0.5, "max_length": 512, "task_path": None}


def test_names_say_all_that_makes_another_measurement():
    assert name_of(PERPLEXITY) == "perplexity, windows of 512; 4,096 tokens, text 01234567"
    assert name_of(NEEDLES) == "niah_single_2 at 1,024/2,048; 100 questions, essays.json fedcba98"
    assert name_of(SWDE) == "swde at 2,048; 90 questions, text aaaaaaaa"
    assert name_of(PIQA) == "lm_eval:piqa, texts of at most 512"
    others = [
        *(PERPLEXITY | {name: value} for name, value in (
            ("length", 1_024), ("tokens", 8_192), ("packed", True), ("data_sha256", "ff" * 32), ("weights", "int8"),
            ("settings", ["model.rope_scaling=ntk"]),
        )),
        *(NEEDLES | {name: value} for name, value in (
            ("task", "niah_single_3"), ("lengths", [1_024]), ("depths", [0, 50.0]), ("samples", 500), ("seed", 3),
            ("haystack_sha256", "ff" * 32), ("weights", "fp8"),
        )),
        SWDE | {"length": 1_024}, SWDE | {"data_sha256": "ff" * 32},
        PIQA | {"max_length": 1_024}, PIQA | {"task_path": "mine"},
    ]  # fmt: skip
    results = {}
    for result in [PERPLEXITY, NEEDLES, SWDE, PIQA, *others]:
        put(results, result)
    assert len(results) == 4 + len(others)


def test_the_same_measurement_of_a_newer_checkpoint_takes_the_older_ones_place_as_the_newest():
    results = {}
    for result in (PERPLEXITY, NEEDLES, PERPLEXITY | {"checkpoint": "step_2", "perplexity": 8.0}):
        put(results, result)
    needles, perplexity = results.values()
    assert needles == NEEDLES
    assert (perplexity["checkpoint"], perplexity["perplexity"]) == ("step_2", 8.0)
    two = ["model.rope_factor=4", "model.rope_scaling=ntk"]
    assert name_of(PERPLEXITY | {"settings": two}) == name_of(PERPLEXITY | {"settings": two[::-1]})


def test_results_are_written_whole_and_read_back(tmp_path):
    path = tmp_path / "eval.json"
    assert read(path) == {}
    results = {"a": PERPLEXITY, "b": NEEDLES, "c": SWDE, "d": PIQA}
    write(path, results)
    with pytest.raises(ValueError, match="Out of range float values"):
        write(path, {"a": PERPLEXITY | {"perplexity": float("nan")}})
    assert read(path) == results
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no results by name"),
        ('{"recall": 1}', "holds no results by name"),
        ('{"recall": {"percent": 50.0}}', r"eval\.json', result 'recall': no field 'task'; move it away"),
    ],
)
def test_a_file_that_holds_no_results_is_not_overwritten(tmp_path, text, message):
    path = tmp_path / "eval.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize("result", [PERPLEXITY, NEEDLES, SWDE, PIQA], ids=lambda result: result["task"])
def test_every_field_that_is_missing_or_of_another_kind_is_named(tmp_path, result):
    path = tmp_path / "eval.json"
    left_out = {"acc", "task_path", "haystack_sha256"}  # not every result has them
    for name in result.keys() - left_out:
        for broken in ({k: v for k, v in result.items() if k != name}, result | {name: {}}):
            path.write_text(json.dumps({"mine": broken}))
            with pytest.raises(ValueError, match=rf"eval\.json', result 'mine': (no )?field '{name}'"):
                read(path)
    path.write_text(json.dumps({"mine": result | {"settings": [1]}}))
    with pytest.raises(ValueError, match=r"field 'settings\.0' is 1; expected text"):
        read(path)
