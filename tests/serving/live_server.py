"""A live server of a small random model, on a socket, in a thread of this process."""

import threading
from contextlib import contextmanager

import httpx
from saved_run import BYTES
from small import MODELS, small_model

from gdn2.inference import Engine
from gdn2.serving.app import create_app
from gdn2.serving.run import make_server
from gdn2.serving.settings import ServerSettings

TEMPLATE = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


class Live:
    """A running server: `url`, `model`, and `app`."""

    def __init__(self, server, app, model, url):
        self.server, self.app, self.model, self.url = server, app, model, url

    def post(self, path, json=None, **settings):
        return httpx.post(self.url + path, json=json, timeout=60, **settings)

    def get(self, path, **settings):
        return httpx.get(self.url + path, timeout=60, **settings)

    def metric(self, name):
        """The value of a sample, such as 'gdn2_active_requests'."""
        lines = self.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)


@contextmanager
def serving(model=None, slots=4, chunk=16, tokenizer=BYTES, template=None, connections=1_000, engine=Engine, **limits):
    # float64: a row alone and one among others may sum in another order, which must not flip a near tie.
    model = small_model(**MODELS["window"]).double() if model is None else model
    app = create_app(
        ServerSettings(name="small", **limits),
        model,
        tokenizer,
        lambda: engine(model, tokenizer, slots, chunk),
        template,
    )
    ready = threading.Event()
    server = make_server(app, grace=30, connections=connections, ready=ready.set)
    server.config.port = 0
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(30)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Live(server, app, model, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join()
