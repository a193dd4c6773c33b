"""HTTP connections of the servers: which are closed, and which are kept for an answer."""

import asyncio
import logging

from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import describe_error

READ_TIMEOUT_S = 20  # for the headers of a request
MAX_WAITING = 256  # connections without a whole request; the process can open 1024 files or more
BACKLOG = 64  # connections that are accepted at a time
PROBE_S = 0.25  # between two signs of life to a client that has stopped sending


def is_logged(record: logging.LogRecord) -> bool:
    """Return whether to log a message of uvicorn: not two lines for each request of Java."""
    return not record.getMessage().startswith(("Unsupported upgrade", "No supported WebSocket"))


def format_error(status: str, message: str) -> bytes:
    """Return a whole HTTP response for a client whose request never reaches the app."""
    body = describe_error(int(status[:3]), message)
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n\r\n{body}"
    ).encode()


class Connection(H11Protocol):
    """uvicorn's connection, but it does not stay open without requests.

    It does stay open for an answer if the client only shuts its sending side. The app is told by
    `scope["state"]["client_stopped_sending"]`, an `asyncio.Event`.

    uvicorn's other parser, httptools, drops the body of a request that offers an upgrade to
    HTTP/2, as Java's HttpClient and `curl --http2` do.
    """

    def __init__(self, *, app_state: dict, **options):
        self.client_stopped_sending = asyncio.Event()
        app_state = {**app_state, "client_stopped_sending": self.client_stopped_sending}
        super().__init__(app_state=app_state, **options)

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_waiting(self) -> bool:
        """Whether the client has not sent a whole request."""
        has_request = self.is_answering and not self.cycle.more_body
        return not has_request and not self.transport.is_closing()

    def connection_made(self, transport):
        super().connection_made(transport)
        self.last_read = self.loop.time()
        self.close_without_request(last=self)
        waiting = [connection for connection in self.connections if connection.is_waiting]
        if len(waiting) > MAX_WAITING:
            min(waiting, key=lambda connection: connection.last_read).transport.close()

    def data_received(self, data: bytes):
        self.last_read = self.loop.time()
        super().data_received(data)

    def connection_lost(self, error):
        self.timer.cancel()
        super().connection_lost(error)

    def close_without_request(self, last):
        """Close the connection if no request began or was answered since `last`."""
        now = self.cycle, self.is_answering
        if now == last and not self.is_answering:
            if self.conn.trailing_data[0]:
                self.send_error("408 Request Timeout", f"No headers within {READ_TIMEOUT_S} s.")
            self.transport.close()
        else:
            self.timer = self.loop.call_later(READ_TIMEOUT_S, self.close_without_request, now)

    def send_error(self, status: str, message: str):
        if not self.is_answering or not self.cycle.response_started:
            self.transport.write(format_error(status, message))
        self.transport.close()

    def send_400_response(self, msg: str):
        self.send_error("400 Bad Request", "The request is not valid HTTP/1.")

    def eof_received(self) -> bool:
        """Return whether to keep the connection, for the answer to a whole request."""
        if not self.is_answering or self.cycle.more_body:
            return False
        if not self.conn.trailing_data[0]:  # else it has further requests
            self.shutdown()  # after the answer
        self.client_stopped_sending.set()
        return True


class ProbeClients:
    """ASGI middleware: detects that a client is gone that has stopped sending.

    TCP does not tell a client that only shuts its sending side, and still reads, from one that has
    closed the connection, until something is sent to it. So both get what readers skip: spaces
    before JSON, empty comments between server-sent events.

    `scope["state"]["is_collecting"]` is true while a valid request waits for a whole answer.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        state = scope.get("state", {})
        if "client_stopped_sending" not in state:  # not served by a `Connection`
            return await self.app(scope, receive, send)
        blank = b""  # what may be sent now

        async def probe():
            nonlocal blank
            await state["client_stopped_sending"].wait()
            while True:
                await asyncio.sleep(PROBE_S)
                if not blank and state.get("is_collecting"):
                    blank = b" "
                    headers = [(b"content-type", b"application/json")]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                if blank:
                    await send({"type": "http.response.body", "body": blank, "more_body": True})

        async def send_around_probes(message):
            nonlocal blank
            if message["type"] == "http.response.start":
                if blank:
                    return  # the probe has begun the response
                content_type = dict(message["headers"]).get(b"content-type", b"")
                blank = b":\n\n" if content_type.startswith(b"text/event-stream") else b""
            elif not message.get("more_body"):
                probing.cancel()
            await send(message)

        probing = asyncio.create_task(probe())
        try:
            await self.app(scope, receive, send_around_probes)
        finally:
            probing.cancel()
