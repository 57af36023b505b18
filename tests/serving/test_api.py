"""The official client of OpenAI's API, and what the answers have to be."""

import json
from contextlib import closing

import openai
import pytest
import torch
from saved_run import BYTES
from serving.live_server import serving
from serving.texts import alone
from small import small_model

from gdn2.data import load_tokenizer
from gdn2.serving.chat_template import ChatTemplate

GREEDY = {"model": "small", "temperature": 0}


@pytest.fixture(scope="module")
def client(live):
    with closing(openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)) as client:
        yield client


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "gdn2"
    with pytest.raises(openai.NotFoundError, match="model is 'large'; expected 'small'"):
        client.models.retrieve("large")


def test_prompts_may_be_texts_or_tokens(live, client):
    texts = ["def main(", "naïve", ""]
    expected = [alone(live.model, text, 12)[0] for text in texts]
    for prompt in (texts, [BYTES.encode(text) or [256] for text in texts]):
        done = client.completions.create(**GREEDY, prompt=prompt, max_tokens=12)
        assert [choice.text for choice in done.choices] == expected
        assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert done.usage.prompt_tokens == 9 + 6 + 1
    assert done.usage.completion_tokens == sum(len(alone(live.model, text, 12)[1]) for text in texts)
    for prompt in (texts[0], BYTES.encode(texts[0])):
        (choice,) = client.completions.create(**GREEDY, prompt=prompt, max_tokens=12).choices
        assert (choice.text, choice.finish_reason) == (expected[0], "length")
    answer = live.post("/v1/completions", {"temperature": 0}).json()  # no prompt, 16 tokens
    assert answer["choices"][0]["text"] == alone(live.model, "", 16)[0]


def test_stream_joins_to_the_whole_text(live, client):
    whole = client.completions.create(**GREEDY, prompt=["ab", "c"], max_tokens=30)
    chunks = list(
        client.completions.create(
            **GREEDY, prompt=["ab", "c"], max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole.choices):
        pieces = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(piece.text for piece in pieces) == choice.text == alone(live.model, ["ab", "c"][index], 30)[0]
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [choice.finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1


def test_streams_are_valid_events_in_valid_utf8(live):
    body = {"prompt": "é", "max_tokens": 60, "temperature": 2, "seed": 5, "stream": True}
    lines = live.post("/v1/completions", body).content.decode("utf-8").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2]]
    assert "".join(texts).encode("utf-8")


def test_seed_and_n_give_different_texts_that_come_back(live, client):
    ask = {"model": "small", "prompt": ["ab", "c"], "n": 2, "seed": 7, "max_tokens": 15, "temperature": 0.9}
    first, again = (client.completions.create(**ask, top_p=0.9, extra_body={"top_k": 50}) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 4
    sampled = {"temperature": 0.9, "top_p": 0.9, "top_k": 50}
    assert texts == [alone(live.model, p, 15, seed=7 + i, **sampled)[0] for i, p in enumerate(["ab", "ab", "c", "c"])]


def test_stop_strings_are_not_part_of_the_text(live, client):
    text = alone(live.model, "ab", 30)[0]
    stop = text[5:8]
    for given in (stop, ["never, never", stop]):
        (choice,) = client.completions.create(**GREEDY, prompt="ab", max_tokens=30, stop=given).choices
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_offsets_are_those_of_the_text_whatever_is_held_back_for_a_stop_string(live, client):
    ask = GREEDY | {"prompt": "ab", "max_tokens": 30, "logprobs": 0}
    (plain,) = client.completions.create(**ask).choices
    # Of it all but the last character comes, so that the text is held back and then let go.
    (held,) = client.completions.create(**ask, stop=plain.text[3:9] + "\0").choices
    assert held.text == plain.text
    assert held.logprobs.text_offset == plain.logprobs.text_offset
    assert plain.logprobs.text_offset[-1] > 20


@torch.no_grad()
@pytest.mark.parametrize("new", [0, 1, 4])
def test_echo_has_the_log_probabilities_of_the_prompt(live, client, new):
    prompt = "def ü"
    ids = BYTES.encode(prompt)
    ask = {**GREEDY, "prompt": prompt, "max_tokens": new, "logprobs": 3, "echo": True}
    (choice,) = client.completions.create(**ask).choices
    text, tokens = alone(live.model, prompt, new) if new else ("", [])
    assert choice.text == prompt + text
    hidden, _ = live.model(torch.tensor([ids + tokens]))
    rows = live.model.logits(hidden)[0].log_softmax(-1)
    said = choice.logprobs
    assert said.token_logprobs[0] is None
    assert said.token_logprobs[1:] == pytest.approx(
        [float(row[token]) for row, token in zip(rows, (ids + tokens)[1:])], abs=1e-9
    )
    assert said.tokens[:4] == ["d", "e", "f", " "]
    assert said.tokens[4:6] == ["token_id:195", "token_id:188"]
    assert said.text_offset[:7] == [0, 1, 2, 3, 4, 4, 5][: len(ids) + new]
    for row, top in zip(rows, said.top_logprobs[1:]):
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(row.topk(3).values.tolist(), abs=1e-9)
        assert len(top) <= 4  # with the chosen one
    pieces = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
    assert "".join(piece.text for piece in pieces) == choice.text
    assert [lp for piece in pieces for lp in piece.logprobs.token_logprobs] == said.token_logprobs
    assert pieces[-1].finish_reason == choice.finish_reason


def test_chat_goes_through_the_template(live, client):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    expected = alone(live.model, "system: be kind\nuser: hi\nassistant: ", 10)[0]
    done = client.chat.completions.create(
        **GREEDY, messages=messages, max_completion_tokens=10, logprobs=True, top_logprobs=2
    )
    assert done.choices[0].message.content == expected
    assert done.choices[0].finish_reason == "length"
    entries = done.choices[0].logprobs.content
    assert len(entries) == done.usage.completion_tokens == 10
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy
    with client.chat.completions.create(**GREEDY, messages=messages, max_tokens=10, stream=True) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_without_a_template_says_so():
    with serving() as plain:
        answer = plain.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_chat_template"
    assert "use /v1/completions" in answer.json()["error"]["message"]


def test_special_tokens_are_the_templates_alone(tmp_path):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    inner = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|turn|>", special=True)])
    inner.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}{{ eos_token }}"
    config = {"eos_token": "<|turn|>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)  # a saved one keeps its template
    assert tokenizer.chat_template == template
    chat = ChatTemplate(tokenizer.chat_template, tokenizer)
    assert chat.encode([("user", "ab")]) == [256, *tokenizer.encode("ab"), 256]
    with pytest.raises(ValueError, match="a message contains the special token"):
        chat.encode([("user", "ab<|turn|>")])
    assert 256 not in tokenizer.encode("<|turn|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "the chat template is not Jinja"),
        ("{{ raise_exception('only users') }}", "refuses the messages: only users"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages: access to attribute '__class__'"),
    ],
)
def test_template_that_cannot_be_used_is_named(template, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(template, BYTES).encode([("user", "hi")])


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"{", None, "the body is not JSON"),
        (b"\xff\xfe\x00", None, "parsing the body"),
        (b'{"prompt": "\xff"}', None, "parsing the body"),
        (b'{"prompt": "\\ud800"}', "prompt", "lone surrogate"),
        (b'{"prompt":' + b"[" * 100_000, None, "parsing the body"),
        (b"[1]", None, "not a JSON object"),
        (b'{"prompt": 3}', "prompt", "valid string; or Input should be a valid list"),
        (b'{"prompt": []}', "prompt", "at least 1 item"),
        (b'{"prompt": [[1], []]}', "prompt", "at least 1 item"),
        (b'{"prompt": [257]}', "prompt", "token is 257; expected an id in [0, 257)"),
        (b'{"max_tokens": 5000}', "max_tokens", "max_tokens is 5000; expected at most 4096"),
        (b'{"max_tokens": 1e400}', "max_tokens", "valid integer"),
        (b'{"max_tokens":' + b"9" * 5000 + b"}", None, "parsing the body"),
        (b'{"max_tokens": true}', "max_tokens", "valid integer"),
        (b'{"temperature": NaN}', "temperature", "temperature: "),
        (b'{"temperature": "hot"}', "temperature", "valid number"),
        (b'{"n": 129}', "n", "less than or equal to 128"),
        (b'{"n": 100, "prompt": ["a", "b", "c"]}', "prompt", "3 prompts by n = 100; expected at most 204 texts"),
        (b'{"stop": ""}', "stop", "at least 1 character"),
        (b'{"logit_bias": {"5": 1}}', "logit_bias", "at most 0 items"),
        (b'{"frequency_penalty": 0.5}', "frequency_penalty", "less than or equal to 0"),
        (b'{"suffix": "x"}', "suffix", "None"),
        (b'{"min_p": 0.1}', "min_p", "Extra inputs are not permitted"),
    ],
    ids=lambda value: value[:20].decode("ascii", "replace") if isinstance(value, bytes) else "",
)
def test_bad_bodies_are_explained(live, body, param, message):
    answer = live.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    assert len(error["message"]) < 600


def test_bodies_of_another_type_are_refused(live):
    """A web page elsewhere can send these without asking first; JSON it cannot."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {} if kind is None else {"Content-Type": kind}
        assert live.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers).status_code == 400


def test_long_prompts_are_refused():
    with serving(max_prompt_tokens=10) as small:
        error = small.post("/v1/completions", {"prompt": "a" * 11}).json()["error"]
        assert error["message"] == "a prompt has 11 tokens; expected at most 10"
        assert small.post("/v1/completions", {"prompt": "a" * 10}).status_code == 200


def test_unknown_paths_and_methods_are_errors_of_the_same_shape(live):
    assert live.get("/v1/embeddings").json()["error"]["type"] == "not_found_error"
    assert live.get("/v1/completions").status_code == 405
    assert "error" in live.get("/v1/completions").json()


def test_metrics_tell_what_was_done(live):
    before = live.metric("gdn2_new_tokens_total"), live.metric("gdn2_prompt_tokens_total")
    live.post("/v1/completions", {"prompt": "abc", "max_tokens": 5, "temperature": 0})
    assert live.metric("gdn2_new_tokens_total") - before[0] == len(alone(live.model, "abc", 5)[1])
    assert live.metric("gdn2_prompt_tokens_total") - before[1] == 3
    assert live.metric("gdn2_active_requests") == 0
    assert live.metric("process_resident_memory_bytes") > 1e7
    assert live.metric('gdn2_http_responses_total{route="/v1/completions",status="200"}') > 0
    assert live.get("/health").json() == {"status": "ok"}


def test_model_that_computes_nan_is_an_error_and_the_server_goes_on():
    model = small_model().double()
    with serving(model) as broken:
        weight = model.embedding.weight.data
        kept = weight.clone()
        weight.fill_(float("nan"))
        answer = broken.post("/v1/completions", {"prompt": "a"})
        assert answer.status_code == 500
        assert "a logit is nan" in answer.json()["error"]["message"]
        events = broken.post("/v1/completions", {"prompt": "a", "stream": True}).text
        assert '"type": "server_error"' in events
        assert events.endswith("data: [DONE]\n\n")
        weight.copy_(kept)
        answer = broken.post("/v1/completions", {"prompt": "a", "temperature": 0})
        assert answer.json()["choices"][0]["text"] == alone(model, "a", 16)[0]
        assert broken.metric("gdn2_active_requests") == 0
