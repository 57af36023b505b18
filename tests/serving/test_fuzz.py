"""The server against requests made up from its own OpenAPI schema, right ones and wrong ones."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving.live_server import serving

pytestmark = pytest.mark.filterwarnings("ignore")  # those of schemathesis and what it stands on
# Why a request of the schema's form may still be refused: limits of this server, and of this model.
BEYOND_THE_SCHEMA = ("; expected at most", "; expected an id in", "; expected logprobs to be true", "max_tokens is 0")
BEYOND_THE_SCHEMA += ("head is", "block is")
BOUNDED = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed():
    limits = {"max_new_tokens": 8, "max_prompt_tokens": 200, "queue": 10_000}
    with serving(template="{{ messages }}", **limits) as live:
        yield live


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_of_its_schema_and_none_is_a_failure(fuzzed, mode):
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    tried = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing in it can be wrong

        @BOUNDED
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case):
            response = case.call()
            case.validate_response(response, excluded_checks=[positive_data_acceptance])
            if mode is GenerationMode.POSITIVE and response.status_code == 400:
                message = response.json()["error"]["message"]
                assert any(reason in message for reason in BEYOND_THE_SCHEMA), message
            assert response.status_code < 500
            tried.add((case.method, case.path, response.status_code // 100))

        ask()
    assert fuzzed.get("/health").status_code == 200
    assert fuzzed.metric("gdn2_active_requests") == 0
    wanted = 2 if mode is GenerationMode.POSITIVE else 4
    for path in ("/v1/completions", "/v1/chat/completions", "/view"):
        assert ("POST", path, wanted) in tried
