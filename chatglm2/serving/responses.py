"""The answers of openai_api.py, made with the types of the package `openai`.

Those of /v1/responses are in `responses_schema.py` and `responses_api.py`.
"""

import time
import uuid
from base64 import b64encode
from codecs import getincrementaldecoder
from collections.abc import Iterable
from typing import Literal

from fastapi import Response
from openai.types import (
    Completion,
    CompletionChoice,
    CompletionUsage,
    CreateEmbeddingResponse,
    Embedding,
    Model,
)
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from .batching import Chunk, Generation, Request, TokenLogprob
from .json_grammar import read_bytes


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class EmbeddingItem(Embedding):
    embedding: list[float] | str  # a string in base64


class EmbeddingList(CreateEmbeddingResponse):
    data: list[EmbeddingItem]


class CompletionLogprobs(Logprobs):
    """Log-probabilities, which the first token of a prompt does not have."""

    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(CompletionChoice):
    logprobs: CompletionLogprobs | None = None


class TextCompletion(Completion):
    choices: list[TextChoice]


class CompletionChunkChoice(TextChoice):
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(Completion):
    """A `Completion` in a stream: only the last choice has a `finish_reason`."""

    choices: list[CompletionChunkChoice]


def as_json(response: BaseModel) -> Response:
    return Response(response.model_dump_json(exclude_unset=True), media_type="application/json")


def count_usage(generations: list[Generation], num_tokens: int, num_choices=1) -> CompletionUsage:
    """Count the tokens of a request; a prompt with several answers counts once."""
    prompts = generations[::num_choices]
    prompt_tokens = sum(generation.prompt_length for generation in prompts)
    cached_tokens = sum(generation.num_cached for generation in prompts)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=prompt_tokens + num_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )


def list_embeddings(vectors: list, encoding_format: str | None, **fields) -> EmbeddingList:
    def encode(vector) -> list[float] | str:
        data = vector.numpy().astype("<f4")
        return b64encode(data).decode() if encoding_format == "base64" else data.tolist()

    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, vector in enumerate(vectors)
    ]
    return EmbeddingList(object="list", data=data, **fields)


def read_token(tokenizer, token_id: int) -> tuple[str, list[int]]:
    """Return the text and the bytes of a token.

    A byte of a longer character is written as \\xe4, and a token without text by its name.
    """
    data = read_bytes(tokenizer, token_id)
    if not data and token_id < tokenizer.vocab_size:
        return tokenizer.name_token(token_id), []
    return data.decode(errors="backslashreplace"), list(data)


def describe_tokens(tokenizer, tokens: list[TokenLogprob]) -> list[dict]:
    """Return tokens with their log-probabilities in the form of chats."""

    def describe(token_id: int, logprob: float) -> dict:
        text, data = read_token(tokenizer, token_id)
        return {"token": text, "bytes": data, "logprob": logprob}

    return [
        describe(token.token_id, token.logprob)
        | {"top_logprobs": [describe(*top) for top in token.top]}
        for token in tokens
    ]


class TextOffsets:
    """Counts the characters before each token of a text.

    A byte inside of a character has the offset of the character. SentencePiece decodes each byte
    that is no UTF-8 as one character.

    Args:
        drops_space: The text begins here: SentencePiece drops a leading space.
    """

    def __init__(self, drops_space: bool):
        self.decoder = getincrementaldecoder("utf-8")("surrogateescape")
        self.num_chars, self.drops_space = 0, drops_space

    def add(self, data: bytes) -> int:
        """Return the offset of the next token."""
        if self.drops_space and data:
            data, self.drops_space = data.removeprefix(b" "), False
        if data and data[0] & 0xC0 != 0x80:  # an unfinished character before it stays so
            self.num_chars += len(self.decoder.decode(b"", final=True))
        offset = self.num_chars
        self.num_chars += len(self.decoder.decode(data))
        return offset


class Completions:
    """The shapes of /v1/completions, for one request.

    The methods `whole_choice`, `begin`, `chunk` and `end` return the choices of a response: of a
    whole answer, and of the first, middle and last event of a stream.
    """

    param, prefix = "prompt", "cmpl"
    name = chunk_name = "text_completion"
    whole_type, chunk_type = TextCompletion, CompletionChunk

    def __init__(self, tokenizer, model: str, requests: Iterable[Request] = ()):
        self.tokenizer = tokenizer
        id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.envelope = {"id": id, "created": int(time.time()), "model": model}
        # An answer begins a text if nothing before it has text, or if that is echoed.
        self.offsets = [
            TextOffsets(
                request.echo_text is not None
                or not any(read_bytes(tokenizer, i) for i in request.input_ids)
            )
            for request in requests
        ]

    def respond(self, answers: list[Chunk], usage: CompletionUsage) -> BaseModel:
        choices = [self.whole_choice(index, answer) for index, answer in enumerate(answers)]
        return self.whole_type(**self.envelope, object=self.name, choices=choices, usage=usage)

    def respond_chunk(self, choices: list[dict], **fields) -> BaseModel:
        return self.chunk_type(**self.envelope, object=self.chunk_name, choices=choices, **fields)

    def report(self, index: int, tokens: list[TokenLogprob]) -> dict:
        """Return the field `logprobs`; nothing without tokens."""
        if not tokens:
            return {}

        def read(token_id: int) -> str:
            return read_token(self.tokenizer, token_id)[0]

        ids = [token.token_id for token in tokens]
        fields = {
            "tokens": [read(i) for i in ids],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [  # of tokens with the same text, the likeliest
                None if token.top is None else {read(i): p for i, p in reversed(token.top)}
                for token in tokens
            ],
            "text_offset": [self.offsets[index].add(read_bytes(self.tokenizer, i)) for i in ids],
        }
        return {"logprobs": fields}

    def choice(self, index: int, text: str, finish_reason=None) -> dict:
        return {"index": index, "text": text, "finish_reason": finish_reason}

    def whole_choice(self, index: int, answer: Chunk) -> dict:
        choice = self.choice(index, answer.text, answer.finish_reason)
        return choice | self.report(index, answer.logprobs)

    def begin(self, index: int) -> list[dict]:
        return []

    def chunk(self, index: int, chunk: Chunk) -> dict:
        return self.choice(index, chunk.text) | self.report(index, chunk.logprobs)

    def end(self, index: int, reason: str) -> dict:
        return self.choice(index, "", reason)


class ChatCompletions(Completions):
    """The shapes of /v1/chat/completions."""

    param, prefix = "messages", "chatcmpl"
    name, chunk_name = "chat.completion", "chat.completion.chunk"
    whole_type, chunk_type = ChatCompletion, ChatCompletionChunk

    def report(self, index: int, tokens: list[TokenLogprob]) -> dict:
        content = describe_tokens(self.tokenizer, tokens)
        return {"logprobs": {"content": content}} if content else {}

    def choice(self, index: int, delta: dict, finish_reason=None) -> dict:
        return {"index": index, "delta": delta, "finish_reason": finish_reason}

    def whole_choice(self, index: int, answer: Chunk) -> dict:
        message = {"role": "assistant", "content": answer.text}
        fields = {"message": message, "finish_reason": answer.finish_reason}
        return {"index": index} | fields | self.report(index, answer.logprobs)

    def begin(self, index: int) -> list[dict]:
        return [self.choice(index, {"role": "assistant", "content": ""})]

    def chunk(self, index: int, chunk: Chunk) -> dict:
        delta = {"content": chunk.text}
        return self.choice(index, delta) | self.report(index, chunk.logprobs)

    def end(self, index: int, reason: str) -> dict:
        return self.choice(index, {}, reason)
