"""`placement`: device maps and their mistakes, models over pretended GPUs, memory and disk."""

import shutil
from collections import Counter

import pytest
import torch
from fake_devices import PretendTensor

import utils
from chatglm2 import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMQuantizationConfig,
    placement,
)
from chatglm2.kernels.build_cpu import get_library
from chatglm2.quantization import QuantizedLinear, prepare_layers

LAYER = "transformer.encoder.layers."
CONFIG = ChatGLMConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    kv_channels=8,
    num_attention_heads=4,
    multi_query_attention=True,
    multi_query_group_num=2,
    padded_vocab_size=64,
)
WHOLE = {
    "transformer.embedding": 0,
    "transformer.encoder.layers": 1,
    "transformer.encoder.final_layernorm": 1,
    "transformer.output_layer": 0,
}


# Maps.


@pytest.mark.parametrize(
    ("args", "numbers"),
    [
        ((1,), [28]),
        ((2,), [13, 15]),  # up to 6 and with 8 as the original divides 28
        ((3,), [8, 10, 10]),
        ((4,), [6, 8, 8, 6]),
        ((5,), [4, 6, 6, 6, 6]),
        ((6,), [3, 5, 5, 5, 5, 5]),
        ((7,), [3, 5, 5, 5, 5, 4, 1]),  # where the original left the last one empty
        ((8,), [2, 4, 4, 4, 4, 4, 4, 2]),
        ((2, 4), [1, 3]),
        ((4, 4), [0, 2, 1, 1]),
        ((2, 3), [1, 2]),
    ],
)
def test_layers_are_divided(args, numbers):
    device_map = utils.auto_configure_device_map(*args)
    gpus = [device_map.pop(f"{LAYER}{i}") for i in range(sum(numbers))]
    assert gpus == [gpu for gpu, number in enumerate(numbers) for _ in range(number)]
    assert device_map == dict.fromkeys(placement.ENDS, 0)


@pytest.mark.parametrize("num_gpus", [0, -1, 5])
def test_more_gpus_than_layers(num_gpus):
    with pytest.raises(ValueError, match=rf"num_gpus is {num_gpus}, .* from 1 to 4\."):
        utils.auto_configure_device_map(num_gpus, 4)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("num_gpus", [1, 2, 3, 4])
@pytest.mark.parametrize("fields", [{}, {"pre_seq_len": 3}, {"post_layer_norm": False}])
def test_maps_are_whole(num_gpus, fields):
    config = ChatGLMConfig.from_dict({**CONFIG.to_dict(), **fields})
    device_map = placement.create_device_map(config, num_gpus)
    resolved = placement.resolve_device_map(device_map, config)
    assert {device.index for device in resolved.values()} == set(range(num_gpus))


@pytest.mark.usefixtures("four_gpus")
def test_names_of_devices():
    device_map = {**WHOLE, "transformer.encoder.layers": "cuda:3", f"{LAYER}2": "disk"}
    device_map |= {f"{LAYER}1": torch.device("cpu"), "lm_head": 0}  # lm_head: as in the original
    first, second, last = (torch.device(f"cuda:{i}") for i in (0, 1, 3))
    resolved = placement.resolve_device_map(device_map, CONFIG)
    assert [resolved.pop(f"{LAYER}{i}") for i in range(4)] == [last, "cpu", "disk", last]
    assert resolved == {
        "transformer.embedding.word_embeddings": first,
        "transformer.encoder.final_layernorm": second,
        "transformer.output_layer": first,
    }
    whole = placement.resolve_device_map({"": "cuda"}, CONFIG)
    assert len(whole) == 7 and set(whole.values()) == {first}


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"transformer.word_embeddings": 0}, "transformer.word_embeddings, which is a name of the"),
        ({"transformer.layers.3": 0}, "transformer.layers.3, which is a name of the first ChatGLM"),
        ({f"{LAYER}4": 0}, f"'{LAYER}4', which the model does not have: the parts are transf"),
        ({f"{LAYER}1.mlp": 0}, f"divides a layer \\({LAYER}1.mlp\\), .* whole of {LAYER}1 one"),
        ({"transformer.encoder.layers": None, f"{LAYER}0": 1}, f"for 18 .* {LAYER}1.input_layer"),
        ({"transformer.embedding": "disk"}, "transformer.embedding on 'disk', but the ids are"),
        ({"transformer.embedding": "cpu"}, "on 'cpu', but the ids .*: put it on a GPU"),
        ({"transformer.output_layer": 4}, "on cuda:4, but the GPUs here are cuda:0 to cuda:3"),
        ({"transformer.output_layer": -1}, "on -1: give a GPU's number, 'cuda:N', 'cpu' or 'di"),
        ({"transformer.output_layer": True}, "on True: give a GPU's number"),
        ({"transformer.output_layer": "gpu"}, "on 'gpu': give a GPU's number"),
        (None, "device_map is 'auto': give a dictionary from parts to"),
    ],
)
def test_wrong_map(changes, expected):
    device_map = {k: v for k, v in {**WHOLE, **(changes or {})}.items() if v is not None}
    with pytest.raises(ValueError, match=expected) as error:
        placement.resolve_device_map(device_map if changes else "auto", CONFIG)
    assert "\n" not in str(error.value)


def test_absent_gpus(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"num_gpus is 2, but PyTorch .* finds no CUDA GPU here"):
        utils.load_model_on_gpus(tiny_checkpoint)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="num_gpus is 2, but the GPUs here are cuda:0"):
        utils.load_model_on_gpus(tiny_checkpoint)
    with pytest.raises(ValueError, match="num_gpus is 5, and the model has 4 layers"):
        utils.load_model_on_gpus(tiny_checkpoint, num_gpus=5)
    with pytest.raises(OSError):
        utils.load_model_on_gpus("nowhere")


# Models over several devices give what they give on one.


def find_places(model) -> Counter:
    return Counter(str(p.device) for p in model.parameters())


def hold_conversation(model, tokenizer) -> list:
    """Return what chat, a stream with a kept cache, beams and a batch with padding give."""
    answers = [model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=4)]
    history, cache = [], None
    options = {"do_sample": False, "max_new_tokens": 4, "return_past_key_values": True}
    for query in ("你好", "What is the capital of France?"):
        steps = [*model.stream_chat(tokenizer, query, history, cache, **options)]
        _, history, cache = steps[-1]
    answers += [len(steps), history, cache.input_ids]
    prompts = [tokenizer.build_prompt(query) for query in ("hi", "What is your name?")]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    for options in ({}, {"num_beams": 2}):
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
        answers.append(output.tolist())
    return answers


@pytest.fixture(scope="module")
def expected(tiny_model, tiny_tokenizer):
    return hold_conversation(tiny_model, tiny_tokenizer)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_load_model_on_gpus(tiny_checkpoint, tiny_tokenizer, expected, num_gpus):
    model = utils.load_model_on_gpus(tiny_checkpoint, num_gpus=num_gpus, dtype=torch.float32)
    assert set(find_places(model)) == {f"cuda:{i}" for i in range(num_gpus)}
    assert not model.training
    assert hold_conversation(model, tiny_tokenizer) == expected
    default = utils.load_model_on_gpus(tiny_checkpoint)
    assert set(find_places(default)) == {"cuda:0", "cuda:1"} and default.dtype == torch.float16


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"transformer.embedding": 3, "transformer.output_layer": 2, f"{LAYER}0": "cuda:2"},
        {f"{LAYER}2": "cpu", f"{LAYER}3": "disk"},
    ],
    ids=["layers apart", "ends apart", "offloaded"],
)
def test_a_map_of_ones_own(tiny_checkpoint, tiny_tokenizer, expected, tmp_path, changes):
    options = {"dtype": torch.float32, "offload_folder": tmp_path}
    model = utils.load_model_on_gpus(tiny_checkpoint, device_map={**WHOLE, **changes}, **options)
    for i, layer in enumerate(model.transformer.encoder.layers):
        device = changes.get(f"{LAYER}{i}", "cuda:1")
        device = "meta" if device in ("cpu", "disk") else device
        assert {str(p.device) for p in layer.parameters()} == {device}
    assert model(torch.tensor([[1]], device=model.device)).logits.device == model.device
    assert hold_conversation(model, tiny_tokenizer) == expected


@pytest.mark.usefixtures("four_gpus")
def test_tensors_of_two_gpus_are_refused():
    one, other = (torch.ones(2).to(f"cuda:{i}") for i in range(2))
    with pytest.raises(RuntimeError, match="tensors on several devices"):
        torch.add(one, other)
    assert isinstance(one + 1, PretendTensor)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("places", [[0, 1, 1, 1], [0, 1, "cpu", 1], [0, 1, "disk", 1]])
def test_quantized_checkpoint(int4_checkpoint, tiny_tokenizer, tmp_path, places):
    device_map = {**WHOLE, **{f"{LAYER}{i}": place for i, place in enumerate(places)}}
    options = {"dtype": torch.float32, "offload_folder": tmp_path}
    model = utils.load_model_on_gpus(int4_checkpoint, device_map=device_map, **options)
    single = ChatGLMForConditionalGeneration.from_pretrained(int4_checkpoint, dtype=torch.float32)
    expected = single.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=4)
    for _ in range(2):
        assert model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=4) == expected


@pytest.mark.parametrize("kind", ["safetensors", "bin", "int4"])
def test_disk_without_a_gpu(
    kind, tiny_checkpoint, int4_checkpoint, tiny_tokenizer, tmp_path, expected
):
    folder = int4_checkpoint if kind == "int4" else tiny_checkpoint
    single = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    if kind == "bin":
        folder = shutil.copytree(tiny_checkpoint, tmp_path / "bin")
        (folder / "model.safetensors").unlink()
        torch.save(single.state_dict(), folder / "pytorch_model.bin")
    model = utils.load_model_on_gpus(
        folder,
        device_map={"": "cpu", f"{LAYER}1": "disk", f"{LAYER}3": "disk"},
        dtype=torch.float32,
        offload_folder=tmp_path / "offload",
    )
    layers = model.transformer.encoder.layers
    assert find_places(model)["meta"] == 2 * len([*layers[0].parameters()])
    assert any((tmp_path / "offload").iterdir()) == (kind == "bin")
    ids = torch.tensor([tiny_tokenizer.encode("你好")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, single(ids).logits, rtol=1e-3, atol=2e-3)
    if kind != "int4":
        assert hold_conversation(model, tiny_tokenizer) == expected


def test_offloaded_weights_are_not_packed(int4_checkpoint, monkeypatch):
    """A packed copy of each would bring into memory what is on the disk."""
    if problem := get_library()[1]:
        pytest.skip(f"needs the kernels for CPUs: {problem}")
    packed, pack = [], QuantizedLinear.pack
    monkeypatch.setattr(
        QuantizedLinear, "pack", lambda layer, kind: packed.append(layer) or pack(layer, kind)
    )
    device_map = {"": "cpu", f"{LAYER}1": "disk"}
    model = utils.load_model_on_gpus(int4_checkpoint, device_map=device_map, dtype=torch.float32)
    prepare_layers(model)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    offloaded = {*model.transformer.encoder.layers[1].modules()}
    assert len({*packed}) == 3 * 4 and not offloaded & {*packed}


def test_quantizing_onto_the_disk(tiny_checkpoint):
    options = {"quantization_config": ChatGLMQuantizationConfig(bits=4)}
    with pytest.raises(ValueError, match="on the disk cannot be quantized while loading"):
        device_map = {"": "cpu", f"{LAYER}1": "disk"}
        utils.load_model_on_gpus(tiny_checkpoint, device_map=device_map, **options)


# Sizes and plans.


def test_parts_are_measured(tiny_model):
    sizes = placement.measure_parts(tiny_model.config, torch.float16, None)
    assert sum(sizes.values()) == 2 * sum(p.numel() for p in tiny_model.parameters())
    block = 2 * sum(p.numel() for p in tiny_model.transformer.encoder.layers[2].parameters())
    assert sizes[f"{LAYER}2"] == block
    config = ChatGLMConfig.from_dict({**CONFIG.to_dict(), "pre_seq_len": 3})
    assert placement.measure_parts(config, torch.float16, None)["transformer.prefix_encoder"] > 0
    int4 = ChatGLMQuantizationConfig(bits=4)
    assert placement.measure_parts(CONFIG, torch.float16, int4)[f"{LAYER}0"] < block


SIZES = {"transformer.embedding.word_embeddings": 5, "transformer.output_layer": 5}
SIZES |= {f"{LAYER}{i}": 10 for i in range(6)}


@pytest.mark.parametrize(
    ("free", "places"),
    [
        ({"a": 50, "cpu": 50}, ["a"] * 2 + ["cpu"] * 3 + ["disk"]),
        ({"a": 30, "cpu": 29}, ["disk"] * 6),
        ({"a": 59, "b": 30, "cpu": None}, ["a"] * 2 + ["b"] + ["cpu"] * 3),
        ({"cpu": 40}, ["cpu"] + ["disk"] * 5),
    ],
)
def test_plan(free, places):
    device_map = placement.plan_offload(SIZES, free)
    assert [device_map[f"{LAYER}{i}"] for i in range(6)] == places
    first = next(iter(free))
    assert {device_map[name] for name in list(SIZES)[:2]} == {first}
