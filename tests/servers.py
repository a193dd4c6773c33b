"""Starts a server of this project in a thread of the tests, or as a process; uses a batcher."""

import argparse
import asyncio
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
