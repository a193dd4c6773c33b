"""Write a ChatGLM2 checkpoint as transformers' own GLM, for engines that run no remote code.

    python -m chatglm2.export CHECKPOINT DIR

CHECKPOINT is the folder of chatglm2-6b or another ChatGLM2 model that is not quantized, DIR a new
folder. It gets config.json (`model_type` glm), generation_config.json, the weights in safetensors
files of up to 5 GB, a fast tokenizer and its chat template: what stock transformers and vLLM need.
The weights are read from the mapped files while they are written, not copied into memory first.
"""

import argparse
import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from .checkpoint import check_new_folder, read_checkpoint, read_tensors
from .configuration_chatglm import ChatGLMConfig
from .errors import exit_on_error, print_result, run_command
from .quantization import get_quantization
from .recognition import COMPUTED
from .tokenization_chatglm import CHAT_TEMPLATE, ChatGLMTokenizer
from .weights_chatglm import find_weight_files

MAX_SHARD_SIZE = "5GB"
GLM_IS = {
    "multi_query_attention": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "fp32_residual_connection": False,
    "pre_seq_len": None,
}
SHARED_FIELDS = (  # of GlmConfig; `ChatGLMConfig.attribute_map` gives them the official values
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim attention_dropout max_position_embeddings initializer_range "
    "rms_norm_eps tie_word_embeddings pad_token_id bos_token_id"
)
RENAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.layers": "model.layers",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
# sop and eop are spelt as in later GLMs: an added token is found within words too ("people").
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
PREFIX = ("[gMASK]", "<sop>")
PAD_TOKEN, EOS_TOKEN = "<unk>", "</s>"
END_OF_ANSWER = (  # what apply_chat_template of ChatGLMTokenizer adds as an id
    "{%- if chat.last == 'assistant' and not add_generation_prompt -%}"
    "{{- '" + EOS_TOKEN + "' -}}{%- endif -%}"
)
SAMPLES = ("  a  b ", "\t\r\n\n", "Ａ①ﬁ㈱", "e\u0301", "\u200b\u3000\xa0\ufeff", "▁a▁", "𠮷\0")


def check_config(config: ChatGLMConfig):
    """Check that GLM can express a model.

    Raises:
        ValueError: It cannot; the message is one line that says what to do.
    """
    if get_quantization(config):
        raise ValueError(
            "the weights are quantized in a format that only ChatGLM2 has: export the unquantized "
            "checkpoint (such as THUDM/chatglm2-6b)."
        )
    check_architecture(config, "GLM")


def check_architecture(config: ChatGLMConfig, engine: str):
    """Check that the fields `GLM_IS` of a model have the only values that an engine supports.

    Raises:
        ValueError: They do not.
    """
    for field, needed in GLM_IS.items():
        if bool(value := getattr(config, field)) != bool(needed):
            raise ValueError(
                f"{field} is {value!r} and {engine} supports only {needed!r}: this model runs with "
                "this project's code only."
            )


def convert_rope(config: ChatGLMConfig) -> dict:
    """Return GLM's `rope_parameters`, where `rope_ratio` is linear position interpolation."""
    rope = config.rope_parameters
    if config.rope_ratio == 1:
        return rope
    if rope["rope_type"] not in ("default", "linear"):
        raise ValueError(
            f"rope_ratio is {config.rope_ratio} with rope_type {rope['rope_type']!r}, and GLM "
            "supports only one of them: set rope_ratio to 1, or rope_type to default or linear."
        )
    return {**rope, "rope_type": "linear", "factor": rope.get("factor", 1.0) * config.rope_ratio}


def convert_config(config: ChatGLMConfig) -> GlmConfig:
    shared = {name: getattr(config, name) for name in SHARED_FIELDS.split()}
    return GlmConfig(
        attention_bias=config.add_qkv_bias,
        rope_parameters=convert_rope(config),
        eos_token_id=2 if config.eos_token_id is None else config.eos_token_id,
        **shared,
    )


def convert_weights(state: dict[str, torch.Tensor], config: ChatGLMConfig) -> dict:
    """Rename tensors, and split query_key_value by rows into views of query, key and value."""
    key_row = config.num_attention_heads * config.kv_channels
    value_row = key_row + config.num_key_value_heads * config.kv_channels
    converted = {}
    for name, tensor in state.items():
        for old, new in RENAMES.items():
            name = name.replace(old, new)
        before, fused, after = name.partition("self_attention.query_key_value")
        if fused:
            for part, rows in zip("qkv", tensor.tensor_split([key_row, value_row]), strict=True):
                converted[f"{before}self_attn.{part}_proj{after}"] = rows
        elif not name.endswith(COMPUTED):
            converted[name] = tensor
    return converted


def create_model(state: dict[str, torch.Tensor], config: GlmConfig) -> GlmForCausalLM:
    """Return a GLM whose parameters are the given tensors, in their dtype.

    Raises:
        ValueError: Names or shapes differ from those that the config describes.
    """
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    unfit = {name for name in shapes.keys() | state if name not in shapes or name not in state}
    unfit |= {name for name in shapes.keys() & state if shapes[name] != state[name].shape}
    if unfit:
        raise ValueError(
            f"the weights do not belong to config.json: {len(unfit)} tensors are missing, unknown "
            f"or of another shape, among them {min(unfit)} (GLM's name): download both again."
        )
    model.load_state_dict(state, assign=True)
    return model


def create_bpe(tokenizer: ChatGLMTokenizer) -> tuple[BPE, list[str]]:
    """Return a BPE with the ids of a SentencePiece model, and the pieces that text can become."""
    sp = tokenizer.sp_model
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    scores = {
        piece: sp.get_score(i)
        for piece, i in vocab.items()
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))
    }
    vocab |= {token: sp.vocab_size() + i for i, token in enumerate(SPECIAL_TOKENS)}
    return BPE(vocab, generate_merges(scores, scores), byte_fallback=True), [*scores]


def check_ids(tokenizer: ChatGLMTokenizer, fast: Tokenizer, pieces: list[str]):
    """Check that both tokenizers give the same ids for all pieces and for `SAMPLES`.

    `SAMPLES` are texts that a normalization would change.

    Raises:
        ValueError: They do not, so the SentencePiece model is of another kind than ChatGLM2's.
    """
    texts = [*SAMPLES, *(piece.replace("▁", " ") for piece in pieces)]
    encodings = fast.encode_batch(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, tokenizer.sp_model.encode(texts), encodings, strict=True):
        if ids != encoding.ids:
            raise ValueError(
                f"{tokenizer.vocab_file} gives other ids for {text!r} than a fast tokenizer: only "
                "a BPE model with byte fallback and without normalization, such as the official "
                "one, can be exported."
            )


def create_tokenizer(tokenizer: ChatGLMTokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """Return a fast tokenizer with the same ids; its chat template also writes the prefix.

    Raises:
        ValueError: The SentencePiece model is of another kind than ChatGLM2's, or tokens were
            added.
    """
    if added := tokenizer.get_added_vocab():
        raise ValueError(
            f"its tokenizer has added tokens, which cannot be exported: {', '.join(added)}."
        )
    bpe, pieces = create_bpe(tokenizer)
    fast = Tokenizer(bpe)
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    check_ids(tokenizer, fast, pieces)
    fast.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (PAD_TOKEN, EOS_TOKEN, *PREFIX)]
    )
    fast.post_processor = processors.TemplateProcessing(
        single=[*PREFIX, "$A"],
        pair=[*PREFIX, "$A", "$B", EOS_TOKEN],
        special_tokens=[(token, fast.token_to_id(token)) for token in (*PREFIX, EOS_TOKEN)],
    )
    without_text = "|".join(map(re.escape, (PAD_TOKEN, "<s>", EOS_TOKEN, *SPECIAL_TOKENS)))
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(f"^({without_text})$"), ""),
            decoders.Replace("▁", " "),
            decoders.Replace("<0x0A>", "\n"),  # ByteFallback drops it beside an invalid character
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    is_own = tokenizer.chat_template == CHAT_TEMPLATE
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        chat_template="".join(PREFIX) + tokenizer.chat_template + END_OF_ANSWER * is_own,
    )


def export(checkpoint: Path, folder: Path) -> str:
    """Write a checkpoint as GLM into a new folder; return one line about it.

    Raises:
        ValueError: It is no ChatGLM2 checkpoint, is damaged, or GLM cannot express it.
        OSError: A file is missing, damaged or cannot be written.
    """
    check_new_folder(folder)
    config = read_checkpoint(checkpoint, check_config)
    tokenizer = create_tokenizer(ChatGLMTokenizer.from_pretrained(checkpoint), config.seq_length)
    state = convert_weights(read_tensors(*find_weight_files(checkpoint)), config)
    model = create_model(state, convert_config(config))
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return f"{folder}: {checkpoint} as GlmForCausalLM, {model.dtype}, {size / 1e9:.2f} GB."


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m chatglm2.export",
        description="Write a ChatGLM2 checkpoint as transformers' own GLM (GlmForCausalLM).",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="its folder")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the new folder")
    args = parser.parse_args(argv)
    with exit_on_error(f"{args.checkpoint} was not exported: "):
        line = export(args.checkpoint, args.folder)
    print_result(line)


if __name__ == "__main__":
    run_command(main)
