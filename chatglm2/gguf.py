"""Write a ChatGLM2 checkpoint as a GGUF file for llama.cpp, LM Studio and ollama.

    python -m chatglm2.gguf CHECKPOINT FILE.gguf [--type auto|f32|f16|bf16|q8_0|q4_0] [--round]

Weights keep their values bit by bit: float16 becomes F16, official INT4 Q4_0, INT8 Q8_0. What the
file cannot hold exactly is refused, or rounded with --round. The weights are read from the mapped
files while they are written, one tensor at a time.

Sources of the conventions: the architecture `chatglm` in llama.cpp's src/models/chatglm.cpp (query,
key and value fused in this order; gate and up fused in `ffn_up`; half of each head rotated in
neighbouring pairs), the keys and names of its conversion/chatglm.py and gguf-py, its
src/llama-vocab.cpp (tokenizer `llama`), and its ggml-common.h (blocks of 32 columns). Unlike its
converter, which multiplies the rotary base by `rope_ratio`, this file has linear scaling.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .checkpoint import read_checkpoint, read_tensors
from .configuration_chatglm import ChatGLMConfig
from .errors import exit_on_error, print_result, run_command
from .export import PREFIX, check_architecture, convert_rope, create_tokenizer
from .hardware import get_free_space, gigabytes
from .json_files import read_generation_config
from .quantization import QuantizedLinear, get_quantization, unpack_int4
from .recognition import BASE_PREFIX, COMPUTED
from .sampling_chatglm import find_end_ids
from .tokenization_chatglm import SPECIAL_TOKENS, ChatGLMTokenizer
from .weights_chatglm import SCALE, find_weight_files

BLOCK = 32  # columns of a row that share a scale
ROWS_AT_A_TIME = 4096
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LEVELS = {"q8_0": 8, "q4_0": 4}  # bits
TYPES = ("auto", *FLOATS, *LEVELS)
OUTPUT = "output_layer.weight"
SPELLING = {"sop": "<sop>", "eop": "<eop>"}  # words such as "philosopher" contain sop
END_KEYS = ("eos", "eot", "eom")  # keys for ids that end an answer
METADATA_BYTES = 10_000_000  # at most


def import_gguf():
    """Return the package `gguf`.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"the package gguf is needed ({error}): pip install gguf") from error
    return gguf


# Tensors.


class Tensor:
    """A tensor of the file.

    Attributes:
        name: Its name in the checkpoint, without the prefix of the base model.
        kind: A key of FLOATS or LEVELS.
        shape: Rows and columns, or the length of a vector.
        is_rounded: Whether `encode` has rounded floats to a narrower dtype.
    """

    def __init__(self, name: str, kind: str, weight: torch.Tensor, scale: torch.Tensor | None):
        self.name, self.kind, self.weight, self.scale = name, kind, weight, scale
        self.shape, self.is_rounded = list(weight.shape), False
        if kind == "q4_0" and scale is not None:
            self.shape[-1] *= 2  # two levels in a byte
        if kind in LEVELS and self.shape[-1] % BLOCK:
            raise ValueError(
                f"{name} has {self.shape[-1]} columns, and {kind} needs a multiple of {BLOCK}: "
                "convert the unquantized checkpoint with --type auto."
            )

    @property
    def row_bytes(self) -> int:
        """Return the size of a row, or of a whole vector."""
        if self.kind in FLOATS:
            return self.shape[-1] * FLOATS[self.kind].itemsize
        return self.shape[-1] // BLOCK * (2 + BLOCK * LEVELS[self.kind] // 8)

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.row_bytes)

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.byte_shape, dtype=np.int64))

    def convert(self, name: str, values: torch.Tensor, dtype: torch.dtype, may_round: bool):
        """Return weights or scales in another dtype; `name` is for the error.

        Raises:
            ValueError: A value is out of the dtype's range, or not exact and `may_round` is False.
        """
        converted = values.to(dtype)
        if values.dtype == dtype or torch.equal(converted.double(), values.double()):
            return converted
        old, new = (str(kind).removeprefix("torch.") for kind in (values.dtype, dtype))
        if not converted[values.isfinite()].isfinite().all():
            raise ValueError(f"{name} has values of {old} beyond the range of {new}.")
        if not may_round:
            raise ValueError(
                f"{name} has values of {old} that {new} cannot hold exactly: give --round to round "
                "them, or another --type."
            )
        self.is_rounded = True
        return converted

    def encode(self, may_round: bool) -> np.ndarray:
        """Return the bytes in the file, as uint8 in `byte_shape`: of the mapped file if equal."""
        if self.kind in FLOATS and self.weight.dtype == FLOATS[self.kind]:
            return self.weight.contiguous().view(torch.uint8).numpy()
        encoded = np.empty(self.byte_shape, np.uint8)
        for start in range(0, len(self.weight), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            weight, scale = self.weight[rows], None if self.scale is None else self.scale[rows]
            if self.kind in FLOATS:
                dtype = FLOATS[self.kind]
                part = self.convert(self.name, weight, dtype, may_round).view(torch.uint8)
                encoded.reshape(len(self.weight), -1)[rows] = part.numpy().reshape(len(weight), -1)
            else:
                encoded[rows] = self.encode_levels(weight, scale, may_round).numpy()
        return encoded

    def encode_levels(self, weight, scale, may_round: bool) -> torch.Tensor:
        """Return rows as blocks of a float16 scale and 32 levels; floats are quantized first.

        In a block of Q4_0, byte i has column i in its low four bits and column i + 16 in its high
        ones, each as level + 8.
        """
        bits = LEVELS[self.kind]
        if scale is None:
            weight, scale = QuantizedLinear(self.shape[1], len(weight), bits).quantize(weight)
        scale = self.convert(f"{self.name}_scale", scale, torch.float16, may_round)
        levels = unpack_int4(weight) if bits == 4 else weight
        blocks = levels.unflatten(-1, (-1, BLOCK))  # [row, block, column]
        if bits == 4:
            low, high = (blocks + 8).view(torch.uint8).chunk(2, dim=-1)
            blocks = low | high << 4
        scale = scale.reshape(len(levels), -1, 1)  # [row, group, 1]
        scale = scale.repeat_interleave(blocks.shape[1] // scale.shape[1], dim=1)
        return torch.cat((scale.view(torch.uint8), blocks.view(torch.uint8)), dim=-1).flatten(1)


def choose_kind(name: str, weight: torch.Tensor, bits: int | None, wanted: str) -> str:
    """Return the kind of a tensor in the file.

    Args:
        bits: Of its levels; None for floats.
        wanted: One of TYPES.
    """
    if weight.dim() == 1:
        return "f32"  # llama.cpp adds and multiplies vectors in float32
    if bits:
        return f"q{bits}_0"
    if wanted in FLOATS or (wanted in LEVELS and ".layers." in name):
        return wanted
    kinds = {dtype: kind for kind, dtype in FLOATS.items()}
    return kinds.get(weight.dtype, "f32")


def plan_tensors(state: dict, config: ChatGLMConfig, wanted: str) -> list[Tensor]:
    """Return the tensors of the file.

    Raises:
        ValueError: The weights are quantized, to other levels than `wanted`, or have a number of
            columns that no block fits.
    """
    quantization = get_quantization(config)
    if quantization and wanted not in ("auto", f"q{quantization.bits}_0"):
        raise ValueError(
            f"the weights are INT{quantization.bits}, and --type is {wanted}: give auto, or "
            "convert the unquantized checkpoint."
        )
    state = {name.removeprefix(BASE_PREFIX): tensor for name, tensor in state.items()}
    tensors = []
    for name, weight in state.items():
        is_tied = name == OUTPUT and config.tie_word_embeddings
        if is_tied or name.endswith((SCALE, COMPUTED)):
            continue
        scale = state.get(f"{name}_scale")
        bits = None
        if scale is not None:
            bits = quantization.output_bits if name == OUTPUT else quantization.bits
        tensors.append(Tensor(name, choose_kind(name, weight, bits, wanted), weight, scale))
    return tensors


# Metadata.


def check_config(config: ChatGLMConfig):
    """Check that llama.cpp can express a model.

    Raises:
        ValueError: It cannot; the message is one line.
    """
    check_architecture(config, "llama.cpp")
    heads, head_dim = config.num_attention_heads, config.kv_channels
    if heads * head_dim != config.hidden_size:
        raise ValueError(
            f"num_attention_heads * kv_channels is {heads * head_dim} and hidden_size "
            f"{config.hidden_size}; llama.cpp supports only equal ones: this model runs with this "
            "project's code only."
        )
    if (kind := config.rope_parameters["rope_type"]) not in ("default", "linear"):
        raise ValueError(
            f"rope_type is {kind!r}, and the file can have only default or linear: set it so in "
            "config.json if the texts are short enough."
        )


def add_shape(writer, config: ChatGLMConfig):
    rope = convert_rope(config)
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.kv_channels)
    writer.add_value_length(config.kv_channels)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_rope_dimension_count(config.kv_channels // 2)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(import_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config.padded_vocab_size)


def list_tokens(tokenizer: ChatGLMTokenizer, size: int) -> list[tuple[str, float, str]]:
    """Return text, score and type of each id below `size`.

    Only the tokens of the prompt format are control tokens, because llama.cpp searches prompts for
    the texts of those.

    Raises:
        ValueError: llama.cpp could make a control token by merging pieces of a text.
    """
    sp, controls = tokenizer.sp_model, {"</s>", *PREFIX}
    pieces = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    normal = {piece for piece, i in pieces.items() if not (i < 3 or sp.is_byte(i))}
    others = [SPELLING.get(token, token) for token in SPECIAL_TOKENS]
    others += [f"[PAD{i}]" for i in range(len(pieces) + len(others), size)]
    if len(pieces) + len(others) > size:
        raise ValueError(
            f"padded_vocab_size is {size}, and the tokenizer has {len(tokenizer)} tokens: correct "
            "it, or download config.json and tokenizer.model again."
        )
    rows = []
    for text in (*pieces, *others):
        score = sp.get_score(pieces[text]) if text in normal else 0.0
        kind = "CONTROL" if text in controls else "NORMAL" if text in normal else "UNUSED"
        is_byte = text in pieces and sp.is_byte(pieces[text])
        rows.append((text, score, "BYTE" if is_byte else kind))
        parts = [] if text in normal else [(text[:i], text[i:]) for i in range(1, len(text))]
        if any(all(x in normal or len(x) == 1 for x in pair) for pair in parts):
            raise ValueError(f"the pieces of tokenizer.model make the token {text!r} of llama.cpp.")
    return rows


def add_tokenizer(writer, tokenizer: ChatGLMTokenizer, config: ChatGLMConfig, end_ids: list[int]):
    """Write the vocabulary, the special ids and the chat template.

    Raises:
        ValueError: The SentencePiece model is of another kind than ChatGLM2's, or more ids end an
            answer than the format has keys for.
    """
    create_tokenizer(tokenizer, config.seq_length)  # only its checks
    if len(end_ids) > len(END_KEYS):
        raise ValueError(
            f"eos_token_id is {end_ids}, and the file can have at most {len(END_KEYS)} ids: give "
            "fewer in generation_config.json."
        )
    texts, scores, types = zip(*list_tokens(tokenizer, config.padded_vocab_size), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types([import_gguf().TokenType[kind] for kind in types])
    for key, i in zip(END_KEYS, end_ids, strict=False):
        getattr(writer, f"add_{key}_token_id")(i)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(False)
    writer.add_chat_template("".join(PREFIX) + tokenizer.chat_template)


# The file.


def check_target(file: Path):
    if file.exists() or file.is_symlink():
        raise ValueError(f"{file} exists: give a new name.")
    if not file.parent.is_dir():
        raise ValueError(f"{file}: there is no folder {file.parent}: make it, or give another one.")


def write_tensors(writer, path: Path, tensors: list[Tensor], may_round: bool):
    """Write header, metadata and tensors, one tensor at a time, with a progress bar."""
    gguf = import_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.CHATGLM, 1000)
    for tensor in tensors:
        name = names.get_name(tensor.name, (".weight", ".bias"))
        kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
        uint8 = np.dtype(np.uint8)
        writer.add_tensor_info(name, tensor.byte_shape, uint8, tensor.num_bytes, kind)
    size = sum(tensor.num_bytes for tensor in tensors)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        for tensor in tensors:
            writer.write_tensor_data(tensor.encode(may_round))
            bar.update(tensor.num_bytes)


def convert(checkpoint: Path, file: Path, wanted: str = "auto", may_round: bool = False) -> str:
    """Write a checkpoint as a GGUF file; return one line about it.

    Args:
        wanted: One of TYPES; "auto" keeps what the checkpoint has.
        may_round: Round values that the file cannot hold exactly.

    Raises:
        ImportError: The package gguf is not installed.
        ValueError: It is no ChatGLM2 checkpoint, is damaged, or the file cannot express it.
        OSError: A file is missing, damaged or cannot be written.
    """
    gguf = import_gguf()
    check_target(file)
    config = read_checkpoint(checkpoint, check_config)
    tokenizer = ChatGLMTokenizer.from_pretrained(checkpoint)
    sources = read_generation_config(checkpoint), config, tokenizer
    end_ids = find_end_ids(*sources, num_ids=len(tokenizer))
    writer = gguf.GGUFWriter(None, "chatglm")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(checkpoint.resolve().name)
    add_shape(writer, config)
    add_tokenizer(writer, tokenizer, config, end_ids)
    tensors = plan_tensors(read_tensors(*find_weight_files(checkpoint)), config, wanted)
    kinds = [tensor.kind for tensor in tensors if ".layers." in tensor.name and tensor.shape[1:]]
    kind = kinds[0].upper()
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind}", gguf.LlamaFileType.ALL_F32))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    size = sum(tensor.num_bytes for tensor in tensors) + METADATA_BYTES
    if size > (free := get_free_space(file.parent)):
        raise OSError(
            f"{file} needs {gigabytes(size)}, {gigabytes(free)} free in {file.parent}: free some "
            "space, or choose another disk."
        )
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write_tensors(writer, temporary, tensors, may_round)
        writer.close()
        temporary.rename(file)
    except OSError as error:
        raise OSError(
            f"{file} cannot be written ({error.strerror or error}): free some space, or choose "
            "another disk."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    num_rounded = sum(tensor.is_rounded for tensor in tensors)
    rounded = f", values of {num_rounded} tensors rounded" if num_rounded else ""
    return f"{file}: {checkpoint} as {kind}, {gigabytes(file.stat().st_size)}{rounded}."


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m chatglm2.gguf",
        description="Write a ChatGLM2 checkpoint as a GGUF file for llama.cpp.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="its folder")
    parser.add_argument("file", metavar="FILE", type=Path, help="the new file, such as x.gguf")
    parser.add_argument(
        "--type",
        choices=TYPES,
        default="auto",
        help="of the weights; auto: what the checkpoint has (default: %(default)s)",
    )
    parser.add_argument(
        "--round", action="store_true", help="round values that the file cannot hold exactly"
    )
    args = parser.parse_args(argv)
    with exit_on_error(f"{args.checkpoint} was not converted: "):
        line = convert(args.checkpoint, args.file, args.type, args.round)
    print_result(line)


if __name__ == "__main__":
    run_command(main)
