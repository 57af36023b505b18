import pytest
from serving.live_server import TEMPLATE, serving


@pytest.fixture(scope="session")
def live():
    """A server that many tests share, with a chat template and room for 204 texts."""
    with serving(template=TEMPLATE, queue=200) as server:
        yield server
