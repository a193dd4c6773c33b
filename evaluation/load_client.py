"""The clients of load_test.py, and the conversations that they hold."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import yaml

ROOT = Path(__file__).resolve().parent.parent
DIALOGUES = ROOT / "resources" / "chatglm2-tiny" / "training" / "dialogues"
NUM_CALIBRATIONS = 8  # requests to learn how long a prompt is


class ServerError(Exception):
    """The server refused a request that it should answer, or broke an answer off."""


def spread(low: int, high: int, count: int) -> list[int]:
    """Return `count` numbers from `low` to `high` at equal distances."""
    return [low + (high - low) * i // max(count - 1, 1) for i in range(count)]


@dataclass
class Answer:
    """A streamed answer; a chunk holds a token, or more where a token is half a character."""

    text: str = ""
    start: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)  # of the chunks with text
    prompt_tokens: int = 0
    new_tokens: int = 0
    is_whole: bool = False

    def read(self, line: bytes):
        """Take in a line of the event stream."""
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self.is_whole = True
        if not data.startswith(b"{"):
            return
        event = json.loads(data)
        if "error" in event:
            raise ServerError(f"The server broke an answer off: {event['error']}")
        if usage := event.get("usage"):
            self.prompt_tokens = usage["prompt_tokens"]
            self.new_tokens = usage["completion_tokens"]
        if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
            self.text += text
            self.times.append(time.perf_counter())


class Client:
    """Sends the requests of all clients and counts the answers 503 (`num_refused`)."""

    def __init__(self, session: aiohttp.ClientSession, url: str):
        self.session, self.url = session, url.rstrip("/")
        self.model, self.num_refused = "", 0

    async def get(self, path: str) -> str:
        """Return what the server answers on a path beside /v1."""
        async with self.session.get(self.url.removesuffix("/v1") + path) as response:
            response.raise_for_status()
            return await response.text()

    async def post(self, path: str, data: bytes) -> int:
        """Return the status; 0 if the server closed the connection."""
        try:
            headers = {"Content-Type": "application/json"}
            async with self.session.post(self.url + path, data=data, headers=headers) as response:
                return response.status
        except aiohttp.ClientError:
            return 0

    async def ask(self, messages: list[dict], num_chunks: int | None = None, **fields) -> Answer:
        """Read an answer, or `num_chunks` of it and disconnect; try again while the queue is full.

        Raises:
            ServerError: The server refuses the request or breaks the answer off.
        """
        body = {"model": self.model, "messages": messages, "stream": True, **fields}
        body["stream_options"] = {"include_usage": True}
        answer = Answer()
        while True:
            async with self.session.post(f"{self.url}/chat/completions", json=body) as response:
                if response.status == 200:
                    async for line in response.content:
                        answer.read(line)
                        if len(answer.times) == num_chunks:
                            response.close()
                            break
                    return answer
                if response.status != 503 or "Retry-After" not in response.headers:
                    raise ServerError(f"Status {response.status}: {await response.text()}")
                self.num_refused += 1
            await asyncio.sleep(float(response.headers["Retry-After"]))


class Conversations:
    """Random conversations of a wanted length from the bundled model's dialogues.

    Attributes:
        costs: Tokens in each language: in every prompt, for each message, for each character.
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
        """Learn from what the server counts how many tokens a character costs."""
        for language, (constant, per_message, _) in self.costs.items():
            num_tokens = num_chars = 0
            for length in spread(low, high, NUM_CALIBRATIONS):
                messages = self.draw(length, language)
                answer = await client.ask(messages, max_tokens=1)
                num_tokens += answer.prompt_tokens - constant - per_message * len(messages)
                num_chars += sum(len(message["content"]) for message in messages)
            self.costs[language] = constant, per_message, max(num_tokens / num_chars, 0.01)
