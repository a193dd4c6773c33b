"""Tokenizer of ChatGLM2: SentencePiece BPE with byte fallback, and the prompt format.

Text is never searched for special tokens: "[gMASK]" or "</s>" in a message are ordinary characters.
The special tokens exist only as ids, put in front of a text by `build_inputs_with_special_tokens`.
This file is also Hugging Face remote code.
"""

import os

import sentencepiece
from transformers import PreTrainedTokenizer

from .configuration_chatglm import check_transformers

check_transformers()

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
        kwargs.setdefault("split_special_tokens", True)  # text is never searched for special tokens
        super().__init__(
            padding_side=padding_side, chat_template=chat_template or CHAT_TEMPLATE, **kwargs
        )

    # As the original: transformers does not know these tokens as special, so `skip_special_tokens`
    # changes nothing.

    @property
    def unk_token(self) -> str:
        return super().__getattr__("unk_token") or "<unk>"

    @property
    def unk_token_id(self) -> None:
        return None

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

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        if token in self.special_tokens:
            return self.special_tokens[token]
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if index >= self.vocab_size:
            raise IndexError(f"id {index} is out of range: there are {self.vocab_size} tokens")
        # As the original: special tokens have no text.
        if index < 3 or index >= self.sp_model.vocab_size():
            return ""
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode_pieces(tokens)

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
        history = history or []
        rounds = [
            ROUND.format(n=n, query=old_query) + response + SEPARATOR
            for n, (old_query, response) in enumerate(history, start=1)
        ]
        return "".join(rounds) + ROUND.format(n=len(history) + 1, query=query)

    def build_round(self, query: str, history) -> list[int]:
        """Return the ids of the new round alone, which continue a conversation.

        SentencePiece puts a space at the start of a text; its id is dropped.
        """
        text = SEPARATOR + ROUND.format(n=len(history) + 1, query=query)
        return self.encode(text, add_special_tokens=False)[1:]

    def apply_chat_template(
        self, conversation, *args, tokenize=True, return_dict=True, tokenizer_kwargs=None, **kwargs
    ):
        """Render messages like PreTrainedTokenizer; the ids begin with `[gMASK] sop`.

        Raises:
            ValueError: `return_assistant_tokens_mask` is requested.
        """
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask needs a fast tokenizer")
        kwargs.pop("sanitize_control_tokens", None)  # text never becomes a control token
        options = {name: kwargs.pop(name) for name in ENCODING_OPTIONS & kwargs.keys()}
        text = super().apply_chat_template(conversation, *args, tokenize=False, **kwargs)
        if not tokenize:
            return text
        encoded = self(text, **options, **(tokenizer_kwargs or {}))
        return encoded if return_dict else encoded["input_ids"]

    def save_vocabulary(self, save_directory, filename_prefix=None) -> tuple[str]:
        """Write `tokenizer.model` into a folder and return its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        name = prefix + self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, name)
        with open(path, "wb") as file:
            file.write(self.sp_model.serialized_model_proto())
        return (path,)


ChatGLMTokenizer.register_for_auto_class()
