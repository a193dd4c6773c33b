"""`serving/server.py` and `errors.py`: flags, errors, metrics, clients that leave, the end."""

import asyncio
import os
import signal
import socket
import threading
from contextlib import contextmanager, suppress

import httpx2 as httpx
import pytest
from conftest import ROOT
from servers import check_error, format_request, parse, sending, serve, wait_until

import api
import openai_api
from chatglm2.serving.batching import Request
from chatglm2.serving.server import bind

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
LONG = {"messages": [{"role": "user", "content": "你好"}], "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def client(tiny_model, tiny_tokenizer):
    flags = ("--max-batch", "2", "--max-queue", "1")
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, *flags) as client:
        yield client


@pytest.fixture(scope="module")
def api_client(tiny_model, tiny_tokenizer):
    with serve(api.create_app, tiny_model, tiny_tokenizer) as client:
        yield client


# The command line.


def test_flags(monkeypatch, tmp_path):
    monkeypatch.setenv("CHATGLM_API_KEY", "")
    args = parse()
    assert (args.host, args.api_key, args.cors, args.max_batch) == ("127.0.0.1", None, [], 8)
    monkeypatch.setenv("CHATGLM_API_KEY", "secret")
    assert parse().api_key == ["secret"] and parse("--api-key", "other").api_key == ["other"]
    monkeypatch.setenv("CHATGLM_API_KEY", "from a file\n")
    assert parse().api_key == ["from a file"]
    keys = tmp_path / "keys"
    keys.write_bytes("\ufeffone\r\n\n 密钥 key\n".encode())
    monkeypatch.setenv("CHATGLM_API_KEY", f"@{keys}")
    assert parse().api_key == parse("--api-key", f"@{keys}").api_key == ["one", "密钥 key"]
    several = parse("--api-key", "two", "--api-key", f"@{keys}", "--api-key", "three").api_key
    assert several == ["two", "one", "密钥 key", "three"]
    assert parse("--cors", "http://LocalHost:3000/").cors == ["http://localhost:3000"]
    names = ["GPU.example.", "[::1]", "例子.example"]
    args = parse(*(part for name in names for part in ("--allowed-host", name)))
    assert args.allowed_host == ["gpu.example", "::1", "xn--fsqu00a.example"]


def test_wrong_flags_are_refused(capsys):
    for flag, *values in (
        ("--max-batch", "0"),
        ("--port", "70000"),
        ("--grace", "-1"),
        ("--context", "x"),
        ("--api-key", "", " ", "a\nb", "@nowhere", f"@{os.devnull}", f"@{ROOT}/resources"),
        ("--allowed-host", "", "*", "a:80", "http://a", "a b", "a..b"),
        ("--cors", "", "localhost:3000", "https://", "https://a/page"),
    ):
        for value in values:
            with pytest.raises(SystemExit):
                parse(flag, value)
            assert f"argument {flag}: " in capsys.readouterr().err


def test_a_taken_port_ends_the_script_before_the_model_is_loaded():
    with bind(parse()) as other:  # it does not answer yet: its model is loading
        port = str(other.getsockname()[1])
        for script in (api, openai_api):
            with pytest.raises(SystemExit, match=f"--port {port}: .*such as --port 8001"):
                script.main(["--port", port, "--model", "nowhere"])


def test_hosts(capsys, monkeypatch):
    for host in ("nowhere.invalid", "a" * 70, "192.0.2.1"):
        with pytest.raises(SystemExit, match=rf"--host {host} .*such as 127\.0\.0\.1"):
            bind(parse("--host", host))
    monkeypatch.delenv("CHATGLM_API_KEY", raising=False)
    for flags, is_warned in (
        ([], False),
        (["--host", "localhost"], False),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
        (["--host", "0.0.0.0"], True),  # other machines need no key
    ):
        bind(parse(*flags)).close()
        assert ("CHATGLM_API_KEY" in capsys.readouterr().err) == is_warned


def test_an_ipv6_address():
    try:
        with bind(parse("--host", "::1")) as listener:
            assert listener.family == socket.AF_INET6
    except SystemExit:
        pytest.skip("needs IPv6")


def test_a_model_in_the_folder_itself_and_a_context_above_its_own(
    tiny_model, tiny_tokenizer, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT / "resources" / "chatglm2-tiny")
    flags = ("--model", ".", "--context", "4096")
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, *flags) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "chatglm2-tiny"
    assert "--context 4096: " in capsys.readouterr().err


# Errors.


def test_other_errors_of_clients(client):
    check_error(client.get("/v1/nothing"), 404)
    response = client.get(CHAT)
    check_error(response, 405)
    assert response.headers["allow"] == "POST"
    check_error(client.post(CHAT, data={"messages": "a form, not JSON"}), 400)
    response = client.post(CHAT, json=LONG | {"temperature": "热" * 500})
    message = check_error(response, 400, "temperature")
    assert "热热" in message and len(message) < 200


def test_a_body_that_is_not_an_object_is_refused_with_the_cause(client, api_client):
    causes = {b"{": "not JSON", b"": "JSON", b"[]": "JSON object", b'"\xff"': "UTF-8"}
    for content, cause in (causes | {b"[" * 100_000: "nested"}).items():
        for server, path, status in ((client, CHAT, 400), (api_client, "/", 422)):
            response = server.post(path, headers=JSON, content=content)
            assert cause in check_error(response, status)


def test_a_failure_is_an_error_object_without_its_details(tiny_model, tiny_tokenizer):
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer) as client:

        @client.app.get("/fail")
        async def fail():
            raise KeyError("private")

        assert "private" not in check_error(client.get("/fail"), 500, kind="server_error")
        text = client.get("/metrics").text
    assert 'chatglm_requests_total{route="/fail",status="500"} 1.0' in text


# Many clients.


@contextmanager
def streaming(client, **fields):
    """Begin to read an answer of hundreds of tokens; yields the lines."""
    body = LONG | {"stream": True, "max_tokens": 1000} | fields
    with client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


def wait_until_idle(client):
    wait_until(lambda: not client.batcher.running)


def test_a_full_queue_answers_503(client):
    with streaming(client), streaming(client):
        with streaming(client):
            response = client.post(CHAT, json=LONG)
            check_error(response, 503, kind="server_error")
            assert response.headers["retry-after"] == "1"
            gauges = ("chatglm_requests_running 2.0", "chatglm_requests_waiting 1.0")
            wait_until(lambda: all(gauge in client.get("/metrics").text for gauge in gauges))
        wait_until(lambda: not client.batcher.waiting)  # a client that leaves the queue
        assert len(client.batcher.running) == 2
        with streaming(client):
            pass
    wait_until_idle(client)


def test_several_answers_are_queued_all_or_none(client):
    response = client.post(CHAT, json=LONG | {"n": 4})
    assert "4 answers in one request; at most 3" in check_error(response, 400, "n")
    for n in (1, None):
        response = client.post("/v1/completions", json={"prompt": ["a"] * 4, "n": n})
        check_error(response, 400, "prompt")
    with streaming(client):
        check_error(client.post(CHAT, json=LONG | {"n": 3}), 503, kind="server_error")
        wait_until(lambda: len(client.batcher.running) == 1, 3)
    wait_until_idle(client)


def test_embeddings_that_have_begun_finish_beside_a_full_queue(client, monkeypatch):
    """The queue is full whenever the server could refuse the next part of the inputs."""
    submit, others = client.batcher.submit, []

    def submit_behind_others(request, queue, index, is_begun):
        if is_begun and not others:
            for _ in range(3):
                others.append(submit(Request([5], ignore_eos=True), asyncio.Queue()))
        return submit(request, queue, index, is_begun)

    monkeypatch.setattr(client.batcher, "submit", submit_behind_others)
    response = client.post("/v1/embeddings", json={"input": ["a"] * 5})
    assert len(response.json()["data"]) == 5 and others
    for generation in others:
        generation.cancel()
    wait_until_idle(client)


def test_a_client_that_leaves_frees_its_place(client):
    for stream in (True, False):
        with sending(client, format_request(CHAT, LONG | {"stream": stream})):
            wait_until(lambda: client.batcher.running)
            (generation,) = client.batcher.running
        wait_until_idle(client)
        assert len(generation.ids) < 1000  # the whole answer has 2048
    assert client.post(CHAT, json=LONG | {"max_tokens": 2}).status_code == 200


def test_health_reports_that_the_computing_thread_has_ended(client, monkeypatch):
    assert client.head("/health").status_code == 200
    monkeypatch.setattr(client.batcher, "thread", threading.Thread())  # not started: not alive
    message = check_error(client.get("/health"), 503, kind="server_error")
    assert "restart" in message and client.head("/health").status_code == 503


def test_metrics_count_requests_and_tokens(tiny_model, tiny_tokenizer):
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer) as client:
        usages = [client.post(CHAT, json=LONG | {"max_tokens": 5}).json()["usage"] for _ in "12"]
        client.get("/nothing")
        text = client.get("/metrics").text
    prompt_tokens = usages[0]["prompt_tokens"]
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == prompt_tokens - 1
    for line in (
        f'requests_total{{route="{CHAT}",status="200"}} 2.0',
        'requests_total{route="other",status="404"} 1.0',
        f"prompt_tokens_total {2 * prompt_tokens}.0",
        f"cached_prompt_tokens_total {prompt_tokens - 1}.0",
        "generated_tokens_total 10.0",
        "time_to_first_token_seconds_count 2.0",
        "time_between_tokens_seconds_count 8.0",
        "answer_seconds_count 2.0",
        "requests_running 0.0",
    ):
        assert f"chatglm_{line}" in text.splitlines()


# The end.


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_ends_running_answers_and_refuses_new_ones(number, tiny_checkpoint, capfd):
    load_test = pytest.importorskip("load_test", reason="needs aiohttp and psutil")
    flags = ["--model", str(tiny_checkpoint), "--threads", "1", "--grace", "2", "--max-batch", "1"]
    body = LONG | {"stream": True}

    def is_ready() -> bool:
        with suppress(httpx.ConnectError):
            return httpx.get(f"{url}/models").status_code == 200

    with load_test.serve(flags) as (url, process):
        wait_until(is_ready)
        chat = f"{url}/chat/completions"
        with httpx.stream("POST", chat, json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            with httpx.stream("POST", chat, json=body, timeout=30) as waiting:
                queued = waiting.iter_lines()
                next(queued)
                process.send_signal(number)
                assert "shutting down" in "".join(queued)  # it had no place yet
                assert httpx.post(chat, json=LONG).status_code == 503
                assert httpx.get(url.removesuffix("v1") + "health").status_code == 503
                *_, last, done = [line for line in lines if line]
        assert '"finish_reason":"length"' in last and done == "data: [DONE]"
        assert process.wait(10) == 0
        assert "nanobind" not in capfd.readouterr().err
