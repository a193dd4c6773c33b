"""Errors of the servers: OpenAI's {"error": {"message", "type", "param", "code"}}."""

import json
import reprlib

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from .batching import InvalidRequest, Unavailable

RETRY_AFTER = {"Retry-After": "1"}  # seconds
SHOWN_VALUE_LENGTH = 80  # characters of a wrong value that an error message shows

EXPECTED = {  # by the types of pydantic's errors
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_type": "an integer",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_pattern_mismatch": "a token id",
    "string_type": "a text",
    "string_unicode": "a text",
    "too_long": "at most {max_length}",
    "too_short": "at least {min_length}",
}


class ShowJson(reprlib.Repr):
    """Shortens a wrong value, and writes it as the client did."""

    def repr_bool(self, value, level) -> str:
        return json.dumps(value)

    repr_NoneType = repr_float = repr_bool

    def repr_str(self, value, level) -> str:
        half = self.maxstring // 2
        short = value if len(value) <= self.maxstring else f"{value[:half]}...{value[-half:]}"
        return json.dumps(short, ensure_ascii=False)


show_json = ShowJson()


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


# For the OpenAPI schema; docs/api.md lists what the status codes mean.
ERROR_RESPONSES = {"4XX": {"model": ErrorResponse}, 503: {"model": ErrorResponse}}


class RequestError(HTTPException):
    """A refused request: a message, the name of the wrong field, a code for programs."""

    def __init__(self, status: int, message: str, param=None, code=None, headers=None):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def describe_error(status: int, message: str, param=None, code=None) -> str:
    """Return an error object as JSON, in ASCII, because a wrong value can be any text."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error})


def error_response(status: int, message: str, param=None, code=None, headers=None) -> Response:
    content = describe_error(status, message, param, code)
    return Response(content, status, headers, media_type="application/json")


def describe_invalid(error: RequestValidationError) -> tuple[str, str | None]:
    """Return a message about a wrong field, and the field's name."""
    # A field of several types has an error for each; the deepest is of the type that was meant.
    errors = error.errors()
    detail = max(errors, key=lambda item: (len(item["loc"]), not item["type"].endswith("_type")))
    # The path also has names of types, which are no identifiers.
    path = [str(p) for p in detail["loc"][1:] if isinstance(p, int) or p.isidentifier()]
    if detail["type"] == "json_invalid":
        return f"The body is not JSON: {detail['ctx']['error']}.", None
    if detail["type"] == "together":
        param = detail["ctx"]["param"]
        return f"{param}: {detail['msg']}.", param
    if not path:
        if isinstance(detail["input"], bytes):  # not read, because of its content type
            return "The body must be JSON with the header Content-Type: application/json.", None
        return "The body must be a JSON object with the fields of a request.", None
    name, kind, value = ".".join(path), detail["type"], detail["input"]
    shown = f"{show_json.repr(value):.{SHOWN_VALUE_LENGTH}}"
    if kind == "missing":
        return f"{name} is missing.", path[0]
    if kind not in EXPECTED:  # a message of schema.py
        return f"{name}: {detail['msg']}; the value is {shown}.", path[0]
    kinds = [kind]
    if kind.endswith("_type"):  # none of a field's types fits: name all
        kinds = [e["type"] for e in errors if len(e["loc"]) == len(detail["loc"])]
    expected = " or ".join(dict.fromkeys(EXPECTED[kind] for kind in kinds if kind in EXPECTED))
    context = {k: str(v).removesuffix(".0") for k, v in detail.get("ctx", {}).items()}
    expected = expected.format(**context)
    if kind.startswith("too_"):
        unit = "character" if isinstance(value, str) else "text" if name == "stop" else "item"
        unit += "" if expected.endswith(" 1") else "s"
        size = f"it has {len(value)}" if value else "it is empty"
        return f"{name}: expected {expected} {unit}; {size}.", path[0]
    return f"{name}: expected {expected}, not {shown}.", path[0]


def add_error_handlers(app: FastAPI, invalid_status: int):
    """Answer every error with an error object; a wrong field has the status `invalid_status`."""

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: HTTPRequest, error: RequestValidationError):
        return error_response(invalid_status, *describe_invalid(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: HTTPRequest, error: HTTPException):
        if isinstance(error, RequestError):
            fields = error.detail, error.param, error.code, error.headers
            return error_response(error.status_code, *fields)
        if error.status_code in (404, 405):
            path = f"{request.method} {request.url.path:.100}"
            message = f"There is no route {path}; GET /docs lists all routes."
            return error_response(error.status_code, message, headers=error.headers)
        # FastAPI hides why it could not parse a body.
        for kind, reason in (
            (UnicodeDecodeError, "is not JSON: it is not in UTF-8"),
            (RecursionError, "is nested too deeply"),
            (ValueError, "has a number with too many digits"),
        ):
            if isinstance(error.__cause__, kind):
                return error_response(invalid_status, f"The body {reason}.")
        return error_response(error.status_code, error.detail, headers=error.headers)

    @app.exception_handler(InvalidRequest)
    async def on_invalid_request(request: HTTPRequest, error: InvalidRequest):
        return error_response(invalid_status, str(error), error.param)

    @app.exception_handler(Unavailable)
    async def on_unavailable(request: HTTPRequest, error: Unavailable):
        return error_response(503, str(error), code="unavailable", headers=RETRY_AFTER)

    @app.exception_handler(Exception)
    async def on_failure(request: HTTPRequest, error: Exception):
        message = "The server failed; its log has the cause."
        headers = {"Connection": "close"}  # uvicorn closes it
        return error_response(500, message, code="internal_error", headers=headers)
