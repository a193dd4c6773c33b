"""`python -m chatglm2.export`: the folder as stock transformers reads it, against this project.

One other process, which never imports this project, loads the exported folders with the Auto
classes; its logits and ids are compared with the package's own.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer, GlmForCausalLM

from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer, export

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "tokenizer" / "tokenizer_golden.json").read_text("utf-8")
)
MESSAGES = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好👋！\n"},
    {"role": "user", "content": "  the people's [MASK] eop"},
]
TEXTS = ["你好", "philosophers, people and a sop <s>", " \n\t😀", ""]
VARIANTS = {
    "plain": {},
    "no_bias": {"add_qkv_bias": False},
    "32k": {"rope_ratio": 8},
    "linear_32k": {"rope_ratio": 3, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "tied": {"tie_word_embeddings": True},
}
STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, messages, texts = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
prompt = tokenizer.apply_chat_template(messages, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=20)[0]
batch = tokenizer(texts, padding=True)
assert "chatglm2" not in sys.modules
json.dump({
    "classes": [type(tokenizer).__name__, type(model).__name__],
    "logits": model(torch.tensor(ids)).logits.tolist(),
    "prompt": prompt["input_ids"][0].tolist(),
    "answer": answer.tolist(),
    "text": tokenizer.decode(answer[prompt["input_ids"].shape[1]:]),
    "facts": [len(tokenizer), tokenizer.model_max_length, tokenizer.eos_token_id],
    "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"],
    "decoded": tokenizer.batch_decode(batch["input_ids"]),
}, sys.stdout)
"""
CLOSE = {"atol": 1e-5, "rtol": 0}
IDS = [[4092, 4094, *range(3, 200)]]


def save_random_model(folder: Path, tokenizer, **fields) -> Path:
    torch.manual_seed(0)
    shape = {"num_layers": 2, "padded_vocab_size": 4096, "hidden_size": 32, "ffn_hidden_size": 48}
    shape |= {"kv_channels": 8, "num_attention_heads": 4, "seq_length": 128}
    shape |= {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True}
    config = ChatGLMConfig(**{**shape, "initializer_range": 0.2, **fields})
    model = ChatGLMForConditionalGeneration(config, empty_init=False)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "layernorm.weight")):  # else 0 and 1, which hide what is lost
            torch.nn.init.normal_(parameter, mean=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_stock(folder: Path) -> dict:
    """Return what a process without this project makes of a folder."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", STOCK],
        input=json.dumps([str(folder), IDS, MESSAGES, TEXTS]),
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


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


@pytest.fixture(scope="module")
def official_fast(official_tokenizer):
    return export.create_tokenizer(official_tokenizer, 32768)


@pytest.fixture(scope="module")
def tiny_fast(tiny_tokenizer):
    return export.create_tokenizer(tiny_tokenizer, 2048)


@pytest.fixture(params=["official", "tiny"])
def tokenizers(request):
    """A tokenizer and the fast one made of it."""
    return tuple(request.getfixturevalue(f"{request.param}_{x}") for x in ("tokenizer", "fast"))


# The model


@pytest.mark.slow
def test_stock_classes_in_another_process(exported, tiny_model, tiny_tokenizer):
    stock = run_stock(exported)
    assert stock["classes"] == ["TokenizersBackend", "GlmForCausalLM"]
    assert_close(torch.tensor(stock["logits"]), tiny_model(torch.tensor(IDS)).logits, **CLOSE)
    prompt = tiny_tokenizer.apply_chat_template(MESSAGES, return_tensors="pt")
    answer = tiny_model.generate(**prompt, max_new_tokens=20)[0].tolist()
    assert stock["prompt"] == prompt["input_ids"][0].tolist()
    assert stock["answer"] == answer
    assert stock["text"] == tiny_tokenizer.decode(answer[len(stock["prompt"]) :])
    encoded = tiny_tokenizer(TEXTS, padding=True)
    assert stock["input_ids"] == encoded["input_ids"]
    assert stock["attention_mask"] == encoded["attention_mask"]
    assert stock["decoded"] == TEXTS
    assert stock["facts"] == [len(tiny_tokenizer), 2048, 2]


@torch.no_grad()
def test_the_bundled_checkpoint(exported, tiny_model, tiny_tokenizer):
    glm = GlmForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    assert_close(glm(torch.tensor(IDS)).logits, tiny_model(torch.tensor(IDS)).logits, **CLOSE)
    fast = AutoTokenizer.from_pretrained(exported)
    assert (
        fast(TEXTS, padding=True)["input_ids"] == tiny_tokenizer(TEXTS, padding=True)["input_ids"]
    )
    assert (len(fast), fast.model_max_length) == (len(tiny_tokenizer), 2048)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_of_other_models(name, tiny_tokenizer, tmp_path):
    checkpoint = save_random_model(tmp_path / "chatglm", tiny_tokenizer, **VARIANTS[name])
    export.export(checkpoint, tmp_path / "glm")
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    glm = GlmForCausalLM.from_pretrained(tmp_path / "glm").eval()
    assert_close(glm(torch.tensor(IDS)).logits, model(torch.tensor(IDS)).logits, **CLOSE)


def test_half_precision_and_end_of_text_are_kept(exported, tiny_checkpoint):
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("glm", ["GlmForCausalLM"])
    assert (config["dtype"], config["max_position_embeddings"]) == ("float16", 2048)
    assert "auto_map" not in config
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((exported / name).read_text())
        assert (fields["eos_token_id"], fields["pad_token_id"]) == (2, 0)
    for eos_token_id, expected in (([2, 7], [2, 7]), (None, 2)):
        config = ChatGLMConfig(eos_token_id=eos_token_id)
        assert export.convert_config(config).eos_token_id == expected
    theirs = load_file(exported / "model.safetensors")
    ours = load_file(tiny_checkpoint / "model.safetensors")
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float16}
    assert sum(x.numel() for x in theirs.values()) == sum(x.numel() for x in ours.values())


def test_bin_files_and_shards(exported, tiny_checkpoint, tmp_path, monkeypatch):
    """Many files of another layout become files of limited size with the same tensors."""
    checkpoint = tmp_path / "bin"
    checkpoint.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (checkpoint / name).write_bytes((tiny_checkpoint / name).read_bytes())
    state = load_file(tiny_checkpoint / "model.safetensors")
    state["transformer.rotary_pos_emb.inv_freq"] = torch.zeros(8)  # is in the official files
    weight_map = {}
    for i, name in enumerate(state):
        weight_map[name] = f"pytorch_model-{i % 3}.bin"
    for file in set(weight_map.values()):
        torch.save({n: state[n] for n in state if weight_map[n] == file}, checkpoint / file)
    index = checkpoint / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "3MB")
    folder = tmp_path / "glm"
    export.export(checkpoint, folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and all(file.stat().st_size < 3.1e6 for file in shards)
    merged = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    whole = load_file(exported / "model.safetensors")
    assert merged.keys() == whole.keys()
    assert all(merged[name].equal(whole[name]) for name in whole)
    assert (folder / "tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == set(whole)


# The tokenizer


def create_texts(tokenizer) -> list[str]:
    """Pieces in any order, any characters, and runs of the few that merge in many ways."""
    generator = random.Random(0)
    size = tokenizer.sp_model.vocab_size()
    pieces = [tokenizer.sp_model.id_to_piece(i).replace("▁", " ") for i in range(259, size)]
    ranges = [(32, 126), (0x4E00, 0x9FFF), (0, 0xD7FF), (0xE000, 0x10FFFF)]
    draws = [
        lambda: generator.choice(pieces),
        lambda: chr(generator.randint(*generator.choice(ranges))),
        lambda: generator.choice(" a=-.哈\n"),
    ]
    texts = [
        "".join(draw() for _ in range(generator.randint(1, 40)))
        for draw in draws
        for _ in range(300)
    ]
    return texts + [character * n for character in " =-a哈\n▁0" for n in range(1, 70)]


def test_random_texts(tokenizers):
    tokenizer, fast = tokenizers
    texts = create_texts(tokenizer)
    encoded = fast(texts)["input_ids"]
    assert encoded == [tokenizer.encode(text) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        assert fast.decode(ids) == tokenizer.decode(ids) == text.replace("▁", " ")


def test_golden_strings(official_fast):
    for case in GOLDEN["strings"]:
        text = case["text"]
        if any(token in text for token in ("[gMASK]", "</s>", "<unk>")):
            assert official_fast.encode(text) != case["encode"]  # parsed, as docs/vllm.md says
            continue
        assert official_fast.encode(text) == case["encode"]
        assert official_fast.encode(text, add_special_tokens=False) == case["encode_no_special"]
        assert official_fast.decode(case["encode"]) == case["decode"]
        assert official_fast.decode(case["encode"], skip_special_tokens=True) == case["decode"]
    for pair in GOLDEN["pairs"]:
        assert official_fast(pair["a"], pair["b"])["input_ids"] == pair["input_ids"]
    # A fast tokenizer ignores unknown ids. Beside an invalid character it shows the replacement
    # character for each byte, except line feeds.
    for case in GOLDEN["decode"]:
        if set(case["ids"]) < set(range(64794)) and len(case["ids"]) < 256:
            assert official_fast.decode(case["ids"]) == case["decode"], case["ids"]


def test_broken_character_leaves_line_feeds(tokenizers):
    tokenizer, fast = tokenizers
    ids = [*tokenizer.encode("a\n😀", add_special_tokens=False)[:-1], 3 + 0xF0]
    assert fast.decode(ids).startswith("a\n") and fast.decode(ids).endswith("\ufffd")


def test_special_tokens_are_those_of_the_prefix_and_the_end(tokenizers):
    tokenizer, fast = tokenizers
    names = ("[gMASK]", "<sop>", "</s>", "<unk>")
    ids = [*tokenizer.get_prefix_tokens(), 2, 0]
    assert fast.convert_tokens_to_ids(names) == ids
    assert {i: token.content for i, token in fast.added_tokens_decoder.items()} == dict(
        zip(ids, names, strict=True)
    )
    assert (fast.eos_token_id, fast.pad_token_id, fast.padding_side) == (2, 0, "left")
    assert len(fast) == len(tokenizer)


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[:1], [{"role": "system", "content": "s"}]])
def test_chat_template_gives_the_prefix_once(tokenizers, messages):
    """As ids, and as text that is encoded without further special tokens (as vLLM does)."""
    tokenizer, fast = tokenizers
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert fast.apply_chat_template(messages)["input_ids"] == ids
    text = fast.apply_chat_template(messages, tokenize=False)
    assert text == "[gMASK]<sop>" + tokenizer.apply_chat_template(messages, tokenize=False)
    assert fast.encode(text, add_special_tokens=False) == ids


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
    fast = export.create_tokenizer(tokenizer, 2048)
    prompt = fast.apply_chat_template(MESSAGES)["input_ids"]
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
    lines = [
        f"{a}{b} {b}{a}" for a in ("the", "一二三", "四五", "é") for b in ("cat", "六", "七八")
    ]
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "vocab_size": 300, "minloglevel": 2}
    settings |= {"hard_vocab_limit": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tokenizer"), **settings
    )
    tokenizer = ChatGLMTokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model gives other ids for '"):
        export.create_tokenizer(tokenizer, 2048)


# What cannot be exported


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pre_seq_len": 8}, "pre_seq_len is 8 and GLM supports only None"),
        ({"multi_query_attention": False}, "multi_query_attention is False"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"post_layer_norm": False}, "post_layer_norm is False"),
        ({"apply_residual_connection_post_layernorm": True}, "post_layernorm is True"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"fp32_residual_connection": True}, "fp32_residual_connection is True"),
        (
            {"rope_ratio": 2, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_ratio is 2 with rope_type 'dynamic'",
        ),
    ],
    ids=str,
)
def test_models_that_glm_cannot_express(tiny_tokenizer, tmp_path, fields, message):
    checkpoint = save_random_model(tmp_path / "chatglm", tiny_tokenizer, **fields)
    assert message in run_and_fail(checkpoint, tmp_path / "glm")
    assert not (tmp_path / "glm").exists()


def test_quantized_checkpoint(int4_checkpoint, tmp_path):
    message = run_and_fail(int4_checkpoint, tmp_path / "glm")
    assert "weights are quantized" in message and "export the unquantized" in message


def test_folders(tiny_checkpoint, tmp_path, exported):
    full = run_and_fail(tiny_checkpoint, exported)
    assert f"{exported} exists and is not an empty folder" in full
    assert "has no config.json" in run_and_fail(tmp_path / "nowhere", tmp_path / "glm")
    assert "has model_type 'glm'" in run_and_fail(exported, tmp_path / "glm")
    part = tmp_path / "part"
    for name, missing in (
        ("config.json", "no tokenizer.model"),
        ("tokenizer.model", "no model.safetensors or pytorch_model.bin"),
    ):
        part.mkdir(exist_ok=True)
        (part / name).write_bytes((tiny_checkpoint / name).read_bytes())
        assert f"there is {missing} in it" in run_and_fail(part, tmp_path / "glm")
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    (part / "model.safetensors").write_bytes(weights[:-10])
    assert "is truncated or damaged" in run_and_fail(part, tmp_path / "glm")


@pytest.mark.parametrize(
    "fields, tensor",
    [
        ({"num_layers": 3}, "model.layers.2."),
        ({"num_layers": 1}, "model.layers.1."),
        ({"multi_query_group_num": 1}, "self_attn.v_proj.bias"),
        ({"add_qkv_bias": False}, "self_attn.k_proj.bias"),
    ],
    ids=str,
)
def test_weights_that_do_not_belong_to_the_config(tiny_tokenizer, tmp_path, fields, tensor):
    checkpoint = save_random_model(tmp_path / "chatglm", tiny_tokenizer)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | fields))
    message = run_and_fail(checkpoint, tmp_path / "glm")
    assert "the weights do not belong to config.json" in message and tensor in message
