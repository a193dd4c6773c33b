"""openai_api.py under load: disconnects, garbage, too many requests, a thousand requests."""

import asyncio
from urllib.parse import urlsplit

import pytest

pytest.importorskip("aiohttp", reason="needs aiohttp")
pytest.importorskip("psutil", reason="needs psutil")

from load_test import connect, serve, spread

pytestmark = [pytest.mark.slow, pytest.mark.alone]
NUM_CLIENTS = 6
NUM_TURNS = 4  # answers of each client while others disconnect and send garbage
NUM_SOAK = 1000
RAW_TIMEOUT_S = 2
PROMPT_TOKENS = (20, 100)
BURST = 200  # requests at once: more than wait by default
MAX_GROWTH = 1.05  # of the server's memory after the first 100 requests
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS
    b"\x00\xff\r\n\r\n" * 100,
    HEAD + b"Content-Length: 9\r\n\r\n{",  # the rest of the body never comes
]
for body in (
    b"[1, 2]",
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": -1e400}',
    b'{"model": "\xff\xfe"}',
    b"[" * 100_000,
    b'{"model": "' + b"a" * 32_000_000 + b'"}',
):
    GARBAGE.append(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))


@pytest.fixture(scope="module")
def server(tiny_checkpoint):
    """URL and process of a server."""
    with serve(["--model", str(tiny_checkpoint), "--threads", "1"]) as server:
        yield server


def connected(test):
    """Give a test a client, conversations and the server's process."""

    def run(server):
        async def run():
            async with connect(server[0], PROMPT_TOKENS, server[1]) as (client, conversations):
                await test(client, conversations, server[1])

        asyncio.run(run())

    return run


async def send_raw(client, data: bytes) -> int:
    """Send bytes and disconnect; return the status, or 0 without an answer."""
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


@connected
async def test_answers_do_not_change_while_others_disconnect_and_send_garbage(
    client, conversations, process
):
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
        statuses = [await send_raw(client, data) for data in GARBAGE]
        assert all(not status or 400 <= status < 500 for status in statuses), statuses
        assert sum(map(bool, statuses)) > 4

    await asyncio.gather(send_garbage(), leave(), leave(), *map(stay, range(NUM_CLIENTS)))


@connected
async def test_a_burst_of_requests_is_answered(client, conversations, process):
    """What the queue cannot hold is refused with `Retry-After`, then accepted."""
    prompts = [conversations.draw(20) for _ in range(BURST)]
    answers = await asyncio.gather(*(client.ask(prompt, max_tokens=4) for prompt in prompts))
    assert all(answer.new_tokens for answer in answers)


@connected
async def test_memory_does_not_grow(client, conversations, process):
    async def work(numbers):
        for _ in numbers:
            length = conversations.random.randint(*PROMPT_TOKENS)
            await client.ask(conversations.draw(length), max_tokens=8)

    sizes = []
    for count in (100, NUM_SOAK - 100):
        numbers = iter(range(count))  # shared by the clients
        await asyncio.gather(*(work(numbers) for _ in range(NUM_CLIENTS)))
        sizes.append(process.memory_info().rss)
    assert sizes[1] < MAX_GROWTH * sizes[0], sizes
