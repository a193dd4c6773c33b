"""Answers that follow a JSON schema: a token is only allowed if the schema can still be met.

llguidance has the grammars; this file tells it the bytes of the tokens.
"""

import json
import re

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from transformers import LogitsProcessor

# If spaces were allowed wherever JSON allows them, a model could write them for ever.
SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def read_bytes(tokenizer, token_id: int) -> bytes:
    """Return the bytes of a token; none for a token without text, such as a special token."""
    if token_id >= tokenizer.vocab_size:  # rows that pad the model's vocabulary
        return b""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


def check(matcher: LLMatcher):
    """Raise the error of a matcher, if it has one: it would only allow the answer to end."""
    if matcher.is_error():
        lines = matcher.get_error().splitlines()
        if not lines[0].endswith(":"):  # else the pattern, a mark and the cause follow
            lines = lines[:1]
        raise ValueError(" ".join(line.strip() for line in lines if line.strip(" ^")))


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
        # SentencePiece puts a space before a text, but not after a line feed.
        texts = ["\n", "\n" + data.decode()]
        prefix, ids = (self.tokenizer.encode(text, add_special_tokens=False) for text in texts)
        return ids[len(prefix) :]


class JsonGrammar:
    """Makes the processors of requests whose answers are JSON.

    Args:
        vocab_size: The model's size of the vocabulary, which can exceed the tokenizer's.
    """

    def __init__(self, tokenizer, vocab_size: int):
        wrapper = TokenizerWrapper(Vocabulary(tokenizer, vocab_size))
        self.tokenizer = LLTokenizer(wrapper, n_vocab=vocab_size)

    def compile(self, schema: dict, prompt_length: int) -> "JsonProcessor":
        """Return a processor for one answer.

        Raises:
            ValueError: The schema is invalid, or llguidance does not support it.
        """
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SEPARATORS)
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        check(matcher)
        return JsonProcessor(matcher, prompt_length)


class JsonProcessor(LogitsProcessor):
    """Sets the scores of the tokens that the grammar forbids to -inf; for one answer.

    Raises:
        ValueError: When called, if the grammar turns out to be too large.
    """

    def __init__(self, matcher: LLMatcher, prompt_length: int):
        self.matcher, self.length = matcher, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor):
        self.matcher.consume_tokens(input_ids[0, self.length :].tolist())
        self.length = input_ids.shape[1]
        mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        check(self.matcher)
        allowed = np.unpackbits(mask, count=scores.shape[1], bitorder="little")
        return scores.masked_fill(torch.from_numpy(allowed == 0), -torch.inf)
