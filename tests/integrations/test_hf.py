"""transformers runs our models as we do: the same tokens, whatever the padding, the cache or the way of loading."""

import copy

import pytest
import torch
from small import MODELS, prompt
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    TextStreamer,
    Trainer,
)
from transformers import TrainingArguments as Arguments
from twins import exported

from gdn2.generate import generate
from gdn2.integrations.hf import CACHE_NAME, Gdn2Cache
from gdn2.layers.state import state_rows

PROMPTS = [prompt(3), prompt(20, seed=1), [5] * 11]
# Its name from 5.24 on.
RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if RENAMED else "gradient_checkpointing"


def padded(rows, side="left", width=None):
    width = width or max(map(len, rows))
    fills = [[256] * (width - len(row)) for row in rows]
    masks = [[0] * len(fill) for fill in fills]
    if side == "left":
        ids = [fill + row for fill, row in zip(fills, rows)]
        mask = [zeros + [1] * len(row) for zeros, row in zip(masks, rows)]
    else:
        ids = [row + fill for fill, row in zip(fills, rows)]
        mask = [[1] * len(row) + zeros for zeros, row in zip(masks, rows)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.fixture(scope="module")
def pair():
    return exported()


def ours(model, prompts, n, **settings):
    steps = zip(*generate(model, prompts, n, temperature=0, **settings))
    return [[256 if token is None else token for token in row] for row in steps]


def greedy(twin, n=12, **inputs):
    out = twin.generate(**inputs, max_new_tokens=n, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_of_a_left_padded_batch_is_ours(name):
    model, twin = exported(name)
    assert greedy(twin, **padded(PROMPTS)) == ours(model, PROMPTS, 12, stop_tokens=[256])
    assert greedy(twin, input_ids=torch.tensor(PROMPTS[1:2])) == ours(model, PROMPTS[1:2], 12, stop_tokens=[256])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_exactly_the_rows_alone(name, side):
    model, twin = exported(name)
    batch = padded(PROMPTS, side, width=25)
    out = twin(**batch, use_cache=True)
    for row, tokens in enumerate(PROMPTS):
        hidden, state = model(torch.tensor([tokens]))
        logits = out.logits[row][batch["attention_mask"][row] == 1]
        torch.testing.assert_close(logits, model.logits(hidden)[0], atol=1e-10, rtol=1e-10)
        for mine, its in zip(state, state_rows(out[CACHE_NAME].state, slice(row, row + 1))):
            for a, b in zip(mine, its):  # full attention keeps room for the longest row
                its_part = b[:, : a.shape[1]] if a.dim() > 1 else b
                torch.testing.assert_close(its_part, a, atol=1e-10, rtol=1e-10)


def test_row_of_nothing_but_padding_changes_nothing(pair):
    model, twin = pair
    batch = padded([PROMPTS[0], [], PROMPTS[1]])
    out = twin(**batch, use_cache=True)
    hidden, _ = model(torch.tensor(PROMPTS[1:2]))
    torch.testing.assert_close(out.logits[2], model.logits(hidden)[0], atol=1e-10, rtol=1e-10)
    assert all(not t[1].any() for block in out[CACHE_NAME].state for t in block)
    nothing = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"] * 0}
    again = twin(**nothing, **{CACHE_NAME: out[CACHE_NAME]})
    assert again[CACHE_NAME].get_seq_length() == 2 * batch["input_ids"].shape[1]
    fresh = twin(**batch, use_cache=True)[CACHE_NAME]
    assert all(torch.equal(a, b) for x, y in zip(again[CACHE_NAME].state, fresh.state) for a, b in zip(x, y))


def test_gradients_of_a_padded_batch_are_those_of_its_rows(pair):
    _, twin = pair
    batch = padded(PROMPTS, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    total = sum(len(row) - 1 for row in PROMPTS)
    twin.zero_grad()
    twin(**batch, labels=labels, num_items_in_batch=total).loss.backward()
    together = {name: p.grad.clone() for name, p in twin.named_parameters()}
    twin.zero_grad()
    for row in PROMPTS:
        ids = torch.tensor([row])
        twin(input_ids=ids, labels=ids, num_items_in_batch=total).loss.backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, atol=1e-9, rtol=1e-9)
    twin.zero_grad()


@pytest.mark.parametrize("form", ["columns so far", "by layer type", "own columns"])
def test_mask_of_a_later_segment_counts_from_its_end(pair, form):
    _, twin = pair
    first, second = padded(PROMPTS), padded([[1, 2, 3], [4], [5, 6]])
    cache = twin(**first, use_cache=True)[CACHE_NAME]
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    forms = {"columns so far": mask, "by layer type": {"linear_attention": mask, "sliding_attention": mask}}
    mask = forms.get(form, second["attention_mask"])
    out = twin(input_ids=second["input_ids"], attention_mask=mask, **{CACHE_NAME: cache})
    for row, (a, b) in enumerate(zip(PROMPTS, [[1, 2, 3], [4], [5, 6]])):
        whole = twin(input_ids=torch.tensor([a + b])).logits[0, -1]
        torch.testing.assert_close(out.logits[row, -1], whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["gdn2", "window", "full"])
def test_continuation_reads_the_new_tokens_alone(name):
    model, twin = exported(name)
    first = padded(PROMPTS)
    out = twin.generate(**first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    cache = out[CACHE_NAME]
    assert isinstance(cache, Gdn2Cache)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1  # the last token is chosen, not read
    mask = torch.cat([first["attention_mask"], torch.ones(3, 6 + 2, dtype=torch.int64)], 1)
    ids = torch.cat([out.sequences, torch.tensor([[9, 8]] * 3)], 1)
    read = []
    handle = twin.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    more = twin.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, **{CACHE_NAME: cache}
    )
    handle.remove()
    assert read == [3, 1, 1, 1, 1, 1]
    texts = [row + new for row, new in zip(PROMPTS, ours(model, PROMPTS, 6))]
    assert more[:, ids.shape[1] :].tolist() == ours(model, [[*text, 9, 8] for text in texts], 6)


@torch.no_grad()
def test_copied_cache_is_a_place_to_return_to(pair):
    _, twin = pair
    cache = twin(input_ids=torch.tensor([PROMPTS[1]]), use_cache=True)[CACHE_NAME]
    kept = copy.deepcopy(cache)
    first = twin(input_ids=torch.tensor([[1, 2, 3]]), **{CACHE_NAME: cache}).logits
    assert cache.get_seq_length() == 23
    assert torch.equal(twin(input_ids=torch.tensor([[1, 2, 3]]), **{CACHE_NAME: kept}).logits, first)


def test_cache_rows_are_selected_repeated_and_reset(pair):
    _, twin = pair
    cache = twin(**padded(PROMPTS), use_cache=True)[CACHE_NAME]
    before = cache.state
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0, 1]))
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.batch_size == 2
    assert all(torch.equal(a, b[[0, 2]]) for x, y in zip(cache.state, before) for a, b in zip(x, y))
    assert (cache.get_mask_sizes(3, 0), cache.get_max_length(), cache.is_compileable) == ((23, 0), -1, False)
    with pytest.raises(ValueError, match="tokens_to_remove is 2 of 20; expected 0 or all"):
        cache.crop(2)
    cache.crop(0)
    assert cache.get_seq_length() == 20
    cache.reset()
    assert (cache.get_seq_length(), cache.has_previous_state(), cache.batch_size) == (0, False, -1)


def test_stock_cache_is_refused(pair):
    _, twin = pair
    with pytest.raises(ValueError, match="the cache is a DynamicCache; expected a Gdn2Cache"):
        twin(input_ids=torch.tensor([[1]]), **{CACHE_NAME: DynamicCache()})


def test_assisted_generation_is_refused_rather_than_wrong(pair):
    _, twin = pair
    with pytest.raises(ValueError, match="stateful"):
        twin.generate(torch.tensor([[1, 2]]), assistant_model=twin, max_new_tokens=3, do_sample=False)


def best_beams(model, tokens, beams, n):
    """Beam search without an end token, every hypothesis read anew from its first token."""
    hypotheses = [(0.0, [])]
    for _ in range(n):
        grown = []
        for score, text in hypotheses:
            hidden, _ = model(torch.tensor([tokens + text]))
            scores = model.logits(hidden[0, -1]).log_softmax(-1)
            grown += [(score + float(scores[t]), [*text, t]) for t in scores.topk(beams).indices.tolist()]
        hypotheses = sorted(grown, reverse=True)[:beams]
    return [text for _, text in hypotheses]


@pytest.mark.parametrize("name", ["window", "full", "mamba3"])
def test_beams_are_those_of_beam_search_without_a_cache(name):
    model, twin = exported(name)
    out = twin.generate(
        **padded(PROMPTS), max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False, eos_token_id=None
    )
    with torch.no_grad():
        expected = [text for row in PROMPTS for text in best_beams(model, row, 3, 6)[:2]]
    assert out[:, 20:].tolist() == expected


def test_sampled_text_is_that_of_our_logits_and_the_same_draws(pair):
    model, twin = pair
    torch.manual_seed(3)
    out = twin.generate(
        **padded(PROMPTS), max_new_tokens=10, do_sample=True, temperature=0.7, top_k=40, num_return_sequences=2,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    rows = [list(row) for row in PROMPTS for _ in range(2)]
    with torch.no_grad():
        for _ in range(10):
            logits = torch.stack([model.logits(model(torch.tensor([row]))[0][0, -1]) for row in rows]) / 0.7
            logits[logits < logits.topk(40).values[:, -1:]] = -torch.inf
            # transformers draws from float32 or the logits' own dtype: both are the same draws to rounding.
            for row, token in zip(rows, torch.multinomial(logits.softmax(-1), 1).squeeze(1).tolist()):
                row.append(token)
    assert out[:, 20:].tolist() == [row[-10:] for row in rows]
    assert len({tuple(row[-10:]) for row in rows}) == 6


def test_streamer_hears_every_token_once(pair):
    model, twin = pair

    class Heard(TextStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    heard = Heard()
    twin.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=8, do_sample=False, streamer=heard, eos_token_id=None)
    assert heard.tokens == [*PROMPTS[1], *ours(model, PROMPTS[1:2], 8)[0], "end"]


def test_text_without_a_cache_is_the_same(pair):
    model, twin = pair
    out = twin.generate(**padded(PROMPTS), max_new_tokens=8, do_sample=False, use_cache=False, eos_token_id=None)
    assert out[:, 20:].tolist() == ours(model, PROMPTS, 8)


def test_end_token_ends_its_row_alone(pair):
    model, twin = pair
    texts = ours(model, PROMPTS, 12)
    end = texts[0][4]
    expected = ours(model, PROMPTS, 12, stop_tokens=[end])
    out = twin.generate(**padded(PROMPTS), max_new_tokens=12, do_sample=False, eos_token_id=end)[:, 20:].tolist()
    for new, text in zip(out, texts):
        cut = text.index(end) if end in text else len(text)
        assert new[:cut] == text[:cut]
        assert set(new[cut + 1 :]) <= {256}
    assert expected[0][4] == 256


def test_only_the_logits_asked_for_are_formed(pair):
    _, twin = pair
    ids = torch.tensor([PROMPTS[1]])
    whole = twin(input_ids=ids).logits
    formed = []
    handle = twin.lm_head.register_forward_hook(lambda module, args, out: formed.append(out.shape[1]))
    last = twin(input_ids=ids, logits_to_keep=2).logits
    some = twin(input_ids=ids, logits_to_keep=torch.tensor([0, 7])).logits
    twin.generate(input_ids=ids, max_new_tokens=2, do_sample=False, eos_token_id=None)
    handle.remove()
    assert formed == [2, 2, 1, 1]
    torch.testing.assert_close(last, whole[:, -2:])
    torch.testing.assert_close(some, whole[:, [0, 7]])


def test_packed_positions_and_offsets_keep_sequences_apart(pair):
    _, twin = pair
    packed = torch.tensor([[token for row in PROMPTS for token in row]])
    alone = torch.cat([twin(input_ids=torch.tensor([row])).logits[0] for row in PROMPTS])
    positions = torch.cat([torch.arange(len(row)) for row in PROMPTS])[None]
    offsets = torch.tensor([0, 3, 23, 34])
    for how in ({"position_ids": positions}, {"cu_seq_lens_q": offsets.int()}):
        torch.testing.assert_close(twin(input_ids=packed, **how).logits[0], alone, atol=1e-10, rtol=1e-10)
        assert twin(input_ids=packed, **how).get(CACHE_NAME) is None
    with pytest.raises(ValueError, match="cu_seq_lens_q comes with a cache or a mask that leaves tokens out"):
        twin(input_ids=packed, cu_seq_lens_q=offsets, attention_mask=torch.arange(34)[None])
    plain = {"position_ids": torch.arange(34)[None]}
    torch.testing.assert_close(twin(input_ids=packed, **plain).logits, twin(input_ids=packed).logits)


def test_embeddings_stand_for_ids(pair):
    _, twin = pair
    ids = torch.tensor([PROMPTS[1]])
    assert torch.equal(twin(inputs_embeds=twin.get_input_embeddings()(ids)).logits, twin(input_ids=ids).logits)
    with pytest.raises(ValueError, match="expected one of them"):
        twin()


@pytest.mark.parametrize("mask", [torch.ones(1, 2), torch.ones(2, 3), torch.ones(1, 1, 3, 3)])
def test_mask_of_another_shape_is_named(pair, mask):
    with pytest.raises(ValueError, match=r"attention_mask has shape .*; expected \[1, 3\] or more columns"):
        pair[1](input_ids=torch.tensor([[1, 2, 3]]), attention_mask=mask)


def test_hidden_states_are_the_stream_before_each_block_and_the_last(pair):
    _, twin = pair
    out = twin(input_ids=torch.tensor([PROMPTS[1]]), output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(1, 20, 32)] * 3
    assert torch.equal(twin.lm_head(out.hidden_states[-1]), out.logits)
    assert isinstance(twin(input_ids=torch.tensor([[1]]), return_dict=False), tuple)


def test_checkpointed_blocks_give_the_same_gradients():
    _, twin = exported()
    twin.train()
    batch = padded(PROMPTS, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for enable in (False, True):
        if enable:
            getattr(twin, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
            assert twin.model.gradient_checkpointing
        twin.zero_grad()
        calls = []
        handle = twin.model.blocks[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        twin(**batch, labels=labels).loss.backward()
        handle.remove()
        assert len(calls) == 1 + enable  # once more in the backward pass
        gradients.append([p.grad.clone() for p in twin.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_trainer_steps_save_and_load(tmp_path):
    _, twin = exported(double=False)
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    rows = [
        {"input_ids": torch.tensor(prompt(16, seed)), "labels": torch.tensor(prompt(16, seed))} for seed in range(8)
    ]
    arguments = Arguments(
        tmp_path / "out", max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        use_cpu=True, **{CHECKPOINTING: True}, save_steps=2, logging_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False, eval_strategy="steps", eval_steps=2, learning_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(twin, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    assert any("eval_loss" in row for row in trainer.state.log_history)
    assert all(not torch.equal(p, before[name]) for name, p in twin.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), twin.parameters(), strict=True))
