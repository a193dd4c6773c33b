"""Quantization against golden data of the official code, and every way to a quantized model."""

import doctest
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import require_library
from quantized_layers import create_layer, each_way
from safetensors.torch import load_file, save_file
from test_modeling_chatglm import CONFIG, IDS, assert_close, padded_batch
from test_modeling_chatglm import create_model as create_golden_model
from transformers import AutoModel
from transformers.trainer_utils import validate_quantization_for_training
from transformers.utils.logging import warning_once

from chatglm2 import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
    ChatGLMQuantizationConfig,
    kernels,
    quantization,
)
from chatglm2.kernels import Backend
from chatglm2.quantization import QuantizedLinear, dequantize, torch_matmul

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = load_file(GOLDEN / "tiny" / "model.safetensors")
OUTPUTS = load_file(GOLDEN / "quant" / "outputs.safetensors")
META = json.loads((GOLDEN / "quant" / "meta.json").read_text("utf-8"))
CHECKPOINTS = {
    bits: load_file(GOLDEN / "quant" / f"int{bits}_fp16_checkpoint.safetensors") for bits in (4, 8)
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# golden/README.md of the tiny model; in float16 either side is up to 0.021 from the float32 logits
TOLERANCES = {"fp32": 1e-4, "fp16": 0.025, "bf16": 0.15}
ROUNDED = 2e-3  # the CPU kernels round activations to 16 bits
METHOD = {"quant_method": "chatglm"}
WAYS = [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 128}, {"bits": 4, "output_bits": 8}]
LENGTH = IDS.shape[1]
NUM_PRODUCTS = 4 * CONFIG["num_layers"]
load = ChatGLMForConditionalGeneration.from_pretrained


def create_model(dtype=torch.float16, **config) -> ChatGLMForConditionalGeneration:
    return create_golden_model(**config).to(dtype)


def write_official(folder: Path, bits: int, suffix="safetensors", **config) -> Path:
    """Write a folder like THUDM/chatglm2-6b-int4: its config says nothing but quantization_bit."""
    folder.mkdir(parents=True)
    fields = {**CONFIG, "torch_dtype": "float16", "quantization_bit": bits, **config}
    (folder / "config.json").write_text(json.dumps(fields))
    if suffix == "bin":
        torch.save(CHECKPOINTS[bits], folder / "pytorch_model.bin")
    else:
        save_file(CHECKPOINTS[bits], folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def compute_logits(model) -> torch.Tensor:
    return model(IDS).logits


def assert_official(state: dict, bits: int):
    """Check that a state dict is the official checkpoint, bit for bit."""
    expected = {k: v for k, v in CHECKPOINTS[bits].items() if "inv_freq" not in k}
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


# The format


def test_packing():
    assert doctest.testmod(quantization).failed == 0
    packed = torch.arange(-128, 128, dtype=torch.int8).view(16, 16)
    levels = quantization.unpack_int4(packed)
    assert levels.shape == (16, 32) and levels.min() == -8 and levels.max() == 7
    assert torch.equal(quantization.pack_int4(levels), packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_levels_and_scales_are_the_official_ones(bits, dtype):
    names = [x for x in OUTPUTS if x.startswith(f"{dtype}.int{bits}.") and x.endswith(".weight")]
    assert len(names) == 2
    for name in names:
        weight = WEIGHTS[f"transformer.encoder.layers.{name.split('.', 2)[2]}"].to(DTYPES[dtype])
        levels, scale = quantization.quantize_rows(weight, bits)
        stored = quantization.pack_int4(levels) if bits == 4 else levels
        assert scale.dtype == weight.dtype and torch.equal(scale, OUTPUTS[f"{name}_scale"])
        differs = stored != OUTPUTS[name]
        if (dtype, bits) == ("bf16", 8):  # where the original wraps 128 around to -128
            assert differs.any()
            assert (OUTPUTS[name][differs] == -128).all() and (stored[differs] == 127).all()
            assert (weight[differs] > 0).all()
        else:
            assert not differs.any()


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_and_of_tiny_numbers(bits):
    levels, scale = quantization.quantize_rows(OUTPUTS[f"edge.int{bits}.weight"], bits)
    assert torch.equal(scale, OUTPUTS[f"edge.int{bits}.scale"])
    expected = torch.tensor(META[f"edge.int{bits}"]["as_int8"])
    if bits == 4:
        expected = expected.clamp(max=7)  # the official 8 becomes -8 when it is packed
    assert torch.equal(levels.long(), expected)
    assert torch.isfinite(dequantize(levels, scale, 8, torch.float32)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_weights_are_the_official_ones(bits):
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    state = CHECKPOINTS[bits]
    weight = dequantize(state[name], state[f"{name}_scale"], bits, torch.float32)
    assert torch.equal(weight, OUTPUTS[f"cpu_float.int{bits}.0.qkv.dequantized"])


@each_way
def test_error_is_at_most_half_a_step(bits, group_size):
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 48)
    layer = QuantizedLinear.from_linear(linear, bits, group_size)
    weight = dequantize(layer.weight, layer.weight_scale, bits, torch.float32)
    steps = layer.weight_scale.reshape(48, -1).repeat_interleave(group_size or 256, dim=1)
    is_cut = (linear.weight / steps > 7.5) & (group_size is not None)  # 8 becomes 7
    limit = torch.where(is_cut, 1, 0.501)
    assert ((weight - linear.weight).abs() <= limit * steps.abs()).all()
    assert is_cut.float().mean() < 0.05
    with torch.no_grad():
        x = torch.randn(2, 3, 256)
        assert_close(layer(x), F.linear(x, weight, linear.bias), 2e-4)


# The layers


@pytest.mark.parametrize("block_weights", [5 * 64, 1 << 30])
@each_way
def test_gradient_of_the_input_in_blocks(bits, group_size, block_weights, monkeypatch):
    """An adapter before a frozen layer needs it."""
    monkeypatch.setattr(quantization, "BLOCK_WEIGHTS", block_weights)
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 5, dtype=torch.float64)
    layer = QuantizedLinear.from_linear(linear, bits, group_size)
    x = torch.randn(2, 128, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    weight = dequantize(layer.weight, layer.weight_scale, bits, torch.float64)
    assert_close(layer(x), F.linear(x, weight, linear.bias), 1e-12)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.dtype) or x, lambda x: x
    ):
        layer(x).sum().backward()
    assert layer.bias.grad is not None and layer.weight.grad is layer.weight_scale.grad is None
    assert saved.count(torch.int8) == 1 and len(saved) == 2, "the float weight is kept"


def test_output_layer_casts_where_used():
    torch.manual_seed(0)
    layer = quantization.StoredLinear(torch.nn.Linear(32, 20, bias=False))
    weight = layer.weight.float()
    assert layer.weight.dtype == torch.float16
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).square().sum().backward()
    assert_close(layer(x), F.linear(x, weight), 1e-6)
    assert_close(x.grad, 2 * F.linear(x, weight) @ weight, 1e-4)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_output_layer_gets_its_gradient(dtype, weight_dtype):
    torch.manual_seed(0)
    layer, x = quantization.StoredLinear(torch.nn.Linear(32, 20)), torch.randn(3, 32)
    layer.weight = torch.nn.Parameter(layer.weight.to(weight_dtype))
    layer(x.to(dtype)).square().sum().backward()
    assert layer.weight.grad.dtype == weight_dtype
    exact = 2 * F.linear(x, layer.weight.float()).T @ x
    assert_close(layer.weight.grad, exact, 0.01 if dtype == torch.float32 else 0.1)


@each_way
def test_trained_scales_get_their_gradient(bits, group_size):
    layer = create_layer(bits, group_size, dtype=torch.float64)
    layer.weight_scale = torch.nn.Parameter(layer.weight_scale.data)
    x = torch.randn(2, 384, dtype=torch.float64)

    def compute(scale):
        return F.linear(x, dequantize(layer.weight, scale, bits, torch.float64))

    layer(x).square().sum().backward()
    scale = layer.weight_scale.data.requires_grad_(True)
    (expected,) = torch.autograd.grad(compute(scale).square().sum(), scale)
    assert_close(layer.weight_scale.grad, expected, 1e-6)


# Resizing


@pytest.mark.parametrize("num_rows", [150, 250])
@pytest.mark.parametrize(("output_bits", "is_tied"), [(None, False), (None, True), (8, False)])
@torch.no_grad()
def test_resizing_a_quantized_model(num_rows, output_bits, is_tied, tmp_path):
    """The rows that remain keep their bytes, in both dtypes and in the saved folder."""
    for dtype in (torch.float32, torch.bfloat16):
        model = create_model(dtype, tie_word_embeddings=is_tied)
        model.quantize(4, output_bits=output_bits)
        expected, kind = model(IDS % 150).logits[..., :150], type(model.get_output_embeddings())
        model.resize_token_embeddings(num_rows)
        logits = model(IDS % 150).logits
        assert logits.shape[-1] == num_rows and torch.equal(logits[..., :150], expected)
        assert logits.isfinite().all() and type(model.get_output_embeddings()) is kind
        model.save_pretrained(tmp_path)
        assert torch.equal(load(tmp_path).to(dtype)(IDS % 150).logits, logits)


# Official checkpoints


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("bits", [4, 8])
def test_official_checkpoint(tmp_path, bits, suffix, backend, monkeypatch):
    if backend == "cpu":
        require_library()
    monkeypatch.setenv("CHATGLM_BACKEND", backend)
    tolerance = ROUNDED if backend == "cpu" else TOLERANCES["fp32"]
    folder = write_official(tmp_path / "official", bits, suffix)
    model, info = load(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float16 and not model.training
    assert_close(compute_logits(model), OUTPUTS[f"fp16.int{bits}.logits"], TOLERANCES["fp16"])
    assert_official(model.state_dict(), bits)

    model = AutoModel.from_pretrained(folder).float()
    assert_close(compute_logits(model), OUTPUTS[f"cpu_float.int{bits}.logits"], tolerance)
    inputs = padded_batch()
    with torch.no_grad():
        logits = model(**inputs).logits
    is_token = inputs["attention_mask"].bool()
    assert_close(
        logits[is_token], OUTPUTS[f"cpu_float.int{bits}.batch_logits"][is_token], tolerance
    )
    expected = META["generate"][f"cpu_float.int{bits}"]
    ids = model.generate(IDS, max_length=len(expected[0]), eos_token_id=None)
    assert ids.tolist() == expected
    assert_official(model.half().state_dict(), bits)  # also after a backend has packed it


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_checkpoint_is_the_official_one(tmp_path, bits):
    folder = write_official(tmp_path / "official", bits)
    load(folder).save_pretrained(tmp_path / "saved")
    assert_official(load_file(tmp_path / "saved" / "model.safetensors"), bits)
    fields = json.loads((tmp_path / "saved" / "config.json").read_bytes())
    assert fields["quantization_bit"] == bits and fields["dtype"] == "float16"
    assert fields["quantization_config"] == METHOD | {"bits": bits, "group_size": None}
    again = load(tmp_path / "saved")
    assert_official(again.state_dict(), bits)
    again.float().save_pretrained(tmp_path / "float32")
    last = load(tmp_path / "float32")
    assert last.dtype == torch.float32
    assert_close(compute_logits(last), OUTPUTS[f"cpu_float.int{bits}.logits"], ROUNDED)
    config = ChatGLMConfig.from_pretrained(folder, num_labels=3)
    model = ChatGLMForSequenceClassification.from_pretrained(folder, config=config).float()
    assert model(IDS).logits.shape == (1, 3)
    assert isinstance(model.transformer.encoder.layers[0].mlp.dense_4h_to_h, QuantizedLinear)


def test_model_made_from_a_config():
    for model_class in (ChatGLMModel, ChatGLMForConditionalGeneration):
        model = model_class(ChatGLMConfig(**CONFIG, quantization_bit=4), empty_init=False)
        assert torch.isfinite(model(IDS)[0]).all()
    model.half().load_state_dict({k: v for k, v in CHECKPOINTS[4].items() if "inv_freq" not in k})
    assert_close(compute_logits(model.float()), OUTPUTS["cpu_float.int4.logits"], ROUNDED)


# Quantizing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_quantizing_while_loading_gives_the_same_folder(tiny_checkpoint, tmp_path, way, dtype):
    options = {"dtype": DTYPES[dtype]}
    load(tiny_checkpoint, **options).quantize(**way).save_pretrained(tmp_path / "a")
    model = load(tiny_checkpoint, quantization_config=ChatGLMQuantizationConfig(**way), **options)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "scale" in n)
    model.save_pretrained(tmp_path / "b")
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    state = load(tmp_path / "a").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_quantizing_while_loading_shards(tmp_path, monkeypatch):
    """When a weight is quantized, those before it are int8 already."""
    create_model().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    convert, num_converted = quantization.QuantizeWhileLoading.convert, []

    def record(self, input_dict, full_layer_name=None, model=None, **kwargs):
        alive = [x for x in model.base_model.encoder.parameters() if x.ndim == 2 and not x.is_meta]
        assert all(x.dtype == torch.int8 for x in alive)
        num_converted.append(len(alive))
        return convert(self, input_dict, full_layer_name, model, **kwargs)

    monkeypatch.setattr(quantization.QuantizeWhileLoading, "convert", record)
    model = load(tmp_path, quantization_config=METHOD | {"bits": 4}, device_map="cpu")
    assert_official(model.state_dict(), 4)
    assert num_converted == list(range(NUM_PRODUCTS))


@pytest.mark.parametrize("way", WAYS[1:], ids=str)
def test_weights_are_mapped_and_not_copied(tiny_checkpoint, tmp_path, way):
    load(tiny_checkpoint).quantize(**way).save_pretrained(tmp_path)
    model = load(tmp_path).float()
    lines = Path("/proc/self/maps").read_text().splitlines()
    regions = [line.split()[0].split("-") for line in lines if str(tmp_path) in line]
    regions = [[int(x, 16) for x in ends] for ends in regions]
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    for layer in layers[:1] if "output_bits" in way else layers:
        address = layer.weight.data_ptr()
        assert any(start <= address < end for start, end in regions)


@pytest.mark.parametrize("is_loaded", [False, True], ids=["quantized", "loaded"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_gives_the_official_bytes_once(bits, is_loaded, tmp_path):
    model = load(write_official(tmp_path / "x", bits)) if is_loaded else create_model()
    assert model.quantize(bits) is model and model.quantize(bits) is model.quantize(0) is model
    assert_official(model.state_dict(), bits)
    with pytest.raises(ValueError, match=f"already, with {bits} bits and group_size None: load"):
        model.quantize(12 - bits)


def test_quantization_config_for_a_quantized_checkpoint(tmp_path, tiny_checkpoint, recwarn):
    folder = write_official(tmp_path / "official", 4)
    for wanted in (METHOD | {"bits": 4}, ChatGLMQuantizationConfig(bits=4)):
        for load_model in (load, AutoModel.from_pretrained):
            assert_official(load_model(folder, quantization_config=wanted).state_dict(), 4)
    config = ChatGLMConfig.from_pretrained(folder)
    for wanted in ({"bits": 8}, {"bits": 4, "group_size": 128}):
        expected = f"with 4 bits and group_size None: load .* for {wanted['bits']} bits"
        for options in ({}, {"config": config}, {"config": str(folder)}):
            with pytest.raises(ValueError, match=expected):
                load(folder, quantization_config=METHOD | wanted, **options)
    assert not [w for w in recwarn if "quantization_config" in str(w.message)]
    model = load(tiny_checkpoint).quantize(4, group_size=128)
    assert model.quantize(4) is model and model.config.quantization_config.group_size == 128


@torch.no_grad()
def test_output_layer_of_a_quantized_checkpoint(tmp_path):
    folder = write_official(tmp_path / "official", 4)
    expected = compute_logits(load(folder).float())
    model = load(folder)
    assert model.quantize(4, output_bits=8) is model and model.quantize(4) is model
    assert model.config.quantization_config.output_bits == 8
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)
    error = compute_logits(model.float()) - expected
    assert 0 < error.norm() < 0.01 * expected.norm()
    model.half().save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert all(torch.equal(value, again.state_dict()[n]) for n, value in model.state_dict().items())
    assert not any(p.requires_grad for p in again.get_output_embeddings().parameters())
    with pytest.raises(ValueError, match=r"output layer is not: load it without .*output_bits=8"):
        load(folder, quantization_config=METHOD | {"bits": 4, "output_bits": 8})


def test_backend_is_picked_anew_for_the_output_layer(monkeypatch):
    kinds = []

    def pick(layers, *_):
        kinds.append([layer.bits for layer in layers])

    monkeypatch.setattr(quantization, "pick_backend", pick)
    model = create_model(torch.float32).quantize(4)
    compute_logits(model)
    compute_logits(model.quantize(4, output_bits=8))
    assert 8 not in kinds[0] and 8 in kinds[1] and len(kinds) == 2


def create_adapted(name):
    model = create_model()
    model.set_submodule(f"transformer.{name}", torch.nn.Sequential())
    return model


GROUPS = {"bits": 4, "group_size": 128}
OUTPUT = {"bits": 4, "output_bits": 8}
LINEAR = "encoder.layers.0.mlp.dense_4h_to_h"


@pytest.mark.parametrize(
    ("create", "options", "message"),
    [
        *((create_model, {"bits": b}, "bits: give 4 or 8") for b in (2, 16, -4, None, "4")),
        *((create_model, {"bits": 4, "group_size": n}, f"no group_size {n}") for n in (64, 0)),
        (create_model, {"bits": 8, "group_size": 128}, "no group_size 128 with 8 bits"),
        (create_model, GROUPS, "64 inputs cannot have 4-bit weights.*multiple of 128"),
        (lambda: create_model().quantize(4), GROUPS, "load .* for 4 bits and group_size 128"),
        *((create_model, OUTPUT | {"output_bits": n}, f"{n} bits: give 8") for n in (4, 16, 0)),
        (create_model, OUTPUT | {"bits": 0}, "cannot quantize to 0 bits"),
        (lambda: create_model(tie_word_embeddings=True), OUTPUT, "is 8, but .*tie_word_emb"),
        (lambda: create_adapted("output_layer"), OUTPUT, "output_layer is a Sequential: quanti"),
        (lambda: create_adapted(LINEAR), OUTPUT, "dense_4h_to_h is a Sequential: quantize"),
    ],
)
def test_refused(create, options, message):
    model = create()
    fields, modules = model.config.to_dict(), list(model.modules())
    with pytest.raises(ValueError, match=message):
        model.quantize(**options)
    assert model.config.to_dict() == fields
    assert list(model.modules()) == modules


def test_contradicting_configs(tmp_path):
    create_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantization_bit|not quantized"):
        load(tmp_path, quantization_bit=4)
    fields = json.loads((tmp_path / "config.json").read_bytes()) | {"quantization_bit": 4}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"are not quantized, but.*quantization_bit 4"):
        load(tmp_path)
    model = create_model()
    model.config.quantization_bit = 4
    with pytest.raises(ValueError, match="there is no quantization_config"):
        ChatGLMForConditionalGeneration(model.config)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="quantized by gptq"):
        model.quantize(4)


# dtype and device


@pytest.mark.parametrize("is_loaded", [False, True], ids=["quantized", "loaded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_in_either_order(tmp_path, is_loaded, dtype):
    model = load(write_official(tmp_path / "x", 4)) if is_loaded else create_model().quantize(4)
    assert model.to(DTYPES[dtype]) is model and model.dtype == DTYPES[dtype]
    for name, parameter in model.named_parameters():
        is_stored = "word_embeddings" in name or "output_layer" in name
        is_packed = parameter.ndim == 2 and not is_stored
        kept = torch.int8 if is_packed else torch.float16 if is_stored else DTYPES[dtype]
        assert parameter.dtype == kept, name
    logits, reference = compute_logits(model), OUTPUTS["cpu_float.int4.logits"]
    assert_close(logits, reference, {"fp32": ROUNDED, "fp16": 0.05, "bf16": 1.5}[dtype])
    if dtype != "bf16":
        assert_official(model.half().state_dict(), 4)
    other = create_model(DTYPES[dtype]).quantize(4)
    assert other.get_input_embeddings().weight.dtype.itemsize == 2
    assert compute_logits(other).dtype == logits.dtype == DTYPES[dtype]
    if dtype != "fp32":
        assert_close(compute_logits(other), OUTPUTS[f"{dtype}.int4.logits"], TOLERANCES[dtype])


def test_conversion_to_another_device():
    model = create_model().quantize(4).to("meta", torch.float32)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(torch.ones(1, 3, dtype=torch.long, device="meta")).logits.dtype == torch.float32
    model.to_empty(device="cpu")
    assert model.get_input_embeddings().weight.dtype == torch.float16


def test_tied_weights_stay_tied():
    model = create_model(torch.float32, tie_word_embeddings=True).quantize(8)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


# Use


@torch.no_grad()
def test_quality_on_the_bundled_checkpoint(tiny_checkpoint, tiny_model, tiny_tokenizer):
    inputs = tiny_tokenizer(["[Round 1]\n\n问：你好\n\n答：你好！"], return_tensors="pt")
    expected, errors = tiny_model(**inputs).logits.log_softmax(-1), []
    for way in WAYS[:3]:
        logits = load(tiny_checkpoint).quantize(**way).float()(**inputs).logits.log_softmax(-1)
        errors.append(F.kl_div(logits, expected, reduction="sum", log_target=True))
    int8, int4, groups = errors
    assert int8 < groups < int4


def test_training_on_a_quantized_model(tmp_path):
    """P-Tuning v2: only the prefix is trained, through the quantized layers."""
    model = load(write_official(tmp_path / "official", 4, pre_seq_len=5)).float()
    validate_quantization_for_training(model)  # Trainer calls this
    model.requires_grad_(False)
    prefix = model.transformer.prefix_encoder.embedding.weight.requires_grad_(True)
    torch.nn.init.normal_(prefix, generator=torch.manual_seed(0))
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    with torch.no_grad():
        prefix -= 0.05 * prefix.grad
    assert model(IDS, labels=IDS).loss < loss


# Backends


class FakeBackend(Backend):
    """Notes the number of tokens of each product."""

    def __init__(self, problem=None):
        self.problem, self.products, self.asked = problem, [], []

    def find_problem(self, layer, device, dtype):
        self.asked.append((layer.in_features, layer.out_features, dtype))
        return self.problem

    def matmul(self, x, layer):
        self.products.append(x.shape[-2])
        return torch_matmul(x, layer)


@pytest.fixture
def fake_backends(monkeypatch, caplog):
    """Replace the table: one that cannot be imported, two fakes, and plain torch."""
    fakes = {"first": FakeBackend("it is too new"), "second": FakeBackend()}
    for name, fake in fakes.items():
        module = ModuleType(f"chatglm2.kernels.{name}")
        module.Fake = lambda fake=fake: fake
        monkeypatch.setitem(sys.modules, module.__name__, module)
    table = {name: ("cpu", f"{name}.Fake") for name in ("absent", *fakes)}
    monkeypatch.setattr(kernels, "BACKENDS", table | {"torch": (None, None)})
    monkeypatch.setattr(kernels.logger, "parent", logging.getLogger())
    monkeypatch.delenv("CHATGLM_BACKEND", raising=False)
    warning_once.cache_clear()
    return fakes.values()


def test_backend_is_picked_once_for_a_model_and_printed(fake_backends, caplog):
    first, second = fake_backends
    model = create_model(torch.float32).quantize(4)
    compute_logits(model)
    compute_logits(model)
    layer = model.transformer.encoder.layers[0].mlp.dense_h_to_4h
    layer(torch.randn(3, layer.in_features, requires_grad=True))  # in plain torch
    assert len(first.products) == 0 and len(second.products) == 2 * NUM_PRODUCTS
    assert len(second.asked) == len(set(second.asked)) == 4  # each size of layer, once
    (line,) = caplog.messages
    assert "Quantized layers on cpu in float32: backend second (not absent: No module " in line
    assert line.endswith("; not first: it is too new)")
    first.problem = None
    compute_logits(model.bfloat16())
    assert len(first.products) == NUM_PRODUCTS and len(second.products) == 2 * NUM_PRODUCTS
    assert "cpu in bfloat16: backend first (not absent" in caplog.text


def test_environment_forces_a_backend(fake_backends, monkeypatch, caplog):
    monkeypatch.setenv("CHATGLM_BACKEND", "torch")
    compute_logits(create_model(torch.float32).quantize(4))
    assert not any(fake.products for fake in fake_backends)
    assert "backend torch (CHATGLM_BACKEND says so)" in caplog.text
    monkeypatch.setenv("CHATGLM_BACKEND", "first")
    model = create_model(torch.float32).quantize(4)
    with pytest.raises(ValueError, match="'first', which cannot serve cpu in float32: it is too"):
        compute_logits(model)
    monkeypatch.setenv("CHATGLM_BACKEND", "fastest")
    with pytest.raises(ValueError, match="'fastest': give one of absent, first, second, torch, or"):
        create_model().quantize(4)


@torch.no_grad()
def test_backend_that_overrides_nothing_else(monkeypatch):
    """The defaults compute what plain torch does."""
    Minimal = type("Minimal", (Backend,), {"matmul": lambda self, x, layer: torch_matmul(x, layer)})
    logits = []
    for backend in (None, Minimal()):
        monkeypatch.setattr(quantization, "pick_backend", lambda *_, found=backend: found)
        model = create_model(torch.float32).quantize(4)
        quantization.prepare_layers(model)
        logits.append(model(IDS).logits)
    assert all(torch.equal(x, logits[0]) for x in logits)


@pytest.mark.slow  # starts processes
def test_package_without_the_kernels_works(tiny_checkpoint, tmp_path):
    """chatglm2/kernels/ may be deleted."""
    package = Path(quantization.__file__).parent
    ignored = shutil.ignore_patterns("kernels", "__pycache__")
    shutil.copytree(package, tmp_path / "chatglm2", ignore=ignored)
    code = """
import sys
import torch
from chatglm2 import ChatGLMForConditionalGeneration, quantization

model = ChatGLMForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
ids = model.quantize(4).generate(torch.tensor([[5, 7, 9]]), max_new_tokens=4, min_new_tokens=4)
print(quantization.__file__, ids.shape)
"""
    environment = {k: v for k, v in os.environ.items() if k != "CHATGLM_BACKEND"}

    def run(**variables):
        variables |= {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, str(tiny_checkpoint)]
        options = {"capture_output": True, "text": True, "timeout": 300, "cwd": tmp_path}
        return subprocess.run(command, env=environment | variables, **options)

    done = run()
    assert done.stdout.startswith(str(tmp_path)) and "[1, 7]" in done.stdout, done.stderr
    assert "backend torch (No module named 'chatglm2.kernels')" in done.stderr
    assert "CHATGLM_BACKEND is 'cpu', which is not here" in run(CHATGLM_BACKEND="cpu").stderr


@pytest.fixture
def products(monkeypatch):
    """The numbers of tokens in the products of all quantized layers."""
    backend = FakeBackend()
    monkeypatch.setattr(quantization, "pick_backend", lambda *_: backend)
    return backend.products


@torch.no_grad()
def test_candidates_are_multiplied_together(products):
    model = create_model(torch.float32).quantize(4)
    settings = {"min_new_tokens": 8, "max_new_tokens": 8, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(IDS.repeat(1, 2), **settings)
    products.clear()
    found = model.generate(IDS.repeat(1, 2), prompt_lookup_num_tokens=3, **settings)
    assert products[0] == 2 * LENGTH + 3 and max(products[NUM_PRODUCTS:]) > 1
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(torch.cat(found.logits), torch.cat(expected.logits), 1e-4)
