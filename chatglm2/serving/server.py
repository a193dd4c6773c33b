"""The parts that api.py and openai_api.py share: the app, answers, start and stop."""

import asyncio
import dataclasses
import gc
import logging
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from chatglm2.hardware import listen

from .batching import (
    Batcher,
    Chunk,
    InvalidRequest,
    PromptTooLong,
    Request,
    Unavailable,
    read_chunks,
)
from .connections import BACKLOG, Connection, ProbeClients, is_logged
from .errors import ERROR_RESPONSES, RequestError, add_error_handlers, describe_error
from .guards import Cors, Guard, SiteGuard, is_loopback, list_hosts
from .metrics import CountRequests, Metrics

FLUSH_S = 5  # for clients to read their last chunk
EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


# Answers.


def build_request(body: BaseModel, input_ids: list[int], **settings) -> Request:
    """Return a request for the batcher.

    A field of the body that `Request` has too is passed on by its name, unless `settings` has it.
    """
    names = {field.name for field in dataclasses.fields(Request)} & type(body).model_fields.keys()
    return Request(input_ids, **body.model_dump(include=names, exclude_none=True) | settings)


class Answers:
    """The answers to one HTTP request; their chunks come through one queue.

    Args:
        http_request: The HTTP request, to an app of `create_app`.
        requests: Either all are submitted or none. They share kept caches with the requests that
            have sent the same key.
        param: The field of the prompts, named in errors.
        num_choices: Answers to each prompt.
        is_begun: A part of the work is done already, so a full queue refuses nothing.

    Raises:
        RequestError: The requests never fit into the queue together, or a prompt is too long.
        Unavailable: The queue is full, or the server is stopping.
    """

    def __init__(
        self,
        http_request: HTTPRequest,
        requests: list[Request],
        param: str,
        num_choices=1,
        is_begun=False,
    ):
        self.http_request, self.queue, self.generations = http_request, asyncio.Queue(), []
        batcher, metrics = http_request.app.state.batcher, http_request.app.state.metrics
        if len(requests) > (limit := batcher.max_batch + batcher.max_queue):
            message = f"{len(requests)} answers in one request; at most {limit} are allowed."
            raise RequestError(400, message, param if num_choices == 1 else "n")
        try:
            for index, request in enumerate(requests):
                request.client = http_request.state.client
                self.generations.append(batcher.submit(request, self.queue, index, is_begun))
        except PromptTooLong as error:
            self.cancel()
            param = param if error.limit == "context" else error.limit
            raise RequestError(400, str(error), param, "context_length_exceeded") from error
        except Unavailable:
            self.cancel()
            raise
        self.records = [metrics.follow(generation) for generation in self.generations]

    def cancel(self):
        """End the generations that still run."""
        for generation in self.generations:
            generation.cancel()

    async def __aiter__(self):
        """Yield (index of the answer, chunk) as they come."""
        async for index, chunk in read_chunks(self.queue, len(self.generations)):
            self.records[index](chunk)
            yield index, chunk

    async def collect(self) -> list[Chunk]:
        """Wait for whole answers.

        Raises:
            RequestError: The client closed the connection; the generations are cancelled.
        """
        self.http_request.state.is_collecting = True  # for `ProbeClients`

        async def gather() -> list[Chunk]:
            answers = [Chunk() for _ in self.generations]
            async for index, chunk in self:
                answers[index].add(chunk)
            return answers

        async def wait_for_disconnect():
            while (await self.http_request.receive())["type"] != "http.disconnect":
                pass

        tasks = work, _ = [
            asyncio.create_task(gather()),
            asyncio.create_task(wait_for_disconnect()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise RequestError(499, "The client closed the connection.")
            return work.result()
        finally:
            for task in tasks:
                task.cancel()
            self.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; the answers are cancelled when the connection closes."""

    media_type = "text/event-stream"

    def __init__(self, events, answers: Answers):
        super().__init__(events, headers=EVENT_HEADERS)
        self.answers = answers

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:  # also if the events were never begun
            self.answers.cancel()


def event(data: str) -> str:
    return f"data: {data}\n\n"


def describe_failure(error: Exception) -> str:
    """Return the error object of a failed stream; the batcher has logged the cause."""
    if isinstance(error, Unavailable):
        return describe_error(503, str(error), code="unavailable")
    if isinstance(error, InvalidRequest):
        return describe_error(400, str(error), error.param)
    return describe_error(500, "The answer failed; the server's log has the cause.")


def error_event(error: Exception) -> str:
    """Return the last event of a failed stream."""
    return event(describe_failure(error))


# The app, and how it runs.


def create_app(model, tokenizer, args, title: str, invalid_status=400, **options) -> FastAPI:
    """Return an app with /health and /metrics; `app.state` holds its batcher and metrics."""
    batcher = Batcher(
        model, tokenizer, args.max_batch, args.max_queue, args.context, args.kept_tokens
    )
    if args.context > batcher.context:
        print(
            f"--context {args.context}: the model has {batcher.context}, which is used.",
            file=sys.stderr,
        )
    metrics = Metrics(batcher)
    # FastAPI's documentation pages load scripts from other hosts: `add_pages` has another one.
    app = FastAPI(title=title, docs_url=None, redoc_url=None, **options)
    app.state.batcher, app.state.metrics = batcher, metrics
    add_error_handlers(app, invalid_status)
    app.add_middleware(Guard, api_keys=args.api_key, max_body=int(args.max_body * 1e6))
    if args.cors:
        app.add_middleware(
            Cors,
            allow_origins=args.cors,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
        )
    hosts = list_hosts(args.host, args.allowed_host)
    app.add_middleware(SiteGuard, hosts=hosts, origins=args.cors)
    app.add_middleware(ProbeClients)
    app.add_middleware(CountRequests, counter=metrics.requests)

    @app.get("/health", responses={503: ERROR_RESPONSES[503]})
    async def health():
        """Return status 200 while the server works; needs no key."""
        if batcher.deadline is not None:
            raise Unavailable("The server is shutting down.")
        if not batcher.thread.is_alive():
            raise Unavailable(
                "The server has stopped computing; its log has the cause: restart it."
            )
        return JSONResponse({"status": "ok"})

    errors = {"4XX": ERROR_RESPONSES["4XX"]}

    @app.get("/metrics", response_class=PlainTextResponse, responses=errors)
    async def report_metrics():
        """Return counts and times for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def bind(args) -> socket.socket:
    """Return a socket at `--host` and `--port`; called before the model loads, which takes time.

    Raises:
        SystemExit: The port is taken, or the address does not belong to this machine.
    """
    try:
        listener = listen(args.host, args.port)
    except OSError as error:
        where = f"--host {args.host} --port {args.port}"
        raise SystemExit(
            f"{where}: {error.strerror or error}: give an address of this machine, such as "
            "127.0.0.1, and a free port, such as --port 8001."
        ) from error
    if not args.api_key and not is_loopback(args.host):
        print(
            f"--host {args.host}: other machines can use the server without a key; "
            "the environment variable CHATGLM_API_KEY sets one.",
            file=sys.stderr,
        )
    return listener


class Server(uvicorn.Server):
    """uvicorn, but at shutdown running answers end properly and new requests are refused."""

    def __init__(self, app: FastAPI, grace_s: float):
        options = {"backlog": BACKLOG, "timeout_graceful_shutdown": FLUSH_S}
        config = uvicorn.Config(app, http=Connection, ws="none", **options)
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(is_logged)
        self.batcher, self.grace_s = app.state.batcher, grace_s

    async def shutdown(self, sockets=None):
        self.batcher.close(self.grace_s)
        while self.batcher.thread.is_alive() and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def run(app: FastAPI, args, listener: socket.socket):
    """Serve until SIGINT or SIGTERM, then exit with code 0."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again at its end
        signal.signal(stop, lambda *_: sys.exit(0))
    host, port, *_ = listener.getsockname()
    host = f"[{host}]" if ":" in host else host
    print(f"http://{host}:{port} (Ctrl-C: 停止 / stop)", file=sys.stderr)
    gc.collect()
    gc.freeze()  # else parsing a large body visits all objects of the libraries again and again
    sys.setswitchinterval(2e-4)  # lets the computing thread wait less for the sending one
    try:
        Server(app, args.grace).run(sockets=[listener])
    finally:
        gc.unfreeze()  # else nanobind reports the objects of triton as leaked when Python ends
