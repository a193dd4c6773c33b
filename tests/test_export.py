"""`python -m chatglm2.export`: the folder as stock transformers reads it, against this project."""

import copy
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from test_modeling_chatglm import save_shards
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

from chatglm2 import ChatGLMConfig, ChatGLMTokenizer, export

GOLDEN = Path(__file__).parent / "golden" / "tokenizer" / "tokenizer_golden.json"
MESSAGES = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好👋！\n"},
    {"role": "user", "content": "  the people's [MASK] eop"},
]
CONVERSATIONS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你是谁？"},
        {"role": "assistant", "content": "我是 ChatGLM2-tiny 👋。"},
        {"role": "user", "content": "people and philosophers\n  " * 5},
    ],
]
TEXTS = ["你好", "philosophers, people and a sop <s>", " \n\t😀", ""]
CLOSE = {"atol": 1e-5, "rtol": 0}
IDS = [[4092, 4094, *range(3, 200)]]


def run_and_fail(checkpoint: Path, folder: Path) -> str:
    """Run the command, which must end with one line, and return that."""
    with pytest.raises(SystemExit) as error:
        export.main([str(checkpoint), str(folder)])
    message = error.value.code
    assert message.startswith(f"{checkpoint} was not exported: ") and "\n" not in message
    return message


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory) -> Path:
    """The bundled checkpoint as GLM."""
    folder = tmp_path_factory.mktemp("export") / "glm"
    export.main([str(tiny_checkpoint), str(folder)])
    return folder


@pytest.fixture(scope="module", params=["official_tokenizer", "tiny_tokenizer"])
def tokenizers(request):
    """A tokenizer and the fast one made of it."""
    tokenizer = request.getfixturevalue(request.param)
    return tokenizer, export.create_tokenizer(tokenizer, 2048)


# The model


@torch.no_grad()
def test_the_bundled_checkpoint(exported, tiny_model, tiny_tokenizer):
    fast = AutoTokenizer.from_pretrained(exported)
    glm = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert (type(fast).__name__, type(glm)) == ("TokenizersBackend", GlmForCausalLM)
    assert_close(glm(torch.tensor(IDS)).logits, tiny_model(torch.tensor(IDS)).logits, **CLOSE)
    answers = []
    for model, tokenizer in ((glm, fast), (tiny_model, tiny_tokenizer)):
        prompt = tokenizer.apply_chat_template(MESSAGES, return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=20)[0].tolist()
        batch = tokenizer(TEXTS, padding=True)
        text = tokenizer.decode(ids[prompt["input_ids"].shape[1] :])
        answers.append([ids, text, batch["input_ids"], batch["attention_mask"], len(tokenizer)])
    assert answers[0] == answers[1]
    assert fast.batch_decode(answers[0][2]) == TEXTS
    assert (fast.model_max_length, fast.eos_token_id) == (2048, 2)


def test_half_precision_and_end_of_text_are_kept(exported, tiny_checkpoint):
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((exported / name).read_text())
        assert (fields["eos_token_id"], fields["pad_token_id"]) == (2, 0)
    for eos_token_id, expected in (([2, 7], [2, 7]), (None, 2)):
        config = ChatGLMConfig(eos_token_id=eos_token_id)
        assert export.convert_config(config).eos_token_id == expected
    fields = json.loads((exported / "config.json").read_text())
    expected = {"model_type": "glm", "architectures": ["GlmForCausalLM"], "dtype": "float16"}
    assert fields.items() >= {**expected, "max_position_embeddings": 2048}.items()
    assert "auto_map" not in fields
    theirs, ours = (load_file(x / "model.safetensors") for x in (exported, tiny_checkpoint))
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float16}
    assert sum(x.numel() for x in theirs.values()) == sum(x.numel() for x in ours.values())


def test_bin_files_and_shards(exported, tiny_checkpoint, tmp_path, monkeypatch):
    """Many files of another layout become files of limited size with the same tensors."""
    checkpoint, folder = tmp_path / "bin", tmp_path / "glm"
    checkpoint.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(tiny_checkpoint / name, checkpoint)
    save_shards(checkpoint, load_file(tiny_checkpoint / "model.safetensors"))
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "3MB")
    export.export(checkpoint, folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and all(file.stat().st_size < 3.1e6 for file in shards)
    merged = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    whole = load_file(exported / "model.safetensors")
    assert merged.keys() == whole.keys()
    assert all(merged[name].equal(whole[name]) for name in whole)
    assert (folder / "tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()


# The tokenizer


def create_texts(tokenizer) -> list[str]:
    """Pieces in any order, any characters, and runs of the few that merge in many ways."""
    generator, sp = random.Random(0), tokenizer.sp_model
    pieces = [sp.id_to_piece(i).replace("▁", " ") for i in range(259, sp.vocab_size())]
    ranges = [(32, 126), (0x4E00, 0x9FFF), (0, 0xD7FF), (0xE000, 0x10FFFF)]
    draws = [
        lambda: generator.choice(pieces),
        lambda: chr(generator.randint(*generator.choice(ranges))),
        lambda: generator.choice(" a=-.哈\n"),
    ] * 300
    texts = ["".join(draw() for _ in range(generator.randint(1, 40))) for draw in draws]
    return texts + [character * n for character in " =-a哈\n▁0" for n in range(1, 70)]


def test_random_texts(tokenizers):
    tokenizer, fast = tokenizers
    texts = create_texts(tokenizer)
    encoded = fast(texts)["input_ids"]
    assert encoded == [tokenizer.encode(text) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        assert fast.decode(ids) == tokenizer.decode(ids) == text.replace("▁", " ")
    # A broken character leaves line feeds.
    ids = [*tokenizer.encode("a\n😀", add_special_tokens=False)[:-1], 3 + 0xF0]
    assert fast.decode(ids).startswith("a\n") and fast.decode(ids).endswith("\ufffd")


def test_golden_strings(official_tokenizer):
    fast = export.create_tokenizer(official_tokenizer, 32768)
    golden = json.loads(GOLDEN.read_text("utf-8"))
    for case in golden["strings"]:
        text = case["text"]
        if any(token in text for token in ("[gMASK]", "</s>", "<unk>")):
            assert fast.encode(text) != case["encode"]  # parsed, as docs/engines.md says
            continue
        assert fast.encode(text) == case["encode"]
        assert fast.encode(text, add_special_tokens=False) == case["encode_no_special"]
        assert fast.decode(case["encode"]) == case["decode"]
        assert fast.decode(case["encode"], skip_special_tokens=True) == case["decode"]
    for pair in golden["pairs"]:
        assert fast(pair["a"], pair["b"])["input_ids"] == pair["input_ids"]
    # A fast tokenizer ignores unknown ids. Beside an invalid character it shows the replacement
    # character for each byte, except line feeds.
    for case in golden["decode"]:
        if set(case["ids"]) < set(range(64794)) and len(case["ids"]) < 256:
            assert fast.decode(case["ids"]) == case["decode"], case["ids"]


def test_special_tokens_are_those_of_the_prefix_and_the_end(tokenizers):
    tokenizer, fast = tokenizers
    mask, sop = tokenizer.get_prefix_tokens()
    expected = {mask: "[gMASK]", sop: "<sop>", 2: "</s>", 0: "<unk>"}
    assert {i: token.content for i, token in fast.added_tokens_decoder.items()} == expected
    assert (fast.eos_token_id, fast.pad_token_id, fast.padding_side) == (2, 0, "left")
    assert len(fast) == len(tokenizer)


@pytest.mark.parametrize(
    "messages", [MESSAGES, MESSAGES[:1], [{"role": "system", "content": "s"}], MESSAGES[:2]]
)
def test_chat_template_gives_the_prefix_and_the_end_once(tokenizers, messages):
    """As ids, and as text that is encoded without further special tokens (as vLLM does)."""
    tokenizer, fast = tokenizers
    for options in ({}, {"add_generation_prompt": True}):
        ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
        assert fast.apply_chat_template(messages, **options)["input_ids"] == ids
        text = fast.apply_chat_template(messages, tokenize=False, **options)
        end = "</s>" * ids.count(2)
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert text == f"[gMASK]<sop>{expected}{end}"
        assert fast.encode(text, add_special_tokens=False) == ids


def test_added_tokens_are_refused(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<a>", "<b>"])
    with pytest.raises(ValueError, match=r"added tokens, which cannot be exported: <a>, <b>"):
        export.create_tokenizer(tokenizer, 2048)


def test_chat_template_can_leave_special_tokens_in_messages_alone(tokenizers):
    _, fast = tokenizers
    messages = [{"role": "user", "content": "a [gMASK] b </s>"}]
    parsed = fast.apply_chat_template(messages)["input_ids"]
    safe = fast.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    special = {fast.convert_tokens_to_ids("[gMASK]"), 2}
    assert special <= set(parsed[2:]) and not special & set(safe[2:])
    assert "a [gMASK] b </s>" in fast.decode(safe)


def test_own_chat_template_is_kept(tiny_checkpoint, tiny_tokenizer):
    tokenizer = ChatGLMTokenizer.from_pretrained(tiny_checkpoint, chat_template="Q: x A:")
    prompt = export.create_tokenizer(tokenizer, 2048).apply_chat_template(MESSAGES)["input_ids"]
    assert prompt == tiny_tokenizer.encode("Q: x A:")


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["一二三"]},
        {"model_type": "unigram"},
    ],
    ids=str,
)
def test_vocabulary_of_another_kind_is_refused(options, tmp_path):
    words = "the", "一二三", "四五", "é", "cat", "六", "七八"
    lines = (f"{a}{b} {b}{a}" for a, b in itertools.combinations(words, 2))
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "vocab_size": 300, "minloglevel": 2}
    settings |= {"hard_vocab_limit": False, "model_prefix": str(tmp_path / "tokenizer"), **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, **settings)
    tokenizer = ChatGLMTokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model gives other ids for '"):
        export.create_tokenizer(tokenizer, 2048)


# What cannot be exported


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
OTHER = "the weights do not belong to config.json"


@pytest.mark.parametrize(
    "fields, messages",
    [
        ({"pre_seq_len": 8}, ["pre_seq_len is 8 and GLM supports only None"]),
        ({"multi_query_attention": False}, ["multi_query_attention is False"]),
        ({"rmsnorm": False}, ["rmsnorm is False"]),
        ({"post_layer_norm": False}, ["post_layer_norm is False"]),
        ({"apply_residual_connection_post_layernorm": True}, ["post_layernorm is True"]),
        ({"add_bias_linear": True}, ["add_bias_linear is True"]),
        ({"fp32_residual_connection": True}, ["fp32_residual_connection is True"]),
        ({"quantization_bit": 4}, ["weights are quantized in a format that only ChatGLM2 has"]),
        ({"rope_ratio": 2, "rope_parameters": DYNAMIC}, ["is 2 with rope_type 'dynamic'"]),
        ({"num_layers": 5}, [OTHER, "num_layers is 5"]),
        ({"num_layers": 3}, [OTHER, "num_layers is 3"]),
        ({"multi_query_group_num": 1}, [OTHER, "query_key_value.bias"]),
        ({"add_qkv_bias": False}, [OTHER, "query_key_value.bias"]),
    ],
    ids=str,
)
def test_models_that_cannot_be_exported(tiny_checkpoint, tmp_path, fields, messages):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "chatglm")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | fields))
    printed = run_and_fail(checkpoint, tmp_path / "glm")
    assert all(message in printed for message in messages)
    assert not (tmp_path / "glm").exists()


def test_folders(tiny_checkpoint, tmp_path, exported):
    full = run_and_fail(tiny_checkpoint, exported)
    assert f"{exported} exists and is not an empty folder" in full
    assert "has model_type 'glm'" in run_and_fail(exported, tmp_path / "glm")
    part = tmp_path / "part"
    part.mkdir()
    for name, message in (
        ("config.json", "has no config.json"),
        ("tokenizer.model", "it has no tokenizer.model"),
        ("model.safetensors", "it has no weights"),
    ):
        assert message in run_and_fail(part, tmp_path / "glm")
        shutil.copy(tiny_checkpoint / name, part)
    os.truncate(part / "model.safetensors", 10**6)
    assert "is truncated or damaged" in run_and_fail(part, tmp_path / "glm")
