"""openai_api.py under load: disconnects, garbage, too many requests, a thousand requests."""

import asyncio
import re
from urllib.parse import urlsplit

import pytest

pytest.importorskip("aiohttp", reason="needs aiohttp")
pytest.importorskip("psutil", reason="needs psutil")

import aiohttp
from load_test import connect, serve, spread

pytestmark = pytest.mark.slow
NUM_CLIENTS = 6
NUM_TURNS = 4  # answers of each client while others disconnect and send garbage
NUM_SOAK = 1000
RAW_TIMEOUT_S, FREE_TIMEOUT_S = 2, 10
PROMPT_TOKENS = (20, 100)
BURST = 200  # requests at once: more than wait by default
MAX_GROWTH = 1.05  # of the server's memory after the first 100 requests
BODIES = {
    "invalid JSON": b'{"messages": [',
    "no object": b"[1, 2]",
    "wrong types": b'{"model": "m", "messages": 7}',
    "wrong role": b'{"model": "m", "messages": [{"role": 1, "content": {}}]}',
    "infinite temperature": b'{"messages": [{"role": "user", "content": "a"}], '
    b'"temperature": -1e400}',
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "deep nesting": b"[" * 100_000,
    "large body": b'{"model": "' + b"a" * 32_000_000 + b'"}',
}
RAW_BYTES = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "no HTTP": b"\x00\xff\r\n\r\n" * 100,
    "no body": b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{",
}


@pytest.fixture(scope="module")
def server(tiny_checkpoint):
    """URL and process of a server."""
    with serve(["--model", str(tiny_checkpoint), "--threads", "1"]) as (url, process):
        yield url, process


def run(test, server):
    """Run `test(client, conversations)` against the server."""

    async def run():
        async with connect(server[0], PROMPT_TOKENS, server[1]) as connected:
            await test(*connected)

    asyncio.run(run())


async def send_body(client, data: bytes) -> int:
    """Return the status; 0 if the server closes the connection."""
    url, headers = f"{client.url}/chat/completions", {"Content-Type": "application/json"}
    try:
        async with client.session.post(url, data=data, headers=headers) as response:
            return response.status
    except aiohttp.ClientError:
        return 0


async def send_raw(client, data: bytes) -> int:
    """Send bytes that are no request, then disconnect; return the status, or 0."""
    address = urlsplit(client.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(data)
    try:
        answer = await asyncio.wait_for(reader.read(100), RAW_TIMEOUT_S)
    except (TimeoutError, ConnectionError):
        answer = b""
    writer.close()
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0


async def disconnect(client, messages: list[dict], num_lines: int):
    """Begin a long answer, read some lines of it and disconnect."""
    body = {"model": client.model, "messages": messages, "stream": True}
    body |= {"max_tokens": 1000, "ignore_eos": True}
    async with client.session.post(f"{client.url}/chat/completions", json=body) as response:
        for _ in range(num_lines):
            await response.content.readline()
        response.close()


async def count_places(client) -> float:
    """Return the number of running and of waiting requests."""
    async with client.session.get(client.url.removesuffix("/v1") + "/metrics") as response:
        metrics = await response.text()
    running, waiting = re.findall(r"^\w+_(?:running|waiting)(?:\{.*\})? (\S+)$", metrics, re.M)
    return float(running) + float(waiting)


def test_answers_do_not_change_while_others_disconnect_and_send_garbage(server):
    async def test(client, conversations):
        prompts = [conversations.draw(length) for length in spread(*PROMPT_TOKENS, NUM_CLIENTS)]
        settings = {"temperature": 0, "max_tokens": 32}
        alone = [(await client.ask(prompt, **settings)).text for prompt in prompts]

        async def stay(first):
            for turn in range(NUM_TURNS):
                i = (first + turn) % len(prompts)
                answer = await client.ask(prompts[i], **settings)
                assert answer.text == alone[i] and answer.new_tokens

        async def leave():
            for turn in range(2 * NUM_TURNS):
                await disconnect(client, conversations.draw(50), num_lines=2 + 6 * turn)

        async def send_garbage():
            statuses = {what: await send_body(client, data) for what, data in BODIES.items()}
            statuses |= {what: await send_raw(client, data) for what, data in RAW_BYTES.items()}
            assert all(not code or 400 <= code < 500 for code in statuses.values()), statuses

        stays = [stay(i) for i in range(NUM_CLIENTS)]
        await asyncio.gather(send_garbage(), leave(), leave(), *stays)

    run(test, server)


def test_a_burst_of_requests_is_answered(server):
    """What the queue cannot hold is refused with `Retry-After`, then accepted."""

    async def test(client, conversations):
        prompts = [conversations.draw(20) for _ in range(BURST)]
        answers = await asyncio.gather(*(client.ask(prompt, max_tokens=4) for prompt in prompts))
        assert all(answer.new_tokens for answer in answers)

    run(test, server)


def test_a_disconnect_frees_the_place(server):
    async def test(client, conversations):
        await disconnect(client, conversations.draw(20), num_lines=4)
        async with asyncio.timeout(FREE_TIMEOUT_S):
            while await count_places(client):
                await asyncio.sleep(0.005)

    run(test, server)


def test_memory_does_not_grow(server):
    async def test(client, conversations):
        async def work(numbers):
            for _ in numbers:
                length = conversations.random.randint(*PROMPT_TOKENS)
                await client.ask(conversations.draw(length), max_tokens=8)

        sizes = []
        for count in (100, NUM_SOAK - 100):
            numbers = iter(range(count))  # shared by the clients
            await asyncio.gather(*(work(numbers) for _ in range(NUM_CLIENTS)))
            sizes.append(server[1].memory_info().rss)
        assert sizes[1] < MAX_GROWTH * sizes[0], sizes

    run(test, server)
