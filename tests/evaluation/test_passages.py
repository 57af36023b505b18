"""Passages are cut so that the answer stays, and scored as substrings."""

import json

import pytest

from gdn2.data import load_tokenizer
from gdn2.evaluation.passages import Passage, find, passage_samples, read_passages, score

BYTES = load_tokenizer("bytes")
FILLER = "".join(f"Line {i} of a document that says nothing of interest.\n" for i in range(200))
EARLY = Passage("The town has 412 Wells.\n" + FILLER, "How many wells?", ("412 wells",))
MIDDLE = Passage(
    FILLER + "The town has 413 wells.\n" + FILLER + "413 wells again", "How many wells?", ("413 wells", "x9")
)
LATE = Passage(FILLER + "The town has 414 wells.", "Wells:", ("414",))
ABSENT = Passage(FILLER, "How many wells?", ("412",))


@pytest.mark.parametrize("length", [200, 500, 2_048])
def test_window_holds_the_answer_fits_the_length_and_ends_with_the_question(length):
    for passage in (EARLY, MIDDLE, LATE):
        (sample,) = passage_samples([passage], BYTES, length)
        context, _, question = sample.prompt.rpartition("\n")
        assert question == passage.question
        assert len(sample.prompt) == length - 50  # the documents are longer
        assert passage.answers[0].lower() in context.lower()
        assert context in passage.context
    (sample,) = passage_samples([MIDDLE], BYTES, length)
    at = sample.prompt.index("413")
    assert abs(at + 4 - (length - 50 - 16) / 2) <= 2  # the first place of the answer is the middle


def test_letters_that_lower_case_lengthens_do_not_shift_the_window():
    """An İ is two letters in lower case; 300 of them stand before the answer, and the window has 134 bytes."""
    passage = Passage("İ" * 300 + " 415 Wells " + FILLER, "How many wells?", ("415 wells",))
    (sample,) = passage_samples([passage], BYTES, 200)
    at = len(sample.prompt[: sample.prompt.index("415 Wells")].encode())
    assert abs(at + 4 - (200 - 50 - 16) / 2) <= 2  # its middle
    assert find("İİ ab", "AB") == 3
    assert find("İİ", "x") is None
    assert find("ΟΔΟΣ", "οδος") == 0  # a sigma at the end of a word has a letter of its own


def test_short_document_stays_whole_and_one_without_its_answer_is_left_out():
    short = Passage("Naïve people dug 5 wells.", "How many?", ("5",))
    (sample,) = passage_samples([short, ABSENT], BYTES, 2_048)
    assert sample.prompt == "Naïve people dug 5 wells.\nHow many?"


def test_any_answer_in_any_case_is_right():
    samples = passage_samples([EARLY, MIDDLE, LATE], BYTES, 2_048)
    assert score(samples, lambda prompts: ["It is 412 WELLS.", "X9", "no"]) == pytest.approx(200 / 3)
    assert score(samples, lambda prompts: ["", "", ""]) == 0


def test_both_forms_are_read(tmp_path):
    lines = [
        {"context": "a b c", "question": " which? ", "answers": ["b", "c"]},
        {"text": "Name: Bo\nSize: 4\n\nName:", "value": " Bo "},
    ]
    (tmp_path / "fda.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_passages(tmp_path, "fda") == [
        Passage("a b c", "which?", ("b", "c")),
        Passage("Name: Bo\nSize: 4\n", "Name:", ("Bo",)),
    ]


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Data sets hold U+2028, U+0085 and the like in their texts, and most writers leave them as they are."""
    record = {"context": "a\u2028b\x85c\u2029d", "question": "which?", "answers": ["b"]}
    (tmp_path / "squad.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_passages(tmp_path, "squad") == [Passage(record["context"], "which?", ("b",))]


NO_ANSWERS = '{"context": "a", "question": "b", "answers": []}'
LETTERS = '{"context": "an oak", "question": "what?", "answers": "oak"}'  # o, a and k would each be right


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"context": "a"}', NO_ANSWERS, LETTERS, '{"text": "one line", "value": "x"}']
)
def test_other_lines_are_refused(tmp_path, line):
    (tmp_path / "nq.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"nq\.jsonl:1: no passage"):
        read_passages(tmp_path, "nq")


def test_missing_file_and_short_length_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"drop needs the file '.*drop\.jsonl'"):
        read_passages(tmp_path, "drop")
    with pytest.raises(ValueError, match="length is 60 tokens; expected at least"):
        passage_samples([EARLY], BYTES, 60)
