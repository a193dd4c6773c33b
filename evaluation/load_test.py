"""Measure an OpenAI server under load: tokens/s and latencies of one client and of many.

    python evaluation/load_test.py --model resources/chatglm2-tiny
    python evaluation/load_test.py --url http://127.0.0.1:8000/v1 --json report.json

Without --url it starts openai_api.py, which gets all other flags (--model, --quantize, --threads
...). The clients hold conversations from the bundled dialogues and read streamed answers.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # first: it explains which library is missing

# isort: split
import aiohttp
import numpy
import psutil
import yaml
from tables import format_table

ROOT = Path(__file__).resolve().parent.parent
DIALOGUES = ROOT / "resources" / "chatglm2-tiny" / "training" / "dialogues"
NUM_CALIBRATIONS = 8  # requests for each language
NUM_ROUNDS = 3  # of one client and of all, in turn
START_TIMEOUT_S = 900  # of a server that loads 6 billion parameters
STOP_TIMEOUT_S = 60


# The clients.


class ServerError(Exception):
    """The server refused a request, or ended an answer with an error."""


def spread(low: int, high: int, count: int) -> list[int]:
    """Return `count` numbers from `low` to `high` at equal distances."""
    return [low + (high - low) * i // max(count - 1, 1) for i in range(count)]


@dataclass
class Answer:
    """A streamed answer; a chunk has one token, or several that are one character together."""

    text: str = ""
    start: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)  # of the chunks with text
    prompt_tokens: int = 0
    new_tokens: int = 0  # 0 until the end

    def read(self, line: bytes):
        """Add a line of the event stream."""
        data = line.removeprefix(b"data:").strip()
        if not data.startswith(b"{"):  # an empty line or [DONE]
            return
        event = json.loads(data)
        if "error" in event:
            raise ServerError(f"The server ended an answer: {event['error']}")
        if usage := event.get("usage"):
            self.prompt_tokens = usage["prompt_tokens"]
            self.new_tokens = usage["completion_tokens"]
        if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
            self.text += text
            self.times.append(time.perf_counter())


class Client:
    """Sends the requests of all clients."""

    def __init__(self, session: aiohttp.ClientSession, url: str):
        self.session, self.url, self.model = session, url.rstrip("/"), ""

    async def ask(self, messages: list[dict], **fields) -> Answer:
        """Return the whole answer; try again while the server's queue is full.

        Raises:
            ServerError: The server refuses the request or ends the answer with an error.
        """
        body = {"model": self.model, "messages": messages, "stream": True, **fields}
        body["stream_options"] = {"include_usage": True}
        answer = Answer()
        while True:
            async with self.session.post(f"{self.url}/chat/completions", json=body) as response:
                if response.status == 200:
                    async for line in response.content:
                        answer.read(line)
                    return answer
                if response.status != 503 or "Retry-After" not in response.headers:
                    raise ServerError(f"Status {response.status}: {await response.text()}")
            await asyncio.sleep(float(response.headers["Retry-After"]))


class Conversations:
    """Random conversations of a given length from the bundled model's dialogues.

    Attributes:
        costs: Number of tokens by language: of every prompt, of each message, of each character.
    """

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)
        self.rounds, self.costs = {}, {"zh": (4, 7, 0.8), "en": (4, 7, 0.3)}
        for language in self.costs:
            file = DIALOGUES / f"smalltalk_{language}.yaml"
            self.rounds[language] = [
                (question, intent["answer"])
                for intent in yaml.safe_load(file.read_text("utf-8"))
                for question in intent["questions"]
            ]

    def draw(self, num_tokens: int, language: str | None = None) -> list[dict]:
        """Return messages of about `num_tokens` tokens; the first answer is cut to fit."""
        language = language or self.random.choice([*self.costs])
        constant, per_message, per_char = self.costs[language]
        question, _ = self.random.choice(self.rounds[language])
        texts, room = [question], num_tokens - constant - per_message - per_char * len(question)
        while (num_chars := int((room - 2 * per_message) / per_char)) > 1:
            question, answer = self.random.choice(self.rounds[language])
            texts = [question, answer[: max(num_chars - len(question), 1)], *texts]
            room -= 2 * per_message + per_char * (len(texts[0]) + len(texts[1]))
        roles = ("user", "assistant") * len(texts)
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]

    async def calibrate(self, client: Client, low: int, high: int):
        """Set the tokens of a character from the numbers that the server reports."""
        for language, (constant, per_message, _) in self.costs.items():
            num_tokens = num_chars = 0
            for length in spread(low, high, NUM_CALIBRATIONS):
                messages = self.draw(length, language)
                answer = await client.ask(messages, max_tokens=1)
                num_tokens += answer.prompt_tokens - constant - per_message * len(messages)
                num_chars += sum(len(message["content"]) for message in messages)
            self.costs[language] = constant, per_message, max(num_tokens / num_chars, 0.01)


# Measuring.


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return percentiles in milliseconds."""
    return {f"p{p}": round(1e3 * float(numpy.percentile(seconds, p)), 2) for p in (50, 99)}


async def run_clients(client: Client, conversations: Conversations, num_clients: int, args):
    """Let each client ask one question after another; return tokens/s and the answers.

    Each client goes through all prompt lengths, so that one client and many have equal work.
    """
    lengths = spread(*args.prompt_tokens, args.requests)

    async def converse(first: int) -> list[Answer]:
        turned = lengths[first % len(lengths) :] + lengths[: first % len(lengths)]
        settings = {"max_tokens": args.new_tokens, "ignore_eos": True}
        return [await client.ask(conversations.draw(length), **settings) for length in turned]

    start = time.perf_counter()
    answers = [*chain(*await asyncio.gather(*map(converse, range(num_clients))))]
    return sum(answer.new_tokens for answer in answers) / (time.perf_counter() - start), answers


def describe(speeds: list[float], answers: list[Answer], cpu_s: float) -> dict:
    """Return the figures of all rounds with one number of clients."""
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


async def measure(url: str, args: argparse.Namespace, server: psutil.Popen | None = None) -> dict:
    """Measure one client and all clients in turn, after a round to warm up."""
    counts = (1, args.clients)
    speeds, answers, cpu_s = ({n: [] for n in counts} for _ in range(3))
    async with connect(url, args.prompt_tokens, server) as (client, conversations):
        await run_clients(client, conversations, args.clients, args)
        for _, n in product(range(NUM_ROUNDS), counts):
            before = sum(server.cpu_times()[:2]) if server else 0
            speed, new = await run_clients(client, conversations, n, args)
            speeds[n].append(speed)
            answers[n] += new
            cpu_s[n].append(sum(server.cpu_times()[:2]) - before if server else 0)
    lengths = [answer.prompt_tokens for answer in chain(*answers.values())]
    ratios = [many / one for one, many in zip(*speeds.values(), strict=True)]
    return {
        "model": client.model,
        "prompt_tokens": [min(lengths), round(statistics.mean(lengths)), max(lengths)],
        "new_tokens": args.new_tokens,
        "clients": {n: describe(speeds[n], answers[n], sum(cpu_s[n])) for n in counts},
        "ratio": round(statistics.median(ratios), 2),
    }


# The server.


@contextmanager
def serve(flags: list[str]):
    """Run openai_api.py on a free port; yield its URL and process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
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


@asynccontextmanager
async def connect(url: str, prompt_tokens: list[int], server: psutil.Popen | None = None):
    """Wait until the server answers; yield a client and conversations of known lengths."""
    key = os.environ.get("CHATGLM_API_KEY")
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(),
        headers={"Authorization": f"Bearer {key}"} if key else None,
    ) as session:
        client, conversations = Client(session, url), Conversations()
        deadline = time.monotonic() + (START_TIMEOUT_S if server else 0)
        while not client.model:
            try:
                async with session.get(f"{client.url}/models", raise_for_status=True) as response:
                    client.model = (await response.json())["data"][0]["id"]
            except aiohttp.ClientError as error:
                if server and server.poll() is not None:
                    raise SystemExit(f"openai_api.py ended with {server.returncode}.") from error
                if time.monotonic() > deadline:
                    raise SystemExit(f"{client.url}: no server answers: {error}") from error
                await asyncio.sleep(0.2)
        await conversations.calibrate(client, *prompt_tokens)
        yield client, conversations


# Report and arguments.


def print_report(report: dict):
    low, mean, high = report["prompt_tokens"]
    header = ["clients", "tokens/s", "first token, ms: p50", "p99", "between tokens: p50", "p99"]
    rows = []
    for num_clients, row in report["clients"].items():
        figures = [row["tokens_per_s"], *row["first_token_ms"].values()]
        figures += row["between_tokens_ms"].values()
        figures = [f"{figure:.1f}" for figure in figures]
        rows.append([str(num_clients), *figures, str(row.get("server_cpu_ms_per_token", ""))])
    print(f"prompts of {low} to {high} tokens (mean {mean}), answers of {report['new_tokens']}\n")
    print(format_table([*header, "server's CPU, ms/token"], rows))
    print(f"\nratio {report['ratio']}")


def parse_args(argv=None) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments and the flags for the server."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Without --url, openai_api.py gets all other flags: --model, --threads ...",
        allow_abbrev=False,
    )
    parser.add_argument("--url", help="a running server (default: start openai_api.py)")
    for flag, default, text in (
        ("--clients", 8, "clients at a time"),
        ("--requests", 8, "requests of each client in a round"),
        ("--new-tokens", 128, "length of an answer"),
    ):
        text += " (default: %(default)s)"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=text)
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        nargs=2,
        default=[20, 500],
        metavar=("LOW", "HIGH"),
        help="shortest and longest prompt (default: 20 500)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    args, flags = parser.parse_known_args(argv)
    if args.url and flags:
        parser.error(f"with --url no server is started: leave {' '.join(flags)} out")
    if args.clients < 2 or args.requests < 1 or args.new_tokens < 2:
        parser.error("at least 2 clients, 1 request of each and 2 new tokens are needed")
    return args, flags


def main(argv=None):
    args, flags = parse_args(argv)
    with nullcontext((args.url, None)) if args.url else serve(flags) as (url, server):
        try:
            report = asyncio.run(measure(url, args, server))
        except (aiohttp.ClientError, ServerError) as error:
            raise SystemExit(f"{url}: {error}") from error
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")


if __name__ == "__main__":
    utils.run_script(main)
