"""What api.py and openai_api.py share: flags, guards, errors, answers, running and stopping.

Every error is an OpenAI error object: {"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import gc
import hmac
import ipaddress
import json
import reprlib
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from chatglm2.hardware import listen

from .batching import Batcher, Chunk, Generation, Unavailable
from .metrics import CountRequests, Metrics

OPEN_PATHS = ("/health", "/openapi.json")  # need no key
RETRY_AFTER_S = 1
FLUSH_S = 5  # for clients to read their last chunk
SHOWN_VALUE_LENGTH = 80  # of a wrong value in an error message
EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


# Requests.


def count_room(num_ids: int, max_length: int) -> int:
    """Return the tokens that `max_length` leaves for the answer."""
    if num_ids >= max_length:
        message = f"The prompt has {num_ids} tokens, max_length is {max_length}: raise it."
        raise RequestError(400, message, "max_length", "context_length_exceeded")
    return max_length - num_ids


# Errors.


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


# For the OpenAPI schema of a route that answers; 4XX is 400 or 422 (wrong), 401 (no key), 413.
ERROR_RESPONSES = {"4XX": {"model": ErrorResponse}, 503: {"model": ErrorResponse}}


class RequestError(HTTPException):
    """What is wrong with a request: a message, the field's name, a code for programs."""

    def __init__(self, status: int, message: str, param=None, code=None, headers=None):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def describe_error(status: int, message: str, param=None, code=None) -> str:
    """Return an error object as JSON, in ASCII, for a wrong value can be any text."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error})


def error_response(status: int, message: str, param=None, code=None, headers=None) -> Response:
    content = describe_error(status, message, param, code)
    return Response(content, status, headers, media_type="application/json")


def describe_invalid(error: RequestValidationError) -> tuple[str, str | None]:
    """Return a line on a wrong field, and the field's name."""
    # Of a field of several types, what went wrong deepest is what was meant.
    detail = max(error.errors(), key=lambda item: len(item["loc"]))
    # Names of types are parts of the path too; they are no identifiers.
    path = [str(p) for p in detail["loc"][1:] if isinstance(p, int) or p.isidentifier()]
    if detail["type"] == "json_invalid":
        return f"The body is no JSON: {detail['ctx']['error']}.", None
    if detail["type"] == "together":
        param = detail["ctx"]["param"]
        return f"{param}: {detail['msg']}.", param
    if not path:
        return "The body must be a JSON object, sent as Content-Type: application/json.", None
    message = f"{'.'.join(path)}: {detail['msg']}"
    if detail["type"] != "missing":
        message += f", not {reprlib.repr(detail['input']):.{SHOWN_VALUE_LENGTH}}"
    return f"{message}.", path[0]


def add_error_handlers(app: FastAPI, invalid_status: int):
    """Answer every error with an error object, a wrong field with `invalid_status`."""

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError):
        return error_response(invalid_status, *describe_invalid(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException):
        # FastAPI hides why a body could not be parsed.
        if isinstance(error.__cause__, UnicodeDecodeError):
            return error_response(invalid_status, "The body is no JSON: it is not in UTF-8.")
        if isinstance(error.__cause__, RecursionError):
            return error_response(invalid_status, "The body is nested too deeply.")
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        return error_response(error.status_code, error.detail, param, code, error.headers)

    @app.exception_handler(Unavailable)
    async def on_unavailable(request: Request, error: Unavailable):
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return error_response(503, str(error), code="unavailable", headers=headers)

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception):
        message = "The server failed; its log tells why."
        headers = {"Connection": "close"}  # uvicorn closes it
        return error_response(500, message, code="internal_error", headers=headers)


class Guard:
    """ASGI middleware: the key is checked before anything is read, and no more than allowed."""

    def __init__(self, app, api_key: str | None, max_body: int):
        self.app, self.max_body = app, max_body
        self.too_large = f"The body has more than {max_body} bytes."
        self.expected = api_key and api_key.encode()

    def is_allowed(self, scope) -> bool:
        if not self.expected or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(key, self.expected) and scheme.lower() == b"bearer"

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not self.is_allowed(scope):
            message = "A valid key is needed, in the header Authorization: Bearer KEY."
            headers = {"WWW-Authenticate": "Bearer"}
            response = error_response(401, message, code="invalid_api_key", headers=headers)
            return await response(scope, receive, send)
        # Starlette's own limit answers in plain text. The HTTP parser has checked the number.
        if int(dict(scope["headers"]).get(b"content-length", 0)) > self.max_body:
            response = error_response(413, self.too_large)
            return await response(scope, receive, send)
        num_read = 0

        async def receive_limited():
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self.max_body:
                raise RequestError(413, self.too_large)
            return message

        await self.app(scope, receive_limited, send)


# Answers.


def submit_all(
    batcher: Batcher, requests: list, param: str, num_choices: int = 1
) -> list[Generation]:
    """Submit requests, all or none; `param` names the field of their prompts.

    Raises:
        RequestError: They can never be served together, or a prompt is too long.
        Unavailable: They cannot now.
    """
    if len(requests) > (limit := batcher.max_batch + batcher.max_queue):
        message = f"{len(requests)} answers in one request; at most {limit}."
        raise RequestError(400, message, param if num_choices == 1 else "n")
    generations = []
    try:
        for request in requests:
            generations.append(batcher.submit(request))
    except (ValueError, Unavailable) as error:
        for generation in generations:
            generation.cancel()
        if isinstance(error, ValueError):
            raise RequestError(400, str(error), param, "context_length_exceeded") from error
        raise
    return generations


async def follow(generations: list[Generation], metrics: Metrics):
    """Yield (index, chunk) of all generations as they come; end them if the reader goes away."""
    queue = asyncio.Queue()

    async def forward(index: int, generation: Generation):
        record = metrics.follow(generation)
        try:
            async for chunk in generation:
                record(chunk)
                queue.put_nowait((index, chunk))
        except Exception as error:  # raised again below, where it is awaited
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(forward(*item)) for item in enumerate(generations)]
    remaining = len(tasks)
    try:
        while remaining:
            index, chunk = await queue.get()
            if isinstance(chunk, Exception):
                raise chunk
            remaining -= chunk.finish_reason is not None
            yield index, chunk
    finally:
        for task, generation in zip(tasks, generations, strict=True):
            generation.cancel()
            task.cancel()


async def collect(request: Request, generations: list[Generation], metrics: Metrics) -> list[Chunk]:
    """Wait for whole answers.

    Raises:
        RequestError: The client went away; the generations are ended.
    """

    async def gather() -> list[Chunk]:
        answers = [Chunk() for _ in generations]
        async for index, chunk in follow(generations, metrics):
            answers[index].add(chunk)
        return answers

    async def wait_for_disconnect():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = work, _ = [asyncio.create_task(gather()), asyncio.create_task(wait_for_disconnect())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise RequestError(499, "The client closed the connection.")
        return work.result()
    finally:
        for task in tasks:
            task.cancel()
        for generation in generations:
            generation.cancel()


class EventStream(StreamingResponse):
    """Server-sent events of some generations, which end with the connection."""

    media_type = "text/event-stream"

    def __init__(self, events, generations: list[Generation]):
        super().__init__(events, headers=EVENT_HEADERS)
        self.generations = generations

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:  # also if the events were never begun
            for generation in self.generations:
                generation.cancel()


def event(data: str) -> str:
    return f"data: {data}\n\n"


def error_event(error: Exception) -> str:
    """Return the last event of a stream that failed; the batcher has logged the cause."""
    if isinstance(error, Unavailable):
        return event(describe_error(503, str(error), code="unavailable"))
    return event(describe_error(500, "The answer failed; the server's log tells why."))


# The app, and running it.


def create_app(model, tokenizer, args, title: str, invalid_status=400, **options) -> FastAPI:
    """Return an app with /health and /metrics; `app.state` holds its batcher and metrics."""
    batcher = Batcher(
        model, tokenizer, args.max_batch, args.max_queue, args.context, args.kept_tokens
    )
    if args.context > batcher.context:
        print(
            f"--context {args.context}: the model's {batcher.context} tokens are taken.",
            file=sys.stderr,
        )
    metrics = Metrics(batcher)
    # No pages with documentation: they load scripts from other hosts.
    app = FastAPI(title=title, docs_url=None, redoc_url=None, **options)
    app.state.batcher, app.state.metrics = batcher, metrics
    add_error_handlers(app, invalid_status)
    app.add_middleware(Guard, api_key=args.api_key, max_body=int(args.max_body * 1e6))
    if args.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=args.cors, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(CountRequests, counter=metrics.requests)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: ERROR_RESPONSES[503]})
    async def health():
        if batcher.deadline is not None:
            raise Unavailable("The server is shutting down.")
        if not batcher.thread.is_alive():
            raise Unavailable("The server computes no more; its log tells why: restart it.")
        return JSONResponse({"status": "ok"})

    errors = {"4XX": ERROR_RESPONSES["4XX"]}

    @app.get("/metrics", response_class=PlainTextResponse, responses=errors)
    async def report_metrics():
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def bind(args) -> socket.socket:
    """Return a socket at `--host` and `--port`; before the model is loaded, which takes time.

    Raises:
        SystemExit: The port is taken, or the address is none of this machine's.
    """
    try:
        listener = listen(args.host, args.port)
    except socket.gaierror as error:
        raise SystemExit(
            f"--host {args.host}: {error.strerror or error}: give a name or an address of this "
            "machine, such as 127.0.0.1."
        ) from error
    except OSError as error:
        raise SystemExit(
            f"--host {args.host} --port {args.port}: {error.strerror or error}: choose another, "
            "such as --port 8001, or stop what listens there."
        ) from error
    if not is_loopback(listener.getsockname()[0]) and not args.api_key:
        print(
            f"{args.host}: other machines can reach the server, and it asks for no key: "
            "--api-key sets one.",
            file=sys.stderr,
        )
    return listener


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class Server(uvicorn.Server):
    """uvicorn, but stopping it ends the running answers properly and refuses new requests."""

    def __init__(self, app: FastAPI, grace_s: float):
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=FLUSH_S))
        self.batcher, self.grace_s = app.state.batcher, grace_s

    async def shutdown(self, sockets=None):
        self.batcher.close(self.grace_s)
        while self.batcher.thread.is_alive() and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def run(app: FastAPI, args, listener: socket.socket):
    """Serve until SIGINT or SIGTERM, then exit with code 0."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has stopped
        signal.signal(stop, lambda *_: sys.exit(0))
    host, port, *_ = listener.getsockname()
    host = f"[{host}]" if ":" in host else host
    print(f"http://{host}:{port} (Ctrl-C: 停止 / stop)", file=sys.stderr)
    gc.collect()
    gc.freeze()  # else parsing a large body walks all objects of the libraries again and again
    sys.setswitchinterval(2e-4)  # the computing thread waits less for the one that sends
    Server(app, args.grace).run(sockets=[listener])
