"""The answers of openai_api.py: their shapes, with the types of the package `openai`."""

from base64 import b64encode
from collections import defaultdict
from typing import Literal

from openai.types import Completion, CompletionChoice, CreateEmbeddingResponse, Embedding, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from .batching import Chunk, TokenLogprob
from .json_grammar import read_bytes


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class EmbeddingItem(Embedding):
    embedding: list[float] | str  # in base64, a string


class EmbeddingList(CreateEmbeddingResponse):
    data: list[EmbeddingItem]


class CompletionPiece(CompletionChoice):
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(Completion):
    """A `Completion` in a stream: its choices have no `finish_reason` yet."""

    choices: list[CompletionPiece]


def encode_vector(vector, encoding_format: str | None) -> list[float] | str:
    data = vector.numpy().astype("<f4")
    return b64encode(data).decode() if encoding_format == "base64" else data.tolist()


def read_token(tokenizer, token_id: int) -> tuple[str, list[int]]:
    """Return text and bytes of a token; a byte of a longer character is written as \\xe4."""
    data = read_bytes(tokenizer, token_id)
    return data.decode(errors="backslashreplace"), list(data)


class Completions:
    """Shapes of /v1/completions, for one request."""

    param, prefix = "prompt", "cmpl"
    name = chunk_name = "text_completion"
    whole_type, chunk_type = Completion, CompletionChunk

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.num_chars = defaultdict(int)  # of each choice's tokens so far

    def report(self, index: int, tokens: list[TokenLogprob]) -> dict:
        """Return the field `logprobs`, if there is anything to report."""
        if not tokens:
            return {}
        offsets, texts = [], []
        for token in tokens:
            text, data = read_token(self.tokenizer, token.token_id)
            offsets.append(self.num_chars[index])
            texts.append(text)
            self.num_chars[index] += sum(byte & 0xC0 != 0x80 for byte in data)
        top = [{read_token(self.tokenizer, i)[0]: p for i, p in token.top} for token in tokens]
        values = [token.logprob for token in tokens]
        fields = {"tokens": texts, "token_logprobs": values, "text_offset": offsets}
        return {"logprobs": fields | {"top_logprobs": top}}

    def whole(self, index: int, answer: Chunk) -> dict:
        reason = {"finish_reason": answer.finish_reason}
        return {"index": index, "text": answer.text} | reason | self.report(index, answer.logprobs)

    def begin(self, index: int) -> list[dict]:
        return []

    def piece(self, index: int, chunk: Chunk) -> dict:
        reason = {"finish_reason": None}
        return {"index": index, "text": chunk.text} | reason | self.report(index, chunk.logprobs)

    def end(self, index: int, reason: str) -> dict:
        return {"index": index, "text": "", "finish_reason": reason}


class ChatCompletions(Completions):
    """Shapes of /v1/chat/completions."""

    param, prefix = "messages", "chatcmpl"
    name, chunk_name = "chat.completion", "chat.completion.chunk"
    whole_type, chunk_type = ChatCompletion, ChatCompletionChunk

    def token(self, token_id: int, logprob: float) -> dict:
        text, data = read_token(self.tokenizer, token_id)
        return {"token": text, "bytes": data, "logprob": logprob}

    def report(self, index: int, tokens: list[TokenLogprob]) -> dict:
        if not tokens:
            return {}
        content = [
            self.token(token.token_id, token.logprob)
            | {"top_logprobs": [self.token(*top) for top in token.top]}
            for token in tokens
        ]
        return {"logprobs": {"content": content}}

    def whole(self, index: int, answer: Chunk) -> dict:
        message = {"role": "assistant", "content": answer.text}
        fields = {"message": message, "finish_reason": answer.finish_reason}
        return {"index": index} | fields | self.report(index, answer.logprobs)

    def delta(self, index: int, delta: dict, finish_reason=None) -> dict:
        return {"index": index, "delta": delta, "finish_reason": finish_reason}

    def begin(self, index: int) -> list[dict]:
        return [self.delta(index, {"role": "assistant", "content": ""})]

    def piece(self, index: int, chunk: Chunk) -> dict:
        return self.delta(index, {"content": chunk.text}) | self.report(index, chunk.logprobs)

    def end(self, index: int, reason: str) -> dict:
        return self.delta(index, {}, reason)
