"""The network against golden data of the official code, GLM of transformers, and itself."""

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GlmForCausalLM,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from chatglm2 import (
    ChatGLMCache,
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
    export,
    modeling_chatglm,
)
from chatglm2.modeling_chatglm import RotaryEmbedding, eager_attention_forward

TINY = Path(__file__).parent / "golden" / "tiny"
TOLERANCE = 1e-4  # golden/README.md: another implementation in float32
CONFIG = json.loads((TINY / "config.json").read_text("utf-8"))
OUTPUTS = load_file(TINY / "outputs.safetensors")
IDS = OUTPUTS["a.input_ids"]
YARN = {"rope_type": "yarn", "factor": 2.0}
VARIANTS = json.loads((TINY / "variants.json").read_text("utf-8"))
VARIANT_TENSORS = load_file(TINY / "variants.safetensors")
VARIANT_NAMES = [name for name, value in VARIANTS.items() if isinstance(value, dict)]
LOW_PRECISION = {"fp16": (torch.float16, 0.02), "bf16": (torch.bfloat16, 0.15)}


def create_model(model_class=ChatGLMForConditionalGeneration, weights=None, **config):
    """Build the golden tiny model, with other config fields and weights if given."""
    model = model_class(ChatGLMConfig(**{**CONFIG, **config}))
    state = load_file(TINY / "model.safetensors") | (weights or {})
    own = model.state_dict()
    model.load_state_dict({name: state[name].to(value.dtype) for name, value in own.items()})
    return model.eval()


def create_variant(name, model_class=ChatGLMForConditionalGeneration, **config):
    """Build a model with the golden weights of a variant."""
    names = [key for key in VARIANT_TENSORS if key.startswith(f"{name}.w.")]
    weights = {key.removeprefix(f"{name}.w."): VARIANT_TENSORS[key] for key in names}
    return create_model(model_class, weights, **config)


@pytest.fixture(scope="module")
def model():
    return create_model()


def padded_batch():
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: OUTPUTS[f"b.{name}"].long() for name in names}


def assert_close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=tolerance)


def save_shards(folder: Path, state: dict, count: int = 3):
    """Write `.bin` shards and their index, with the buffer of the official checkpoint."""
    state, weight_map = {"transformer.rotary_pos_emb.inv_freq": torch.ones(2), **state}, {}
    for i in range(count):
        file = f"pytorch_model-{i + 1:05}-of-{count:05}.bin"
        shard = {name: state[name].clone() for name in [*state][i::count]}
        torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@torch.no_grad()
def test_logits_and_hidden_states_and_cache(model):
    outputs, expected = model(IDS, output_hidden_states=True), OUTPUTS["a.logits"]
    assert_close(outputs.logits, expected)
    assert len(outputs.hidden_states) == CONFIG["num_layers"] + 1
    for i, hidden_states in enumerate(outputs.hidden_states):
        assert_close(hidden_states.transpose(0, 1), OUTPUTS[f"a.hidden.{i}"])
    for i, layer in enumerate(outputs.past_key_values.layers):
        assert_close(layer.keys.permute(2, 0, 1, 3), OUTPUTS[f"a.past.{i}.key"])
        assert_close(layer.values.permute(2, 0, 1, 3), OUTPUTS[f"a.past.{i}.value"])
    assert_close(model(IDS, return_last_logit=True).logits, OUTPUTS["a.last_logit"])
    for kept, indices in ((1, [16]), (torch.tensor([0, 16]), [0, 16])):
        assert_close(model(IDS, logits_to_keep=kept).logits, expected[:, indices])
    positions = OUTPUTS["a.pos_shift.position_ids"].long()
    assert_close(model(IDS, position_ids=positions).logits, OUTPUTS["a.pos_shift.logits"])
    assert_close(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, expected)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_padded_batch_and_prompt_in_chunks(implementation):
    model, batch = create_model(attn_implementation=implementation), padded_batch()
    outputs = model(**batch)
    assert_close(outputs.logits, OUTPUTS["b.logits"])
    following = model(
        OUTPUTS["c2.next_ids"].long(),
        position_ids=batch["position_ids"][:, -1:] + 1,
        attention_mask=F.pad(batch["attention_mask"], (0, 1), value=1),
        past_key_values=outputs.past_key_values,
    )
    assert_close(following.logits, OUTPUTS["c2.logits"])
    for cache in (ChatGLMCache(), DynamicCache()):
        chunks = IDS.split([10, 4, 1, 1, 1], dim=1)
        logits = [model(chunk, past_key_values=cache).logits for chunk in chunks]
        assert_close(torch.cat(logits, dim=1), OUTPUTS["c.logits"])


def test_loss_and_gradients():
    model = create_model()
    outputs = model(IDS, labels=OUTPUTS["d.labels"].long())
    outputs.loss.backward()
    assert_close(outputs.loss, OUTPUTS["d.loss"][0])
    parameters = dict(model.named_parameters())
    for name, expected in OUTPUTS.items():
        if name.startswith("d.grad."):
            assert_close(parameters[name.removeprefix("d.grad.")].grad, expected)
    with torch.no_grad():
        loss = model(**padded_batch(), labels=OUTPUTS["d.batch_labels"].long()).loss
    assert_close(loss, OUTPUTS["d.batch_loss"][0])


def test_gradient_checkpointing(monkeypatch):
    """The gradients are the same; a given cache is ignored, which one warning says."""
    gradients, cache, messages = [], ChatGLMCache(), []
    logging.Logger.warning_once.cache_clear()
    monkeypatch.setattr(modeling_chatglm.logger, "warning", lambda text: messages.append(text))
    for is_checkpointing in (False, True, True):
        model = create_model().train()
        if is_checkpointing:
            model.gradient_checkpointing_enable()
        outputs = model(IDS, labels=IDS, past_key_values=cache if is_checkpointing else None)
        assert (outputs.past_key_values is None) == is_checkpointing
        outputs.loss.backward()
        gradients.append(model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight.grad)
    assert_close(gradients[1], gradients[0], 1e-6)
    assert cache.get_seq_length() == 0
    assert messages == ["The cache is ignored: gradient checkpointing is enabled."]


@pytest.mark.parametrize("precision", LOW_PRECISION)
@pytest.mark.parametrize("way", ["native", "cast"])
@torch.no_grad()
def test_low_precision(precision, way):
    dtype, tolerance = LOW_PRECISION[precision]
    model = create_model().to(dtype)
    logits = model(IDS).logits
    assert logits.dtype == dtype
    assert_close(logits, OUTPUTS[f"g.{precision}.{way}.logits"], tolerance)


@pytest.mark.parametrize("name", VARIANT_NAMES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_variants(name, implementation):
    fields = {key: value for key, value in VARIANTS[name].items() if key in CONFIG or "pre" in key}
    if name.startswith("rope_ratio4"):
        fields["rope_ratio"] = 4
    model = create_variant(name, attn_implementation=implementation, **fields)
    assert_close(model(IDS).logits, VARIANT_TENSORS[f"{name}.logits"])
    assert_close(model(**padded_batch()).logits, VARIANT_TENSORS[f"{name}.batch_logits"])
    if "generate_from_first_6" in VARIANTS[name]:
        check_prefix_model(model, VARIANTS[name])


def check_prefix_model(model, expected):
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == expected["trainable"]
    cache = model(IDS).past_key_values
    assert cache.layers[0].keys.shape[2] == expected["past0_shape"][0]
    assert cache.get_seq_length() == IDS.shape[1]
    golden = expected["generate_from_first_6"]
    length, half = len(golden[0]), torch.tensor(golden)[:, :10]
    for past in (ChatGLMCache(), DynamicCache(), None):
        generated = model.generate(IDS[:, :6], max_length=length, past_key_values=past)
        assert generated.tolist() == golden
    static = StaticCache(config=model.config, max_cache_len=64)
    for settings in ({"cache_implementation": "static"}, {"past_key_values": static}):
        with pytest.raises(ValueError, match="cannot be put into a static or paged cache: use"):
            model.generate(IDS[:, :6], max_length=length, **settings)
    past = DynamicCache()
    model(IDS[:, :4], past_key_values=past)
    with pytest.raises(ValueError, match=r"DynamicCache cannot be continued .* a ChatGLMCache"):
        model.generate(IDS[:, :6], max_length=length, past_key_values=past)
    cache = ChatGLMCache()  # continued: positions go on after the prefix
    model.generate(half[:, :6], max_length=10, past_key_values=cache)
    assert model.generate(half, max_length=length, past_key_values=cache).tolist() == golden
    cache.reset()
    assert model.generate(half, max_length=length, past_key_values=cache).tolist() == golden


def test_prefix_is_trained_alone_also_with_checkpointing(tmp_path):
    create_variant("prefix", pre_seq_len=4).save_pretrained(tmp_path)
    gradients = []
    for is_checkpointing in (False, True):
        model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
        model.transformer.encoder.train()  # the prefix's own dropout stays off
        if is_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert trained.keys() == {"transformer.prefix_encoder.embedding.weight"}
        gradients += trained.values()
    assert gradients[0].abs().sum() > 0
    assert_close(gradients[1], gradients[0], 1e-6)


@pytest.mark.parametrize(
    "labels, compute_loss",
    [
        (torch.tensor([0, 2, 1]), F.cross_entropy),
        (torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]), F.binary_cross_entropy_with_logits),
    ],
    ids=["single label", "several labels"],
)
@torch.no_grad()
def test_sequence_classification(labels, compute_loss):
    model = create_variant("seqcls", ChatGLMForSequenceClassification, num_labels=3)
    outputs, logits = model(**padded_batch(), labels=labels), VARIANT_TENSORS["seqcls.logits"]
    assert_close(outputs.logits, logits)
    assert_close(outputs.loss, compute_loss(logits, labels))
    by_position = (padded_batch().get(name) for name in ("input_ids", "position_ids"))
    mask = padded_batch()["attention_mask"]
    assert model(*by_position, mask, None, None, labels).loss == outputs.loss


def test_rotary_rows_are_exact_at_6b_size_in_every_dtype():
    rotary = RotaryEmbedding(ChatGLMConfig(seq_length=32768))
    positions = OUTPUTS["rope6b.positions"].long()[None]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cos, sin = rotary.to(dtype)(torch.zeros(1, dtype=dtype), positions)
        assert cos.dtype == dtype
        table = torch.stack((cos, sin), dim=-1)[0, 0]
        exact = OUTPUTS["rope6b.fp32"]
        # float32 angles of up to 32767 radians are exact to 0.002
        tolerance = 4e-3 if dtype == torch.float32 else 4e-3 + torch.finfo(dtype).eps
        assert_close(table, exact, tolerance)
        near = positions[0] < 2000
        assert_close(table[near], exact[near], 5e-4 + torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "fields",
    [
        {"add_qkv_bias": False},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_theta": 50000.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}},
        {"rope_parameters": YARN},
        {"rope_ratio": 8},
        {"rope_ratio": 3, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_equal_those_of_transformers_own_glm(fields):
    model = create_model(**fields)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["transformer.output_layer.weight"]  # as in a file
    ids = torch.arange(150).remainder(97)[None] + 3  # beyond seq_length 128, where dynamic acts
    mask = torch.ones_like(ids)
    mask[:, :10] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    config = export.convert_config(model.config)
    converted = export.create_model(export.convert_weights(state, model.config), config)
    for start, batch in ((0, {}), (10, padded)):
        glm = GlmForCausalLM(config)  # created anew: its dynamic frequencies depend on the past
        glm.load_state_dict(converted.state_dict())
        expected = glm.eval()(ids, **batch).logits
        assert_close(model(ids, **batch).logits[:, start:], expected[:, start:])


@torch.no_grad()
def test_half_precision_with_a_float32_residual():
    model = create_model(fp32_residual_connection=True).bfloat16()
    outputs = model(IDS, output_hidden_states=True)
    assert {h.dtype for h in outputs.hidden_states} == {torch.float32}
    assert_close(outputs.logits, OUTPUTS["a.logits"], 0.15)


@torch.no_grad()
def test_dropout_acts_only_in_training():
    model = create_model(hidden_dropout=0.5, attention_dropout=0.5)
    assert_close(model(IDS).logits, OUTPUTS["a.logits"])
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_attention_implementations_are_found_by_name():
    """Another implementation (such as flash attention) gets all heads, keys not expanded."""
    shapes = []

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        shapes.append((query.shape, key.shape, value.shape))
        return eager_attention_forward(module, query, key, value, attention_mask, scaling)

    AttentionInterface.register("recording", attention)
    AttentionMaskInterface.register("recording", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model = create_model(attn_implementation="recording")
    assert_close(model(IDS).logits, OUTPUTS["a.logits"])
    assert shapes[0] == ((1, 4, 17, 16), (1, 2, 17, 16), (1, 2, 17, 16))


@torch.no_grad()
def test_compiles_without_a_graph_break(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(IDS, use_cache=False).logits, OUTPUTS["a.logits"])
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(IDS[:, :10], past_key_values=cache)
    step = compiled(IDS[:, 10:11], past_key_values=cache, position_ids=torch.tensor([[10]]))
    assert_close(step.logits, OUTPUTS["a.logits"][:, 10:11])


# Loading and saving


@pytest.mark.parametrize("layout", ["safetensors", "bin shards"])
def test_checkpoints_load_with_the_official_names_and_inv_freq(tmp_path, layout):
    state = load_file(TINY / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if layout == "safetensors":
        state["transformer.rotary_pos_emb.inv_freq"] = torch.zeros(4)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        save_shards(tmp_path, state)
    model, info = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert_close(model.eval()(IDS).logits, OUTPUTS["a.logits"])


def test_save_and_reload(tmp_path):
    saved = create_model().half()
    saved.save_pretrained(tmp_path)
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, device="cpu")
    assert (model.device.type, model.dtype) == ("cpu", torch.float16)
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["original_rope"] is True
    assert model.float().half().bfloat16().dtype == torch.bfloat16


def test_loading_arguments_that_are_none(tmp_path):
    create_model().save_pretrained(tmp_path)
    names = "subfolder", "variant", "config", "device_map", "quantization_config"
    model = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path, device="meta", **dict.fromkeys(names)
    )
    assert model.device.type == "meta"
    (tmp_path / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(OSError, match="truncated or damaged"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path, variant=None)


@pytest.mark.parametrize("num_rows", [150, 250])
@pytest.mark.parametrize(
    "model_class", [ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification]
)
@torch.no_grad()
def test_resizing_also_resizes_the_output_layer(model_class, num_rows, tmp_path):
    model = model_class(ChatGLMConfig(**CONFIG)).eval()
    model.resize_token_embeddings(num_rows)
    assert model.base_model.output_layer.weight.shape[0] == num_rows
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS % 150)[0], model(IDS % 150)[0])


def test_empty_init_and_device():
    config = ChatGLMConfig(**CONFIG)
    meta = ChatGLMForConditionalGeneration(config, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    empty = ChatGLMForConditionalGeneration(config, empty_init=True)
    assert empty.state_dict().keys() == meta.state_dict().keys()
    classes = ChatGLMForConditionalGeneration, ChatGLMModel, ChatGLMForSequenceClassification
    for create in (AutoModel.from_config, AutoModelForCausalLM.from_config, *classes):
        model = create(config)
        for part in (model.base_model.embedding, model.base_model.encoder.layers[0].mlp):
            assert all(0.015 < weight.std() < 0.025 for weight in part.parameters())
        assert model(IDS)[0].isfinite().all()


def test_tied_embeddings_if_the_config_says_so():
    config = ChatGLMConfig(**{**CONFIG, "tie_word_embeddings": True})
    model = ChatGLMForConditionalGeneration(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_export_for_any_length(implementation):
    """A graph of 20 tokens computes shorter prompts, and those of more than 128 tokens."""
    logits = Logits(create_model(attn_implementation=implementation))
    sizes = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", min=2, max=512)}

    def make_inputs(length):
        ids = torch.arange(3 * length).view(3, length) % 200
        return ids, (ids != 0).long()

    shapes = {"dynamic_shapes": (sizes, sizes), "strict": False}
    graph = torch.export.export(logits, make_inputs(20), **shapes).module()
    for length in (2, 128, 300):
        assert_close(graph(*make_inputs(length)), logits(*make_inputs(length)))
