"""`serving/server.py`: flags, keys, limits, errors, metrics, disconnecting clients, the end."""

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2 as httpx
import pytest
from conftest import ROOT
from servers import parse, serve, start, wait_until

import api
import openai_api
from chatglm2.serving.server import bind

CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "你好"}], "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def client(tiny_model, tiny_tokenizer):
    flags = ("--max-batch", "2", "--max-queue", "1")
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, *flags) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(tiny_model, tiny_tokenizer):
    """A server with a key, for two origins, that reads 1000 bytes."""
    flags = ["--api-key", "密钥 key", "--max-body", "0.001"]
    flags += ["--cors", "https://chat.example", "--cors", "http://localhost:3000"]
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, *flags) as client:
        yield client


def check_error(response, status: int, param=None, kind="invalid_request_error") -> str:
    """Check that a response is an error object; return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == (kind, param)
    return error["message"]


def test_importing_the_scripts_loads_nothing():
    check = "import threading, api, openai_api; print(threading.active_count())"
    result = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "1\n" and result.stderr == ""


# The command line.


def test_the_defaults_are_of_this_machine_only(monkeypatch):
    monkeypatch.delenv("CHATGLM_API_KEY", raising=False)
    args = serving_defaults = parse()
    assert (args.host, args.api_key, args.cors) == ("127.0.0.1", None, [])
    monkeypatch.setenv("CHATGLM_API_KEY", "secret")
    assert parse().api_key == "secret" and parse("--api-key", "other").api_key == "other"
    assert serving_defaults.max_batch == 8


@pytest.mark.parametrize(
    "flags", [("--max-batch", "0"), ("--port", "70000"), ("--grace", "-1"), ("--context", "x")]
)
def test_wrong_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert f"argument {flags[0]}: '{flags[1]}' is not" in capsys.readouterr().err


@pytest.mark.parametrize("script", [api, openai_api])
def test_a_taken_port_is_told_in_one_line_before_the_model_is_loaded(script):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(SystemExit, match=f"--port {port}: .*such as --port 8001") as caught:
            script.main(["--port", port, "--model", "nowhere"])
    assert "\n" not in str(caught.value)


def test_of_two_servers_started_together_the_second_ends_before_loading():
    with bind(parse()) as first:  # it does not answer yet: it loads
        port = str(first.getsockname()[1])
        with pytest.raises(SystemExit, match=f"--port {port}: .*such as --port 8001"):
            bind(parse("--port", port))


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 70])
def test_a_host_without_an_address_is_told(host):
    with pytest.raises(SystemExit, match=rf"--host {host}: .*such as 127\.0\.0\.1") as caught:
        bind(parse("--host", host))
    assert "\n" not in str(caught.value)


def test_an_empty_key_is_refused(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        parse("--api-key", "")
    assert "argument --api-key: '' is no key" in capsys.readouterr().err
    monkeypatch.setenv("CHATGLM_API_KEY", "")
    assert parse().api_key is None


def test_an_origin_is_taken_without_its_slash():
    assert parse("--cors", "http://localhost:3000/").cors == ["http://localhost:3000"]


@pytest.mark.parametrize(("context", "is_told"), [("2048", False), ("4096", True)])
def test_a_context_above_the_models_is_told(tiny_model, tiny_tokenizer, capsys, context, is_told):
    args = parse("--context", context)
    openai_api.create_app(tiny_model, tiny_tokenizer, args).state.batcher.close()
    line = "--context 4096: the model's 2048 tokens are taken.\n"
    assert capsys.readouterr().err == line * is_told


def test_a_model_in_the_folder_itself_has_its_name(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(ROOT / "resources" / "chatglm2-tiny")
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, "--model", ".") as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "chatglm2-tiny"


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(SystemExit, match=r"--host 192\.0\.2\.1 .*choose another"):
        bind(parse("--host", "192.0.2.1"))


@pytest.mark.parametrize(
    ("flags", "is_warned"),
    [
        ([], False),
        (["--host", "localhost"], False),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
        (["--host", "0.0.0.0"], True),
    ],
)
def test_a_warning_where_other_machines_need_no_key(flags, is_warned, capsys, monkeypatch):
    monkeypatch.delenv("CHATGLM_API_KEY", raising=False)
    bind(parse(*flags)).close()
    assert ("--api-key" in capsys.readouterr().err) == is_warned


# Keys, origins, limits, errors.


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer x", "Bearer 密钥", "Basic 密钥 key"])
def test_a_wrong_key_is_refused_before_the_body_is_read(guarded, key):
    headers = {"Authorization": key.encode()}
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")):
        response = guarded.request(method, path, headers=headers, content=b"{" * 5000)
        check_error(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert guarded.get("/health", headers=headers).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_right_key_is_accepted(guarded, scheme):
    headers = {"Authorization": f"{scheme} 密钥 key".encode()}
    assert guarded.get("/v1/models", headers=headers).status_code == 200


def test_a_body_declared_too_large_is_refused_before_it_is_sent(guarded):
    with socket.create_connection((guarded.base_url.host, guarded.base_url.port), 10) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer 密钥 key\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 1001\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_the_request_of_chatgpt_next_web_and_its_preflight(guarded):
    """As its source makes them, in a browser."""
    origin = {"Origin": "https://chat.example", "Referer": "https://chat.example/"}
    preflight = origin | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-requested-with",
    }
    response = guarded.options(CHAT, headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    allowed = response.headers["access-control-allow-headers"]
    assert "authorization" in allowed and "x-requested-with" in allowed
    assert "POST" in response.headers["access-control-allow-methods"]
    headers = origin | {
        "Accept": "application/json, text/event-stream",
        "Content-Type": "application/json",
        "X-Requested-With": "XMLHttpRequest",
        "Authorization": "Bearer 密钥 key".encode(),
    }
    body = {
        "messages": [
            {"role": "system", "content": "\nYou are ChatGPT, a large language model.\n"},
            {"role": "user", "content": "你好"},
        ],
        "stream": True,
        "model": "gpt-3.5-turbo",
        "temperature": 0.5,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "top_p": 1,
    }
    response = guarded.post(CHAT, headers=headers, json=body)
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n") and '"model":"gpt-3.5-turbo"' in response.text


def test_other_origins_and_servers_without_the_flag_allow_none(guarded, client):
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert guarded.options(CHAT, headers=preflight).status_code == 400
    for server in (guarded, client):
        response = server.get("/health", headers=preflight)
        assert "access-control-allow-origin" not in response.headers
    check_error(client.options(CHAT, headers=preflight), 405)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_the_size_of_a_body_is_limited(guarded, is_chunked):
    headers = {"Authorization": "Bearer 密钥 key".encode(), "Content-Type": "application/json"}
    content = b'{"messages": [], "pad": "' + b"x" * 2000
    parts = (content[i : i + 100] for i in range(0, len(content), 100))
    response = guarded.post(CHAT, headers=headers, content=parts if is_chunked else content)
    assert "1000 bytes" in check_error(response, 413)
    small = b'{"messages": [], "pad": "' + b"x" * 900 + b'"}'
    check_error(guarded.post(CHAT, headers=headers, content=small), 400, "messages")


def test_unknown_routes_and_methods_are_error_objects(client):
    check_error(client.get("/v1/nothing"), 404)
    response = client.get(CHAT)
    check_error(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("content", [b"{", b"[]", b"7", b"\xff", b"", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(client, content):
    headers = {"Content-Type": "application/json"}
    check_error(client.post(CHAT, headers=headers, content=content), 400)


@pytest.mark.parametrize(
    ("content", "cause"), [(b'"\xff"', "UTF-8"), (b"[" * 100_000, "nested"), (b"{", "no JSON")]
)
def test_why_a_body_cannot_be_parsed(client, tiny_model, tiny_tokenizer, content, cause):
    headers = {"Content-Type": "application/json"}
    assert cause in check_error(client.post(CHAT, headers=headers, content=content), 400)
    with serve(api.create_app, tiny_model, tiny_tokenizer) as other:
        assert cause in check_error(other.post("/", headers=headers, content=content), 422)


def test_a_form_is_not_read_as_json(client):
    check_error(client.post(CHAT, data={"messages": "x"}), 400)


def test_the_message_shows_what_was_given_shortened(client):
    body = {"messages": [{"role": "user", "content": "a"}], "temperature": "热" * 500}
    message = check_error(client.post(CHAT, json=body), 400, "temperature")
    assert "热热" in message and len(message) < 200


def test_a_failure_is_an_error_object_without_its_details(tiny_model, tiny_tokenizer):
    def create_app(*args):
        app = openai_api.create_app(*args)

        @app.get("/fail")
        async def fail():
            raise KeyError("private")

        return app

    with serve(create_app, tiny_model, tiny_tokenizer) as client:
        assert "private" not in check_error(client.get("/fail"), 500, kind="server_error")
        text = client.get("/metrics").text
    assert 'chatglm_requests_total{route="/fail",status="500"} 1.0' in text


@pytest.mark.parametrize("create_app", [api.create_app, openai_api.create_app])
def test_the_servers_keep_to_their_schema(create_app, tiny_model, tiny_tokenizer, tmp_path):
    if not (program := shutil.which("schemathesis")):
        pytest.skip("needs the program schemathesis")
    with serve(create_app, tiny_model, tiny_tokenizer) as client:
        command = [program, "run", f"{client.base_url}/openapi.json", "--max-examples", "10"]
        # No schema tells what fits the context or the vocabulary.
        command += ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "120"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


# Many clients.


def is_idle(client) -> bool:
    return not client.batcher.running


@contextmanager
def streaming(client, **fields):
    """Begin to read an answer of hundreds of tokens; yields the lines."""
    body = LONG | {"stream": True, "max_tokens": 1000} | fields
    with client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


def test_a_full_queue_answers_503_at_once(client):
    with streaming(client), streaming(client), streaming(client):
        begin = time.monotonic()
        response = client.post(CHAT, json=LONG)
        assert time.monotonic() - begin < 2
        check_error(response, 503, kind="server_error")
        assert response.headers["retry-after"] == "1"
        gauges = ("chatglm_requests_running 2.0", "chatglm_requests_waiting 1.0")
        wait_until(lambda: all(gauge in client.get("/metrics").text for gauge in gauges))
    wait_until(lambda: is_idle(client))


def test_several_answers_are_queued_all_or_none(client):
    response = client.post(CHAT, json=LONG | {"n": 4})
    assert check_error(response, 400, "n") == "4 answers in one request; at most 3."
    for n in (1, None):
        response = client.post("/v1/completions", json={"prompt": ["a"] * 4, "n": n})
        check_error(response, 400, "prompt")
    with streaming(client):
        check_error(client.post(CHAT, json=LONG | {"n": 3}), 503, kind="server_error")
        wait_until(lambda: len(client.batcher.running) == 1, 3)
    wait_until(lambda: is_idle(client))


@pytest.mark.parametrize("stream", [b"true", b"false"])
def test_a_client_that_goes_away_frees_its_place(client, stream):
    generated = client.app.state.metrics.generated_tokens
    before = generated.collect()[0].samples[0].value
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        body = b'{"messages":[{"role":"user","content":"a"}],"ignore_eos":true,"stream":%s}'
        body %= stream
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: client.batcher.running)
    wait_until(lambda: is_idle(client), 1)  # the whole answer takes seconds
    assert generated.collect()[0].samples[0].value - before < 500
    assert client.post(CHAT, json=LONG | {"max_tokens": 2}).status_code == 200


def test_health_answers_while_tokens_are_generated(client):
    times = []
    with streaming(client, n=2, max_tokens=400) as lines:
        reader = threading.Thread(target=lambda: [*lines])
        reader.start()
        while len(times) < 10 and reader.is_alive():
            begin = time.monotonic()
            assert client.get("/health").json() == {"status": "ok"}
            times.append(time.monotonic() - begin)
        reader.join()
    assert len(times) == 10 and sorted(times)[5] < 0.1


def test_health_tells_when_nothing_is_computed_any_more(client, monkeypatch):
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
        f'chatglm_requests_total{{route="{CHAT}",status="200"}} 2.0',
        'chatglm_requests_total{route="other",status="404"} 1.0',
        f"chatglm_prompt_tokens_total {2 * prompt_tokens}.0",
        f"chatglm_cached_prompt_tokens_total {prompt_tokens - 1}.0",
        "chatglm_generated_tokens_total 10.0",
        "chatglm_time_to_first_token_seconds_count 2.0",
        "chatglm_time_between_tokens_seconds_count 8.0",
        "chatglm_answer_seconds_count 2.0",
        "chatglm_requests_running 0.0",
    ):
        assert line in text.splitlines()


# The end.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_ends_running_answers_and_refuses_new_ones(number):
    with start("openai_api.py", "--grace", "0.7", "--max-batch", "1") as (process, address):
        body = LONG | {"stream": True}
        with httpx.stream("POST", address + CHAT, json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            waiting = httpx.stream("POST", address + CHAT, json=body, timeout=30)
            queued = waiting.__enter__().iter_lines()
            next(queued)
            process.send_signal(number)
            assert "shutting down" in "".join(queued)  # it had no place yet
            assert httpx.post(address + CHAT, json=LONG).status_code == 503
            assert httpx.get(address + "/health").status_code == 503
            *_, last, done = [line for line in lines if line]
            waiting.__exit__(None, None, None)
        assert '"finish_reason":"length"' in last and done == "data: [DONE]"
        assert process.wait(10) == 0


def test_both_servers_end_at_once_when_idle(tiny_model, tiny_tokenizer):
    for create_app in (api.create_app, openai_api.create_app):
        with serve(create_app, tiny_model, tiny_tokenizer, "--grace", "60"):
            begin = time.monotonic()
        assert time.monotonic() - begin < 5
