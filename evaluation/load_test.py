"""Measure an OpenAI server under load: tokens/s of one client and of many, latencies, faults.

    python evaluation/load_test.py --model resources/chatglm2-tiny
    python evaluation/load_test.py --url http://127.0.0.1:8000/v1 --faults --json report.json

Without --url it starts openai_api.py, hands it every flag that is not its own (--model, --quantize,
--threads ...), and stops it in the end. The clients hold conversations from the dialogues of
resources/chatglm2-tiny and read streamed answers of a fixed length. Exits with 1 if a client got a
wrong answer, a place leaked, or the server's memory grew.
"""

import argparse
import asyncio
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain, pairwise, product
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
from load_client import Answer, Client, Conversations, ServerError, spread

ROOT = Path(__file__).resolve().parent.parent
NUM_ROUNDS = 3  # of one client and of all, in turn
START_TIMEOUT_S = 900  # of a server that loads 6 billion parameters
STOP_TIMEOUT_S = 60
FREE_TIMEOUT_S = 10
RAW_TIMEOUT_S = 2
HEALTH_INTERVAL_S = 0.05
NUM_FAULT_TURNS = 4  # answers of each client while others disconnect and send garbage
BURST = 200  # requests at once: more than wait by default
MAX_GROWTH = 1.05  # of memory, from the first 100 requests of a soak to the last

GARBAGE = {
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


# Speed.


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the nearest-rank percentiles and the maximum in milliseconds."""
    ordered = sorted(seconds)
    ranks = {"p50": 0.5, "p99": 0.99, "max": 1}
    return {
        name: round(1e3 * ordered[max(math.ceil(rank * len(ordered)), 1) - 1], 2)
        for name, rank in ranks.items()
    }


async def run_clients(client: Client, conversations: Conversations, num_clients: int, args):
    """Let clients ask one question after another; return tokens/s and the answers.

    Each goes through all prompt lengths, beginning at one of its own, so that one client and many
    have the same work an answer.
    """
    lengths = spread(*args.prompt_tokens, args.requests)

    async def converse(first: int) -> list[Answer]:
        turned = lengths[first % len(lengths) :] + lengths[: first % len(lengths)]
        settings = {"max_tokens": args.new_tokens, "ignore_eos": True}
        return [await client.ask(conversations.draw(length), **settings) for length in turned]

    start = time.perf_counter()
    answers = [*chain(*await asyncio.gather(*map(converse, range(num_clients))))]
    return sum(answer.new_tokens for answer in answers) / (time.perf_counter() - start), answers


async def sample_health(client: Client, seconds: list[float]):
    """Append the time that /health takes, again and again."""
    while True:
        start = time.perf_counter()
        await client.get("/health")
        seconds.append(time.perf_counter() - start)
        await asyncio.sleep(HEALTH_INTERVAL_S)


def read_cpu_s(server: psutil.Process | None) -> float:
    return sum(server.cpu_times()[:2]) if server else 0.0


def describe(speeds: list[float], answers: list[Answer], cpu_s: float) -> dict:
    """Return the figures of all rounds of so many clients."""
    gaps = [after - before for a in answers for before, after in pairwise(a.times)]
    row = {
        "tokens_per_s": round(statistics.median(speeds), 1),
        "rounds_tokens_per_s": [round(speed, 1) for speed in speeds],
        "first_token_ms": percentiles([a.times[0] - a.start for a in answers if a.times]),
        "between_tokens_ms": percentiles(gaps),
    }
    if cpu_s:
        row["server_cpu_ms_per_token"] = round(1e3 * cpu_s / sum(a.new_tokens for a in answers), 2)
    return row


async def measure_speed(client: Client, conversations: Conversations, args, server) -> dict:
    """Measure one client and all, in turn, after a round to warm up."""
    counts = (1, args.clients)
    speeds, answers, cpu_s = ({n: [] for n in counts} for _ in range(3))
    health = []
    await run_clients(client, conversations, args.clients, args)
    for _, n in product(range(NUM_ROUNDS), counts):
        before = read_cpu_s(server)
        sampler = asyncio.create_task(sample_health(client, health))
        speed, new = await run_clients(client, conversations, n, args)
        if not sampler.cancel():
            sampler.result()  # it ended by itself: raises what happened
        speeds[n].append(speed)
        answers[n] += new
        cpu_s[n].append(read_cpu_s(server) - before)
    lengths = [answer.prompt_tokens for answer in chain(*answers.values())]
    ratios = [many / one for one, many in zip(*speeds.values(), strict=True)]
    return {
        "prompt_tokens": [min(lengths), round(statistics.mean(lengths)), max(lengths)],
        "new_tokens": args.new_tokens,
        "clients": {n: describe(speeds[n], answers[n], sum(cpu_s[n])) for n in counts},
        "ratio": round(statistics.median(ratios), 2),
        "health_ms": percentiles(health),
    }


# Faults.


async def send_raw(url: str, data: bytes) -> int:
    """Send bytes that are no HTTP, or half a request, and hang up; return the status as `post`."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(data)
    answer = b""
    with suppress(TimeoutError, ConnectionError):
        answer = await asyncio.wait_for(reader.read(100), RAW_TIMEOUT_S)
    writer.close()
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0


async def send_garbage(client: Client) -> dict[str, int]:
    """Return the status that each kind of garbage got."""
    statuses = {}
    for what, data in GARBAGE.items():
        statuses[what] = await client.post("/chat/completions", data)
    for what, data in RAW_BYTES.items():
        statuses[what] = await send_raw(client.url, data)
    statuses["unknown route"] = await client.post("/nothing", b"{}")
    return statuses


def count_places(metrics: str) -> float:
    """Return the sum of the gauges of running and of waiting requests, by whatever prefix."""
    pattern = r"^[\w:]*(?:running|waiting)(?:\{.*\})? (\S+)$"
    if len(values := re.findall(pattern, metrics, re.MULTILINE)) < 2:
        raise ServerError("/metrics has no gauges of running and waiting requests.")
    return sum(map(float, values))


async def measure_leak(client: Client, conversations: Conversations) -> float | None:
    """Return the milliseconds from a disconnect until no place is taken; `None` if one leaks."""
    await client.ask(conversations.draw(20), num_chunks=1, max_tokens=1000, ignore_eos=True)
    start = time.perf_counter()
    while count_places(await client.get("/metrics")):
        if time.perf_counter() - start > FREE_TIMEOUT_S:
            return None
        await asyncio.sleep(0.005)
    return round(1e3 * (time.perf_counter() - start), 1)


async def check_faults(client: Client, conversations: Conversations, args) -> dict:
    """Let a third of the clients disconnect and one send garbage; compare all other answers.

    Each must be the one that the same conversation gets alone, greedily. Then a burst overfills
    the queue.
    """
    prompts = [conversations.draw(length) for length in spread(*args.prompt_tokens, args.clients)]
    settings = {"temperature": 0, "max_tokens": args.new_tokens}
    alone = [(await client.ask(prompt, **settings)).text for prompt in prompts]
    wrong = []

    async def stay(first: int):
        for turn in range(NUM_FAULT_TURNS):
            i = (first + turn) % len(prompts)
            answer = await client.ask(prompts[i], **settings)
            if not answer.is_whole or answer.text != alone[i]:
                wrong.append({"alone": alone[i], "with others": answer.text})

    async def leave(_):
        for turn in range(2 * NUM_FAULT_TURNS):
            prompt = conversations.draw(args.prompt_tokens[turn % 2])
            await client.ask(prompt, num_chunks=1 + 3 * turn, max_tokens=500, ignore_eos=True)

    clients = [leave(i) if i % 3 == 2 else stay(i) for i in range(args.clients)]
    statuses, *_ = await asyncio.gather(send_garbage(client), *clients)
    client.num_refused = 0
    burst = [client.ask(prompts[i % len(prompts)], max_tokens=4) for i in range(BURST)]
    answers = await asyncio.gather(*burst)
    return {
        "answers_compared": NUM_FAULT_TURNS * sum(i % 3 != 2 for i in range(args.clients)),
        "wrong_answers": wrong,
        "garbage_statuses": statuses,
        "burst": BURST,
        "burst_refused_at_first": client.num_refused,
        "burst_answered": sum(answer.is_whole for answer in answers),
        "place_free_after_ms": await measure_leak(client, conversations),
    }


async def soak(client: Client, conversations: Conversations, args, server: psutil.Process) -> dict:
    """Return the server's memory after 100 requests and after `args.soak`."""

    async def work(numbers):
        for _ in numbers:
            length = conversations.random.randint(*args.prompt_tokens)
            await client.ask(conversations.draw(length), max_tokens=args.new_tokens)

    sizes = []
    for count in (100, args.soak - 100):
        numbers = iter(range(count))  # shared by the clients
        await asyncio.gather(*(work(numbers) for _ in range(args.clients)))
        sizes.append(server.memory_info().rss)
    return {
        "requests": args.soak,
        "rss_mb": [round(size / 1e6, 1) for size in sizes],
        "growth": round(sizes[1] / sizes[0], 3),
    }


def find_problems(report: dict) -> list[str]:
    """Return a line for each thing that a server must not do."""
    problems = []
    if faults := report.get("faults"):
        problems += [f"a wrong answer: {pair}" for pair in faults["wrong_answers"]]
        problems += [
            f"{what}: status {status}, not one from 400 to 499"
            for what, status in faults["garbage_statuses"].items()
            if status and not 400 <= status < 500
        ]
        if missing := faults["burst"] - faults["burst_answered"]:
            problems.append(f"{missing} of {faults['burst']} requests at once got no whole answer")
        if faults["place_free_after_ms"] is None:
            problems.append(f"a place is taken {FREE_TIMEOUT_S} s after the last client has gone")
    if (growth := report.get("soak", {}).get("growth", 0)) > MAX_GROWTH:
        problems.append(f"the server's memory grew {growth} times, allowed are {MAX_GROWTH}")
    return problems


# The server, the report.


@contextmanager
def serve(flags: list[str]):
    """Run openai_api.py on a free port; yield its URL and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "openai_api.py"), "--port", str(port), *flags]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:
            process.kill()


async def connect(client: Client, server: psutil.Popen | None):
    """Wait until a server that was started answers, and ask for the model's name."""
    deadline = time.monotonic() + (START_TIMEOUT_S if server else 0)
    while True:
        try:
            await client.get("/health")
            break
        except aiohttp.ClientError as error:
            if server and server.poll() is not None:
                raise SystemExit(f"openai_api.py ended with {server.returncode}.") from error
            if time.monotonic() > deadline:
                raise SystemExit(f"{client.url}: no server answers: {error}") from error
        await asyncio.sleep(0.2)
    client.model = json.loads(await client.get("/v1/models"))["data"][0]["id"]


async def measure(url: str, args, server: psutil.Popen | None = None) -> dict:
    key = os.environ.get("CHATGLM_API_KEY")
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    ) as session:
        client, conversations = Client(session, url), Conversations()
        await connect(client, server)
        await conversations.calibrate(client, *args.prompt_tokens)
        report = {"model": client.model, **await measure_speed(client, conversations, args, server)}
        if args.faults:
            report["faults"] = await check_faults(client, conversations, args)
        if args.soak:
            report["soak"] = await soak(client, conversations, args, server)
        return report


def print_table(report: dict):
    low, mean, high = report["prompt_tokens"]
    print(f"prompts of {low} to {high} tokens (mean {mean}), answers of {report['new_tokens']}\n")
    print("         tokens/s   first token, ms  between tokens, ms  server's CPU,")
    print("clients    median      p50      p99       p50      p99   ms a token")
    for num_clients, row in report["clients"].items():
        latencies = row["first_token_ms"], row["between_tokens_ms"]
        figures = [figures[rank] for figures in latencies for rank in ("p50", "p99")]
        columns = "".join(f" {figure:8.1f}" for figure in [row["tokens_per_s"], *figures])
        print(f"{num_clients:7} {columns} {row.get('server_cpu_ms_per_token', ''):>12}")
    health = report["health_ms"]
    print(f"\nratio {report['ratio']}; /health ms: p99 {health['p99']}, max {health['max']}")
    for part in ("faults", "soak"):
        if part in report:
            print(f"{part}: " + json.dumps(report[part], ensure_ascii=False))


def parse_args(argv=None) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments and the flags for the server."""
    parser = argparse.ArgumentParser(
        description="Measure an OpenAI server under load.",
        epilog="Without --url, flags of openai_api.py are handed to it: --model, --threads ...",
        allow_abbrev=False,
    )
    parser.add_argument("--url", help="of a running server (default: openai_api.py is started)")
    parser.add_argument("--clients", type=int, default=8, help="at a time (default: 8)")
    parser.add_argument(
        "--requests", type=int, default=8, help="of each client in a round (default: 8)"
    )
    parser.add_argument("--new-tokens", type=int, default=128, help="of an answer (default: 128)")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        nargs=2,
        default=[20, 500],
        metavar=("LOW", "HIGH"),
        help="shortest and longest prompt (default: 20 500)",
    )
    parser.add_argument("--faults", action="store_true", help="also check disconnects and garbage")
    parser.add_argument("--soak", type=int, default=0, help="also send so many requests (1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    args, flags = parser.parse_known_args(argv)
    if args.url and (flags or args.soak):
        parser.error(f"with --url no server is started: leave {' '.join(flags) or '--soak'} out")
    if args.clients < 2 or args.requests < 1 or args.new_tokens < 2:
        parser.error("at least 2 clients, 1 request of each and 2 new tokens are needed")
    if args.soak and args.soak <= 100:
        parser.error(f"--soak {args.soak}: the growth from 100 requests on is measured, so more")
    return args, flags


def main(argv=None) -> int:
    args, flags = parse_args(argv)
    with nullcontext((args.url, None)) if args.url else serve(flags) as (url, server):
        try:
            report = asyncio.run(measure(url, args, server))
        except (aiohttp.ClientError, ServerError) as error:
            raise SystemExit(f"{url}: {error}") from error
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
    problems = find_problems(report)
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
