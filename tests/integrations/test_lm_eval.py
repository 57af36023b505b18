"""lm-evaluation-harness scores a run the same directly, through its export and through `gdn2 eval`."""

import json
import math

import pytest
import torch
from saved_run import BYTES, save_run
from small import MODELS, small_model

from gdn2.cli import main
from gdn2.integrations.export import export
from gdn2.integrations.lm_eval import HarnessModel, _parts, evaluate

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and its packages' own

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 1
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
    "write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match}
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, its export and a folder of tasks on local data. Answers of half the written ones are the model's own."""
    root = tmp_path_factory.mktemp("harness")
    model = small_model(**MODELS["window"])
    config = save_run(root / "run", model)
    export(model, BYTES, config, root / "exported")
    harness = HarnessModel(model, BYTES, 128)
    questions = [f"question {i} of the naïve test: " for i in range(8)]
    settings = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    answers = harness.generate_until([type("Asked", (), {"args": (q, settings)}) for q in questions])
    documents = [
        {
            "question": question, "answer": answer if i % 2 else "no",
            "text": f"some words {i} that go on. " * (3 * i + 1),
            "choices": [f"{word} {j}" for j, word in enumerate(("grün", "blue", "red")[i % 3 :] + ("a", "b")[: i % 3])],
        }
        for i, (question, answer) in enumerate(zip(questions, answers))
    ]  # fmt: skip
    (root / "tasks").mkdir()
    (root / "tasks" / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    for name, task in TASKS.items():
        head = f"task: gdn2_{name}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n"
        head += f"    test: {root / 'tasks' / 'data.jsonl'}\n  cache_dir: {root / 'cache'}\n"
        (root / "tasks" / f"{name}.yaml").write_text(head + task)
    return root, model


NAMES = [f"gdn2_{name}" for name in TASKS]


@pytest.fixture(scope="module")
def direct(place):
    root, model = place
    return evaluate(model, BYTES, NAMES, 128, root / "tasks")


def test_scores_equal_those_of_the_harness_on_the_export(place, direct):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import gdn2.integrations.hf  # noqa: F401 - registers the model

    root, _ = place
    manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
    theirs = simple_evaluate(
        HFLM(pretrained=str(root / "exported"), device="cpu", batch_size=3),
        tasks=NAMES, task_manager=manager, bootstrap_iters=0,
    )["results"]  # fmt: skip
    for name, metric in (
        ("choice", "acc"), ("choice", "acc_norm"), ("whole", "word_perplexity"), ("whole", "bits_per_byte"),
        ("write", "exact_match"),
    ):  # fmt: skip
        # float32 in batches of another shape: nats differ by rounding, choices and texts not at all.
        assert direct[f"gdn2_{name}"][metric] == pytest.approx(theirs[f"gdn2_{name}"][f"{metric},none"], rel=1e-5)
    assert direct["gdn2_write"]["exact_match"] == 0.5
    assert 0 < direct["gdn2_choice"]["acc"] < 1 or 0 < direct["gdn2_choice"]["acc_norm"] < 1


def test_command_gives_the_same_scores_and_keeps_them(place, direct, capsys):
    root, _ = place
    tasks = ",".join(f"lm_eval:{name}" for name in NAMES)
    with pytest.raises(SystemExit) as leaving:
        main(["eval", str(root / "run"), "--tasks", tasks, "--task-path", str(root / "tasks"), "--device", "cpu"])
    shown = capsys.readouterr()
    assert leaving.value.code == 0, shown.err
    kept = {result["task"]: result for result in json.loads((root / "run" / "eval.json").read_text()).values()}
    about = {"checkpoint": "step_00000001", "settings": [], "weights": "float32", "task_path": str(root / "tasks")}
    for name, metrics in direct.items():
        assert kept[f"lm_eval:{name}"] == {"task": f"lm_eval:{name}"} | metrics | about
    assert f"word_perplexity {direct['gdn2_whole']['word_perplexity']:.4f}" in shown.out
    assert direct["gdn2_whole"]["max_length"] == 128


def ask(*arguments):
    return type("Asked", (), {"args": arguments})


def test_likelihoods_are_those_of_reading_the_tokens_one_by_one(place):
    _, model = place
    model = small_model(**MODELS["window"]).double()
    harness = HarnessModel(model, BYTES, 32)
    asked = [("a naïve", " answer"), ("", "from nothing"), ("long " * 30, "text " * 10), ("x ", "y")]
    for (context, continuation), (nats, greedy) in zip(asked, harness.loglikelihood([ask(*a) for a in asked])):
        before = BYTES.encode(context) or [256]
        tokens = (before + BYTES.encode(continuation))[-33:]
        hidden, _ = model(torch.tensor([tokens[:-1]]))
        scores = model.logits(hidden)[0].log_softmax(-1)
        length = min(len(BYTES.encode(continuation)) + (context == "x "), 32)  # a space at its end goes over
        chosen = scores.gather(1, torch.tensor(tokens[1:])[:, None])[-length:]
        assert nats == pytest.approx(float(chosen.sum()), rel=1e-9)
        assert greedy == bool((scores.argmax(-1)[-length:] == torch.tensor(tokens[-length:])).all())


def test_greedy_continuation_is_told(place):
    _, model = place
    harness = HarnessModel(model, BYTES, 64)
    from gdn2.generate import generate

    new = [t for (t,) in generate(model, [BYTES.encode("abc")], 3, temperature=0)]
    (right, wrong) = harness._loglikelihood_tokens(
        [(None, BYTES.encode("abc"), new), (None, BYTES.encode("abc"), [*new[:2], (new[2] + 1) % 256])]
    )
    assert (right[1], wrong[1]) == (True, False)
    assert right[0] > wrong[0]


def test_rolling_windows_count_every_token_once(place):
    model = small_model().double()
    text = "some words that go on and on. " * 5
    (short,) = HarnessModel(model, BYTES, 16).loglikelihood_rolling([ask(text)])
    (whole,) = HarnessModel(model, BYTES, 4_096).loglikelihood_rolling([ask(text)])
    hidden, _ = model(torch.tensor([[256, *BYTES.encode(text)]]))
    scores = model.logits(hidden)[0, :-1].log_softmax(-1)
    assert whole == pytest.approx(float(scores.gather(1, torch.tensor(BYTES.encode(text))[:, None]).sum()), rel=1e-9)
    assert not math.isclose(short, whole, rel_tol=1e-3)  # less context: which is why results carry max_length


def test_parts_are_in_order_and_within_the_budget():
    lengths = [4_000, 96, 1, 9_000, 5, 4_091, 1]
    assert _parts(lengths) == [[0, 1], [2], [3], [4, 5], [6]]
    assert _parts([]) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: HarnessModel(m, BYTES, 0), "max_length is 0; expected an integer >= 1"),
        (lambda m: HarnessModel(m, BYTES, 8, batch=0), "batch is 0; expected an integer >= 1"),
        (lambda m: evaluate(m, BYTES, ["nonsense_task"], 8), "lm_eval task is 'nonsense_task'"),
        (
            lambda m: HarnessModel(m, BYTES, 8).generate_until([ask("a", {"until": [], "max_gen_toks": 8})]),
            "max_length is 8; expected more than the 8 new tokens of the task",
        ),
        (
            lambda m: HarnessModel(m, BYTES, 8).generate_until([ask("a", {"max_gen_toks": 2, "num_beams": 3})]),
            "the task sets 'num_beams'; expected some of seed, temperature, top_k, top_p",
        ),
    ],
)
def test_bad_settings_are_named(place, call, message, monkeypatch):
    monkeypatch.setattr("gdn2.integrations.lm_eval.TaskManager", lambda **_: type("Manager", (), {"all_tasks": []}))
    with pytest.raises(ValueError, match=message):
        call(place[1])
