"""The decoding step says what a forward pass says, on a state that stays where it is; on a GPU from a CUDA graph."""

import random

import pytest
import torch
from saved_run import BYTES
from small import MODELS, prompt, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from gdn2.decoding import LEAST_ROOM, DecodeStep, likeliest_tokens
from gdn2.generate import generate
from gdn2.inference import Engine, Request, Session

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = MODELS | {"gdn": {"mixer": "gdn"}, "deltanet": {"mixer": "deltanet"}, "ablated": {"channel_write": False}}


@pytest.fixture(params=FORMS, scope="module")
def model(request):
    return small_model(**FORMS[request.param]).double()


def pointers(state):
    return [tensor.data_ptr() for block in state for tensor in block]


@torch.inference_mode()
def read(model, tokens, state=None):
    hidden, state = model(torch.tensor([tokens]), state)
    return model.logits(hidden[:, -1]), state


def test_steps_say_what_forward_passes_say(model):
    texts = [prompt(5), prompt(19, seed=1), prompt(11, seed=2)]  # some beyond the window of 16, some not yet
    logits, states = zip(*(read(model, text) for text in texts))
    step, states = DecodeStep(model, 3), list(states)
    for row, state in enumerate(states):
        step.put(row, state)
    here = pointers(step.state)
    for _ in range(24):
        tokens = [int(likeliest_tokens(row)) for row in logits]
        logits, states = zip(*(read(model, [token], state) for token, state in zip(tokens, states)))
        # float64: only the order of sums differs; angles are float32, but the same ones
        torch.testing.assert_close(step(tokens), torch.cat(logits), atol=1e-10, rtol=1e-10)
        assert step.likeliest.tolist() == [int(likeliest_tokens(row)) for row in logits]
    assert pointers(step.state) == here


def test_rows_do_not_see_each_other(model):
    alone, many = DecodeStep(model, 1), DecodeStep(model, 4)
    for token in prompt(20):
        torch.testing.assert_close(many([7, token, 9, 250])[1:2], alone([token]), atol=1e-10, rtol=1e-10)


class Capturable(TorchDispatchMode):
    """Refuses what a capture refuses: results that the host must wait for, and shapes that depend on them."""

    WAITS = ("item", "_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.WAITS), func
        if "index" in str(func):
            for index in args[1] if isinstance(args[1], (list, tuple)) else ():
                assert index is None or index.dtype != torch.bool, func
        return func(*args, **(kwargs or {}))


def test_step_never_waits(model):
    step = DecodeStep(model, 2)
    with torch.inference_mode(), Capturable():
        step._step()
    with torch.inference_mode(), Capturable(), pytest.raises(AssertionError, match=r"item|_local_scalar_dense"):
        step.logits.max().item()


def test_advance_is_a_step_on_values(model):
    text = prompt(30)
    _, state = read(model, text[:20])
    before = [tensor.clone() for block in state for tensor in block]
    step, found = DecodeStep(model, 1), []
    after = state
    for length, token in enumerate(text[20:], 21):
        logits, after = step.advance(after, [token], length)
        found.append((logits, after, logits.clone(), [t.clone() for b in after for t in b]))
    again, _ = step.advance(state, [text[20]], 21)  # from another state than the last one
    assert torch.equal(again, found[0][0])
    expected, _ = read(model, text)
    torch.testing.assert_close(found[-1][0], expected, atol=1e-10, rtol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(before, (t for block in state for t in block)))
    for logits, after, kept, tensors in found:
        assert torch.equal(logits, kept)
        assert all(torch.equal(a, b) for a, b in zip(tensors, (t for block in after for t in block)))


def test_sessions_may_share_a_step(model):
    step = DecodeStep(model, 1)
    plain, session, other = Session(model), Session(model, step=step), Session(model, step=step)
    for s in (plain, session, other):
        s.read(prompt(10))
    fork = session.fork()
    for token in prompt(12, seed=1):
        expected = plain.read([token])
        torch.testing.assert_close(session.read([token]), expected, atol=1e-10, rtol=1e-10)
        other.read([3])
    session.rollback(21)
    torch.testing.assert_close(session.read(prompt(12, seed=1)[-1:]), expected, atol=1e-10, rtol=1e-10)
    for token in prompt(12, seed=1):  # from where it left, whatever the step did since
        logits = fork.read([token])
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)


def test_room_of_full_attention_grows_and_keeps_what_was_read():
    model = small_model(**MODELS["full"]).double()
    text = prompt(3 * LEAST_ROOM)
    step = DecodeStep(model, 2)
    for length, token in enumerate(text, 1):
        step.make_room(length)
        logits = step([token, 5])
    expected, _ = read(model, text)
    torch.testing.assert_close(logits[:1], expected, atol=1e-10, rtol=1e-10)
    assert len(text) <= step.room <= len(text) * 5 // 4
    step.make_room(3)
    assert step.room == LEAST_ROOM


def test_nan_in_a_row_is_told_by_that_row():
    logits = torch.zeros(3, 5)
    logits[0, 2], logits[1, 3], logits[2, 4] = 1, float("nan"), float("inf")
    assert likeliest_tokens(logits).tolist() == [2, -1, 4]


def test_what_cannot_be_is_named():
    model = small_model()
    with pytest.raises(ValueError, match="rows is 0; expected an integer >= 1"):
        DecodeStep(model, 0)
    with pytest.raises(ValueError, match="step has 2 rows"):
        Session(model, step=DecodeStep(model, 2))
    with pytest.raises(ValueError, match="expected 1 row of the session's model"):
        Session(small_model(), step=DecodeStep(model, 1))
    with pytest.raises(ValueError, match="graph is True and the model on cpu; expected one on a CUDA device"):
        DecodeStep(model, 1, graph=True)
    with pytest.raises(ValueError, match="graph is True and the model on cpu"):
        Engine(model, BYTES, graph=True)
    assert not DecodeStep(model, 1).graph


@pytest.mark.parametrize("name", ["gdn2", "full"])
def test_sharded_model_steps_by_forward_passes(tmp_path, name):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, whole = small_model(**MODELS[name]), small_model(**MODELS[name])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.loss(*torch.tensor([[[1, 2]], [[2, 3]]])).backward()  # as in training: what is gathered has its place
        texts = [[t for (t,) in generate(m, [prompt(20)], 60, temperature=0)] for m in (model, whole)]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 60
    finally:
        dist.destroy_process_group()


def on_gpu(name, dtype=torch.float32):
    return small_model(**FORMS[name]).to("cuda", dtype)


def run_with_arrivals(engine, requests, seed):
    """Texts of requests that come, and of which some are cancelled, at random moments."""
    rng, told, numbers, pending = random.Random(seed), {}, {}, list(range(len(requests)))
    while pending or not engine.idle:
        if pending and rng.random() < 0.3:
            index = pending.pop(0)
            numbers[engine.submit(requests[index])] = index
        if numbers and rng.random() < 0.02:
            engine.cancel(rng.choice(sorted(numbers)))
        for event in engine.step():
            told.setdefault(numbers[event.request], []).append(event.token)
    return told


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_gpu_graph_says_what_eager_steps_say_while_texts_come_and_go(name, dtype):
    model = on_gpu(name, dtype)
    ways = [{"temperature": 0.0}, {"top_k": 20}, {"top_p": 0.9, "temperature": 0.8}]
    requests = [Request(prompt(3 + 17 * i, seed=i), 40 - i, seed=i, **ways[i % 3]) for i in range(9)]
    texts = [
        run_with_arrivals(Engine(model, BYTES, slots=3, chunk=16, graph=graph), requests, seed=0)
        for graph in (True, False)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 9


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("name", FORMS)
def test_gpu_graph_follows_forward_passes(name):
    model = on_gpu(name)
    step, state = DecodeStep(model, 1), None
    assert step.graph
    for length, token in enumerate(prompt(200), 1):
        with torch.inference_mode():
            hidden, state = model(torch.tensor([[token]], device="cuda"), state)
            expected = model.logits(hidden[:, -1])
        step.make_room(length)
        # float32 (products in TF32 are off by default): sums in another order over 200 tokens of feedback
        torch.testing.assert_close(step([token]), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("name", ["gdn2", "window", "full"])
def test_gpu_generate_and_sessions_replay(name):
    model = on_gpu(name)
    tokens = [token for (token,) in generate(model, [prompt(30)], 100, temperature=0)]
    session, plain = Session(model, step=DecodeStep(model, 1)), Session(model, step=DecodeStep(model, 1, graph=False))
    for s in (session, plain):
        text, logits = [], s.read(prompt(30))
        for _ in range(100):
            text.append(int(logits.argmax()))
            logits = s.read(text[-1:])
        assert text == tokens


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_step_under_autocast_takes_no_graph():
    model = on_gpu("gdn2")
    with torch.autocast("cuda", torch.bfloat16):
        assert not DecodeStep(model, 1).graph
        with pytest.raises(ValueError, match="graph is True under autocast"):
            DecodeStep(model, 1, graph=True)
