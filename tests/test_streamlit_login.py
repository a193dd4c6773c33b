"""`streamlit_login`: the middleware that asks for user and password."""

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from chatglm2.chat.streamlit_login import Login


async def application(scope, receive, send):
    if scope["type"] == "http":
        await PlainTextResponse("in")(scope, receive, send)
    else:
        await WebSocket(scope, receive, send).accept()


@pytest.fixture
def client():
    return TestClient(Login(application, [("ann", "a:b"), ("bob", "密码")]))


@pytest.mark.parametrize("login", [None, ("ann", "b"), ("bob", "a:b"), ("", "")])
def test_without_a_login(client, login):
    response = client.get("/", auth=login)
    assert (response.status_code, response.text) == (401, "")
    assert response.headers["WWW-Authenticate"].startswith("Basic ") and not client.cookies
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/"):
        pass


@pytest.mark.parametrize("login", [("ann", "a:b"), ("bob", "密码")])
def test_a_login_and_its_cookie(client, login):
    assert client.get("/", auth=login).text == "in"
    assert client.get("/").text == "in"
    with client.websocket_connect("/"):
        pass
    name = next(iter(client.cookies))
    client.cookies.clear()
    assert client.get("/", headers={"Cookie": f"{name}=wrong"}).status_code == 401
