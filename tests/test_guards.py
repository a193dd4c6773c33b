"""`serving/guards.py`: keys, names of the host, origins of pages, size and time of bodies."""

import select
import socket
import time
from contextlib import ExitStack

import pytest
from conftest import ROOT
from pages import served_page
from servers import check_error, format_request, parse, sending, serve, wait_until

import openai_api
from chatglm2.serving import guards

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
KEY_LINE = "Authorization: Bearer 密钥 key"
KEY = {"Authorization": "Bearer 密钥 key".encode()}
SHORT = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 1}
PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def client(tiny_model, tiny_tokenizer):
    """A server that everyone on this machine may use."""
    flags = ("--allowed-host", "gpu.example", "--allowed-host", "fe80::1")
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, *flags) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(tiny_model, tiny_tokenizer):
    """A server with a key, for one origin, that reads 1000 bytes."""
    flags = ["--api-key", "密钥 key", "--max-body", "0.001", "--cors", PAGE]
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, *flags) as client:
        yield client


def test_a_wrong_key_is_refused_before_the_body_is_read(guarded):
    for key in ("", "Bearer", "Bearer x", "Bearer 密钥", "Basic 密钥 key"):
        headers = {"Authorization": key.encode()}
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/openapi.json")):
            response = guarded.request(method, path, headers=headers, content=b"{" * 5000)
            check_error(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert guarded.get("/health", headers=headers).status_code == 200
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} 密钥 key".encode()}
        assert guarded.get("/v1/models", headers=headers).status_code == 200


def test_each_key_has_its_own_caches(tiny_model, tiny_tokenizer):
    """What one client asks shows neither in the cached tokens of another, nor by their loss."""
    keys = ("--api-key", "one", "--api-key", "two")

    def count_cached(key: str, content: str, **fields) -> int:
        body = SHORT | {"messages": [{"role": "user", "content": content}], **fields}
        answer = client.post(CHAT, headers={"Authorization": f"Bearer {key}"}, json=body)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, *keys) as client:
        assert count_cached("one", "你好") == 0
        assert count_cached("two", "你好") == 0 < count_cached("two", "你好")
        assert count_cached("two", "你好", max_tokens=40) > 0  # a longer one replaces its own only
        assert count_cached("one", "你好") > 0
        assert count_cached("one", "a" * 50) == 0
        headers = {"Authorization": "Bearer three"}
        assert client.post(CHAT, headers=headers, json=SHORT).status_code == 401


def test_names_of_the_host(client):
    served = ["localhost", "LOCALHOST:1", "localhost.:8000", "127.0.0.1", "[::1]:80", "gpu.example"]
    for name in [*served, "[FE80::1]"]:
        assert client.post(CHAT, headers={"Host": name}, json=SHORT).status_code == 200, name
    others = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost"]
    for name in [*others, "0.0.0.0", "192.0.2.1", "[::2]"]:
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/health")):
            response = client.request(method, path, headers={"Host": name})
            assert f"--allowed-host {name.strip('[]')} " in check_error(response, 421)
    for name in (
        "a b",
        "localhost@evil.example",
        "localhost:80:80",
        "localhost, x",
        "::1",
        "[",
        "",
    ):
        check_error(client.get("/health", headers={"Host": name}), 400)


@pytest.mark.parametrize(
    ("flags", "is_limited"),
    [
        (("--host", "localhost"), True),
        (("--host", "0.0.0.0"), False),
        (("--host", "0.0.0.0", "--allowed-host", "api"), True),
    ],
)
def test_a_server_for_other_machines_serves_every_name_until_one_is_given(flags, is_limited):
    args = parse(*flags)
    assert (guards.list_hosts(args.host, args.allowed_host) is not None) == is_limited


def test_proxies_and_old_clients_name_the_host_otherwise(client):
    for path, version, lines, status in (
        (f"http://localhost:9{CHAT}", "1.1", ("Host: evil.example",), 200),
        (f"http://evil.example{CHAT}", "1.1", ("Host: localhost",), 421),
        (CHAT, "1.1", ("Host: localhost", "Host: localhost"), 400),
        (CHAT, "1.0", ("Host: evil.example",), 421),
    ):
        with sending(client, format_request(path, SHORT, *lines, version=version)) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 %d " % status)


def test_pages_of_other_sites(client, guarded):
    own = f"http://{client.base_url.host}:{client.base_url.port}"
    for origin in (own, own.replace("http", "https")):
        response = client.post(CHAT, headers={"Origin": origin}, json=SHORT)
        assert response.status_code == 200
    for host, origin in (("localhost", "https://localhost"), ("localhost:80", "http://localhost")):
        response = client.post(CHAT, headers={"Host": host, "Origin": origin}, json=SHORT)
        assert response.status_code == 200
    foreign = [
        "null",
        "http://evil.example",
        "http://127.0.0.1",
        "http://localhost:3000",
        "file://",
    ]
    for origin in [*foreign, own.replace("http", "ftp"), f"{own}.evil.example", own[7:], ""]:
        headers = {"Origin": origin}
        for server in (client, guarded):
            for method in ("POST", "OPTIONS", "DELETE"):
                response = server.request(method, CHAT, headers=headers | KEY)
                assert "--cors " in check_error(response, 403)
            response = server.get("/health", headers=headers)
            assert response.status_code == 200
            assert "access-control-allow-origin" not in response.headers


def test_pages_of_allowed_origins(guarded):
    preflight = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-requested-with",
    }
    response = guarded.options(CHAT, headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    allowed = response.headers["access-control-allow-headers"]
    assert "authorization" in allowed and "x-requested-with" in allowed
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "access-control-allow-private-network" not in response.headers
    for headers, status in ((KEY, 200), ({}, 401)):  # the page can read errors, too
        response = guarded.post(CHAT, headers={"Origin": PAGE} | headers, json=SHORT)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("network", guards.NETWORKS)
def test_chromium_asks_whether_a_page_on_the_internet_may_use_this_machine(guarded, network):
    preflight = {
        "Access-Control-Request-Method": "POST",
        f"Access-Control-Request-{network}": "true",
    }
    for origin, status in ((PAGE, 200), ("https://evil.example", 403)):
        response = guarded.options(CHAT, headers=preflight | {"Origin": origin})
        assert response.status_code == status
        is_allowed = f"access-control-allow-{network}" in response.headers
        assert is_allowed == (status == 200)


def test_the_size_of_a_body_is_limited(guarded):
    content = b'{"messages": [], "pad": "' + b"x" * 2000
    chunked = (content[i : i + 100] for i in range(0, len(content), 100))
    for body in (content, chunked):
        response = guarded.post(CHAT, headers=JSON | KEY, content=body)
        assert "1000 bytes" in check_error(response, 413)
    small = b'{"messages": [], "pad": "' + b"x" * 900 + b'"}'
    check_error(guarded.post(CHAT, headers=JSON | KEY, content=small), 400, "messages")
    head, _, _ = format_request(CHAT, {"pad": "x" * 1000}, KEY_LINE).partition(b"{")
    with sending(guarded, head) as connection:  # refused before the body is sent
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_large_bodies_that_never_end_leave_room_for_others(client):
    """Eight bodies of the largest size are read at a time; further ones are refused."""
    large = SHORT | {"pad": "x" * 3_900_000}
    with ExitStack() as stack:
        begun = format_request(CHAT, large)[:-1]
        held = [stack.enter_context(sending(client, begun)) for _ in range(10)]
        wait_until(lambda: len(select.select(held, [], [], 0)[0]) == 2)
        response = client.post(CHAT, json=large)
        assert "too many" in check_error(response, 503, kind="server_error")
        assert response.headers["retry-after"]
        assert client.post(CHAT, json=SHORT | {"pad": "x" * 50_000}).status_code == 200
    wait_until(lambda: client.post(CHAT, json=large).status_code == 200)


def test_a_slow_body_is_read_as_long_as_it_comes(client, monkeypatch):
    monkeypatch.setattr(guards, "READ_TIMEOUT_S", 1)
    request = format_request(CHAT, SHORT)
    with sending(client, b"") as connection:
        for i in range(0, len(request), 10):
            connection.sendall(request[i : i + 10])
            time.sleep(0.06)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    monkeypatch.setattr(guards, "BODY_TIMEOUT_S", 0.1)
    with sending(client, request[:-1]) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "flags", "path"),
    [
        (["web_demo.py"], ["--port", "{port}", "--allowed-host", "gpu.example"], "/config"),
        (
            ["streamlit", "run", "web_demo2.py", "--server.port", "{port}"],
            ["--"],
            "/_stcore/stream",
        ),
    ],
    ids=["gradio", "streamlit"],
)
def test_sites_that_call_a_web_page_by_their_own_name(
    program, flags, path, tiny_checkpoint, tmp_path
):
    words = [ROOT / word if word.endswith(".py") else word for word in program]
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "a" * 22 + "==",
        "Sec-WebSocket-Version": "13",
    }
    with served_page(words, [*flags, "--model", tiny_checkpoint], tmp_path) as server:
        port = server.address.rstrip("/").rpartition(":")[2]
        for host, statuses in (("localhost", (200, 101)), ("evil.example", (421, 403))):
            lines = [f"Host: {host}:{port}", f"Origin: http://{host}:{port}"]
            if "stream" in path:
                lines += [f"{name}: {value}" for name, value in upgrade.items()]
            with socket.create_connection(("127.0.0.1", int(port)), 60) as connection:
                connection.sendall(format_request(path, None, *lines))
                assert int(connection.recv(1000).split()[1]) in statuses
