"""Continuous batching: one model answers many requests, a token of each at every step.

A request joins at the next step and leaves when it ends (Orca, OSDI 2022, section 3.1). Each has a
cache of its own, so what it is answered does not depend on the others; a later round of a
conversation goes on with the cache of the former. One thread computes, an asyncio loop reads:

    batcher = Batcher(model, tokenizer)
    async for chunk in batcher.submit(Request(input_ids)):
        print(chunk.text, end="")
"""

import asyncio
import atexit
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from chatglm2.generation_chatglm import (
    CACHE_BLOCK,
    CHAT_DEFAULTS,
    AnswerDecoder,
    ChatGLMCache,
    InvalidScoreLogitsProcessor,
    RaggedCache,
)

logger = logging.getLogger(__name__)
force_finite = InvalidScoreLogitsProcessor()

PROMPT_CHUNK = 128  # prompt tokens computed between two steps of the running answers
MIN_SHARED_PREFIX = 16  # tokens of a kept cache that are worth a copy
PLACEHOLDER = "[[训练时间]]"  # process_response fills it in


class Unavailable(Exception):
    """The queue is full, or the batcher is closing."""


@dataclass
class Request:
    """What to generate.

    Attributes:
        max_new_tokens: `None` for all that the context leaves.
        temperature: 0 takes the likeliest token always.
        top_k: 0 for all tokens.
        seed: The same seed gives the same tokens, whoever else is served.
        stop: Texts that end the answer and are not part of it.
        ignore_eos: Go on after the end of an answer (to measure speed).
        processors: Applied to the scores [1, V] before sampling, with all ids so far [1, length].
        num_logprobs: Report each token's log-probability and those of so many likeliest ones.
        process_text: Applied to the answer so far; it must only ever lengthen it.
        is_embedding: Compute the mean of the last hidden states instead of an answer.
    """

    input_ids: list[int]
    max_new_tokens: int | None = None
    temperature: float = CHAT_DEFAULTS["temperature"]
    top_k: int = CHAT_DEFAULTS["top_k"]
    top_p: float = CHAT_DEFAULTS["top_p"]
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    num_logprobs: int | None = None
    process_text: Callable[[str], str] = str
    is_embedding: bool = False


@dataclass
class TokenLogprob:
    """A token's log-probability before temperature, and the likeliest tokens' (id, logprob)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Chunk:
    """What a step adds to an answer; the text is empty while it could become part of a stop.

    Attributes:
        finish_reason: In the last chunk "stop" (end of text, or a stop text) or "length".
        embedding: [h], of a request for one.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    embedding: torch.Tensor | None = None

    def add(self, later: "Chunk"):
        """Append what a later step adds."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason, self.embedding = later.finish_reason, later.embedding


class OccurrencePenalty(LogitsProcessor):
    """OpenAI's penalties: score - presence * [c > 0] - frequency * c, for c times in the answer."""

    def __init__(self, presence: float, frequency: float, prompt_length: int):
        self.presence, self.frequency, self.prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor):
        counts = input_ids[0, self.prompt_length :].bincount(minlength=scores.shape[-1])
        return scores - self.presence * (counts > 0) - self.frequency * counts


class AnswerText:
    """The part of a growing answer that can be shown: whole characters and nothing of a stop.

    Args:
        last_id: Of the prompt; after it a first space counts, which alone would be dropped.
    """

    def __init__(
        self, tokenizer, last_id: int, stop: list[str], process_text: Callable[[str], str]
    ):
        self.decoder = AnswerDecoder(tokenizer)
        self.context, self.decoder.end = [last_id], 1
        self.stop, self.process_text = stop, process_text
        self.shown, self.searched = "", 0

    def count_held(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop or the placeholder."""
        marks = [*self.stop, PLACEHOLDER]
        for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
            if any(mark.startswith(text[-length:]) for mark in marks):
                return length
        return 0

    def push(self, ids: list[int], is_last: bool) -> tuple[str, bool]:
        """Return what the answer's ids so far add to the text, and whether a stop was met."""
        text = self.decoder.decode(self.context + ids) or self.decoder.text
        begin = max(0, self.searched - max(map(len, self.stop), default=0))
        ends = [end for stop in self.stop if (end := text.find(stop, begin)) >= 0]
        self.searched = len(text)
        if ends:
            text = text[: min(ends)]
        elif not is_last:
            text = text[: len(text) - self.count_held(text)]
        before, self.shown = self.shown, self.process_text(text)
        return self.shown[len(before) :], bool(ends)


class Generation:
    """A request on its way: iterate over its chunks, and cancel it when nobody reads any more."""

    def __init__(self, batcher: "Batcher", request: Request, room: int):
        self.batcher, self.request = batcher, request
        self.ids = list(request.input_ids)
        self.prompt_length, self.num_cached = len(self.ids), 0  # of the prompt
        self.max_length = self.prompt_length + room
        self.cache: ChatGLMCache | None = None
        self.is_cancelled = False
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)
        self.text = AnswerText(batcher.tokenizer, self.ids[-1], request.stop, request.process_text)
        self.hidden_sum = 0.0
        self.chunks = asyncio.Queue()

    # The reader's side.

    def cancel(self):
        """End the generation within a token; harmless if it has ended."""
        self.is_cancelled = True

    async def __aiter__(self):
        try:
            while True:
                chunk = await self.chunks.get()
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
                if chunk.finish_reason:
                    return
        finally:
            self.cancel()

    async def collect(self) -> Chunk:
        """Wait for the whole answer."""
        whole = Chunk()
        async for chunk in self:
            whole.add(chunk)
        return whole

    # The computing thread's side.

    def is_in_prompt(self) -> bool:
        return self.cache is None or self.cache.get_seq_length() < self.prompt_length

    def process(self, scores: torch.Tensor) -> torch.Tensor:
        processors = self.request.processors
        return processors(torch.tensor([self.ids]), scores) if processors else scores

    def measure(self, scores: torch.Tensor, token_id: int) -> list[TokenLogprob]:
        if self.request.num_logprobs is None:
            return []
        logprobs = F.log_softmax(scores[0], dim=-1)
        values, ids = logprobs.topk(self.request.num_logprobs)
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        return [TokenLogprob(token_id, logprobs[token_id].item(), top)]

    def advance(self, token_id: int, scores: torch.Tensor, eos_token_ids: list[int]) -> Chunk:
        """Take the next token, sampled from scores [1, V], and return what it adds."""
        if token_id in eos_token_ids and not self.request.ignore_eos:
            text, _ = self.text.push(self.ids[self.prompt_length :], is_last=True)
            return Chunk(text, finish_reason="stop")
        self.ids.append(token_id)
        is_full = len(self.ids) >= self.max_length
        text, is_stopped = self.text.push(self.ids[self.prompt_length :], is_full)
        reason = "stop" if is_stopped else "length" if is_full else None
        return Chunk(text, [token_id], self.measure(scores, token_id), reason)

    def cut(self) -> Chunk:
        """Return what is left to show of an answer that must end here."""
        text, _ = self.text.push(self.ids[self.prompt_length :], is_last=True)
        return Chunk(text, finish_reason="length")


def sample(rows: dict[Generation, torch.Tensor]) -> list[int]:
    """Return the next id of each generation from its scores [1, V], drawn by its own generator.

    Rows with the same settings are computed together.
    """
    groups, chosen = defaultdict(list), {}
    for generation in rows:
        request = generation.request
        groups[request.temperature, request.top_k, request.top_p].append(generation)
    for (temperature, top_k, top_p), group in groups.items():
        scores = torch.cat([rows[generation] for generation in group])
        if not temperature:
            chosen.update(zip(group, scores.argmax(-1).tolist(), strict=True))
            continue
        size = min(top_k or scores.shape[1], scores.shape[1])
        scores, candidates = scores.topk(size)
        scores = TemperatureLogitsWarper(temperature)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        # Of waiting times with the rates p_i, the i-th is the shortest with probability p_i.
        waits = [torch.empty(size).exponential_(generator=g.generator) for g in group]
        index = (F.softmax(scores, dim=-1) / torch.stack(waits)).argmax(-1, keepdim=True)
        chosen.update(zip(group, candidates.gather(1, index)[:, 0].tolist(), strict=True))
    return [chosen[generation] for generation in rows]


class Batcher:
    """Serves requests with one model, in a thread of its own.

    Args:
        max_batch: Answers generated at a time.
        max_queue: Requests that wait for a place.
        context: Tokens of a prompt and its answer together, at most the model's.
        kept_tokens: Tokens whose keys and values are kept for later rounds.
    """

    def __init__(
        self, model, tokenizer, max_batch=8, max_queue=64, context=8192, kept_tokens=16384
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_queue, self.kept_tokens = max_batch, max_queue, kept_tokens
        self.context = min(context, model.config.seq_length)
        self.eos_token_ids, self.num_ids = model.eos_token_ids, len(tokenizer)
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.kept: list[ChatGLMCache] = []  # the least recently used first
        self.deadline = None  # when running answers are ended, set by `close`
        self.outbox: list[tuple[Generation, Chunk | Exception]] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self.condition = threading.Condition()
        self.thread = threading.Thread(target=self.run, name="batcher", daemon=True)
        self.thread.start()
        atexit.register(self.end)  # a thread within torch must not outlive the interpreter

    # Called by the asyncio loop.

    def submit(self, request: Request) -> Generation:
        """Queue a request; call it in the asyncio loop that reads the answer.

        Raises:
            ValueError: The prompt leaves no room for an answer.
            Unavailable: Too many wait already, or the batcher is closing.
        """
        length = len(request.input_ids)
        room = self.context - length + request.is_embedding
        if room < 1:
            raise ValueError(
                f"The prompt has {length} tokens, the context {self.context}: shorten it."
            )
        if request.max_new_tokens is not None:
            room = min(room, request.max_new_tokens)
        generation = Generation(self, request, room)
        with self.condition:
            if self.deadline is not None:
                raise Unavailable("The server is shutting down.")
            if len(self.waiting) + len(self.running) >= self.max_batch + self.max_queue:
                raise Unavailable(f"{len(self.waiting)} requests wait already: try again later.")
            self.loop = asyncio.get_running_loop()
            self.waiting.append(generation)
            self.condition.notify()
        return generation

    def close(self, grace_s: float = 0.0):
        """Refuse new requests, and end the running answers after `grace_s` seconds."""
        with self.condition:
            self.deadline = time.monotonic() + grace_s
            self.condition.notify()

    def join(self):
        self.thread.join()
        atexit.unregister(self.end)

    def end(self):
        self.close()
        self.join()

    def deliver(self, outbox: list):
        for generation, chunk in outbox:
            generation.chunks.put_nowait(chunk)

    # The computing thread.

    @torch.inference_mode()
    def run(self):
        while True:
            with self.condition:
                self.condition.wait_for(
                    lambda: self.waiting or self.running or self.deadline is not None
                )
            if self.deadline is not None:
                self.end_for_shutdown()
                if not self.running:
                    return
            self.drop_cancelled()
            self.admit()
            prompts = [generation for generation in self.running if generation.is_in_prompt()]
            answers = [generation for generation in self.running if not generation.is_in_prompt()]
            if prompts:
                self.attempt(self.compute_prompt, prompts[:1])
            if answers:
                self.attempt(self.compute_tokens, answers)
            self.publish()

    def attempt(self, compute: Callable, generations: list[Generation]):
        """Compute a step; an error ends the requests in it and nothing else."""
        try:
            compute(generations)
        except Exception as error:
            logger.exception("A step of %d requests failed.", len(generations))
            for generation in generations:
                self.fail(generation, error)

    def fail(self, generation: Generation, error: Exception):
        """End a request; its cache may be in disorder and is not kept."""
        if generation in self.running:  # else it ended within the step
            self.outbox.append((generation, error))
            self.running.remove(generation)

    def publish(self):
        """Wake the asyncio loop once for all chunks of a step."""
        outbox, self.outbox = self.outbox, []
        if outbox:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self.loop.call_soon_threadsafe(self.deliver, outbox)

    def end_for_shutdown(self):
        with self.condition:
            waiting, self.waiting = self.waiting, deque()
        error = Unavailable("The server is shutting down.")
        self.outbox += [(generation, error) for generation in waiting]
        if time.monotonic() >= self.deadline:
            for generation in [*self.running]:
                if generation.is_in_prompt():
                    self.fail(generation, error)
                else:
                    self.finish(generation, generation.cut())
        self.publish()

    def drop_cancelled(self):
        with self.condition:
            self.waiting = deque(g for g in self.waiting if not g.is_cancelled)
        for generation in [g for g in self.running if g.is_cancelled]:
            self.leave(generation)

    def admit(self):
        with self.condition:
            while self.waiting and len(self.running) < self.max_batch:
                self.running.append(self.waiting.popleft())

    def compute_prompt(self, generations: list[Generation]):
        """Compute the next chunk of a prompt, and after the last one the answer's first token."""
        (generation,) = generations
        if generation.cache is None:
            generation.cache = self.find_prefix(generation)
            generation.num_cached = generation.cache.get_seq_length()
        held = generation.cache.get_seq_length()
        chunk = generation.ids[held : held + PROMPT_CHUNK]
        hidden_states = self.model.transformer(
            torch.tensor([chunk], device=self.model.device),
            past_key_values=generation.cache,
            num_prompt_tokens=len(chunk),
        ).last_hidden_state
        if generation.request.is_embedding:
            generation.hidden_sum += hidden_states.float().sum(1)[0].cpu()
        if generation.is_in_prompt():
            return
        if generation.request.is_embedding:
            mean = generation.hidden_sum / generation.prompt_length
            self.finish(generation, Chunk(finish_reason="stop", embedding=mean))
        else:
            self.take_tokens(generations, hidden_states[:, -1])

    def compute_tokens(self, generations: list[Generation]):
        """Compute the next token of each answer, in one batch."""
        device = self.model.device
        hidden_states = self.model.transformer(
            torch.tensor([[g.ids[-1]] for g in generations], device=device),
            torch.tensor([[len(g.ids) - 1] for g in generations], device=device),
            past_key_values=RaggedCache([g.cache for g in generations]),
        ).last_hidden_state
        self.take_tokens(generations, hidden_states[:, -1])

    def take_tokens(self, generations: list[Generation], hidden_states: torch.Tensor):
        """Sample from the last hidden states [b, h]; on the CPU, so that a seed holds anywhere."""
        scores = self.model.transformer.output_layer(hidden_states).float().cpu()
        if not torch.isfinite(scores).all():
            scores = torch.cat([force_finite(None, row) for row in scores.split(1)])
        scores[:, self.num_ids :] = -torch.inf  # rows that pad the matrix
        rows = dict(zip(generations, scores.split(1), strict=True))
        processed = {}
        for generation, row in rows.items():
            with self.failing_alone(generation):
                processed[generation] = generation.process(row)
        token_ids = sample(processed) if processed else []
        for generation, token_id in zip(processed, token_ids, strict=True):
            with self.failing_alone(generation):
                chunk = generation.advance(token_id, rows[generation], self.eos_token_ids)
                if chunk.finish_reason:
                    self.finish(generation, chunk)
                else:
                    self.outbox.append((generation, chunk))

    @contextmanager
    def failing_alone(self, generation: Generation):
        """Let an error, such as one of a request's own functions, end that request only."""
        try:
            yield
        except Exception as error:
            logger.exception("A request failed.")
            self.fail(generation, error)

    # Caches.

    def finish(self, generation: Generation, chunk: Chunk):
        self.outbox.append((generation, chunk))
        self.leave(generation)

    def leave(self, generation: Generation):
        """Free a place, and keep the cache for a later round."""
        self.running.remove(generation)
        cache = generation.cache
        if cache is None or generation.request.is_embedding:
            return
        ids = cache.input_ids = generation.ids[: cache.get_seq_length()]
        self.kept = [old for old in self.kept if old.input_ids != ids[: len(old.input_ids)]]
        self.kept.append(cache)
        while sum(count_capacity(old) for old in self.kept) > self.kept_tokens:
            del self.kept[0]

    def find_prefix(self, generation: Generation) -> ChatGLMCache:
        """Return a cache of as much of a prompt as is held anywhere; its last id is always left."""
        if generation.request.is_embedding:
            return ChatGLMCache()
        for other in self.running:
            if other.cache is not None:
                other.cache.input_ids = other.ids[: other.cache.get_seq_length()]
        held = [other.cache for other in self.running if other.cache is not None]
        best, length = None, MIN_SHARED_PREFIX - 1
        for cache in [*held, *self.kept]:
            shared = count_shared(cache.input_ids, generation.ids, generation.prompt_length - 1)
            if shared > length:
                best, length = cache, shared
        if best is None:
            return ChatGLMCache()
        if best in held:
            return best.copy_prefix(length)
        self.kept.remove(best)
        if length == len(best.input_ids):
            return best
        self.kept.append(best)  # used most recently
        return best.copy_prefix(length)


def count_capacity(cache: ChatGLMCache) -> int:
    """Return the tokens that the buffers of a cache have room for."""
    return -(-len(cache.input_ids) // CACHE_BLOCK) * CACHE_BLOCK


def count_shared(left: list[int], right: list[int], limit: int) -> int:
    """Return how many ids, at most `limit`, both lists begin with."""
    count = min(len(left), limit)
    if left[:count] == right[:count]:
        return count
    return next(i for i in range(count) if left[i] != right[i])
