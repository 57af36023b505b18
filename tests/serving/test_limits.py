"""What a server refuses, how it says so, and that it forgets nobody whom it has accepted."""

import socket
import threading
import time

import httpx
import pytest
from serving.live_server import serving
from serving.texts import alone

from gdn2.inference import Engine
from gdn2.serving.limits import RateLimit
from gdn2.serving.settings import ServerSettings, read_keys

PROMPT = {"prompt": "ab", "max_tokens": 5, "temperature": 0}


class SlowEngine(Engine):
    """A tenth of a second for each token."""

    def step(self):
        time.sleep(0.1)
        return super().step()


def until(condition, seconds=60):
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def connect(live):
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def request_head(length):
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode()


def received(connection):
    """All that comes until the other side closes, or says nothing for a second after an answer."""
    data = b""
    while part := connection.recv(65_536):
        data += part
        if b"\r\n\r\n" in data and b"error" in data:
            break
    return data


def test_keys_are_asked_for_everywhere_but_at_the_front(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("first-key  # of someone\n\n# nobody\nsecond-key\n")
    keys = read_keys(path, " third-key ")
    assert keys == ("third-key", "first-key", "second-key")
    with serving(keys=keys) as live:
        assert (live.get("/").status_code, live.get("/health").status_code) == (200, 200)
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer first-key2"}):
            for path in ("/v1/models", "/metrics", "/view", "/openapi.json", "/nowhere"):
                assert live.get(path, headers=given).status_code == 401, path
            answer = live.post("/v1/completions", PROMPT, headers=given)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in keys:
            answer = live.post("/v1/completions", PROMPT, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200


def test_other_names_of_the_server_are_refused():
    with serving(hosts=("localhost", "127.0.0.1", "[::1]")) as live:
        for host in ("evil.example", "127.0.0.1.evil.example:80", "", "localhost@evil.example"):
            answer = live.post("/v1/completions", PROMPT, headers={"Host": host})
            assert answer.status_code == 403, host
            assert answer.json()["error"]["code"] == "host_not_allowed"
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
            assert live.post("/v1/completions", PROMPT, headers={"Host": host}).status_code == 200, host


@pytest.mark.parametrize(("text", "message"), [("# none\n", "holds no key"), ("clé\n", "characters that no header")])
def test_keys_that_are_none_are_named(tmp_path, text, message):
    (tmp_path / "keys.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_keys(tmp_path / "keys.txt", "")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"name": ""}, "the model's name is empty"),
        ({"queue": -1}, "queue is -1; expected an integer >= 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected an integer >= 1"),
        ({"timeout": 0.0}, "timeout is 0.0; expected seconds above 0"),
    ],
)
def test_settings_out_of_range_are_named(limits, message):
    with pytest.raises(ValueError, match=message):
        ServerSettings(**{"name": "x"} | limits)


def test_rate_fills_up_again():
    now = 0.0
    rate = RateLimit(6, clock=lambda: now)
    assert [rate.wait("a") for _ in range(8)] == [0] * 6 + [10, 10]
    assert rate.wait("b") == 0
    now = 9.0
    assert rate.wait("a") == 1
    now = 10.0
    assert [rate.wait("a"), rate.wait("a")] == [0, 10]
    now = 1e6
    assert [rate.wait("a") for _ in range(7)] == [0] * 6 + [10]


def test_clients_above_their_rate_are_told_when_to_come_back():
    with serving(rate=2) as live:
        answers = [live.post("/v1/completions", PROMPT) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert 1 <= int(answers[2].headers["retry-after"]) <= 30
        assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
        assert live.get("/v1/models").status_code == 200  # reading is free


def test_full_queue_is_429_and_every_accepted_request_is_answered():
    with serving(slots=1, queue=2, engine=SlowEngine) as live:
        expected = alone(live.model, "ab", 5)[0]
        answers = []

        def ask():
            answers.append(live.post("/v1/completions", PROMPT))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 5
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == expected
            else:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.json()["error"]["code"] == "queue_full"
        assert live.post("/v1/completions", PROMPT | {"n": 4}).status_code == 400  # never fits
        assert live.metric('gdn2_rejected_total{reason="queue"}') == 5


@pytest.mark.parametrize("declared", [True, False])
def test_large_bodies_are_413_however_they_come(declared):
    body = b'{"prompt": "' + b"a" * 5_000_000 + b'"}'

    def pieces():
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    with serving(max_body=10_000) as live:
        headers = {"Content-Type": "application/json"}
        answer = live.post("/v1/completions", content=body if declared else pieces(), headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "the body is too large; expected at most 10,000 bytes"
        assert live.post("/v1/completions", PROMPT).status_code == 200


def test_body_that_does_not_come_is_408():
    with serving(body_timeout=0.3) as live, connect(live) as connection:
        connection.sendall(request_head(1_000) + b'{"prompt')
        answer = received(connection)
        assert b" 408 " in answer
        assert b"the body took longer than 0.3 s" in answer
        assert live.metric("gdn2_active_requests") == 0


def test_answer_that_takes_too_long_is_504_and_frees_its_slot():
    with serving(slots=1, timeout=0.5, engine=SlowEngine) as live:
        ask = {"prompt": "ab", "max_tokens": 4_000, "temperature": 0}
        answer = live.post("/v1/completions", ask)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        with httpx.Client(base_url=live.url, timeout=30) as client:  # which goes on on its connection
            places = [
                response.extensions["network_stream"].get_extra_info("client_addr")
                for response in (client.post("/v1/completions", json=ask), client.get("/health"))
            ]
        assert places[0] == places[1]
        events = live.post("/v1/completions", ask | {"stream": True}).text.split("\n\n")
        assert '"code": "timeout"' in events[-3]
        until(lambda: live.metric("gdn2_active_requests") == 0, 2)
        assert live.post("/v1/completions", PROMPT | {"max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_slot(stream):
    with serving(slots=1, engine=SlowEngine) as live:
        ask = {"prompt": "ab", "max_tokens": 4_000, "temperature": 0, "stream": stream}
        with httpx.Client(timeout=30 if stream else 0.5) as client:
            if stream:
                with client.stream("POST", f"{live.url}/v1/completions", json=ask) as response:
                    lines = response.iter_lines()  # dropped, it would end the stream
                    assert next(lines).startswith("data: ")
                    until(lambda: live.metric("gdn2_active_requests") == 1)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{live.url}/v1/completions", json=ask)
        until(lambda: live.metric("gdn2_active_requests") == 0, 3)
        started = time.monotonic()
        assert live.post("/v1/completions", PROMPT | {"max_tokens": 1}).status_code == 200
        assert time.monotonic() - started < 3  # four thousand tokens would take minutes
        assert live.metric('gdn2_texts_total{reason="cancelled"}') == 1


def test_client_that_leaves_the_queue_is_never_run():
    with serving(slots=1, queue=4, engine=SlowEngine) as live:
        first = threading.Thread(target=live.post, args=("/v1/completions", PROMPT | {"max_tokens": 15}))
        first.start()
        until(lambda: live.metric("gdn2_active_requests") == 1)
        with httpx.Client(timeout=0.2) as client, pytest.raises(httpx.ReadTimeout):
            client.post(f"{live.url}/v1/completions", json=PROMPT)
        until(lambda: live.metric("gdn2_active_requests") == 1)
        first.join()
        assert live.metric("gdn2_new_tokens_total") <= 15


def test_client_that_does_not_read_is_given_up():
    # The first event, log-probabilities of the whole prompt, is more than the buffers between the two hold.
    body = b'{"prompt": "%s", "max_tokens": 4000, "echo": true, "logprobs": 20, "stream": true}' % (b"ab" * 6_000)
    with serving(send_timeout=0.5, chunk=512) as live, connect(live) as connection:
        connection.sendall(request_head(len(body)) + body)
        until(lambda: live.metric('gdn2_rejected_total{reason="stalled"}') == 1)
        until(lambda: live.metric("gdn2_active_requests") == 0, 5)
        assert live.post("/v1/completions", PROMPT).status_code == 200


def test_connections_are_bounded():
    with serving(connections=5) as live:
        held = [connect(live) for _ in range(8)]
        answer = live.get("/health")
        for connection in held:
            connection.close()
        assert answer.status_code == 503
        until(lambda: live.get("/health").status_code == 200)
