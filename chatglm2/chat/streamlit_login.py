"""The login of web_demo2.py."""

import secrets
from base64 import b64encode

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.websockets import WebSocketClose

CHALLENGE = {"WWW-Authenticate": 'Basic realm="ChatGLM2", charset="UTF-8"'}


class Login:
    """ASGI middleware that asks for user and password, as HTTP Basic authentication.

    Afterwards a cookie stands for them: not every browser sends them with a WebSocket.
    """

    def __init__(self, app, logins: list[tuple[str, str]]):
        self.app = app
        self.accepted = [b"Basic " + b64encode(f"{user}:{word}".encode()) for user, word in logins]
        self.cookie, self.token = f"login-{secrets.token_hex(4)}", secrets.token_urlsafe()

    async def __call__(self, scope, receive, send):
        async def send_with_cookie(message):
            if message["type"] == "http.response.start":
                cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Lax; Path=/"
                MutableHeaders(scope=message).append("Set-Cookie", cookie)
            await send(message)

        answer = self.app
        if scope["type"] != "lifespan" and not self.is_logged_in(HTTPConnection(scope)):
            is_page = scope["type"] == "http"
            answer = Response("", 401, CHALLENGE) if is_page else WebSocketClose(1008)
            send_with_cookie = send
        await answer(scope, receive, send_with_cookie)

    def is_logged_in(self, connection: HTTPConnection) -> bool:
        given = connection.headers.get("Authorization", "").encode()
        token = connection.cookies.get(self.cookie, "")
        return any(
            [secrets.compare_digest(given, accepted) for accepted in self.accepted]
            + [secrets.compare_digest(token.encode(), self.token.encode())]
        )
