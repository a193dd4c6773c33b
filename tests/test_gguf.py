"""`python -m chatglm2.gguf`: the file's tensors bit by bit, and llama.cpp on it against our model.

    CHATGLM_LLAMA_PYTHON=path/to/python python -m pytest -m slow tests/test_gguf.py

CHATGLM_LLAMA_PYTHON is the Python of an environment with llama-cpp-python (tested: 0.3.36).
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from memory import PeakMemory, read_memory
from safetensors.torch import load_file, save_file
from test_export import CONVERSATIONS, create_texts
from test_modeling_chatglm import save_shards

from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm2 import gguf as command
from chatglm2.quantization import dequantize, get_quantization

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
from gguf.quants import dequantize as dequantize_gguf  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "tokenizer" / "tokenizer_golden.json"


def run_and_fail(checkpoint: Path, file: Path, *flags: str) -> str:
    """Run the command, which must end with one line and leave no file, and return that."""
    before = {*file.parent.glob("*")}
    with pytest.raises(SystemExit) as error:
        command.main([str(checkpoint), str(file), *flags])
    message = error.value.code
    assert message.startswith(f"{checkpoint}") and "\n" not in message
    assert {*file.parent.glob("*")} == before
    return message


def change_config(checkpoint: Path, folder: Path, **fields) -> Path:
    """Return a copy of a checkpoint, with other fields of its config.json."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("training"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.fixture(scope="module")
def save_as(tiny_checkpoint, tiny_tokenizer, tmp_path_factory):
    """A function that saves the bundled checkpoint in a dtype, perhaps quantized."""

    def save(dtype=torch.float16, bits=0, **options) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=dtype)
        model.quantize(bits, **options).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


# Tensors


def read_floats(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by name; levels become float32."""
    state = load_file(checkpoint / "model.safetensors")
    quantization = get_quantization(ChatGLMConfig.from_pretrained(checkpoint))
    floats = {}
    for name, tensor in state.items():
        if name.endswith("_scale"):
            continue
        scale = state.get(f"{name}_scale")
        if scale is not None:
            bits = 8 if "output_layer" in name else quantization.bits
            tensor = dequantize(tensor, scale, bits, torch.float32)
        floats[name] = tensor
    return floats


NAMES = {
    "embedding.word_embeddings": "token_embd",
    "encoder.layers.": "blk.",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "encoder.final_layernorm": "output_norm",
    "output_layer": "output",
}


def rename(name: str) -> str:
    name = name.removeprefix("transformer.")
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def check_tensors(file: Path, checkpoint: Path) -> dict[str, int]:
    """Compare all tensors bit by bit; return how many there are of each kind."""
    expected = {rename(name): tensor for name, tensor in read_floats(checkpoint).items()}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors.keys() == expected.keys()
    kinds = {}
    for name, tensor in tensors.items():
        kind = tensor.tensor_type.name
        found = torch.from_numpy(dequantize_gguf(np.array(tensor.data), tensor.tensor_type))
        assert found.dtype in (torch.float32, torch.float16)
        wanted = expected[name].float()
        assert found.float().view(torch.int32).equal(wanted.view(torch.int32)), name
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


VECTORS = 4 * 3 + 1


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, {"F16": 18, "F32": VECTORS}),
        ({"dtype": torch.float32}, {"F32": 18 + VECTORS}),
        ({"dtype": torch.bfloat16}, {"BF16": 18, "F32": VECTORS}),
        ({"bits": 4}, {"Q4_0": 16, "F16": 2, "F32": VECTORS}),
        ({"bits": 8}, {"Q8_0": 16, "F16": 2, "F32": VECTORS}),
        ({"bits": 4, "group_size": 128}, {"Q4_0": 16, "F16": 2, "F32": VECTORS}),
        ({"bits": 4, "output_bits": 8}, {"Q4_0": 16, "Q8_0": 1, "F16": 1, "F32": VECTORS}),
        ({"bits": 4, "dtype": torch.bfloat16}, {"Q4_0": 16, "BF16": 2, "F32": VECTORS}),
    ],
    ids=str,
)
def test_tensors_are_equal(save_as, options, kinds, tmp_path):
    checkpoint, file = save_as(**options), tmp_path / "x.gguf"
    command.main([str(checkpoint), str(file)])
    assert check_tensors(file, checkpoint) == kinds
    assert [x.name for x in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("bits", [4, 8])
def test_floats_are_quantized_as_the_official_way(tiny_checkpoint, save_as, bits, tmp_path):
    command.main([str(tiny_checkpoint), str(tmp_path / "x.gguf"), "--type", f"q{bits}_0"])
    check_tensors(tmp_path / "x.gguf", save_as(bits=bits))


def test_shards_and_names_of_the_base_model(tiny_checkpoint, tmp_path):
    """Official names begin with `transformer.`; those of ChatGLMModel do not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(tiny_checkpoint / name, folder)
    state = load_file(tiny_checkpoint / "model.safetensors")
    save_shards(folder, {k.removeprefix("transformer."): v for k, v in state.items()})
    command.main([str(folder), str(tmp_path / "x.gguf")])
    check_tensors(tmp_path / "x.gguf", tiny_checkpoint)
    (missing := folder / "pytorch_model-00002-of-00003.bin").unlink()
    assert f"{missing} is missing" in run_and_fail(folder, tmp_path / "y.gguf")


def test_blocks():
    """Byte i of a block of Q4_0 holds columns i and i + 16, a scale of a group is repeated."""
    levels = torch.arange(256).remainder(16).sub(8).to(torch.int8).view(1, 256)
    packed = (levels[:, 0::2] << 4) | (levels[:, 1::2] & 15)
    scale = torch.tensor([[1.0, -2.0]], dtype=torch.float16)
    encoded = command.Tensor("x", "q4_0", packed, scale).encode(False).reshape(8, 18)
    assert encoded[0, 2:].tolist() == [17 * i for i in range(16)]
    assert encoded[:, :2].copy().view(np.float16).ravel().tolist() == [1] * 4 + [-2] * 4


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([1 + 2**-20], "f16", "cannot hold exactly: give --round"),
        ([70000.0], "f16", "beyond the range of float16"),
        ([2.0**-14, 1.5, float("inf")], "f16", None),
        ([1 + 2**-20], "bf16", "cannot hold exactly"),
        ([1 + 2**-20], "f32", None),
    ],
)
def test_rounding(values, kind, message):
    weight = torch.tensor([values])
    tensor = command.Tensor("x", kind, weight, None)
    if message is None:
        tensor.encode(False)
        return
    with pytest.raises(ValueError, match=message):
        tensor.encode(False)
    if "beyond" in message:
        with pytest.raises(ValueError, match=message):
            tensor.encode(True)
    else:
        assert tensor.encode(True).nbytes == 2


def test_scales_of_float32_are_refused_or_rounded(save_as, tmp_path, capsys):
    checkpoint = save_as(torch.float32, 4)
    message = run_and_fail(checkpoint, tmp_path / "x.gguf")
    assert "weight_scale has values of float32 that float16 cannot hold exactly" in message
    command.main([str(checkpoint), str(tmp_path / "x.gguf"), "--round"])
    assert "as Q4_0, 0.0 GB, values of 16 tensors rounded." in capsys.readouterr().out


def test_tied_weights_are_written_once(tiny_checkpoint, tmp_path):
    folder = change_config(tiny_checkpoint, tmp_path / "chatglm", tie_word_embeddings=True)
    command.main([str(folder), str(tmp_path / "x.gguf")])
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert "token_embd.weight" in names and "output.weight" not in names


def test_memory(tmp_path, tiny_tokenizer):
    """The largest tensor has 34 MB, the checkpoint 270 MB, which are read from the mapped file."""
    shape = {"hidden_size": 512, "num_attention_heads": 4, "ffn_hidden_size": 16384}
    config = ChatGLMConfig(**shape, num_layers=4, padded_vocab_size=32768, seq_length=64)
    config.update({"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True})
    with torch.device("meta"):
        shapes = ChatGLMForConditionalGeneration(config).state_dict()
    state = {name: torch.ones(x.shape, dtype=torch.float16) for name, x in shapes.items()}
    assert sum(tensor.nbytes for tensor in state.values()) > 0.26e9
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    del state
    config.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    for kind, limit in (("f16", 0.05e9), ("q4_0", 0.2e9)):
        before = read_memory("RssAnon")
        with PeakMemory() as memory:
            command.main([str(tmp_path), str(tmp_path / f"{kind}.gguf"), "--type", kind])
        assert memory.peak - before < limit


# What cannot be converted


def test_pieces_that_make_a_control_token(tmp_path):
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "vocab_size": 290, "minloglevel": 2}
    settings |= {"split_by_unicode_script": False}
    settings |= {"hard_vocab_limit": False, "model_prefix": str(tmp_path / "tokenizer")}
    lines = [f"{letter}[gMASK" for letter in "abcdefghij"]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), **settings)
    tokenizer = ChatGLMTokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"make the token '\[gMASK\]' of llama.cpp"):
        command.list_tokens(tokenizer, 400)
    with pytest.raises(ValueError, match="padded_vocab_size is 270"):
        command.list_tokens(tokenizer, 270)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre_seq_len": 8}, "pre_seq_len is 8 and llama.cpp supports only None"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"kv_channels": 16}, "num_attention_heads * kv_channels is 128 and hidden_size 256"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"num_layers": 5}, "num_layers is 5, and the weights have 4"),
        ({"eos_token_id": [2, 5, 6, 7]}, "at most 3 ids"),
        ({"padded_vocab_size": 4095}, "word_embeddings"),
        ({"quantization_bit": 4}, "weights are not quantized"),
    ],
    ids=str,
)
def test_models_that_cannot_be_converted(tiny_checkpoint, tmp_path, fields, message):
    folder = change_config(tiny_checkpoint, tmp_path / "chatglm", **fields)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert message in run_and_fail(folder, tmp_path / "x.gguf")


def test_files_that_cannot_be_written(tiny_checkpoint, tmp_path, monkeypatch):
    file = tmp_path / "x.gguf"
    for other in (file, tmp_path):
        file.touch()
        assert f"{other} exists: give a new name" in run_and_fail(tiny_checkpoint, other)
    file.unlink()
    assert "there is no folder" in run_and_fail(tiny_checkpoint, tmp_path / "a" / "x.gguf")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        assert f"{file} cannot be written" in run_and_fail(tiny_checkpoint, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(command, "get_free_space", lambda folder: 10**6)
    assert "free in" in run_and_fail(tiny_checkpoint, file)


def test_other_folders(tiny_checkpoint, save_as, tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    assert "a LoRA adapter" in run_and_fail(lora, tmp_path / "x.gguf")
    assert "there is no such folder" in run_and_fail(tmp_path / "none", tmp_path / "x.gguf")
    quantized = save_as(bits=8)
    message = run_and_fail(quantized, tmp_path / "x.gguf", "--type", "q4_0")
    assert "the weights are INT8, and --type is q4_0" in message


def test_the_package_is_named_if_it_is_missing(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in run_and_fail(tiny_checkpoint, tmp_path / "x.gguf")


# Metadata


def read_fields(file: Path) -> dict:
    fields = gguf.GGUFReader(file).fields
    return {key: field.contents() for key, field in fields.items()}


def test_metadata(tiny_checkpoint, tiny_tokenizer, tmp_path):
    command.main([str(tiny_checkpoint), str(tmp_path / "x.gguf")])
    fields = read_fields(tmp_path / "x.gguf")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len({*tokens}) == 4096
    controls = [tokens[i] for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    assert controls == ["</s>", "[gMASK]", "<sop>"]
    assert tokens.index("<sop>") == tiny_tokenizer.get_command("sop")
    assert fields["chatglm.context_length"] == 2048
    assert fields["chatglm.rope.dimension_count"] == 16
    assert "chatglm.rope.scaling.type" not in fields
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.chat_template"].startswith("[gMASK]<sop>")


def test_end_ids(tiny_checkpoint, tmp_path):
    folder = change_config(tiny_checkpoint, tmp_path / "chatglm", eos_token_id=[7, 2])
    (folder / "generation_config.json").unlink(missing_ok=True)
    command.main([str(folder), str(tmp_path / "x.gguf")])
    fields = read_fields(tmp_path / "x.gguf")
    ids = [fields[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot")]
    assert ids == [7, 2]


# llama.cpp

LLAMA = """
import json, sys
import llama_cpp
import numpy as np

request = json.load(sys.stdin)
settings = {"n_ctx": 512, "logits_all": True, "type_k": 0, "type_v": 0}  # a cache of float32
vocab_only = {"vocab_only": True} if request.get("vocab_only") else settings
model = llama_cpp.Llama(request["file"], verbose=False, n_threads=1, **vocab_only)
answer = {"texts": [model.tokenize(x.encode(), special=False) for x in request.get("texts", [])]}
answer["greedy"], answer["chats"], logits = [], [], []
for ids in request.get("prompts", []):
    model.reset()
    model.eval(ids)
    logits.append(model.scores[: len(ids)].copy())
    model.reset()
    tokens = model.generate(ids, temp=0, repeat_penalty=1.0)
    answer["greedy"].append([next(tokens) for _ in range(request["new_tokens"])])
for messages in request.get("chats", []):
    options = {"temperature": 0, "repeat_penalty": 1.0, "max_tokens": request["new_tokens"]}
    reply = model.create_chat_completion(messages, **options)
    content = reply["choices"][0]["message"]["content"]
    answer["chats"].append([reply["usage"]["prompt_tokens"], content])
if logits:
    np.savez(request["logits"], *logits)
print(json.dumps(answer))
"""
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def ask_llama(tmp_path_factory):
    """A function that runs llama.cpp on a file; it returns ids, texts and logits."""
    python = os.environ.get("CHATGLM_LLAMA_PYTHON")
    if not python:
        pytest.skip("CHATGLM_LLAMA_PYTHON is not set: see tests/test_gguf.py")

    def ask(file: Path, **request):
        logits = tmp_path_factory.mktemp("logits") / "logits.npz"
        request |= {"file": str(file), "logits": str(logits), "new_tokens": NEW_TOKENS}
        words = [python, "-c", LLAMA]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            words, input=json.dumps(request), env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        if logits.exists():
            answer["logits"] = [torch.from_numpy(x) for x in np.load(logits).values()]
        return answer

    return ask


def create_prompts(tokenizer) -> list[list[int]]:
    """Return 20 prompts: chats and texts."""
    golden = json.loads(GOLDEN.read_text("utf-8"))
    questions = ["你好", "What is 2 + 2?", "晚上睡不着怎么办", "def f(x):\n    return", "写一首诗"]
    chats = [[{"role": "user", "content": text}] for text in questions] + CONVERSATIONS
    prompts = [tokenizer.apply_chat_template(chat)["input_ids"] for chat in chats]
    texts = [case["text"] for case in golden["strings"] if len(case["text"]) > 5]
    return (prompts + [tokenizer.encode(text)[:200] for text in texts])[:20]


@torch.no_grad()
def generate(model, prompts: list[list[int]]) -> tuple[list, list]:
    """Return greedy ids and logits of our model."""
    greedy, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits.append(model(ids).logits[0])
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        greedy.append(model.generate(ids, eos_token_id=None, **options)[0, len(prompt) :].tolist())
    return greedy, logits


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bits", "bound"),
    [("f32", 0, 1e-4), ("f16", 0, 0.03), ("q8_0", 8, 0.5), ("q4_0", 4, 0.6)],
)
def test_llama_generates_our_ids(
    ask_llama, tiny_checkpoint, tiny_tokenizer, kind, bits, bound, tmp_path
):
    file = tmp_path / "x.gguf"
    command.main([str(tiny_checkpoint), str(file), "--type", kind])
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model = model.quantize(bits).float()
    prompts = create_prompts(tiny_tokenizer)
    greedy, logits = generate(model, prompts)
    found = ask_llama(file, prompts=prompts)
    assert len(prompts) == 20
    worst = largest_difference(found["logits"], logits)
    same = sum(a == b for a, b in zip(found["greedy"], greedy, strict=True))
    print(f"{kind}: largest difference of logits {worst:.5f}, {same} of 20 answers equal")
    assert worst < bound and (bits or same == 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["official_tokenizer", "tiny_tokenizer"])
def test_llama_gives_our_ids_for_texts(ask_llama, request, name, tmp_path):
    tokenizer = request.getfixturevalue(name)
    golden = json.loads(GOLDEN.read_text("utf-8"))
    texts = [case["text"] for case in golden["strings"]] + create_texts(tokenizer)
    texts += ["<s></s><unk>[gMASK]sop<sop>", "a\0b", "\n", "<0x0A>", "[PAD65000]"]
    if os.environ.get("CHATGLM_EVALDATA"):
        folder = request.getfixturevalue("evaldata")
        for file in (*sorted(folder.glob("ceval/val/*.csv")), folder / "gsm8k" / "test.jsonl"):
            texts += file.read_text("utf-8").splitlines()[1:11]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    config = ChatGLMConfig(padded_vocab_size=4096 if name == "tiny_tokenizer" else 65024)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "chatglm")
    command.add_shape(writer, config)
    command.add_tokenizer(writer, tokenizer, config, [2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = ask_llama(tmp_path / "x.gguf", texts=texts, vocab_only=True)["texts"]
    for text, ids in zip(texts, found, strict=True):
        assert ids == tokenizer.encode(text, add_special_tokens=False), text


@pytest.mark.slow
def test_llama_chats(ask_llama, tiny_checkpoint, tiny_model, tiny_tokenizer, tmp_path):
    """The prompt and the answer, as they are before `process_response`."""
    command.main([str(tiny_checkpoint), str(tmp_path / "x.gguf")])
    found = ask_llama(tmp_path / "x.gguf", chats=CONVERSATIONS)["chats"]
    for messages, (prompt_tokens, content) in zip(CONVERSATIONS, found, strict=True):
        prompt = tiny_tokenizer.apply_chat_template(messages, return_tensors="pt")
        ids = tiny_model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        length = prompt["input_ids"].shape[1]
        assert prompt_tokens == length
        assert content.strip() == tiny_tokenizer.decode(ids[0, length:]).strip()


@pytest.mark.slow
@torch.no_grad()
def test_llama_scales_positions(ask_llama, tiny_checkpoint, tiny_tokenizer, tmp_path):
    rope = {"rope_type": "linear", "factor": 1.5, "rope_theta": 20000.0}
    for i, fields in enumerate(({"rope_ratio": 4}, {"rope_ratio": 2, "rope_parameters": rope})):
        folder = change_config(tiny_checkpoint, tmp_path / f"{i}", **fields)
        command.main([str(folder), str(tmp_path / f"{i}.gguf"), "--type", "f32"])
        model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        prompts = create_prompts(tiny_tokenizer)[-3:]
        expected = [model(torch.tensor([ids])).logits[0] for ids in prompts]
        found = ask_llama(tmp_path / f"{i}.gguf", prompts=prompts)["logits"]
        assert largest_difference(found, expected) < 1e-4
