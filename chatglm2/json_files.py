"""The JSON files of a checkpoint folder: read them, and check all values before they are used."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from .configuration_chatglm import (
    MAX_CONTEXT,
    MAX_ID,
    ChatGLMConfig,
    LibraryFields,
    check_fields,
    checked,
    choice,
    find_implementations,
    id_or_ids,
    integer,
    number,
    select_fields,
)
from .errors import one_line
from .quantization import get_quantization
from .tokenization_chatglm import ChatGLMTokenizer

MAX_BYTES = 64 * 2**20
TOKEN_FLAGS = {"lstrip", "rstrip", "single_word", "normalized", "special"}
TOKEN = "a text, or an object with content and true or false for " + ", ".join(sorted(TOKEN_FLAGS))


def read_text(path: Path) -> str:
    """Return the text of a file of at most `MAX_BYTES`.

    Raises:
        ValueError: It is something else than such a file, or not in UTF-8.
        OSError: It cannot be read.
    """
    if not path.is_file():  # such as a device, which may have no end
        raise ValueError(f"{path} is no regular file: download it again.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {MAX_BYTES}: download it again.")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): download it again.") from error


def refuse_duplicates(pairs: list[tuple]) -> dict:
    """Return an object of a JSON file; `json` would keep the last of equal names silently."""
    content = dict(pairs)
    if len(content) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r:.80} is given twice")
    return content


def read_json(path: Path) -> dict:
    """Return the object in a JSON file.

    Raises:
        ValueError: The file is not JSON in UTF-8, or holds no object.
        OSError: It cannot be read.
    """
    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: download it again.")
    return content


# config.json.

# Fields for classifiers, for remote code and for outputs, which this package does not use.
UNUSED = {"auto_map", "num_labels", "output_attentions"}
UNUSED |= {field.name for field in fields(PreTrainedConfig)} - {"dtype"}


def read_config(folder: Path) -> ChatGLMConfig:
    """Return the configuration of a checkpoint, from the fields of config.json that are used.

    Raises:
        ValueError: A value is not allowed, or the model is quantized by another library.
        OSError: The file cannot be read.
    """
    path = folder / "config.json"
    content = read_json(path)
    used = {
        name: value
        for kind in (ChatGLMConfig, LibraryFields)
        for name, value in select_fields(kind, content).items()
        if name not in UNUSED
    }
    if ignored := find_implementations(content):
        print(f"{path}: {', '.join(ignored)}: ignored, a folder chooses no code.", file=sys.stderr)
    try:
        config = ChatGLMConfig.from_dict(used)
        check_quantization(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct it, or download the file again.") from error
    return config


def check_quantization(config: ChatGLMConfig):
    try:
        get_quantization(config)
    except ValueError as error:
        raise ValueError(f"quantization_config: {error}") from error


# generation_config.json.


def is_ids(value: list) -> bool:
    return all(0 <= i <= MAX_ID for i in value)


@strict
@dataclass
class GenerationFields:
    """The fields of generation_config.json, or of config.json if that file is missing."""

    max_length: int | None = integer(0, MAX_CONTEXT)
    max_new_tokens: int | None = integer(1, MAX_CONTEXT)
    min_length: int | None = integer(0, MAX_CONTEXT)
    min_new_tokens: int | None = integer(0, MAX_CONTEXT)
    early_stopping: bool | str | None = choice(True, False, "never")
    max_time: float | int | None = number(0, 1e9)
    stop_strings: str | list[str] | None
    do_sample: bool | None
    num_beams: int | None = integer(1, 1000)
    num_return_sequences: int | None = integer(1, 1000)
    use_cache: bool | None
    cache_implementation: str | None
    temperature: float | int | None = number(0, 100)
    top_k: int | None = integer(0, MAX_ID)
    top_p: float | int | None = number(0, 1)
    min_p: float | int | None = number(0, 1)
    typical_p: float | int | None = number(0, 1)
    epsilon_cutoff: float | int | None = number(0, 1)
    eta_cutoff: float | int | None = number(0, 1)
    repetition_penalty: float | int | None = number(0.01, 100)
    encoder_repetition_penalty: float | int | None = number(0.01, 100)
    length_penalty: float | int | None = number(-100, 100)
    no_repeat_ngram_size: int | None = integer(0, MAX_CONTEXT)
    bad_words_ids: list[list[int]] | None = checked(
        "a list of lists of ids", lambda value: value and all(ids and is_ids(ids) for ids in value)
    )
    renormalize_logits: bool | None
    remove_invalid_values: bool | None
    suppress_tokens: list[int] | None = checked("a list of ids", is_ids)
    begin_suppress_tokens: list[int] | None = checked("a list of ids", is_ids)
    forced_bos_token_id: int | None = integer(0, MAX_ID)
    forced_eos_token_id: int | list[int] | None = id_or_ids()
    guidance_scale: float | int | None = number(0, 100)
    output_attentions: bool | None
    output_hidden_states: bool | None
    output_scores: bool | None
    output_logits: bool | None
    return_dict_in_generate: bool | None
    pad_token_id: int | None = integer(0, MAX_ID)
    bos_token_id: int | None = integer(0, MAX_ID)
    eos_token_id: int | list[int] | None = id_or_ids()
    prompt_lookup_num_tokens: int | None = integer(1, 1000)


def read_generation_config(folder: Path) -> GenerationConfig:
    """Return the generation config of a checkpoint; of config.json if it has none of its own.

    Raises:
        ValueError: A value is not allowed, alone or beside another one.
        OSError: A file cannot be read.
    """
    path = folder / "generation_config.json"
    has_own = path.exists()
    path = path if has_own else folder / "config.json"
    content = read_json(path)
    used = select_fields(GenerationFields, content)
    is_derived = not has_own or content.get("_from_model_config") is True
    try:
        check_fields(GenerationFields, used)
        for field in fields(GenerationFields):  # transformers refuses 1 for 1.0
            if float in get_args(field.type) and used.get(field.name) is not None:
                used[field.name] = float(used[field.name])
        config = GenerationConfig(**used, _from_model_config=is_derived)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}; correct it, or delete the field.") from error
    return config


# The tokenizer's files.


def is_token(value) -> bool:
    if not isinstance(value, dict):
        return isinstance(value, str)
    flags = {name: flag for name, flag in value.items() if name not in ("__type", "content", "id")}
    return (
        isinstance(value.get("content"), str)
        and flags.keys() <= TOKEN_FLAGS
        and all(isinstance(flag, bool) for flag in flags.values())
    )


def token():
    return checked(TOKEN, is_token)


def tokens():
    return checked(
        "a list or an object of tokens",
        lambda value: all(map(is_token, value.values() if isinstance(value, dict) else value)),
    )


@strict
@dataclass
class TokenizerFields:
    """The fields of tokenizer_config.json and special_tokens_map.json."""

    model_max_length: int | float | None = number(1, 1e31)
    max_len: int | float | None = number(1, 1e31)
    padding_side: str = choice("left", "right")
    truncation_side: str = choice("left", "right")
    split_special_tokens: bool
    clean_up_tokenization_spaces: bool | None
    do_lower_case: bool | None
    remove_space: bool | None
    bos_token: str | dict | None = token()
    eos_token: str | dict | None = token()
    unk_token: str | dict | None = token()
    sep_token: str | dict | None = token()
    pad_token: str | dict | None = token()
    cls_token: str | dict | None = token()
    mask_token: str | dict | None = token()
    additional_special_tokens: list | None = tokens()
    extra_special_tokens: list | dict | None = tokens()
    model_specific_special_tokens: dict | None = tokens()
    added_tokens_decoder: dict = checked(
        "an object from ids to tokens",
        lambda value: all(
            i.isdigit() and int(i) <= MAX_ID and isinstance(added, dict) and is_token(added)
            for i, added in value.items()
        ),
    )
    chat_template: str | list[dict[str, str]] | dict[str, str] | None
    model_input_names: list[str] = checked(
        "a list with input_ids", lambda names: "input_ids" in names
    )
    init_inputs: list = checked("an empty list", lambda value: not value)
    fast_tokenizer_files: list[str]
    chat_control_tokens: list[str] | None
    tokenizer_class: str | None
    auto_map: dict | list | None


@strict
@dataclass
class AddedTokens:
    """The fields of added_tokens.json, by another name: it has no fixed ones."""

    added_tokens: dict[str, int] = checked(
        "an object from texts to ids", lambda value: is_ids(value.values())
    )


@strict
@dataclass
class FastTokenizerFields:
    """The field of tokenizer.json that transformers reads for this tokenizer."""

    added_tokens: list[dict] = checked(
        "a list of tokens with ids",
        lambda value: all(
            is_token(added) and type(added.get("id")) is int and 0 <= added["id"] <= MAX_ID
            for added in value
        ),
    )


TOKENIZER_FILES = {
    "tokenizer_config.json": TokenizerFields,
    "special_tokens_map.json": TokenizerFields,
    "added_tokens.json": AddedTokens,
    "tokenizer.json": FastTokenizerFields,
}


def check_tokenizer_files(folder: Path):
    """Check the files beside tokenizer.model that transformers reads for a tokenizer.

    Raises:
        ValueError: A value is not allowed.
        OSError: A file cannot be read.
    """
    for name, kind in TOKENIZER_FILES.items():
        if not (path := folder / name).exists():
            continue
        content = read_json(path)
        if kind is AddedTokens:
            content = {"added_tokens": content}
        if kind is FastTokenizerFields:  # transformers reads this field only, and needs it
            content = {"added_tokens": content.get("added_tokens")}
        try:
            check_fields(kind, content)
            for field in content:
                if field == "self" or callable(getattr(ChatGLMTokenizer, field, None)):
                    raise ValueError(f"{field} is no field of a tokenizer but a name in its code")
        except ValueError as error:
            raise ValueError(f"{path}: {error}; correct it, or delete the field.") from error
    if (path := folder / "chat_template.jinja").exists():
        read_text(path)
