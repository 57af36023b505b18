"""`gdn2 serve` as a process: it says where it is, ends on a signal with what runs answered, and refuses in one line."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from saved_run import BYTES, save_run
from serving.texts import alone
from small import small_model

from gdn2.cli import main
from gdn2.inference import Engine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    model = small_model()
    save_run(folder, model)
    return folder, model


def start(run, *options, **environment):
    """The process and its address, once it serves."""
    command = [sys.executable, "-m", "gdn2", "serve", str(run), "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    line = process.stderr.readline()
    assert line.startswith("serving 'first' on cpu at http://127.0.0.1:"), line + process.stderr.read()
    return process, line.split(" at ")[1].split()[0]


def test_signal_ends_it_once_what_runs_and_waits_is_answered_to_keys_of_the_environment(run):
    folder, model = run
    process, url = start(folder, "--slots", "1", GDN2_API_KEYS="one two")
    key = {"Authorization": "Bearer two"}
    try:
        ask = {"prompt": "ab", "max_tokens": 600, "temperature": 0}
        answers = {}

        def stream(name):
            with httpx.stream(
                "POST", f"{url}/v1/completions", json=ask | {"stream": True}, headers=key, timeout=60
            ) as response:
                answers[name] = response.read().decode()

        def whole(name):
            answers[name] = httpx.post(f"{url}/v1/completions", json=ask, headers=key, timeout=60).json()

        threads = [threading.Thread(target=work, args=(i,)) for i, work in enumerate((stream, whole))]
        for thread in threads:
            thread.start()
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers=key).json()["data"][0]["id"] == "first"
        while b"gdn2_active_requests 2.0" not in httpx.get(f"{url}/metrics", headers=key).content:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(20) == 0
        events = [json.loads(line[6:]) for line in answers[0].split("\n\n")[:-2]]
        assert answers[0].endswith("data: [DONE]\n\n")
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == answers[1]["choices"][0]["text"] == alone(model, "ab", 600)[0]
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, None], ids=["SIGTERM", "SIGINT", "grace"])
def test_what_is_given_up_is_told_so_and_nothing_is_thrown(tmp_path, second):
    model = small_model()
    with torch.no_grad():
        model.head.weight[256] = 0  # never the likeliest: the text has no end
    save_run(tmp_path / "first", model)
    grace = ("--grace", "1") if second is None else ()
    process, url = start(tmp_path / "first", "--max-tokens", "1000000", *grace)
    try:
        ask, answers = {"prompt": "ab", "max_tokens": 1_000_000, "temperature": 0}, {}

        def work(stream):
            answers[stream] = httpx.post(f"{url}/v1/completions", json=ask | {"stream": stream}, timeout=60)

        threads = [threading.Thread(target=work, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        while b"gdn2_active_requests 2.0" not in httpx.get(f"{url}/metrics").content:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        if second is not None:
            time.sleep(0.3)
            assert all(thread.is_alive() for thread in threads)
            process.send_signal(second)
        for thread in threads:
            thread.join()
        assert process.wait(20) == 0
        assert (answers[False].status_code, answers[False].json()["error"]["code"]) == (503, "stopping")
        *_, error, done, end = answers[True].text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "stopping"
        assert (done, end) == ("data: [DONE]", "")
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_model_is_kept_in_what_is_asked_for(run):
    folder, _ = run
    process, url = start(folder, "--weights", "int8", "--memories", "bfloat16")
    try:
        ask = {"prompt": "ab", "max_tokens": 20, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=ask, timeout=60).json()
        narrow = small_model().quantize("int8")
        assert answer["choices"][0]["text"] == alone(narrow, "ab", 20, memory_dtype=torch.bfloat16)[0]
        state = Engine(narrow, BYTES, memory_dtype=torch.bfloat16).state_bytes
        assert state < Engine(narrow, BYTES).state_bytes
        assert f"gdn2_state_bytes {float(state)}" in httpx.get(f"{url}/metrics").text
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host is '0.0.0.0' and there is no API key; expected --keys, GDN2_API_KEYS or"),
        (["--keys", "none.txt"], "none.txt"),
        (["--host", "192.0.2.1", "--without-keys"], "assign requested address"),
        (["--timeout", "0"], "timeout is 0.0; expected seconds above 0"),
        (["--chat-template", "BAD"], "the chat template is not Jinja"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--weights", "int4"], "--weights is 'int4'; expected one of float32, bfloat16, int8, fp8"),
        (["--memories", "fp8"], "--memories is 'fp8'; expected float32 or bfloat16"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.delenv("GDN2_API_KEYS", raising=False)
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(SystemExit) as leaving:
        main(["serve", str(run[0]), *[str(tmp_path / "bad.jinja") if o == "BAD" else o for o in options]])
    err = capsys.readouterr().err
    assert leaving.value.code == 2
    assert message in err
    assert err.startswith("gdn2: error: ")
    assert err.count("\n") == 1
