"""`serving/connections.py`: clients that write HTTP otherwise, stop sending, leave, or are idle."""

import json
import select
import shutil
import socket
import subprocess
from contextlib import ExitStack, suppress

import pytest
from servers import format_request, read_all, sending, serve, wait_until

import api
import openai_api
from chatglm2.serving import connections, guards

CHAT = "/v1/chat/completions"
SHORT = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 2, "temperature": 0}
LONG = SHORT | {"max_tokens": None, "ignore_eos": True}
H2C = (
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
)
CLOSE = "Connection: close"
JAVA = """
import java.net.URI;
import java.net.http.*;
class Ask {
    public static void main(String[] args) throws Exception {
        for (HttpClient.Version version : HttpClient.Version.values()) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(args[0])).version(version)
                .header("Content-Type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString(args[1])).build();
            System.out.println(HttpClient.newHttpClient()
                .send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
        }
    }
}
"""


@pytest.fixture(scope="module")
def client(tiny_model, tiny_tokenizer):
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, "--max-batch", "1") as client:
        yield client


@pytest.fixture(scope="module")
def api_client(tiny_model, tiny_tokenizer):
    with serve(api.create_app, tiny_model, tiny_tokenizer) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("headers", [(), H2C])
def test_a_client_that_shuts_its_sending_side_gets_its_answer(
    client, api_client, headers, version, stream
):
    question = {"prompt": "你好", "stream": stream, "max_length": 20}
    for server, path, body, end in (
        (client, CHAT, SHORT | {"stream": stream}, b"[DONE]" if stream else b'"usage"'),
        (api_client, "/", question, b'"status": 200' if stream else b'"status":200'),
    ):
        with sending(server, format_request(path, body, *headers, version=version)) as connection:
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 200 OK") and end in answer
        assert version == "1.1" or b"chunked" not in answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_stopped_sending_gets_signs_of_life(client, monkeypatch, stream):
    """Only an answer to them tells that it is still there; readers of JSON and events skip them."""
    monkeypatch.setattr(connections, "PROBE_S", 0.001)
    request = format_request(CHAT, SHORT | {"stream": stream, "max_tokens": 50})
    with sending(client, request) as connection:
        connection.shutdown(socket.SHUT_WR)
        _, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert (b"3\r\n:\n\n\r\n" if stream else b"1\r\n \r\n") in body
    assert (b"[DONE]" if stream else b'"usage"') in body


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_frees_its_place(client, stream):
    request = format_request(CHAT, LONG | {"stream": stream})
    with sending(client, request):
        wait_until(lambda: client.batcher.running)
        with sending(client, request) as connection:
            wait_until(lambda: client.batcher.waiting)
            connection.setblocking(False)
            with suppress(BlockingIOError):  # else closing is a reset, which is seen at once
                connection.recv(1 << 16)
        wait_until(lambda: not client.batcher.waiting)
        assert client.batcher.running
    wait_until(lambda: not client.batcher.running)


def test_requests_in_a_row_are_answered_in_a_row(client):
    requests = [format_request(CHAT, SHORT | {"max_tokens": n}) for n in (1, 2)]
    requests.append(format_request(CHAT, SHORT | {"max_tokens": 3}, "CONNECTION: CLOSE"))
    with sending(client, b"".join(requests)) as connection:
        answers = read_all(connection).decode().split("HTTP/1.1 ")[1:]
    lengths = [json.loads(answer.split("\r\n\r\n")[1])["usage"] for answer in answers]
    assert [length["completion_tokens"] for length in lengths] == [1, 2, 3]


def test_a_client_may_wait_before_it_sends_the_body(client):
    request = format_request(CHAT, SHORT, "Expect: 100-continue", CLOSE)
    head, _, body = request.partition(b"\r\n\r\n")
    with sending(client, head + b"\r\n\r\n") as connection:
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert read_all(connection).startswith(b"HTTP/1.1 200 OK")


def test_websockets_are_not_spoken(client, caplog):
    lines = "Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Key: {'a' * 22}=="
    for path, status in (("/v1/models", 200), (CHAT, 405), ("/none", 404)):
        request = format_request(path, None, *lines, "Sec-WebSocket-Version: 13")
        with sending(client, request) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 %d " % status)
    assert "pip install" not in caplog.text


def test_what_is_not_http_is_refused(client):
    chunked = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"
    for data in (b"\x16\x03\x01\x02\0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", chunked):
        with sending(client, data) as connection:
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 4") and "error" in json.loads(body)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", b""),
        (b"POST / HTTP/1.1\r\nHost: localh", b"HTTP/1.1 408 "),
        (format_request("/health"), b"HTTP/1.1 200 "),
        (format_request("/", {"prompt": 1})[:-1], b"HTTP/1.1 408 "),
        (format_request("/", {"prompt": "你好"}, "Origin: null")[:-1], b"HTTP/1.1 403 "),
        (format_request("/health") + b"GET", b"HTTP/1.1 200 "),
    ],
)
def test_a_connection_without_requests_is_closed(api_client, monkeypatch, data, answer):
    for module in (connections, guards):
        monkeypatch.setattr(module, "READ_TIMEOUT_S", 0.05)
    with sending(api_client, data) as connection:
        assert read_all(connection).startswith(answer)


def test_too_many_connections_without_requests(client, monkeypatch):
    """The clients that have been silent longest are disconnected, not those that get an answer."""
    monkeypatch.setattr(connections, "MAX_WAITING", 5)
    question = format_request(CHAT, LONG, CLOSE)
    with ExitStack() as stack:
        answered = stack.enter_context(sending(client, question))
        wait_until(lambda: client.batcher.running)
        half = question[:-1], b"GET / HTTP/1.1", b""
        silent = [stack.enter_context(sending(client, half[i % 3])) for i in range(10)]
        wait_until(lambda: len(select.select(silent, [], [], 0)[0]) == 5)
        assert client.get("/health").status_code == 200
        assert not select.select([answered, silent[-1]], [], [], 0)[0]
    wait_until(lambda: not client.batcher.running)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="needs Java 11 or later")
def test_java(client, api_client, tmp_path):
    """Java's HttpClient offers HTTP/2 by default."""
    program = tmp_path / "Ask.java"
    program.write_text(JAVA)
    for server, path, body in ((client, CHAT, SHORT), (api_client, "/", {"prompt": "你好"})):
        command = ["java", program, server.base_url.join(path), json.dumps(body)]
        run = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert run.stdout == "200\n200\n", run.stderr
