"""Tokenizer of ChatGLM2: SentencePiece BPE with byte fallback, and the prompt format.

Text is never searched for control tokens: "[gMASK]" or "</s>" in a message are ordinary characters.
Control tokens exist only as ids: `build_inputs_with_special_tokens` puts them in front of a text,
and `apply_chat_template` ends a finished answer with one. Tokens that a user adds split text.
This file is also Hugging Face remote code.
"""

import operator
import os
from functools import partial
from itertools import groupby

import sentencepiece
from transformers import PreTrainedTokenizer
from transformers.utils import logging

from .configuration_chatglm import check_transformers

check_transformers()
logger = logging.get_logger(__name__)

SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ENCODING_OPTIONS = {"padding", "truncation", "max_length", "return_tensors"}

# The prompt format. The answer follows, and a blank line separates it from the next round.
ROUND = "[Round {n}]\n\n问：{query}\n\n答："
SEPARATOR = "\n\n"
QUESTION, ANSWER = ROUND.split("{query}")


def insert_number(text: str, n: str) -> str:
    """Return the Jinja expression of a text with `{n}`, for the expression of this number."""
    return repr(text).replace("{n}", f"' ~ {n} ~ '")


# The chat template accepts messages in any order and drops nothing: all system texts stand before
# the first question, consecutive messages of one role are joined by a blank line, and an answer
# without a question gets an empty question.
CHAT_TEMPLATE = """\
{%- macro text(message) -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content or [] -%}
            {%- if part.type != 'text' -%}
                {{- raise_exception('Only text is supported, not a part of type ' ~ part.type) -}}
            {%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- raise_exception('ChatGLM2 is not trained for tools') -}}
{%- endif -%}
{%- set chat = namespace(system='', round=1, last='') -%}
{%- for message in messages if message.role == 'system' -%}
    {%- set chat.system = chat.system ~ text(message) ~ '\\n\\n' -%}
{%- endfor -%}
{{- FIRST_QUESTION -}}
{%- for message in messages if message.role != 'system' -%}
    {%- if message.role not in ['user', 'assistant'] -%}
        {{- raise_exception('The roles are system, user and assistant, not ' ~ message.role) -}}
    {%- endif -%}
    {%- if message.tool_calls -%}
        {{- raise_exception('ChatGLM2 is not trained for tool_calls') -}}
    {%- endif -%}
    {%- if loop.first -%}
        {{- chat.system if message.role == 'user' else chat.system[:-2] -}}
    {%- endif -%}
    {%- if message.role == chat.last -%}
        {{- SEPARATOR -}}
    {%- elif message.role == 'assistant' -%}
        {{- ANSWER -}}
    {%- elif chat.last == 'assistant' -%}
        {%- set chat.round = chat.round + 1 -%}
        {{- NEXT_QUESTION -}}
    {%- endif -%}
    {{- text(message) -}}
    {%- set chat.last = message.role -%}
{%- endfor -%}
{%- if chat.last == '' -%}
    {{- chat.system[:-2] -}}
{%- endif -%}
{%- if chat.last != 'assistant' -%}
    {{- ANSWER -}}
{%- elif add_generation_prompt -%}
    {{- EMPTY_ROUND -}}
{%- endif -%}
"""
for name, expression in {
    "FIRST_QUESTION": repr(QUESTION.format(n=1)),
    "NEXT_QUESTION": insert_number(SEPARATOR + QUESTION, "chat.round"),
    "EMPTY_ROUND": insert_number(SEPARATOR + QUESTION + ANSWER, "(chat.round + 1)"),
    "ANSWER": repr(ANSWER),
    "SEPARATOR": repr(SEPARATOR),
}.items():
    CHAT_TEMPLATE = CHAT_TEMPLATE.replace(name, expression)


def check_text(text: str):
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, not {repr(text)[:40]} ({type(text).__name__})")


def replace_surrogates(text: str) -> str:
    """Return a text that UTF-8 can express: a surrogate without its other half becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


class ChatGLMTokenizer(PreTrainedTokenizer):
    """The tokenizer of ChatGLM2, with the ids, texts and padding of the original.

    The ids are those of the SentencePiece pieces (`<unk>` 0, `<s>` 1, `</s>` 2, 256 bytes, ...),
    then those of `SPECIAL_TOKENS`.

    Args:
        vocab_file: Path of `tokenizer.model`.
        padding_side: "left" for generation; "right" can be used for training.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(self, vocab_file, padding_side="left", chat_template=None, **kwargs):
        self.vocab_file = vocab_file
        with open(vocab_file, "rb") as file:
            proto = file.read()
        if proto.startswith(b"version https://git-lfs"):
            raise ValueError(  # transformers hides the text of an OSError
                f"{vocab_file} ({len(proto)} bytes) is a Git LFS pointer and not the file itself: "
                "run `git lfs pull` in the folder, or download the file and put it there."
            )
        self.sp_model = sentencepiece.SentencePieceProcessor()
        try:
            self.sp_model.load_from_serialized_proto(proto or b"empty")
        except RuntimeError as error:
            raise ValueError(
                f"{vocab_file} ({len(proto)} bytes) is truncated or damaged: download it again."
            ) from error
        first_id = self.sp_model.vocab_size()
        self.special_tokens = {token: first_id + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.control_tokens = dict(zip(("<unk>", "<s>", "</s>"), range(3), strict=True))
        self.control_tokens |= self.special_tokens
        added = kwargs.pop("added_tokens_decoder", {})
        super().__init__(
            padding_side=padding_side, added_tokens_decoder=self.check_added(added), **kwargs
        )
        self.chat_template = chat_template or CHAT_TEMPLATE

    @classmethod
    def from_pretrained(cls, *args, chat_template=None, split_special_tokens=False, **kwargs):
        """Load like PreTrainedTokenizer, but with the prompt format of this class.

        Args:
            chat_template: Used instead of this class's own. A template in the folder is not used.
            split_special_tokens: True to read added special tokens in a text as ordinary text. The
                folder's value is not used: earlier versions wrote True for another purpose.
        """
        tokenizer = super().from_pretrained(
            *args, split_special_tokens=split_special_tokens, **kwargs
        )
        found = tokenizer.chat_template
        tokenizer.chat_template = chat_template or CHAT_TEMPLATE
        if chat_template is None and found != CHAT_TEMPLATE:
            logger.warning(
                f"{tokenizer.name_or_path}: its chat template is not used, ChatGLM2 has its own "
                "prompt format; in code, give it as chat_template to use it nevertheless."
            )
        return tokenizer

    def check_added(self, added: dict) -> dict:
        """Return the added tokens of a folder by id, without the control tokens.

        Raises:
            ValueError: An id is below the first free one, and its token is another one.
        """
        for i, token in added.items():
            if i < self.vocab_size and (i < 0 or self.name_token(i) != str(token)):
                raise ValueError(
                    f"added_tokens_decoder: the id of {str(token)!r} is {i}, which is taken: "
                    f"ids of added tokens begin at {self.vocab_size}."
                )
        return {i: token for i, token in added.items() if str(token) not in self.control_tokens}

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        """Add tokens. Control tokens are known already, and text is not to be split at them."""
        added = [token for token in new_tokens if str(token) not in self.control_tokens]
        return super()._add_tokens(added, special_tokens=special_tokens)

    def name_token(self, token_id: int) -> str:
        """Return the token of an original id; unlike when decoding, also of a control token."""
        if token_id < self.sp_model.vocab_size():
            return self.sp_model.id_to_piece(token_id)
        return SPECIAL_TOKENS[token_id - self.sp_model.vocab_size()]

    def __setattr__(self, key, value):
        name = key.removesuffix("_id")
        if name != key and name in self.SPECIAL_TOKENS_ATTRIBUTES and value is not None:
            value = operator.index(value)
            if 0 <= value < self.vocab_size:
                key, value = name, self.name_token(value)
            elif value not in self.added_tokens_decoder:
                raise ValueError(f"{key} = {value}: ids are from 0 to {len(self) - 1}")
        super().__setattr__(key, value)

    # As the original: transformers does not know these tokens as special, so `skip_special_tokens`
    # changes nothing.

    @property
    def unk_token(self) -> str:
        return super().__getattr__("unk_token") or "<unk>"

    @property
    def unk_token_id(self) -> int | None:
        return super().__getattr__("unk_token_id")  # as the original: None unless it was set

    @property
    def pad_token(self) -> str:
        return super().__getattr__("pad_token") or "<unk>"

    @property
    def pad_token_id(self) -> int:
        return self.convert_tokens_to_ids(self.pad_token)

    @property
    def eos_token(self) -> str:
        return super().__getattr__("eos_token") or "</s>"

    @property
    def eos_token_id(self) -> int:
        return self.convert_tokens_to_ids(self.eos_token)

    @property
    def vocab_size(self) -> int:
        return self.sp_model.vocab_size() + len(self.special_tokens)

    def get_vocab(self) -> dict[str, int]:
        pieces = self.sp_model.id_to_piece(list(range(self.sp_model.vocab_size())))
        ids = {piece: i for i, piece in enumerate(pieces)}
        return ids | self.special_tokens | self.get_added_vocab()

    def get_command(self, token: str) -> int:
        """Return the id of "<bos>", "<eos>", "<pad>" or one of `SPECIAL_TOKENS`.

        Raises:
            AssertionError: `token` is none of them (as the original).
        """
        commands = {"<bos>": self.sp_model.bos_id(), "<eos>": self.sp_model.eos_id(), "<pad>": 0}
        commands |= self.special_tokens
        if token not in commands:
            raise AssertionError(f"{token} is not a special token: {', '.join(commands)}")
        return commands[token]

    def get_prefix_tokens(self) -> list[int]:
        """Return the ids of `[gMASK] sop`, which stand in front of every text."""
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    def tokenize(self, text, split_special_tokens=None, follows=False, **kwargs) -> list[str]:
        """Return the tokens of a text.

        Args:
            split_special_tokens: True to read added special tokens as ordinary text.
            follows: True if other text is before it: then SentencePiece puts no space there.

        Raises:
            TypeError: `text` is not a string.
            NotImplementedError: Offsets are requested.
        """
        if kwargs.get("return_offsets_mapping"):
            raise NotImplementedError("return_offsets_mapping needs a fast tokenizer")
        check_text(text)
        text = replace_surrogates(text)
        if not self.get_added_vocab():
            return self._tokenize(text, follows)
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        tokens = []
        for i, piece in enumerate(self.split_at_added_tokens(text, split_special_tokens)):
            tokens += [piece] if i % 2 else self._tokenize(piece, follows or bool(tokens))
        return tokens

    def split_at_added_tokens(self, text: str, split_special_tokens: bool) -> list[str]:
        """Return texts and added tokens by turns; the first and the last are texts."""
        added = {token.content: token for token in self.added_tokens_decoder.values()}
        fragments = self.tokens_trie.split(text) or [""]
        pieces, texts, strip_next = [], [], False
        neighbours = zip(["", *fragments[:-1]], [*fragments[1:], ""], strict=True)
        for fragment, (before, after) in zip(fragments, neighbours, strict=True):
            token = added.get(fragment)
            is_inside_word = is_word(before[-1:]) or is_word(after[:1])
            if (
                token is None
                or (token.special and split_special_tokens)
                or (token.single_word and is_inside_word)
            ):
                texts.append(fragment)
                continue
            text = "".join(texts)
            text = text.lstrip() if strip_next else text
            pieces += [text.rstrip() if token.lstrip else text, fragment]
            texts, strip_next = [], token.rstrip
        text = "".join(texts)
        return [*pieces, text.lstrip() if strip_next else text]

    def _tokenize(self, text: str, follows=False) -> list[str]:
        if follows:  # after a line feed, which is two tokens at the start of a text
            return self.sp_model.encode("\n" + text, out_type=str)[2:]
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        if token in self.special_tokens:
            return self.special_tokens[token]
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        # As the original: special tokens have no text; nor do the ids that pad the model's matrix.
        if index < 3 or index >= self.sp_model.vocab_size():
            return ""
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text = ""
        for is_added, group in groupby(tokens, self.get_added_vocab().__contains__):
            pieces = list(group)
            if is_added:
                text += "".join(pieces)
            elif text:  # SentencePiece drops a space only at the start of a text
                text += self.sp_model.decode_pieces(["<0x0A>", *pieces])[1:]
            else:
                text = self.sp_model.decode_pieces(pieces)
        return text

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        """`[gMASK] sop a`, or `[gMASK] sop a b </s>` for a pair."""
        pair = [] if token_ids_1 is None else [*token_ids_1, self.get_command("<eos>")]
        return [*self.get_prefix_tokens(), *token_ids_0, *pair]

    def get_special_tokens_mask(
        self, token_ids_0, token_ids_1=None, already_has_special_tokens=False
    ) -> list[int]:
        """Return 1 for each token that `build_inputs_with_special_tokens` adds, else 0."""
        if already_has_special_tokens:
            special = {self.get_command("<eos>"), *self.special_tokens.values()}
            special |= set(self.all_special_ids)
            return [int(i in special) for i in token_ids_0]
        pair = [] if token_ids_1 is None else [*[0] * len(token_ids_1), 1]
        return [1, 1, *[0] * len(token_ids_0), *pair]

    def _pad(self, encoded_inputs, *args, padding_side=None, **kwargs):
        """Pad, and add `position_ids`: 0, 1, ... from the first real token on, 0 for padding."""
        length = len(encoded_inputs["input_ids"])
        positions = list(encoded_inputs.get("position_ids", range(length)))
        encoded_inputs = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        padding = [0] * (len(encoded_inputs["input_ids"]) - length)
        is_left = (padding_side or self.padding_side) == "left"
        encoded_inputs["position_ids"] = padding + positions if is_left else positions + padding
        return encoded_inputs

    def build_prompt(self, query: str, history=None) -> str:
        """Return the prompt of a conversation.

        Args:
            query: The new question.
            history: Earlier rounds, a list of (question, answer).

        Example:
            >>> tokenizer.build_prompt("你好")
            '[Round 1]\\n\\n问：你好\\n\\n答：'
        """
        check_text(query)
        history = history or []
        rounds = [
            ROUND.format(n=n, query=old_query) + response + SEPARATOR
            for n, (old_query, response) in enumerate(history, start=1)
        ]
        return "".join(rounds) + ROUND.format(n=len(history) + 1, query=query)

    def build_round(self, query: str, history) -> list[int]:
        """Return the ids of the new round alone, which continue a conversation."""
        check_text(query)
        text = SEPARATOR + ROUND.format(n=len(history) + 1, query=query)
        return self.convert_tokens_to_ids(self.tokenize(text, follows=True))

    def apply_chat_template(
        self,
        conversation,
        tools=None,
        documents=None,
        chat_template=None,
        add_generation_prompt=False,
        continue_final_message=False,
        tokenize=True,
        return_dict=True,
        tokenizer_kwargs=None,
        **kwargs,
    ):
        """Render messages like PreTrainedTokenizer; control tokens exist only in the ids.

        They begin with `[gMASK] sop`, and end with the end of text if the last message is an answer
        that is not to be continued. Answers before it have no end, as in the prompts of `chat`.

        Args:
            chat_template: Used instead of the own template; its answers get no end.

        Raises:
            ValueError: `return_assistant_tokens_mask` is requested.
        """
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError(
                "return_assistant_tokens_mask needs a fast tokenizer: mask the ids of "
                "messages[:-1] with add_generation_prompt=True, with which these ids begin"
            )
        encoding = dict(tokenizer_kwargs or {})
        if kwargs.pop("sanitize_control_tokens", False):
            encoding["split_special_tokens"] = True
        encoding |= {name: kwargs.pop(name) for name in ENCODING_OPTIONS & kwargs.keys()}
        kwargs |= {"tools": tools, "documents": documents, "chat_template": chat_template}
        render = partial(super().apply_chat_template, tokenize=False, **kwargs)
        text = render(
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        if not tokenize:
            return text
        is_own = self.get_chat_template(chat_template, tools) == CHAT_TEMPLATE
        if is_own and not add_generation_prompt and not continue_final_message:
            end = partial(self.end_answer, render, encoding.get("split_special_tokens"))
            is_batch = isinstance(text, list)
            text = [*map(end, conversation, text)] if is_batch else end(conversation, text)
        encoded = self(text, **encoding)
        return encoded if return_dict else encoded["input_ids"]

    def end_answer(self, render, split_special_tokens, messages, text: str) -> str | list[int]:
        """Return the ids of a conversation that ends with an answer, else its text.

        The ids of the prompt are those for generation, so that training masks the right ones: "：“"
        is one token, but the model generates "“" alone.
        """
        messages = getattr(messages, "messages", messages)
        if render(messages, add_generation_prompt=True) == text:
            return text
        prompt = render(messages[:-1], add_generation_prompt=True) if len(messages) > 1 else ""
        if not text.startswith(prompt):  # two answers in a row
            prompt = ""
        tokens = self.tokenize(prompt, split_special_tokens)
        tokens += self.tokenize(text[len(prompt) :], split_special_tokens, bool(prompt))
        return [*self.convert_tokens_to_ids(tokens), self.eos_token_id]

    def save_vocabulary(self, save_directory, filename_prefix=None) -> tuple[str]:
        """Write `tokenizer.model` into a folder and return its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        name = prefix + self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, name)
        with open(path, "wb") as file:
            file.write(self.sp_model.serialized_model_proto())
        return (path,)


ChatGLMTokenizer.register_for_auto_class()
