"""Answers that follow a JSON schema: a token is only allowed if the schema can still be met.

llguidance has the grammars; this file tells it the bytes of the tokens.
"""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from transformers import LogitsProcessor

from .batching import InvalidRequest, Unavailable

SPACE = "▁"  # U+2581, which pieces have for a space
# If spaces were allowed wherever JSON allows them, a model could write them for ever.
SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_SCHEMA_LENGTH = 2**16  # characters
MAX_CACHED = 4  # compiled schemas
MAX_TOKENS = 2**17  # of which the bytes are kept
COMPILE_TIMEOUT_S = 5
STEP_TIMEOUT_S = 0.5  # the other answers wait for that long, once
LIMITS = LLParserLimits(
    max_grammar_size=50_000,
    initial_lexer_fuel=500_000,
    max_lexer_states=20_000,
    verbose_errors=False,  # an error would have the schema
)


@lru_cache(MAX_TOKENS)
def read_bytes(tokenizer, token_id: int) -> bytes:
    """Return the bytes of a token; none for a token without text, such as a special token."""
    if token_id >= tokenizer.vocab_size:  # rows that pad the model's vocabulary
        return b""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE, " ").encode()


def refuse(reason: str) -> InvalidRequest:
    return InvalidRequest(f"response_format: {reason}", "response_format")


def check(matcher: LLMatcher):
    """Raise the error of a matcher, if it has one: it would only allow the answer to end."""
    if matcher.is_error():
        lines = matcher.get_error().splitlines()
        if not lines[0].endswith(":"):  # else the pattern, a mark and the cause follow
            lines = lines[:1]
        raise refuse(" ".join(line.strip() for line in lines if line.strip(" ^")) + ".")


class Vocabulary:
    """A tokenizer with the attributes that llguidance reads."""

    bos_token_id = None

    def __init__(self, tokenizer, size: int):
        self.tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id
        self.tokens = [read_bytes(tokenizer, i) for i in range(size)]
        self.special_token_ids = [i for i, token in enumerate(self.tokens) if not token]
        for i in self.special_token_ids:
            self.tokens[i] = b"\xff[%d]" % i  # no UTF-8 text has the byte ff

    def __call__(self, data: bytes) -> list[int]:
        ids = []
        for part in re.split(f"({SPACE})", data.decode()):
            if part == SPACE:  # only the tokens of its bytes have this character as text
                pieces = [f"<0x{byte:02X}>" for byte in part.encode()]
                ids += self.tokenizer.convert_tokens_to_ids(pieces)
            else:
                ids += self.encode(part)
        return ids

    def encode(self, text: str) -> list[int]:
        # SentencePiece puts a space before a text, but not after a line feed.
        texts = ["\n", "\n" + text]
        prefix, ids = (self.tokenizer.encode(text, add_special_tokens=False) for text in texts)
        return ids[len(prefix) :]


class JsonGrammar:
    """Makes the processors of requests whose answers are JSON.

    Schemas are compiled one after the other, in a thread of their own: other answers continue,
    because llguidance releases the GIL. `LIMITS` keep a compiled schema below about 50 MB.

    Args:
        vocab_size: The model's size of the vocabulary, which can exceed the tokenizer's.
    """

    def __init__(self, tokenizer, vocab_size: int):
        wrapper = TokenizerWrapper(Vocabulary(tokenizer, vocab_size))
        self.tokenizer = LLTokenizer(wrapper, n_vocab=vocab_size)
        self.thread = ThreadPoolExecutor(1, "json-grammar")
        self.compile_once = lru_cache(MAX_CACHED)(self.compile)

    def compile(self, text: str) -> LLMatcher:
        """Return a matcher for a schema, at the beginning of an answer; answers take copies.

        Raises:
            InvalidRequest: The schema is invalid or too large, or llguidance does not support it.
        """
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=SEPARATORS)
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=LIMITS)
        check(matcher)
        matcher.compute_bitmask()
        check(matcher)
        # Some schemas turn out to be too large behind the first bracket.
        begun = matcher.deep_copy()
        begun.consume_tokens(self.tokenizer.tokenize_bytes(begun.compute_ff_bytes()))
        begun.compute_bitmask()
        check(begun)
        return matcher

    async def compile_in_time(self, schema: dict) -> LLMatcher:
        """Compile a schema, or find it compiled.

        Raises:
            InvalidRequest: As `compile`, and if that takes too long.
            Unavailable: Other schemas took too long.
        """
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_LENGTH:
            reason = f"the schema has {len(text)} characters; the most is {MAX_SCHEMA_LENGTH}."
            raise refuse(reason)
        work = self.thread.submit(self.compile_once, text)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), COMPILE_TIMEOUT_S)
        except TimeoutError as error:
            if work.cancelled():  # it has not begun
                raise Unavailable("Other schemas are being compiled: try again later.") from error
            reason = f"compiling takes more than {COMPILE_TIMEOUT_S} s: simplify the schema."
            raise refuse(reason) from error


class JsonProcessor(LogitsProcessor):
    """Sets the scores of the tokens that the grammar forbids to -inf; for one answer.

    Raises:
        InvalidRequest: When called, if the grammar turns out to be too large or too slow.
    """

    def __init__(self, matcher: LLMatcher, prompt_length: int):
        self.matcher, self.length = matcher.deep_copy(), prompt_length
        self.thread = ThreadPoolExecutor(1, "json-answer")

    def compute_mask(self, token_ids: list[int]) -> bytes:
        self.matcher.consume_tokens(token_ids)
        mask = self.matcher.compute_bitmask()
        check(self.matcher)
        return mask

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor):
        work = self.thread.submit(self.compute_mask, input_ids[0, self.length :].tolist())
        try:
            mask = work.result(STEP_TIMEOUT_S)
        except TimeoutError as error:
            reason = f"a token takes more than {STEP_TIMEOUT_S} s: simplify the schema."
            raise refuse(reason) from error
        self.length = input_ids.shape[1]
        bits = np.frombuffer(mask, np.uint8)
        allowed = np.unpackbits(bits, count=scores.shape[1], bitorder="little")
        return scores.masked_fill(torch.from_numpy(allowed == 0), -torch.inf)
