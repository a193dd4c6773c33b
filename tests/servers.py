"""Starts a server of this project in a thread of the tests, or as a process; uses a batcher."""

import argparse
import asyncio
import json
import socket
import threading
import time
from contextlib import closing, contextmanager

import httpx2 as httpx

import utils
from chatglm2.serving.batching import Batcher, Chunk, Generation, Request, read_chunks
from chatglm2.serving.server import Server, bind

TIMEOUT_S = 60


def submit(batcher: Batcher, request: Request) -> Generation:
    return batcher.submit(request, asyncio.Queue())


async def collect(generation: Generation) -> Chunk:
    """Wait for a whole answer."""
    whole = Chunk()
    async for _, chunk in read_chunks(generation.queue):
        whole.add(chunk)
    return whole


async def gather_answers(batcher: Batcher, *requests: Request, return_errors=False) -> list[Chunk]:
    """Return the whole answers to requests that are submitted together."""
    answers = [collect(submit(batcher, request)) for request in requests]
    return await asyncio.gather(*answers, return_exceptions=return_errors)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    utils.add_model_arguments(parser)
    utils.add_server_arguments(parser)
    return parser.parse_args(["--port", "0", "--model", "resources/chatglm2-tiny", *flags])


def wait_until(condition, timeout_s: float = TIMEOUT_S):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.005)


def check_error(response, status: int, param=None, kind="invalid_request_error") -> str:
    """Check that a response is an error object; return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == (kind, param)
    return error["message"]


def format_request(path: str, body: dict | None = None, *headers: str, version="1.1") -> bytes:
    """Return an HTTP request byte by byte; it has the header Host if `headers` do not."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/{version}", *headers]
    if not any(line.lower().startswith("host:") for line in headers):
        lines.append("Host: localhost")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


@contextmanager
def sending(client, data: bytes):
    """Send bytes to a server; yields the connection."""
    address = client.base_url.host, client.base_url.port
    with socket.create_connection(address, TIMEOUT_S) as connection:
        connection.sendall(data)
        yield connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def record_requests(client, monkeypatch) -> list[Request]:
    """Return a list that gets the batcher's requests from now on."""
    requests, submit = [], client.batcher.submit
    monkeypatch.setattr(
        client.batcher,
        "submit",
        lambda request, *args: requests.append(request) or submit(request, *args),
    )
    return requests


@contextmanager
def serve(create_app, model, tokenizer, *flags: str):
    """Run a server; yields an HTTP client, with the app as attribute `app`."""
    args = parse(*flags)
    app = create_app(model, tokenizer, args)
    listener = bind(args)
    host, port = listener.getsockname()
    server = Server(app, args.grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    with closing(httpx.Client(base_url=f"http://{host}:{port}", timeout=TIMEOUT_S)) as client:
        client.app, client.server, client.batcher = app, server, app.state.batcher
        try:
            yield client
        finally:
            server.should_exit = True
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
