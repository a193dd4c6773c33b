"""Starts a server of this project in a thread of the tests, or as a process."""

import argparse
import os
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import httpx2 as httpx
from conftest import ROOT

import utils
from chatglm2.serving.server import Server, bind

TIMEOUT_S = 60


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


@contextmanager
def start(script: str, *flags: str):
    """Run a script; yields its process and its address."""
    command = [sys.executable, str(ROOT / script), "--port", "0", "--threads", "1"]
    command += ["--model", str(ROOT / "resources" / "chatglm2-tiny"), *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = iter(process.stderr.readline, "")
        address = next(line.split()[0] for line in lines if line.startswith("http://"))
        next(line for line in lines if "startup complete" in line)
        yield process, address
    finally:
        process.kill()
        process.communicate()
