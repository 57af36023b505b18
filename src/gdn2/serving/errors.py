"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from gdn2.serving.worker import BusyError, EngineError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class RequestError(Exception):
    """A request that cannot be served; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def body_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    # A lone surrogate from a request must not keep its refusal from being sent.
    text = message.encode("utf-8", "replace").decode()
    return ErrorBody(error=ErrorDetail(message=text, type=kind, param=param, code=code)).model_dump()


def respond(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(body_of(status, message, param, code), status, headers)


def stopping() -> tuple[int, dict[str, Any]]:
    """Status and body for a request that the end of the server leaves unanswered."""
    return 503, body_of(503, "the server stops before the answer is there", code="stopping")


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an error that ends an answer which has already begun."""
    if isinstance(error, TimeoutError):
        return 504, body_of(504, "the answer took longer than this server allows", code="timeout")
    if isinstance(error, ValueError):
        return 400, body_of(400, str(error))
    return 500, body_of(500, str(error) if isinstance(error, EngineError) else "internal error")


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """The response to any exception of a route."""
    match error:
        case RequestError():
            return respond(error.status, error.message, error.param, error.code)
        case RequestValidationError():
            param, message = _explain(error)
            return respond(400, message, param)
        case HTTPException():
            return respond(error.status_code, error.detail, headers=error.headers)
        case BusyError():
            return respond(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    status, body = described(error)
    return JSONResponse(body, status)


def _explain(error: RequestValidationError) -> tuple[str | None, str]:
    """The first field at fault, and what is wrong with it; of a union, what each of its kinds asks for."""
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        return None, f"the body is not JSON: {found[0]['ctx']['error']}"
    place = found[0]["loc"][1:]
    if not place:
        return None, "the body is not a JSON object; expected one with Content-Type: application/json"
    field = str(place[0])
    reasons = dict.fromkeys(e["msg"] for e in found if e["loc"][1:2] == place[:1])
    return field, f"{field}: {'; or '.join(reasons)}"[:500]
