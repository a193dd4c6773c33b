"""ASGI middleware that refuses requests before a route sees them."""

import asyncio
import hmac
import ipaddress
import re
import socket

from fastapi import Response
from fastapi.middleware.cors import CORSMiddleware

from .connections import READ_TIMEOUT_S
from .errors import RETRY_AFTER, RequestError, error_response

OPEN = {("GET", "/"), ("GET", "/health")}  # need no key
BODY_TIMEOUT_S = 120  # for a whole body, whose pauses are at most READ_TIMEOUT_S
SMALL_BODY = 64_000  # bytes that each body may have while too many large ones are read
MAX_LARGE_BODIES = 8  # bodies of the largest size whose memory the bodies being read may take
NETWORKS = ("private-network", "local-network", "local-network-access")  # names in browsers
PORTS = {"http": 80, "https": 443}


def is_loopback(host: str) -> bool:
    """Return whether `--host` is an address that only this machine can reach."""
    *_, (address, *_) = socket.getaddrinfo(host, None, flags=socket.AI_PASSIVE)[0]
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def list_hosts(host: str, allowed_hosts: list[str]) -> set[str] | None:
    """Return the names in the Host header that a server at `--host` serves; `None` is every one."""
    if not allowed_hosts and not is_loopback(host):
        return None
    return {"localhost", "127.0.0.1", "::1", host.lower().removesuffix("."), *allowed_hosts}


def split_host(text: str) -> tuple[str, int | None] | None:
    """Return name and port of a Host header; `None` if it is malformed.

    >>> split_host("LocalHost.:8000"), split_host("[::1]"), split_host("a b")
    (('localhost', 8000), ('::1', None), None)
    """
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::([0-9]{0,5}))?", text.lower(), re.A)
    if match is None:
        return None
    address, name, port = match.groups()
    return address or name.removesuffix("."), int(port) if port else None


def is_same_origin(origin: str, host: tuple[str, int | None] | None) -> bool:
    """Return whether a page of an origin came from the server that its request goes to."""
    scheme, _, rest = origin.lower().partition("://")
    if scheme not in PORTS or host is None or (page := split_host(rest)) is None:
        return False
    (page_name, page_port), (name, port) = page, host
    default = PORTS[scheme]
    return page_name == name and (page_port or default) == (port or default)


class SiteGuard:
    """ASGI middleware: refuses other names of this host, and web pages of other sites.

    A page of any site can make the browser send requests to this machine. If the site also lets
    its own name mean 127.0.0.1 (DNS rebinding), the browser lets the page read the answers.

    Args:
        hosts: Names in the Host header that are served; `None` serves every name.
        origins: Sites whose pages may use the server, as the Origin header names them.
    """

    def __init__(self, app, hosts: set[str] | None, origins: list[str]):
        self.app, self.hosts, self.origins = app, hosts, set(origins)

    def refuse(self, method: str, given_hosts: list[str], given_origins: list[str]):
        """Return an error response, or `None` for a request that is allowed."""
        host = None
        for text in given_hosts:  # HTTP/1.0 needs none
            if (host := split_host(text)) is None:
                return error_response(400, f"The header Host: {text[:100]!r} is malformed.")
            if self.hosts is not None and host[0] not in self.hosts:
                message = f"The host name {host[0]!r} is not served here; the server's flag "
                message += f"--allowed-host {host[0]} allows it."
                return error_response(421, message, code="host_not_allowed")
        for origin in given_origins:
            is_allowed = origin in self.origins or "*" in self.origins
            if is_allowed or method in ("GET", "HEAD") or is_same_origin(origin, host):
                continue
            message = f"Pages of the origin {origin[:100]!r} may not use this server; its flag "
            message += f"--cors {origin[:100]} allows them."
            return error_response(403, message, code="origin_not_allowed")
        return None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        hosts, origins = (
            [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]
            for wanted in (b"host", b"origin")
        )
        # A proxy's form of the path, which takes precedence over the header Host.
        if match := re.match(r"https?://([^/?#]*)", scope["path"], re.IGNORECASE):
            scope["path"], hosts = scope["path"][match.end() :] or "/", [match[1]]
        response = self.refuse(scope["method"], hosts, origins)
        await (response or self.app)(scope, receive, send)


class Cors(CORSMiddleware):
    """Starlette's, for pages on the internet too, which Chromium asks about separately."""

    def preflight_response(self, request_headers) -> Response:
        response = super().preflight_response(request_headers)
        for network in NETWORKS:  # only allowed origins get so far
            if f"access-control-request-{network}" in request_headers:
                response.headers[f"access-control-allow-{network}"] = "true"
        return response


class BodyReader:
    """Reads the body of one request within limits of size and time.

    Raises:
        RequestError: The body is too large or too slow, or too many large bodies are being read.
    """

    def __init__(self, guard: "Guard", receive):
        self.guard, self.receive = guard, receive
        self.num_read = self.num_taken = 0  # bytes; taken are those from the guard's budget
        self.is_whole = False
        self.deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT_S

    async def read(self) -> dict:
        """Return the next ASGI message."""
        if self.is_whole:
            return await self.receive()  # that the client has left
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(self.deadline, now + READ_TIMEOUT_S)):
                message = await self.receive()
        except TimeoutError as error:
            text = f"The body paused for {READ_TIMEOUT_S} s or took {BODY_TIMEOUT_S} s."
            raise RequestError(408, text, headers={"Connection": "close"}) from error
        self.num_read += len(message.get("body", b""))
        if self.num_read > self.guard.max_body:
            raise RequestError(413, self.guard.too_large)
        self.take(max(self.num_read - SMALL_BODY, 0))
        if not message.get("more_body"):
            self.is_whole = True
            self.take(0)
        return message

    def take(self, num_bytes: int):
        """Let this body have a part of the memory for large bodies."""
        more = num_bytes - self.num_taken
        if more > self.guard.num_free:
            text = "The server is reading too many large requests."
            raise RequestError(503, text, code="unavailable", headers=RETRY_AFTER)
        self.guard.num_free -= more
        self.num_taken = num_bytes


class Guard:
    """ASGI middleware: checks the key before anything is read, and limits bodies.

    `request.state.client` is the number of the key; `None` if the server has no keys.
    """

    def __init__(self, app, api_keys: list[str] | None, max_body: int):
        self.app, self.max_body = app, max_body
        self.too_large = f"The body has more than {max_body} bytes."
        self.keys = [key.encode("utf-8", "surrogateescape") for key in api_keys or []]
        self.num_free = MAX_LARGE_BODIES * max_body

    def find_client(self, scope) -> int | None:
        """Return the number of the key that a request has sent; `None` without a valid one."""
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        is_equal = [hmac.compare_digest(key, expected) for expected in self.keys]
        return is_equal.index(True) if any(is_equal) and scheme.lower() == b"bearer" else None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] == "HEAD":  # answered like GET; uvicorn leaves out the body
            scope = scope | {"method": "GET"}
        client = self.find_client(scope)
        if self.keys and client is None and (scope["method"], scope["path"]) not in OPEN:
            message = "A valid key is required, in the header Authorization: Bearer KEY."
            headers = {"WWW-Authenticate": "Bearer"}
            response = error_response(401, message, code="invalid_api_key", headers=headers)
            return await response(scope, receive, send)
        scope.setdefault("state", {})["client"] = client
        # Starlette has a limit too, but answers in plain text. The HTTP parser has checked that
        # the header is a number.
        if int(dict(scope["headers"]).get(b"content-length", 0)) > self.max_body:
            response = error_response(413, self.too_large)
            return await response(scope, receive, send)
        body = BodyReader(self, receive)
        try:
            await self.app(scope, body.read, send)
        finally:
            body.take(0)
