"""Continuous batching: one model answers many requests, a token of each at every step.

A request joins at the next step and leaves when it ends (Orca, OSDI 2022, section 3.1). Each has
its own cache, so its answer does not depend on the other requests. The next round of a conversation
continues from the cache of the last round. One thread computes, an asyncio loop reads:

    batcher, queue = Batcher(model, tokenizer), asyncio.Queue()
    batcher.submit(Request(input_ids), queue)
    async for _, chunk in read_chunks(queue):
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
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from chatglm2.generation_chatglm import CACHE_BLOCK, AnswerDecoder, ChatGLMCache, RaggedCache
from chatglm2.sampling_chatglm import (
    InvalidScoreLogitsProcessor,
    SamplingLogitsProcessor,
    VocabularyLogitsProcessor,
    find_end,
    read_sampling,
)

logger = logging.getLogger(__name__)
force_finite = InvalidScoreLogitsProcessor()

PROMPT_SEGMENT = 128  # prompt tokens computed between two steps of the running answers
MIN_SHARED_PREFIX = 16  # tokens of a kept cache that are worth a copy
PLACEHOLDER = "[[训练时间]]"  # process_response replaces it


class Unavailable(Exception):
    """The queue is full, or the batcher is closing."""


class InvalidRequest(ValueError):
    """A request that cannot be answered; `param` is the field to change."""

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param


class PromptTooLong(ValueError):
    """The prompt leaves no room for an answer; `limit` is "max_length" or "context"."""

    def __init__(self, message: str, limit: str):
        super().__init__(message)
        self.limit = limit


@dataclass
class TokenLogprob:
    """The log-probability of a token, before temperature; `top` has (id, logprob) pairs.

    Both are `None` for the first token of a prompt.
    """

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


@dataclass
class Request:
    """A prompt, and how to answer it.

    `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` are by default the
    checkpoint's, see `read_sampling`.

    Attributes:
        max_new_tokens: Tokens of the answer; `None` for as many as the other limits allow.
        max_length: Tokens of prompt and answer together; `None` for the context's.
        temperature: 0 always takes the likeliest token.
        top_k: 0 considers all tokens.
        min_p: Drops tokens that are less likely than the likeliest one times this.
        seed: The same seed gives the same tokens, whatever other requests run.
        stop: Texts that end the answer and are not part of it.
        ignore_eos: Continue after the end of an answer (to measure speed).
        processors: Applied to the scores [1, V] before sampling, with all ids so far [1, length].
        num_logprobs: Report the log-probability of each token and of this many likeliest tokens;
            `None` reports nothing.
        echo_text: Text of the prompt, with which the first chunk begins. With `num_logprobs` the
            chunk also has the log-probabilities of the prompt, which is then computed as a whole,
            and the last chunk that of the end of the answer.
        prompt_logprobs: Filled with the log-probabilities of the prompt. Requests for several
            answers to one prompt share the list, and with it the prompt is computed once.
        process_text: Applied to the answer so far; a longer answer must give a longer text.
        is_embedding: Compute the mean of the last hidden states instead of an answer.
        client: Who asks. The cache of a request is only continued by requests of the same client.
    """

    input_ids: list[int]
    max_new_tokens: int | None = None
    max_length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    num_logprobs: int | None = None
    echo_text: str | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    process_text: Callable[[str], str] = str
    is_embedding: bool = False
    client: int | None = None


def measure(scores: torch.Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprob]:
    """Return the log-probabilities of tokens, one for each row of scores [n, V]."""
    logprobs = F.log_softmax(scores, dim=-1)
    index = torch.tensor(token_ids, device=scores.device)[:, None]
    chosen, top = logprobs.gather(1, index)[:, 0], logprobs.topk(num_top)
    return [
        TokenLogprob(token_id, logprob, [*zip(ids, values, strict=True)])
        for token_id, logprob, ids, values in zip(
            token_ids, chosen.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]


@dataclass
class Chunk:
    """The piece that a step adds to an answer; text that may begin a stop is held back.

    Attributes:
        finish_reason: In the last chunk "stop" (end of text, or a stop text) or "length".
        embedding: [h], in the only chunk of a request for an embedding.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    embedding: torch.Tensor | None = None

    def add(self, later: "Chunk"):
        """Append the chunk of a later step."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason, self.embedding = later.finish_reason, later.embedding


async def read_chunks(queue: asyncio.Queue, num_answers: int = 1):
    """Yield (index, chunk) as they come, until each answer has ended.

    Raises:
        Exception: The error that ended one of the answers.
    """
    while num_answers:
        index, chunk = await queue.get()
        if isinstance(chunk, Exception):
            raise chunk
        num_answers -= chunk.finish_reason is not None
        yield index, chunk


class OccurrencePenalty(LogitsProcessor):
    """OpenAI's penalties: score - presence * [c > 0] - frequency * c.

    c is how often the token occurs in the answer.
    """

    def __init__(self, presence: float, frequency: float, prompt_length: int):
        self.presence, self.frequency, self.prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor):
        counts = input_ids[0, self.prompt_length :].bincount(minlength=scores.shape[-1])
        return scores - self.presence * (counts > 0) - self.frequency * counts


class AnswerText:
    """The part of a growing answer that can be shown: whole characters and nothing of a stop.

    Args:
        prompt_ids: The prompt from its last token with text on is decoded together with the answer,
            because SentencePiece drops a space at the start of a text.
    """

    def __init__(
        self, tokenizer, prompt_ids: list[int], stop: list[str], process_text: Callable[[str], str]
    ):
        self.decoder = AnswerDecoder(tokenizer)
        begin = len(prompt_ids) - 1
        while begin > 0 and not tokenizer.decode(prompt_ids[begin : begin + 1]):
            begin -= 1
        self.context = prompt_ids[begin:]
        self.decoder.end = len(self.context)
        self.stop, self.process_text, self.shown = stop, process_text, ""

    def count_held(self, text: str) -> int:
        """Return the length of the longest end of `text` that may begin a stop or PLACEHOLDER."""
        marks = [*self.stop, PLACEHOLDER]
        for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
            if any(mark.startswith(text[-length:]) for mark in marks):
                return length
        return 0

    def push(self, ids: list[int], is_last: bool) -> tuple[str, bool]:
        """Return the text that is new since the last call, and whether a stop was found.

        Args:
            ids: All ids of the answer so far.
        """
        text = self.decoder.decode(self.context + ids) or self.decoder.text
        ends = [end for stop in self.stop if (end := text.find(stop)) >= 0]
        if ends:
            text = text[: min(ends)]
        elif not is_last:
            text = text[: len(text) - self.count_held(text)]
        before, self.shown = self.shown, self.process_text(text)
        return self.shown[len(before) :], bool(ends)


class Generation:
    """A submitted request. Its chunks go to `queue` as (index, chunk), or (index, error)."""

    def __init__(self, tokenizer, request: Request, end: int, queue: asyncio.Queue, index: int):
        self.request, self.queue, self.index = request, queue, index
        self.ids = list(request.input_ids)
        self.prompt_length, self.end = len(self.ids), end  # `end`: the most ids it may have
        self.num_cached = 0  # prompt tokens that were not computed
        self.cache: ChatGLMCache | None = None
        self.is_cancelled = False
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)
        self.text = AnswerText(tokenizer, request.input_ids, request.stop, request.process_text)
        self.hidden_sum = 0.0  # of an embedding
        self.echo = request.echo_text

    @property
    def reports_prompt(self) -> bool:
        """Whether the chunks have the log-probabilities of the prompt and of the end."""
        return self.request.echo_text is not None and self.request.num_logprobs is not None

    @property
    def is_unmeasured(self) -> bool:
        return self.reports_prompt and len(self.request.prompt_logprobs) < self.prompt_length

    def cancel(self):
        """End the generation within a token; after its end this does nothing."""
        self.is_cancelled = True

    # Only the computing thread calls the methods below.

    def is_in_prompt(self) -> bool:
        return self.cache is None or self.cache.get_seq_length() < self.prompt_length

    def process(self, scores: torch.Tensor) -> torch.Tensor:
        if not self.request.processors:
            return scores
        return force_finite(None, self.request.processors(torch.tensor([self.ids]), scores))

    def measure(self, scores: torch.Tensor, token_id: int) -> list[TokenLogprob]:
        if self.request.num_logprobs is None:
            return []
        return measure(scores, [token_id], self.request.num_logprobs)

    def add_echo(self, chunk: Chunk) -> Chunk:
        """Return a chunk of the answer, the first one with the echo of the prompt before it."""
        if self.echo is None:
            return chunk
        whole, self.echo = Chunk(self.echo, logprobs=[*self.request.prompt_logprobs]), None
        whole.add(chunk)
        return whole

    def advance(self, token_id: int, scores: torch.Tensor, eos_token_ids: list[int]) -> Chunk:
        """Append the next token, sampled from scores [1, V], and return its chunk."""
        if token_id in eos_token_ids and not self.request.ignore_eos:
            text, _ = self.text.push(self.ids[self.prompt_length :], is_last=True)
            logprobs = self.measure(scores, token_id) if self.reports_prompt else []
            return Chunk(text, logprobs=logprobs, finish_reason="stop")
        self.ids.append(token_id)
        is_full = len(self.ids) >= self.end
        text, is_stopped = self.text.push(self.ids[self.prompt_length :], is_full)
        reason = "stop" if is_stopped else "length" if is_full else None
        return Chunk(text, [token_id], self.measure(scores, token_id), reason)

    def cut(self) -> Chunk:
        """Return the last chunk of an answer that must end here, with the text held back."""
        text, _ = self.text.push(self.ids[self.prompt_length :], is_last=True)
        return Chunk(text, finish_reason="length")


def sample(rows: dict[Generation, torch.Tensor]) -> dict[Generation, int]:
    """Sample the next id of each generation from its scores [1, V], with its own generator.

    Rows with the same settings are computed together.
    """
    groups, chosen = defaultdict(list), {}
    for generation in rows:
        request = generation.request
        settings = request.temperature, request.top_k, request.top_p, request.min_p
        groups[settings].append(generation)
    for (temperature, *filters), group in groups.items():
        scores = torch.cat([rows[generation] for generation in group])
        if not temperature:
            chosen.update(zip(group, scores.argmax(-1).tolist(), strict=True))
            continue
        sampler = SamplingLogitsProcessor(temperature, *filters)
        ids, probabilities = sampler.find_candidates(scores)
        sampled = [
            torch.multinomial(row, 1, generator=generation.generator)
            for row, generation in zip(probabilities, group, strict=True)
        ]
        chosen.update(zip(group, ids.gather(1, torch.stack(sampled))[:, 0].tolist(), strict=True))
    return chosen


class Batcher:
    """Serves requests with one model, in its own thread.

    Args:
        max_batch: Answers that are generated at the same time.
        max_queue: Requests that may wait for a place in the batch.
        context: Tokens of a prompt and its answer together, at most the model's.
        kept_tokens: Tokens whose keys and values are kept for later rounds.
    """

    def __init__(
        self, model, tokenizer, max_batch=8, max_queue=64, context=8192, kept_tokens=16384
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_queue, self.kept_tokens = max_batch, max_queue, kept_tokens
        self.context = min(context, model.config.seq_length)
        self.eos_token_ids = model.find_end_ids(tokenizer)
        self.sampling = read_sampling(model.generation_config)
        self.ban_padding = VocabularyLogitsProcessor(len(tokenizer))
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        # Clients and their caches, the least recently used first.
        self.kept: list[tuple[int | None, ChatGLMCache]] = []
        self.deadline = None  # when the running answers must end; set by `close`
        self.outbox: list[tuple[Generation, Chunk | Exception]] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self.condition = threading.Condition()
        self.thread = threading.Thread(target=self.run, name="batcher", daemon=True)
        self.thread.start()
        atexit.register(self.end)  # a thread within torch must not outlive the interpreter

    # The asyncio loop calls these.

    def submit(self, request: Request, queue: asyncio.Queue, index=0, is_begun=False) -> Generation:
        """Queue a request; call it in the asyncio loop that reads `queue`.

        Args:
            is_begun: It is a part of work that has begun, so it may exceed `max_queue`.

        Raises:
            PromptTooLong: The prompt leaves no room for an answer.
            Unavailable: The queue is full, or the batcher is closing.
        """
        end, request = self.compute_end(request), self.fill_in(request)
        generation = Generation(self.tokenizer, request, end, queue, index)
        with self.condition:
            if self.deadline is not None:
                raise Unavailable("The server is shutting down.")
            is_full = len(self.waiting) + len(self.running) >= self.max_batch + self.max_queue
            if is_full and not is_begun:
                raise Unavailable(f"{len(self.waiting)} requests are waiting: try again later.")
            self.loop = asyncio.get_running_loop()
            self.waiting.append(generation)
            self.condition.notify()
        return generation

    def fill_in(self, request: Request) -> Request:
        """Return the request with the checkpoint's sampling where it has none of its own."""
        sampling = {k: v for k, v in self.sampling.items() if getattr(request, k) is None}
        request = replace(request, **sampling)
        if request.repetition_penalty == 1:
            return request
        penalty = RepetitionPenaltyLogitsProcessor(request.repetition_penalty)
        return replace(request, processors=LogitsProcessorList([penalty, *request.processors]))

    def compute_end(self, request: Request) -> int:
        """Return the number of ids, of prompt and answer together, at which an answer ends."""
        length, max_length = len(request.input_ids), request.max_length
        is_whole = request.is_embedding or request.max_new_tokens == 0  # no token is added
        if length >= self.context + is_whole:
            message = f"The prompt has {length} tokens, the context {self.context}: shorten it"
            if self.context < (most := self.model.config.seq_length):
                message += f", or start the server with --context, up to {most}"
            raise PromptTooLong(f"{message}.", "context")
        if max_length is not None and length >= max_length + is_whole:
            message = f"The prompt has {length} tokens, max_length is {max_length}"
            message += ": give a larger max_length, or shorten the prompt."
            raise PromptTooLong(message, "max_length")
        return find_end(length, self.context, max_length, request.max_new_tokens)

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
            generation.queue.put_nowait((generation.index, chunk))

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
            self.admit()
            prompts = [generation for generation in self.running if generation.is_in_prompt()]
            answers = [generation for generation in self.running if not generation.is_in_prompt()]
            if prompts:
                with self.failing_alone(prompts[:1]):
                    self.compute_prompt(prompts[0])
            if answers:
                with self.failing_alone(answers):
                    self.compute_tokens(answers)
            self.publish()

    @contextmanager
    def failing_alone(self, generations: list[Generation]):
        """Let an error, for example in `process_text`, end only these requests."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, InvalidRequest):
                logger.exception("%d requests failed.", len(generations))
            for generation in generations:
                self.fail(generation, error)

    def fail(self, generation: Generation, error: Exception):
        """End a request with an error; its cache may be inconsistent and is not kept."""
        if generation in self.running:  # else it ended within the step
            self.outbox.append((generation, error))
            self.running.remove(generation)

    def publish(self):
        """Wake the asyncio loop once for all chunks of a step."""
        outbox, self.outbox = self.outbox, []
        if outbox:
            with suppress(RuntimeError):  # the loop is closed: there is no reader
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

    def admit(self):
        """Drop cancelled requests, and give the free places to waiting ones."""
        for generation in [g for g in self.running if g.is_cancelled]:
            self.leave(generation)
        with self.condition:
            self.waiting = deque(g for g in self.waiting if not g.is_cancelled)
            while self.waiting and len(self.running) < self.max_batch:
                self.running.append(self.waiting.popleft())

    def compute_prompt(self, generation: Generation):
        """Compute a segment of a prompt; after the last one, the first token or the embedding."""
        if generation.cache is None:
            generation.cache = self.find_prefix(generation)
            generation.num_cached = generation.cache.get_seq_length()
        begin = generation.cache.get_seq_length()
        segment = generation.ids[begin : begin + PROMPT_SEGMENT]
        hidden_states = self.model.transformer(
            torch.tensor([segment], device=self.model.device),
            past_key_values=generation.cache,
            return_dict=True,
        ).last_hidden_state
        if generation.request.is_embedding:
            generation.hidden_sum += hidden_states.float().sum(1)[0].cpu()
            if not generation.is_in_prompt():
                mean = generation.hidden_sum / generation.prompt_length
                self.finish(generation, Chunk(finish_reason="stop", embedding=mean))
            return
        if generation.is_unmeasured:
            self.measure_prompt(generation, hidden_states[0])
        if generation.is_in_prompt():
            return
        if generation.prompt_length == generation.end:
            self.finish(generation, generation.add_echo(Chunk(finish_reason="length")))
        else:
            self.take_tokens([generation], hidden_states[:, -1])

    def measure_prompt(self, generation: Generation, hidden_states: torch.Tensor):
        """Measure the tokens that follow those of a segment, [s, h]."""
        logprobs = generation.request.prompt_logprobs
        if targets := generation.ids[len(logprobs) :][: len(hidden_states)]:
            scores = self.score(hidden_states[: len(targets)])
            logprobs += measure(scores, targets, generation.request.num_logprobs)

    def compute_tokens(self, generations: list[Generation]):
        """Compute the next token of each answer, in one batch."""
        device = self.model.device
        hidden_states = self.model.transformer(
            torch.tensor([[g.ids[-1]] for g in generations], device=device),
            torch.tensor([[len(g.ids) - 1] for g in generations], device=device),
            past_key_values=RaggedCache([g.cache for g in generations]),
            return_dict=True,
        ).last_hidden_state
        self.take_tokens(generations, hidden_states[:, -1])

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the scores of all tokens, [n, V] in float32, from hidden states [n, h]."""
        scores = self.model.transformer.output_layer(hidden_states).float()
        return force_finite(None, self.ban_padding(None, scores))

    def take_tokens(self, generations: list[Generation], hidden_states: torch.Tensor):
        """Sample from the last hidden states [b, h].

        This happens on the CPU, so that a seed gives the same tokens on every device.
        """
        scores = self.score(hidden_states).cpu()
        rows = dict(zip(generations, scores.split(1), strict=True))
        processed = {}
        for generation, row in rows.items():
            with self.failing_alone([generation]):
                processed[generation] = generation.process(row)
        for generation, token_id in sample(processed).items():
            with self.failing_alone([generation]):
                chunk = generation.advance(token_id, rows[generation], self.eos_token_ids)
                chunk = generation.add_echo(chunk)
                if chunk.finish_reason:
                    self.finish(generation, chunk)
                else:
                    self.outbox.append((generation, chunk))

    # Caches.

    def finish(self, generation: Generation, chunk: Chunk):
        self.outbox.append((generation, chunk))
        self.leave(generation)

    def leave(self, generation: Generation):
        """Free the place in the batch, and keep the cache for a later round."""
        self.running.remove(generation)
        cache = generation.cache
        if cache is None or generation.request.is_embedding:
            return
        ids = cache.input_ids = generation.ids[: cache.get_seq_length()]
        client = generation.request.client
        self.kept = [
            (owner, old)
            for owner, old in self.kept
            if owner != client or old.input_ids != ids[: len(old.input_ids)]
        ]
        self.kept.append((client, cache))
        while sum(count_capacity(old) for _, old in self.kept) > self.kept_tokens:
            del self.kept[0]

    def find_prefix(self, generation: Generation) -> ChatGLMCache:
        """Return a cache with as much of a prompt as the client has, except its last id."""
        if generation.is_unmeasured:
            generation.request.prompt_logprobs[:] = [TokenLogprob(generation.ids[0])]
        if generation.request.is_embedding or generation.is_unmeasured:
            return ChatGLMCache()
        client = generation.request.client
        running = [g for g in self.running if g.cache is not None and g.request.client == client]
        for other in running:
            other.cache.input_ids = other.ids[: other.cache.get_seq_length()]
        kept = [cache for owner, cache in self.kept if owner == client]
        caches = [*(other.cache for other in running), *kept]
        limit = generation.prompt_length - 1
        lengths = [count_shared(cache.input_ids, generation.ids, limit) for cache in caches]
        length = max(lengths, default=0)
        if length < MIN_SHARED_PREFIX:
            return ChatGLMCache()
        best = caches[lengths.index(length)]
        if best in kept:
            self.kept.remove((client, best))
            if length == len(best.input_ids):
                return best
            self.kept.append((client, best))  # now the most recently used
        return best.copy_prefix(length)


def count_capacity(cache: ChatGLMCache) -> int:
    """Return how many tokens fit into the buffers of a cache."""
    return -(-len(cache.input_ids) // CACHE_BLOCK) * CACHE_BLOCK


def count_shared(left: list[int], right: list[int], limit: int) -> int:
    """Return the length of the common beginning of two lists, at most `limit`."""
    count = min(len(left), limit)
    if left[:count] == right[:count]:
        return count
    return next(i for i in range(count) if left[i] != right[i])
