"""lm-evaluation-harness scores the server as it scores the model itself."""

import json

import pytest
from saved_run import BYTES
from serving.live_server import serving
from small import MODELS, small_model

from gdn2.integrations.export import transformers_tokenizer
from gdn2.integrations.lm_eval import evaluate

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and its packages' own

TASKS = {
    "choice": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_target: 1\n'
    'doc_to_choice: ["yes", "grün", "no"]\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
    "whole": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: word_perplexity}]\n",
    "next": 'output_type: loglikelihood\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{greedy}}"\n'
    "target_delimiter: ''\nmetric_list: [{metric: perplexity}, {metric: acc}]\n",
    "write": 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{greedy}}"\n'
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 1, do_sample: false}\nmetric_list: [{metric: exact_match}]\n',
}
METRICS = [("choice", "acc"), ("choice", "acc_norm"), ("whole", "word_perplexity"), ("next", "perplexity")]
METRICS += [("next", "acc"), ("write", "exact_match")]


def test_scores_equal_those_of_the_model(tmp_path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from gdn2.generate import generate

    model = small_model(2, **MODELS["window"])
    documents = []
    for i in range(9):
        question = f"question {i}:"
        ((token,),) = generate(model, [BYTES.encode(question)], 1, temperature=0)
        greedy = chr(token) if 32 < token < 127 else "a"  # right where the first byte is a character
        documents.append({"question": question, "text": f"some words {i} that go on. " * (i + 1), "greedy": greedy})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    for name, task in TASKS.items():
        head = f"task: gdn2_{name}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n"
        head += f"    test: {tmp_path / 'data.jsonl'}\n  cache_dir: {tmp_path / 'cache'}\n"
        (tmp_path / f"{name}.yaml").write_text(head + task)
    names = [f"gdn2_{name}" for name in TASKS]
    # The client keeps one token of its max_length for itself, and of whole texts another one.
    direct = evaluate(model, BYTES, names, 127, tmp_path) | evaluate(model, BYTES, ["gdn2_whole"], 126, tmp_path)
    transformers_tokenizer(BYTES, 128).save_pretrained(tmp_path / "tokenizer")
    with serving(model) as live:
        api = LocalCompletionsAPI(
            base_url=f"{live.url}/v1/completions", model="small", tokenizer=str(tmp_path / "tokenizer"),
            tokenizer_backend="huggingface", max_length=128, batch_size=3, num_concurrent=4,
        )  # fmt: skip
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        theirs = simple_evaluate(api, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
    for name, metric in METRICS:
        # float32 in passes of another shape: nats differ by rounding, choices and texts not at all.
        assert theirs[f"gdn2_{name}"][f"{metric},none"] == pytest.approx(direct[f"gdn2_{name}"][metric], rel=1e-5)
    assert 0 < direct["gdn2_next"]["acc"] < 1
    assert 0 < direct["gdn2_write"]["exact_match"] < 1
