"""Recognise a folder: a ChatGLM2 checkpoint, or what else it holds and which program serves that.

Only names, JSON files and the headers of weight files are read.
"""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from .configuration_chatglm import ChatGLMConfig
from .json_files import read_json, read_text
from .placement import create_empty_model
from .weights_chatglm import check_weights, find_weight_files, read_all_shapes

ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|observation|>")
BASE_PREFIX = "transformer."
PREFIX_KEYS = f"{BASE_PREFIX}prefix_encoder."
COMPUTED = "rotary_pos_emb.inv_freq"  # not learnt
WRAPPERS = {  # beginnings of tensor names
    "base_model.model.": "PEFT: merge it with merge_and_unload()",
    "module.": "DistributedDataParallel: use its .module",
    "_orig_mod.": "torch.compile: use its ._orig_mod",
    "model.": "another model: use its .model",
}
OTHERS = {  # patterns for the name of a model: what it is, and what serves it
    r"codegeex2": ("CodeGeeX2", "https://github.com/THUDM/CodeGeeX2"),
    r"chatglm3": ("ChatGLM3", "https://github.com/THUDM/ChatGLM3"),
    r"glm-?4": ("GLM-4", "https://github.com/THUDM/GLM-4 or transformers' GlmForCausalLM"),
}
FIRST_GENERATION = {"inner_hidden_size", "max_sequence_length", "position_encoding_2d"}
BASE = "a ChatGLM2 checkpoint (such as THUDM/chatglm2-6b)"


def check_kind(folder: Path):
    """Check that a folder holds nothing else than a ChatGLM2 checkpoint; files may be missing.

    Raises:
        ValueError: It does; the message is one line that names it and the next step.
        OSError: A file cannot be read, or a weight file is damaged.
    """
    if (folder / "adapter_config.json").exists():  # transformers would load it, and its base
        kind = "a model and a LoRA adapter" if find_weight_files(folder) else "a LoRA adapter"
        raise ValueError(
            f"{folder} holds {kind}: put the adapter into a folder of its own, and give --model "
            f"{BASE} and --adapter FOLDER."
        )
    if (folder / "config.json").exists():
        check_description(folder)


def check_description(folder: Path):
    """Check the JSON files and the tokenizer as `check_kind` does, without the weights."""
    path = folder / "config.json"
    kind = (config := read_json(path)).get("model_type")
    if kind == "glm":
        raise ValueError(
            f"{path} has model_type 'glm', transformers' own GLM, as chatglm2.export writes: load "
            f"it with transformers or vLLM, or give {BASE}."
        )
    if kind != "chatglm":
        raise ValueError(f"{path} has model_type {kind!r:.60}, not 'chatglm': give {BASE}.")
    if FIRST_GENERATION & config.keys() or "multi_query_attention" not in config:
        raise ValueError(
            f"{path} has no multi_query_attention, so it is not ChatGLM2 but perhaps the first "
            f"ChatGLM-6B, which https://github.com/THUDM/ChatGLM-6B serves: give {BASE}."
        )
    if found := find_other_model(folder, config):
        evidence, (name, program) = found
        raise ValueError(
            f"{evidence}, so it is {name}, whose prompts differ: use {program}, or give {BASE}."
        )


def find_other_model(folder: Path, config: dict) -> tuple | None:
    """Return the evidence for another model of the same architecture, and its row of `OTHERS`."""
    chatglm3, glm4 = OTHERS[r"chatglm3"], OTHERS[r"glm-?4"]
    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path) if path.exists() else {}
    for file, fields in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        for field in ("_name_or_path", "name_or_path"):
            if found := find_name(fields.get(field)):
                return f"{folder / file} has {field} {fields[field]!r}", found
    for part in folder.absolute().parts:  # of the hub's cache; other folders may have any name
        if part.startswith("models--") and (found := find_name(part)):
            return (
                f"{folder} is a copy of {part.removeprefix('models--').replace('--', '/')}",
                found,
            )
    if is_tiktoken(folder / "tokenizer.model"):
        return f"{folder / 'tokenizer.model'} is a vocabulary of tiktoken", glm4
    templates = [tokenizer.pop("chat_template", None)]
    if (file := folder / "chat_template.jinja").exists():
        templates.append(read_text(file))
    if any("[gMASK]" in str(text) and "<|" in str(text) for text in templates):
        return f"{folder} has a chat template with [gMASK] and roles such as <|user|>", chatglm3
    code = folder / "tokenization_chatglm.py"
    for file, text in ((path, str(tokenizer)), (code, read_text(code) if code.exists() else "")):
        if token := next((token for token in ROLE_TOKENS if token in text), None):
            return f"{file} knows the token {token}", chatglm3
    return None


def find_name(name) -> tuple | None:
    """Return the row of `OTHERS` for the name or path of a model, such as THUDM/chatglm3-6b."""
    parts = re.split(r"[/\\]|--", name.lower()) if isinstance(name, str) else []
    for part in reversed(parts):
        if "chatglm2" in part:
            return None
        for pattern, row in OTHERS.items():
            if re.match(pattern, part):
                return row
    return None


def is_tiktoken(path: Path) -> bool:
    """Return True for lines of base64 text and number, False for a SentencePiece model."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        lines = [line.rstrip() for line in islice(iter(lambda: file.readline(1024), b""), 3)]
    return bool(lines) and all(re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", line) for line in lines)


# Weight files.


def check_names(folder: Path, names: Iterable[str]):
    """Check that tensor names are those of a whole model, and not of a wrapped one."""
    names = set(names)
    if names and all(name.startswith(PREFIX_KEYS) for name in names):
        raise ValueError(
            f"{folder} is a P-Tuning v2 prefix and no whole model: give --model {BASE} and "
            f"--adapter {folder}."
        )
    for beginning, remedy in WRAPPERS.items():
        if names and all(name.startswith(beginning) for name in names):
            raise ValueError(
                f"{folder}: all tensor names begin with {beginning!r}, as in {min(names)}; it was "
                f"saved from {remedy}, and save that with save_pretrained."
            )


def check_shapes(folder: Path, config: ChatGLMConfig):
    """Check that the weight files hold the tensors that a config describes.

    Raises:
        ValueError: They do not; the message names a tensor.
        OSError: A weight file is damaged.
    """
    check_names(folder, found := read_all_shapes(folder))
    layers = {match[1] for name in found if (match := re.search(r"\.layers\.(\d+)\.", name))}
    if len(layers) != config.num_layers:  # first, because a model of 1000 layers takes seconds
        raise ValueError(
            f"{folder}: the weights do not belong to config.json: num_layers is "
            f"{config.num_layers}, and the weights have {len(layers)} layers: correct it, or "
            "download both again."
        )
    model = create_empty_model(config)
    check_weights(found, model)
    names = {f"{BASE_PREFIX}{name}" for name in model.base_model.state_dict()}
    names |= {name.removeprefix(BASE_PREFIX) for name in names}
    others = sorted(x for x in found if x not in names and not x.endswith(COMPUTED))
    if length := next((found[x][1] for x in others if x == f"{PREFIX_KEYS}embedding.weight"), None):
        raise ValueError(
            f"{folder}: the weights have a P-Tuning v2 prefix of {length} tokens, and config.json "
            f"has none: set pre_seq_len to {length}."
        )
    if others:
        raise ValueError(
            f"{folder}: the weights do not belong to config.json: {len(others)} tensors have no "
            f"place in the model, among them {others[0]}; download both again."
        )
