"""The model against golden data of the official code, GLM of transformers, and itself."""

import json
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BatchEncoding,
    DynamicCache,
    GlmConfig,
    GlmForCausalLM,
    LogitsProcessorList,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from chatglm2 import (
    ChatGLMCache,
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
)
from chatglm2.generation_chatglm import CACHE_BLOCK, AnswerDecoder, InvalidScoreLogitsProcessor
from chatglm2.modeling_chatglm import RotaryEmbedding, eager_attention_forward
from chatglm2.weights_chatglm import check_weight_file, find_weight_files

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
TOLERANCE = 1e-4  # golden/README.md: another implementation in float32
CONFIG = json.loads((TINY / "config.json").read_text("utf-8"))
OUTPUTS = load_file(TINY / "outputs.safetensors")
GENERATION = json.loads((TINY / "generation.json").read_text("utf-8"))
VARIANTS = json.loads((TINY / "variants.json").read_text("utf-8"))
VARIANT_TENSORS = load_file(TINY / "variants.safetensors")
VARIANT_NAMES = [name for name, value in VARIANTS.items() if isinstance(value, dict)]
CHAT = json.loads((GOLDEN / "chat" / "chat_golden.json").read_text("utf-8"))
LOW_PRECISION = {"fp16": (torch.float16, 0.02), "bf16": (torch.bfloat16, 0.15)}


def create_model(model_class=ChatGLMForConditionalGeneration, weights=None, **config):
    """Build the golden tiny model, with other config fields and weights if given."""
    model = model_class(ChatGLMConfig(**{**CONFIG, **config}))
    state = load_file(TINY / "model.safetensors") | (weights or {})
    own = model.state_dict()
    model.load_state_dict({name: state[name].to(value.dtype) for name, value in own.items()})
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return create_model()


@pytest.fixture(scope="module")
def chat_model():
    """The golden chat model: random weights with the official vocabulary."""
    config = ChatGLMConfig.from_pretrained(GOLDEN / "chat")
    model = ChatGLMForConditionalGeneration(config)
    state = load_file(GOLDEN / "chat" / "model_fp16.safetensors")
    model.load_state_dict(
        {name: value.float() for name, value in state.items() if "inv_freq" not in name}
    )
    return model.float().eval()


def padded_batch():
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: OUTPUTS[f"b.{name}"].long() for name in names}


def assert_close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=tolerance)


# The forward pass


@torch.no_grad()
def test_logits_and_hidden_states_and_cache(model):
    outputs = model(OUTPUTS["a.input_ids"], output_hidden_states=True)
    assert_close(outputs.logits, OUTPUTS["a.logits"])
    assert len(outputs.hidden_states) == CONFIG["num_layers"] + 1
    for i, hidden_states in enumerate(outputs.hidden_states):
        assert_close(hidden_states.transpose(0, 1), OUTPUTS[f"a.hidden.{i}"])
    for i, layer in enumerate(outputs.past_key_values.layers):
        assert_close(layer.keys.permute(2, 0, 1, 3), OUTPUTS[f"a.past.{i}.key"])
        assert_close(layer.values.permute(2, 0, 1, 3), OUTPUTS[f"a.past.{i}.value"])


@torch.no_grad()
def test_last_logits_only(model):
    expected = OUTPUTS["a.last_logit"]
    assert_close(model(OUTPUTS["a.input_ids"], return_last_logit=True).logits, expected)
    assert_close(model(OUTPUTS["a.input_ids"], logits_to_keep=1).logits, expected)
    indices = torch.tensor([0, 16])
    kept = model(OUTPUTS["a.input_ids"], logits_to_keep=indices).logits
    assert_close(kept, OUTPUTS["a.logits"][:, indices])


@torch.no_grad()
def test_shifted_positions(model):
    positions = OUTPUTS["a.pos_shift.position_ids"].long()
    logits = model(OUTPUTS["a.input_ids"], position_ids=positions).logits
    assert_close(logits, OUTPUTS["a.pos_shift.logits"])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_padded_batch_and_its_next_token(implementation):
    model, batch = create_model(), padded_batch()
    model.set_attn_implementation(implementation)
    outputs = model(**batch)
    assert_close(outputs.logits, OUTPUTS["b.logits"])
    mask = torch.cat((batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)), dim=1)
    following = model(
        OUTPUTS["c2.next_ids"].long(),
        position_ids=batch["position_ids"][:, -1:] + 1,
        attention_mask=mask,
        past_key_values=outputs.past_key_values,
    )
    assert_close(following.logits, OUTPUTS["c2.logits"])


@pytest.mark.parametrize("cache_class", [ChatGLMCache, DynamicCache])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_prompt_in_chunks(cache_class, implementation):
    model, cache, logits, start = create_model(), cache_class(), [], 0
    model.set_attn_implementation(implementation)
    for length in (10, 4, 1, 1, 1):
        ids = OUTPUTS["a.input_ids"][:, start : start + length]
        logits.append(model(ids, past_key_values=cache).logits)
        start += length
    assert_close(torch.cat(logits, dim=1), OUTPUTS["c.logits"])


@torch.no_grad()
def test_inputs_embeds_and_the_wrong_inputs(model):
    embeds = model.get_input_embeddings()(OUTPUTS["a.input_ids"])
    assert_close(model(inputs_embeds=embeds).logits, OUTPUTS["a.logits"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_loss_and_gradients():
    model = create_model()
    outputs = model(OUTPUTS["a.input_ids"], labels=OUTPUTS["d.labels"].long())
    outputs.loss.backward()
    assert_close(outputs.loss, OUTPUTS["d.loss"][0])
    parameters = dict(model.named_parameters())
    for name, expected in OUTPUTS.items():
        if name.startswith("d.grad."):
            assert_close(parameters[name.removeprefix("d.grad.")].grad, expected)
    with torch.no_grad():
        loss = model(**padded_batch(), labels=OUTPUTS["d.batch_labels"].long()).loss
    assert_close(loss, OUTPUTS["d.batch_loss"][0])


def test_gradient_checkpointing_gives_the_same_gradients():
    ids, gradients = OUTPUTS["a.input_ids"], []
    for is_checkpointing in (False, True):
        model = create_model().train()
        if is_checkpointing:
            model.gradient_checkpointing_enable()
        outputs = model(ids, labels=ids)
        assert (outputs.past_key_values is None) == is_checkpointing
        outputs.loss.backward()
        gradients.append(model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight.grad)
    assert_close(gradients[1], gradients[0], 1e-6)


@pytest.mark.parametrize("precision", LOW_PRECISION)
@pytest.mark.parametrize("way", ["native", "cast"])
@torch.no_grad()
def test_low_precision(precision, way):
    dtype, tolerance = LOW_PRECISION[precision]
    model = create_model().to(dtype)
    logits = model(OUTPUTS["a.input_ids"]).logits
    assert logits.dtype == dtype
    assert_close(logits, OUTPUTS[f"g.{precision}.{way}.logits"], tolerance)


@pytest.mark.parametrize("name", VARIANT_NAMES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_variants(name, implementation):
    fields = {key: value for key, value in VARIANTS[name].items() if key in CONFIG or "pre" in key}
    if name.startswith("rope_ratio4"):
        fields["rope_ratio"] = 4
    prefix = f"{name}.w."
    weights = {
        key.removeprefix(prefix): value
        for key, value in VARIANT_TENSORS.items()
        if key.startswith(prefix)
    }
    model = create_model(weights=weights, **fields)
    model.set_attn_implementation(implementation)
    logits = model(OUTPUTS["a.input_ids"]).logits
    assert_close(logits, VARIANT_TENSORS[f"{name}.logits"])
    batch = padded_batch()
    logits = model(**batch).logits
    assert_close(logits, VARIANT_TENSORS[f"{name}.batch_logits"])
    if "generate_from_first_6" in VARIANTS[name]:
        check_prefix_model(model, VARIANTS[name])


def check_prefix_model(model, expected):
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == expected["trainable"]
    ids = OUTPUTS["a.input_ids"]
    cache = model(ids).past_key_values
    assert cache.layers[0].keys.shape[2] == expected["past0_shape"][0]
    assert cache.get_seq_length() == ids.shape[1]
    golden = expected["generate_from_first_6"]
    for past in (ChatGLMCache(), DynamicCache(), None):
        generated = model.generate(ids[:, :6], max_length=len(golden[0]), past_key_values=past)
        assert generated.tolist() == golden
    half = torch.tensor(golden)[
        :, :10
    ]  # a kept cache is continued: positions go on after the prefix
    cache = ChatGLMCache()
    model.generate(half[:, :6], max_length=10, past_key_values=cache)
    generated = model.generate(half, max_length=len(golden[0]), past_key_values=cache)
    assert generated.tolist() == golden
    cache.reset()
    assert model.generate(half, max_length=14, past_key_values=cache).tolist() == golden


def test_prefix_is_trained_alone_also_with_checkpointing():
    weights = {
        key.removeprefix("prefix.w."): value
        for key, value in VARIANT_TENSORS.items()
        if key.startswith("prefix.w.")
    }
    gradients = []
    for is_checkpointing in (False, True):
        model = create_model(weights=weights, pre_seq_len=4)
        model.transformer.encoder.train()  # the prefix's own dropout stays off
        if is_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(OUTPUTS["a.input_ids"], labels=OUTPUTS["a.input_ids"]).loss.backward()
        assert model.transformer.output_layer.weight.grad is None
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad)
    assert gradients[0].abs().sum() > 0
    assert_close(gradients[1], gradients[0], 1e-6)


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
@torch.no_grad()
def test_sequence_classification(problem_type):
    weights = {
        key.removeprefix("seqcls.w."): value
        for key, value in VARIANT_TENSORS.items()
        if key.startswith("seqcls.w.")
    }
    model = create_model(
        ChatGLMForSequenceClassification, weights, num_labels=3, problem_type=problem_type
    )
    golden_labels = torch.tensor([0, 2, 1])
    outputs = model(**padded_batch(), labels=golden_labels)
    assert_close(outputs.logits, VARIANT_TENSORS["seqcls.logits"])
    expected = torch.nn.functional.cross_entropy(VARIANT_TENSORS["seqcls.logits"], golden_labels)
    assert_close(outputs.loss, expected)
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize(
    "num_labels, labels, problem_type",
    [
        (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]), "multi_label_classification"),
    ],
)
def test_other_classification_losses(num_labels, labels, problem_type):
    config = ChatGLMConfig(**CONFIG, num_labels=num_labels)
    model = ChatGLMForSequenceClassification(config, empty_init=False).eval()
    outputs = model(**padded_batch(), labels=labels)
    assert model.config.problem_type == problem_type
    if problem_type == "regression":
        expected = ((outputs.logits[:, 0] - labels) ** 2).mean()
    else:
        p = outputs.logits.sigmoid()
        expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert_close(outputs.loss, expected, 1e-5)


# Rotary embedding


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


def glm_of_transformers(model, **rope):
    """Build transformers' own GLM of a ChatGLM2 model's weights: q, k, v split, others renamed."""
    config = model.config
    glm = GlmForCausalLM(
        GlmConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.multi_query_group_num,
            head_dim=config.kv_channels,
            max_position_embeddings=config.seq_length,
            rms_norm_eps=config.layernorm_epsilon,
            attention_bias=True,
            pad_token_id=0,
            eos_token_id=2,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **rope},
        )
    )
    size = config.kv_channels
    sizes = [config.num_attention_heads * size, *[config.multi_query_group_num * size] * 2]
    state = {}
    renames = [
        ("transformer.embedding.word_embeddings", "model.embed_tokens"),
        ("transformer.encoder.final_layernorm", "model.norm"),
        ("transformer.output_layer", "lm_head"),
        ("transformer.encoder.layers", "model.layers"),
        ("self_attention.dense", "self_attn.o_proj"),
        ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
        ("mlp.dense_4h_to_h", "mlp.down_proj"),
        ("self_attention", "self_attn"),
    ]
    for name, value in model.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        if "query_key_value" in name:
            for part, rows in zip("qkv", value.split(sizes), strict=True):
                state[name.replace("query_key_value", f"{part}_proj")] = rows
        else:
            state[name] = value
    glm.load_state_dict(state)
    return glm.eval()


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 50000.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_equal_those_of_transformers_own_glm(rope):
    model = create_model(rope_parameters={"rope_theta": 10000.0, **rope} if rope else None)
    ids = torch.arange(150).remainder(97)[None] + 3  # beyond seq_length 128, where dynamic acts
    mask = torch.ones_like(ids)
    mask[:, :10] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    for start, batch in ((0, {}), (10, padded)):
        glm = glm_of_transformers(model, **rope)  # anew: its dynamic frequencies have a memory
        assert_close(model(ids, **batch).logits[:, start:], glm(ids, **batch).logits[:, start:])


# Generation


@pytest.mark.parametrize("name", ["single", "short", "one", "left_padded_batch"])
@pytest.mark.parametrize("cache_class", [ChatGLMCache, DynamicCache])
def test_greedy_generation(model, name, cache_class):
    case = GENERATION[name]
    inputs = {
        key: torch.tensor(case[key])
        for key in ("input_ids", "attention_mask", "position_ids")
        if key in case
    }
    length = len(case["output_ids"][0])
    generated = model.generate(
        **inputs, max_length=length, eos_token_id=None, past_key_values=cache_class()
    )
    assert generated.tolist() == case["output_ids"]


def test_generation_ends_at_any_eos_and_pads_finished_rows(model):
    case = GENERATION["single_with_eos"]
    ids = torch.tensor(GENERATION["single"]["input_ids"])
    for eos in (case["eos_token_id"], [case["eos_token_id"], 9]):
        generated = model.generate(ids, max_length=41, eos_token_id=eos)
        golden = case["output_ids"][0]
        first_9 = golden.index(9, ids.shape[1]) + 1 if 9 in golden[ids.shape[1] :] else None
        assert generated[0].tolist() == (golden[:first_9] if isinstance(eos, list) else golden)
    case, batch = GENERATION["batch_with_eos"], GENERATION["left_padded_batch"]
    generated = model.generate(
        torch.tensor(batch["input_ids"]),
        attention_mask=torch.tensor(batch["attention_mask"]),
        max_length=len(case["output_ids"][0]),
        eos_token_id=case["eos_token_id"],
    )
    assert generated.tolist() == case["output_ids"]


@pytest.mark.parametrize("cache_class", [ChatGLMCache, DynamicCache])
def test_beams_and_repetition_penalty(model, cache_class):
    ids = torch.tensor(GENERATION["beam3"]["input_ids"])
    golden = GENERATION["beam3"]["output_ids"]
    # Without the length penalty: transformers 4.30.2 divided by prompt and answer, 5 by the answer.
    generated = model.generate(
        ids, num_beams=3, max_length=29, length_penalty=0.0, past_key_values=cache_class()
    )
    assert generated.tolist() == golden
    batch, golden = GENERATION["left_padded_batch"], GENERATION["beam2_batch"]["output_ids"]
    generated = model.generate(
        torch.tensor(batch["input_ids"]),
        attention_mask=torch.tensor(batch["attention_mask"]),
        num_beams=2,
        max_length=len(golden[0]),
        eos_token_id=None,
        past_key_values=cache_class(),
    )
    assert generated.tolist() == golden
    golden = GENERATION["repetition_penalty_1.5"]["output_ids"]
    generated = model.generate(
        ids, repetition_penalty=1.5, max_length=len(golden[0]), eos_token_id=None
    )
    assert generated.tolist() == golden


def test_static_cache_and_prompt_lookup(model):
    case = GENERATION["single"]
    ids, length = torch.tensor(case["input_ids"]), len(case["output_ids"][0])
    cache = StaticCache(config=model.config, max_cache_len=64)
    for kwargs in ({"past_key_values": cache}, {"prompt_lookup_num_tokens": 3}):
        generated = model.generate(ids, max_length=length, eos_token_id=None, **kwargs)
        assert generated.tolist() == case["output_ids"]


def test_stream_generate_yields_all_ids_at_each_step(model):
    ids = torch.tensor(GENERATION["single"]["input_ids"])
    steps = model.stream_generate(ids, max_length=25, eos_token_id=None)
    golden = GENERATION["stream_generate_max_length_25"]["yielded"]
    assert [step[0].tolist() for step in steps] == golden
    for sequences, cache in model.stream_generate(ids, max_length=19, return_past_key_values=True):
        assert cache.get_seq_length() >= sequences.shape[1] - 1
    assert cache.get_seq_length() == 18


def test_stream_generate_ends_when_it_is_closed_and_hands_over_errors(model):
    ids = torch.tensor(GENERATION["single"]["input_ids"])
    num_threads = threading.active_count()
    cache = ChatGLMCache()
    steps = model.stream_generate(ids, max_length=120, eos_token_id=None, past_key_values=cache)
    next(steps)
    steps.close()
    assert threading.active_count() == num_threads
    assert cache.get_seq_length() < 119
    with pytest.raises(ValueError, match="not_an_argument"):
        next(model.stream_generate(ids, max_length=25, not_an_argument=1))


class Sampled(Exception):
    """Carries the probabilities from which a token was to be sampled."""


@pytest.fixture
def sampling(monkeypatch):
    def multinomial(probabilities, num_samples):
        raise Sampled(probabilities)

    monkeypatch.setattr(torch, "multinomial", multinomial)


class FixedTokenizer:
    """Gives the golden ids whatever the prompt."""

    def build_prompt(self, query, history=None):
        return query

    def encode(self, text, **kwargs):
        return OUTPUTS["a.input_ids"][0].tolist()

    def __call__(self, texts, return_tensors):
        return BatchEncoding({"input_ids": OUTPUTS["a.input_ids"]})


@pytest.mark.parametrize("method", ["chat", "stream_chat"])
def test_chat_samples_from_the_golden_probabilities(model, sampling, method):
    """Temperature, top_k and top_p of the original, by default and as given."""
    for golden, settings in (("chat_defaults", {}), ("top_p.8_t.95", {"temperature": 0.95})):
        with pytest.raises(Sampled) as sampled:
            next(iter(getattr(model, method)(FixedTokenizer(), "x", max_length=64, **settings)))
        probabilities = sampled.value.args[0]
        expected = OUTPUTS[f"e.warped_scores_{golden}"].softmax(-1)
        assert_close(probabilities, expected, 1e-5)
        assert (probabilities > 0).sum() == (expected > 0).sum()


@pytest.mark.parametrize("method", ["chat", "stream_chat"])
def test_chat_survives_scores_that_are_no_numbers(sampling, method):
    model = create_model()
    torch.nn.init.constant_(model.transformer.output_layer.weight, float("nan"))
    with pytest.raises(Sampled) as sampled:
        next(iter(getattr(model, method)(FixedTokenizer(), "x", max_length=64)))
    assert sampled.value.args[0].argmax() == 5


def test_invalid_scores_force_id_5(caplog):
    scores = torch.zeros(1, 9)
    scores[0, 3] = float("nan")
    fixed = InvalidScoreLogitsProcessor()(None, scores)
    assert fixed[0].tolist() == [0, 0, 0, 0, 0, 5e4, 0, 0, 0]
    assert scores[0, 3].isnan(), "the given scores are not changed"
    assert torch.equal(InvalidScoreLogitsProcessor()(None, fixed), fixed)


# chat and stream_chat


def test_chat_rounds(chat_model, official_tokenizer):
    history = []
    for case in CHAT["chat_rounds"]:
        max_length = case["gen_kwargs"]["max_length"]
        given = [list(turn) for turn in history]
        response, new_history = chat_model.chat(
            official_tokenizer, case["query"], given, max_length=max_length, do_sample=False
        )
        assert response == case["response"]
        assert given == [list(turn) for turn in history], "the given history is not changed"
        assert [list(turn) for turn in new_history] == case["history_after"]
        history = new_history


def test_chat_ends_at_eos_or_after_max_new_tokens(chat_model, official_tokenizer):
    case = CHAT["chat_eos"]
    response, _ = chat_model.chat(
        official_tokenizer,
        "你好",
        do_sample=False,
        max_length=64,
        eos_token_id=case["eos_token_id"],
    )
    assert response == case["response"]
    response, _ = chat_model.chat(official_tokenizer, "你好", do_sample=False, max_new_tokens=5)
    assert response == CHAT["chat_max_new_tokens_5"]["response"]


def test_every_yield_of_stream_chat(chat_model, official_tokenizer):
    case = CHAT["stream_chat"]
    settings = {"max_length": case["max_length"], "do_sample": False}
    steps = list(chat_model.stream_chat(official_tokenizer, "你好", **settings))
    assert [[text, [list(turn) for turn in history]] for text, history in steps] == case["yielded"]
    assert steps[-1] == chat_model.chat(official_tokenizer, "你好", **settings)
    case = CHAT["stream_chat_eos"]
    steps = chat_model.stream_chat(
        official_tokenizer,
        "你好",
        max_length=64,
        do_sample=False,
        eos_token_id=case["eos_token_id"],
    )
    assert [[text, [list(turn) for turn in history]] for text, history in steps] == case["yielded"]


def test_stream_chat_with_a_kept_cache_as_the_original(chat_model, official_tokenizer):
    """The original's cache lacks the last generated id; without it, all yields are its."""
    history, cache = [], None
    for case in CHAT["stream_chat_past"]:
        if cache is not None:
            cache.pending_ids = []
        steps = chat_model.stream_chat(
            official_tokenizer,
            case["query"],
            history,
            cache,
            max_length=case["max_length"],
            do_sample=False,
            return_past_key_values=True,
        )
        texts = []
        for text, history, cache in steps:  # noqa: B007
            texts.append(text)
        assert texts == case["responses"]
        assert [list(turn) for turn in history] == case["history"]
        assert cache.get_seq_length() == case["past_len"]


def stream(model, tokenizer, query, history=(), cache=None, **kwargs):
    """Run stream_chat to its end; return the last (response, history, cache)."""
    kwargs = {"do_sample": False, "max_length": 64, **kwargs}
    steps = model.stream_chat(
        tokenizer, query, history, cache, return_past_key_values=True, **kwargs
    )
    return list(steps)[-1]


def count_fed_ids(model, function):
    """Return what a function returns, and how many ids the model was fed meanwhile."""
    lengths = []
    hook = model.transformer.register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    result = function()
    hook.remove()
    return result, sum(lengths)


def test_kept_cache_keeps_the_last_id_of_a_round_that_ended_by_length(tiny_model, tiny_tokenizer):
    response, history, cache = stream(tiny_model, tiny_tokenizer, "你好", max_new_tokens=4)
    assert len(cache.pending_ids) == 1
    assert tiny_tokenizer.decode(cache.input_ids + cache.pending_ids).endswith(response)
    held = cache.input_ids + cache.pending_ids
    (_, _, cache), fed = count_fed_ids(
        tiny_model,
        lambda: stream(tiny_model, tiny_tokenizer, "晚安", history, cache, max_new_tokens=2),
    )
    assert cache.input_ids[: len(held)] == held
    assert fed == 1 + len(tiny_tokenizer.build_round("晚安", history)) + 1


def test_kept_cache_gives_the_same_answers_as_none(tiny_model, tiny_tokenizer):
    history, kept, cache = [], [], None
    for query in ("你好", "What is the capital of France?", "讲个笑话", "thank you"):
        response, kept, cache = stream(
            tiny_model, tiny_tokenizer, query, kept, cache, max_length=512
        )
        expected, history = tiny_model.chat(tiny_tokenizer, query, history, do_sample=False)
        assert response == expected
        assert cache.history == kept == history
        assert cache.get_seq_length() == len(cache.input_ids)
        assert cache.pending_ids == []


def test_cache_that_does_not_belong_keeps_the_common_beginning(tiny_model, tiny_tokenizer):
    _, _, cache = stream(tiny_model, tiny_tokenizer, "你好", max_length=512)
    other = [("你好", "不是它说的话。")]
    expected = tiny_model.chat(tiny_tokenizer, "谢谢", other, do_sample=False)
    prompt = tiny_tokenizer.encode(tiny_tokenizer.build_prompt("谢谢", other))
    first_prompt = tiny_tokenizer.encode(tiny_tokenizer.build_prompt("你好"))
    (response, new_history, cache), fed = count_fed_ids(
        tiny_model, lambda: stream(tiny_model, tiny_tokenizer, "谢谢", other, cache, max_length=512)
    )
    assert (response, new_history) == expected
    answer_length = len(cache.input_ids) - len(prompt)
    assert fed == len(prompt) + answer_length - len(first_prompt)
    # a cache of another kind is not trusted
    ids = torch.tensor([[5, 6, 7]])
    foreign = tiny_model(ids, past_key_values=DynamicCache()).past_key_values
    response, _, cache = stream(tiny_model, tiny_tokenizer, "谢谢", other, foreign, max_length=512)
    assert response == expected[0]
    assert isinstance(cache, ChatGLMCache)


def test_history_and_cache_agree_after_a_stopped_answer(tiny_model, tiny_tokenizer):
    steps = tiny_model.stream_chat(
        tiny_tokenizer, "你好", do_sample=False, return_past_key_values=True
    )
    for _ in range(5):
        response, history, cache = next(steps)
    steps.close()
    assert cache.history == history == [("你好", response)]
    assert cache.get_seq_length() == len(cache.input_ids)
    held, before = len(cache.input_ids), list(cache.input_ids)
    _, fed = count_fed_ids(
        tiny_model,
        lambda: stream(tiny_model, tiny_tokenizer, "再见", history, cache, max_new_tokens=1),
    )
    assert fed <= 2 + len(tiny_tokenizer.build_round("再见", history))
    assert cache.input_ids[:held] == before
    assert cache.get_seq_length() > held


def test_cache_stands_for_what_was_yielded_though_generate_runs_ahead(tiny_model, tiny_tokenizer):
    steps = tiny_model.stream_chat(
        tiny_tokenizer, "讲个故事", do_sample=False, return_past_key_values=True
    )
    for _ in range(3):
        response, history, cache = next(steps)
    while cache.get_seq_length() < len(cache.input_ids) + 20:  # until it is well ahead
        time.sleep(0.01)
    steps.close()
    ids = cache.input_ids + cache.pending_ids
    prompt = tiny_tokenizer.encode(tiny_tokenizer.build_prompt("讲个故事"))
    assert ids[: len(prompt)] == prompt
    assert tiny_tokenizer.decode(ids[len(prompt) :]) == response
    assert cache.get_seq_length() == len(ids) - 1
    assert cache.history == history


def test_failing_generation_leaves_a_usable_cache(tiny_model, tiny_tokenizer):
    _, history, cache = stream(tiny_model, tiny_tokenizer, "你好", max_length=512)

    def fail(*args):
        raise RuntimeError("no memory")

    hook = tiny_model.transformer.encoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        stream(tiny_model, tiny_tokenizer, "谢谢", history, cache)
    hook.remove()
    answer = stream(tiny_model, tiny_tokenizer, "谢谢", history, cache, max_length=512)[0]
    assert answer == tiny_model.chat(tiny_tokenizer, "谢谢", history, do_sample=False)[0]


def test_no_partial_answer_ends_in_half_a_character(tiny_model, tiny_tokenizer):
    """An emoji of four byte tokens is forced: nothing is yielded until it is whole."""
    emoji = tiny_tokenizer.encode("\n🦭", add_special_tokens=False)[2:]
    assert len(emoji) == 4, "no token of its own"
    prompt_length = len(tiny_tokenizer.encode(tiny_tokenizer.build_prompt("你好")))

    def force(input_ids, scores):
        step = input_ids.shape[1] - prompt_length
        scores = torch.full_like(scores, -1e4)
        scores[:, [*emoji, *emoji, 2][step]] = 1e4
        return scores

    for length, expected in ((8, ["🦭", "🦭🦭"]), (6, ["🦭"]), (2, [])):
        settings = {"do_sample": False, "logits_processor": [force], "max_new_tokens": length}
        steps = tiny_model.stream_chat(tiny_tokenizer, "你好", **settings)
        assert [text for text, _ in steps] == expected
        response, _ = tiny_model.chat(tiny_tokenizer, "你好", **settings)
        assert response == (expected[-1] if expected else "")


def test_chat_samples_by_its_seed_and_temperature_0_is_greedy(tiny_model, tiny_tokenizer):
    answers = []
    for seed in (1, 1, 2, 3):
        torch.manual_seed(seed)
        answers.append(
            tiny_model.chat(tiny_tokenizer, "abc", temperature=5.0, top_p=1.0, max_length=48)
        )
    assert answers[0] == answers[1]
    assert len({response for response, _ in answers}) > 1
    torch.manual_seed(1)
    steps = tiny_model.stream_chat(tiny_tokenizer, "abc", temperature=5.0, top_p=1.0, max_length=48)
    assert list(steps)[-1] == answers[0], "chat and stream_chat sample alike"
    greedy = tiny_model.chat(tiny_tokenizer, "abc", do_sample=False)
    assert tiny_model.chat(tiny_tokenizer, "abc", temperature=0) == greedy


def test_stop_strings_and_prompt_lookup(tiny_model, tiny_tokenizer):
    settings = {"do_sample": False, "max_length": 256}
    answer, _ = tiny_model.chat(tiny_tokenizer, "你好", **settings)
    stop = answer[5:7]
    response, _ = tiny_model.chat(tiny_tokenizer, "你好", stop_strings=[stop], **settings)
    assert stop in response and len(response) < len(answer)
    steps = tiny_model.stream_chat(tiny_tokenizer, "你好", prompt_lookup_num_tokens=3, **settings)
    assert list(steps)[-1][0] == answer


@pytest.mark.parametrize("cache_class", [ChatGLMCache, DynamicCache])
@pytest.mark.parametrize("held", [20, 149])
def test_generate_goes_on_with_a_kept_cache(tiny_model, tiny_tokenizer, cache_class, held):
    """Given all ids, or the new ones alone with the mask of all; with prompt lookup or without."""
    _, history = tiny_model.chat(tiny_tokenizer, "讲个故事", do_sample=False)
    prompt = tiny_tokenizer.build_prompt("讲个故事", history)
    ids = torch.tensor([tiny_tokenizer.encode(prompt)])
    settings = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(ids)}
    expected = tiny_model.generate(ids, **settings)[0, -20:].tolist()
    for given, lookup in ((ids, {}), (ids[:, held:], {}), (ids, {"prompt_lookup_num_tokens": 5})):
        cache, lengths = cache_class(), []
        tiny_model(ids[:, :held], past_key_values=cache)
        hook = tiny_model.transformer.register_forward_pre_hook(
            lambda _, args, lengths=lengths: lengths.append(args[0].shape[1])
        )
        sequences = tiny_model.generate(given, past_key_values=cache, **settings, **lookup)
        hook.remove()
        assert sequences[0, -20:].tolist() == expected
        assert lengths[0] == ids.shape[1] - held + (5 if lookup else 0)


@pytest.mark.parametrize("history", [[{"role": "user", "content": "x"}], [("a", None)], ["ab"]])
def test_history_of_another_form_is_refused(tiny_model, tiny_tokenizer, history):
    with pytest.raises(ValueError, match=r"history is a list of \(question, answer\), not of"):
        tiny_model.chat(tiny_tokenizer, "你好", history)
    with pytest.raises(ValueError, match="apply_chat_template"):
        next(tiny_model.stream_chat(tiny_tokenizer, "你好", history))


def test_answer_decoder_gives_what_decoding_all_ids_gives(any_tokenizer):
    text = "你好👋 Hello,  world!\n\n1. 一二\n```python\nprint('🦭')\n``` 𠮷 é"
    ids = any_tokenizer.encode("\n" + text, add_special_tokens=False)[2:]
    broken = [3 + 0xE4, 3 + 0xBD, *ids, 3 + 0xFF, *ids, 2]  # half a character, a byte of none
    for sequence in (ids, broken):
        decoder = AnswerDecoder(any_tokenizer)
        for length in range(1, len(sequence) + 1):
            whole = any_tokenizer.decode(sequence[:length])
            expected = None if whole.endswith("\ufffd") else whole
            assert decoder.decode(sequence[:length]) == expected


def test_program_can_end_amid_an_answer(tiny_checkpoint):
    script = (
        "import sys, chatglm2; load = chatglm2.ChatGLMForConditionalGeneration.from_pretrained; "
        "tokenizer = chatglm2.ChatGLMTokenizer.from_pretrained(sys.argv[1]); "
        "steps = load(sys.argv[1]).float().stream_chat(tokenizer, '讲个故事'); "
        "next(steps); sys.exit(7)"
    )
    run = [sys.executable, "-c", script, str(tiny_checkpoint)]
    cwd = Path(__file__).parent.parent
    assert subprocess.run(run, cwd=cwd, capture_output=True).returncode == 7


def test_caller_s_logits_processors_are_not_changed(tiny_model, tiny_tokenizer):
    processors = LogitsProcessorList()
    tiny_model.chat(tiny_tokenizer, "你好", logits_processor=processors, max_new_tokens=1)
    assert len(processors) == 0


def test_prompt_without_room_for_an_answer(tiny_model, tiny_tokenizer):
    length = len(tiny_tokenizer.encode(tiny_tokenizer.build_prompt("你好")))
    message = rf"prompt has {length} tokens; max_length is {length} and the context 2048"
    with pytest.raises(ValueError, match=message):
        tiny_model.chat(tiny_tokenizer, "你好", max_length=length)
    with pytest.raises(ValueError, match=message):
        next(tiny_model.stream_chat(tiny_tokenizer, "你好", max_length=length))
    response, _ = tiny_model.chat(tiny_tokenizer, "你好", max_length=length + 1, do_sample=False)
    assert len(tiny_tokenizer.encode("\n" + response, add_special_tokens=False)[2:]) <= 1
    with pytest.raises(ValueError, match="the context 2048"):
        tiny_model.chat(tiny_tokenizer, "你好" * 1100, max_length=10**6)


def test_kept_cache_and_new_ids_never_exceed_the_context(tiny_model, tiny_tokenizer):
    _, history, cache = stream(tiny_model, tiny_tokenizer, "你好", max_length=512)
    held = cache.get_seq_length()
    new_ids = tiny_tokenizer.build_round("再见", history)
    seq_length = tiny_model.config.seq_length
    try:
        tiny_model.config.seq_length = held + len(new_ids) + 3
        steps = tiny_model.stream_chat(
            tiny_tokenizer, "再见", history, cache, do_sample=False, eos_token_id=None
        )
        assert len(list(steps)) <= 3
        assert cache.get_seq_length() <= tiny_model.config.seq_length
        tiny_model.config.seq_length = held + len(new_ids)
        _, history, cache = stream(tiny_model, tiny_tokenizer, "你好", max_length=held + 1)
        before = list(cache.input_ids)
        message = f"{len(new_ids)} tokens after {held} of the conversation so far"
        with pytest.raises(ValueError, match=message):
            stream(tiny_model, tiny_tokenizer, "再见", history, cache, max_length=8192)
        assert cache.input_ids == before and cache.history == history, "nothing is lost"
    finally:
        tiny_model.config.seq_length = seq_length


def test_build_inputs(tiny_model, tiny_tokenizer):
    history = [("你好", "你好！")]
    whole = tiny_model.build_inputs(tiny_tokenizer, "再见", history)
    prompt = tiny_tokenizer.build_prompt("再见", history)
    assert whole["input_ids"].tolist() == [tiny_tokenizer.encode(prompt)]
    first = tiny_model.build_stream_inputs(tiny_tokenizer, "你好")
    round_2 = tiny_model.build_stream_inputs(tiny_tokenizer, "再见", history)
    answer = tiny_tokenizer.encode("\n你好！", add_special_tokens=False)[2:]
    together = first["input_ids"][0].tolist() + answer + round_2["input_ids"][0].tolist()
    assert together == whole["input_ids"][0].tolist()
    assert round_2["position_ids"][0, 0] == 0


def test_process_response(tiny_model):
    for text, expected in CHAT["process_response"].items():
        assert tiny_model.process_response(text) == expected


def test_batch_of_the_golden_chat_model(chat_model):
    case = CHAT["batch"]
    ids = torch.tensor(case["input_ids"])
    generated = chat_model.generate(
        ids, attention_mask=(ids != 0).long(), max_length=18, do_sample=False
    )
    assert generated.tolist() == case["output_ids"]


# The cache


@torch.no_grad()
def test_cache_grows_in_blocks_and_is_written_in_place(model):
    cache, ids = ChatGLMCache(), OUTPUTS["a.input_ids"]
    model(ids, past_key_values=cache)
    layer = cache.layers[0]
    assert layer.buffers[0].shape[2] == CACHE_BLOCK
    address = layer.buffers[0].data_ptr()
    model(ids[:, :3], past_key_values=cache)
    assert layer.keys.data_ptr() == layer.buffers[0].data_ptr() == address
    assert cache.get_seq_length() == 20
    key = torch.randn(1, 2, CACHE_BLOCK, 16)
    before = layer.keys.clone()
    keys, _ = cache.update(key, key, 0)
    assert layer.buffers[0].shape[2] == 2 * CACHE_BLOCK
    assert torch.equal(keys, torch.cat((before, key), dim=2))


@torch.no_grad()
def test_cropped_cache_continues_rightly(model):
    cache, ids = ChatGLMCache(), OUTPUTS["a.input_ids"]
    model(torch.cat((ids[:, :10], ids[:, 3:9]), dim=1), past_key_values=cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 10
    logits = model(ids[:, 10:], past_key_values=cache).logits
    assert_close(logits, OUTPUTS["a.logits"][:, 10:])
    cache.crop(0)
    assert cache.get_seq_length() == 17


@torch.no_grad()
def test_batch_operations_of_the_cache(model):
    cache, expected, batch = ChatGLMCache(), DynamicCache(), padded_batch()
    for past in (cache, expected):
        model(**batch, past_key_values=past)
        past.batch_repeat_interleave(2)
        past.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
        past.batch_select_indices(torch.tensor([0, 3]))
        past.update(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16), 0)
    assert torch.equal(cache.layers[0].keys, expected.layers[0].keys)
    assert torch.equal(cache.layers[1].values, expected.layers[1].values)
    cache.reset()
    assert cache.get_seq_length() == 0


def count_bytes(cache) -> int:
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.buffers)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_narrow_cache(model, dtype, implementation):
    narrow, ids = create_model(attn_implementation=implementation), OUTPUTS["a.input_ids"]
    narrow.base_model.cache_dtype = dtype
    cache, wide = ChatGLMCache(), ChatGLMCache()
    tolerance = 1e-2 if dtype == torch.float16 else 0.1
    for chunk in (ids[:, :5], ids[:, 5:10], ids[:, 10:11], ids[:, 11:]):
        logits = narrow(chunk, past_key_values=cache).logits
        expected = model(chunk, past_key_values=wide).logits
        assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
        assert_close(logits, expected, tolerance)
    for buffer in (buffer for layer in cache.layers for buffer in layer.buffers):
        assert buffer.dtype == dtype and buffer.is_contiguous()
    assert 2 * count_bytes(cache) == count_bytes(wide)
    copied = cache.copy_prefix(10)
    assert 2 * count_bytes(copied) == count_bytes(wide)
    cache.crop(10 - ids.shape[1])
    for past in (cache, copied):
        logits = narrow(ids[:, 10:], past_key_values=past).logits
        assert_close(logits, OUTPUTS["a.logits"][:, 10:], tolerance)
        past.reorder_cache(torch.tensor([0, 0]))
        narrow(ids[:, :1].repeat(2, 1), past_key_values=past)
        assert {buffer.dtype for layer in past.layers for buffer in layer.buffers} == {dtype}


@pytest.mark.parametrize("cache_class", [ChatGLMCache, DynamicCache])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_a_narrow_cache(model, cache_class, num_beams):
    narrow, ids = create_model(), torch.tensor(GENERATION["single"]["input_ids"])
    narrow.base_model.cache_dtype = torch.float16
    settings = {"max_new_tokens": 8, "eos_token_id": None, "return_dict_in_generate": True}
    settings |= {"num_beams": num_beams, "output_logits": True}
    expected = model.generate(ids, **settings)
    found = narrow.generate(ids, past_key_values=cache_class(), **settings)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert_close(torch.cat(found.logits), torch.cat(expected.logits), 1e-2)
    assert found.past_key_values.layers[0].keys.dtype == torch.float16


def test_chat_with_a_narrow_cache(tiny_model, tiny_tokenizer, monkeypatch):
    def converse():
        history, cache = [], ChatGLMCache()
        for query in ("你好", "What is your name?"):
            steps = tiny_model.stream_chat(
                tiny_tokenizer, query, history, cache, do_sample=False, return_past_key_values=True
            )
            *_, (_, history, cache) = steps
        return history, cache

    expected, wide = converse()
    monkeypatch.setattr(tiny_model.base_model, "cache_dtype", torch.float16)
    history, cache = converse()
    assert history == expected and 2 * count_bytes(cache) == count_bytes(wide)


def test_gradients_with_a_narrow_cache():
    grads, ids = [], OUTPUTS["a.input_ids"].long()
    for dtype in (None, torch.float16):
        trained = create_model()
        trained.base_model.cache_dtype = dtype
        trained(ids, labels=ids, past_key_values=ChatGLMCache()).loss.backward()
        layer = trained.base_model.encoder.layers[0].self_attention.query_key_value
        grads.append(layer.weight.grad)
    assert 0 < (grads[0] - grads[1]).norm() < 0.01 * grads[0].norm()


# Loading and saving


@pytest.mark.parametrize("layout", ["safetensors", "bin", "bin shards"])
def test_checkpoints_load_with_the_official_names_and_inv_freq(tmp_path, layout):
    state = load_file(TINY / "model.safetensors")
    state["transformer.rotary_pos_emb.inv_freq"] = torch.zeros(4)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if layout == "safetensors":
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    elif layout == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        names, index = sorted(state), {}
        for i in range(3):
            shard = f"pytorch_model-0000{i + 1}-of-00003.bin"
            torch.save({name: state[name] for name in names[i::3]}, tmp_path / shard)
            index |= dict.fromkeys(names[i::3], shard)
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
        (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    model, info = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert_close(model.eval()(OUTPUTS["a.input_ids"]).logits, OUTPUTS["a.logits"])


def test_save_and_reload(model, tmp_path):
    model.save_pretrained(tmp_path)
    reloaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, device="cpu")
    assert reloaded.device.type == "cpu"
    for name, value in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["original_rope"] is True


def test_only_the_prefix_of_a_loaded_model_is_trained(tmp_path):
    config = ChatGLMConfig(**CONFIG, pre_seq_len=4)
    ChatGLMForConditionalGeneration(config, empty_init=False).save_pretrained(tmp_path)
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["transformer.prefix_encoder.embedding.weight"]


def test_dtype_follows_the_checkpoint_and_changes_by_name(tmp_path):
    create_model().half().save_pretrained(tmp_path)
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.float16
    assert model.float().half().bfloat16().dtype == torch.bfloat16


def test_empty_init_and_device():
    config = ChatGLMConfig(**CONFIG)
    meta = ChatGLMForConditionalGeneration(config, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(config, empty_init=False)
    std = model.transformer.embedding.word_embeddings.weight.std().item()
    assert 0.015 < std < 0.025
    assert model.transformer.encoder.layers[0].mlp.dense_4h_to_h.weight.std() > 0
    assert (
        ChatGLMModel(config, empty_init=False)(torch.tensor([[1, 2]])).last_hidden_state.std() > 0
    )


@torch.no_grad()
def test_keys_are_not_expanded_for_decoding(model, monkeypatch):
    """One new token, and a few after a cache: the heads of a group are rows of one head."""
    shapes, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(query, key, *args, **kwargs):
        shapes.append((tuple(query.shape), tuple(key.shape)))
        assert not kwargs.get("enable_gqa") and not kwargs.get("is_causal")
        return attend(query, key, *args, **kwargs)

    cache, ids = ChatGLMCache(), OUTPUTS["a.input_ids"]
    model(ids[:, :10], past_key_values=cache)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    model(ids[:, 10:11], past_key_values=cache)
    model(ids[:, 11:14], past_key_values=cache)
    assert shapes[0] == ((1, 2, 2, 16), (1, 2, 11, 16))
    assert shapes[-1] == ((1, 2, 6, 16), (1, 2, 14, 16))


def test_kept_cache_survives_inference_mode(model):
    ids, cache = OUTPUTS["a.input_ids"], ChatGLMCache()
    with torch.inference_mode():
        model(ids[:, :10], past_key_values=cache)
    with torch.no_grad():
        assert_close(model(ids[:, 10:], past_key_values=cache).logits, OUTPUTS["a.logits"][:, 10:])


def test_stream_generate_computes_under_the_callers_autocast(model):
    dtypes = set()
    hook = model.transformer.encoder.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        list(model.stream_generate(OUTPUTS["a.input_ids"], max_length=19))
    hook.remove()
    assert dtypes == {torch.bfloat16}


def test_half_precision_with_a_float32_residual():
    model = create_model(fp32_residual_connection=True).bfloat16()
    with torch.no_grad():
        outputs = model(OUTPUTS["a.input_ids"], output_hidden_states=True)
    assert {h.dtype for h in outputs.hidden_states} == {torch.float32}
    assert_close(outputs.logits, OUTPUTS["a.logits"], 0.15)


def test_dropout_acts_only_in_training():
    model = create_model(hidden_dropout=0.5, attention_dropout=0.5)
    ids = OUTPUTS["a.input_ids"]
    with torch.no_grad():
        assert_close(model(ids).logits, OUTPUTS["a.logits"])
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_attention_implementations_are_found_by_name(model):
    """Another implementation (such as flash attention) gets all heads, keys not expanded."""
    shapes = []

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        shapes.append((query.shape, key.shape, value.shape))
        return eager_attention_forward(module, query, key, value, attention_mask, scaling)

    AttentionInterface.register("recording", attention)
    AttentionMaskInterface.register("recording", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    other = create_model()
    other.set_attn_implementation("recording")
    with torch.no_grad():
        assert_close(other(OUTPUTS["a.input_ids"]).logits, OUTPUTS["a.logits"])
    assert shapes[0] == ((1, 4, 17, 16), (1, 2, 17, 16), (1, 2, 17, 16))


@torch.no_grad()
def test_compiles_without_a_graph_break(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = OUTPUTS["a.input_ids"]
    assert_close(compiled(ids, use_cache=False).logits, OUTPUTS["a.logits"])
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :10], past_key_values=cache)
    step = compiled(ids[:, 10:11], past_key_values=cache, position_ids=torch.tensor([[10]]))
    assert_close(step.logits, OUTPUTS["a.logits"][:, 10:11])


def test_tied_embeddings_if_the_config_says_so():
    model = ChatGLMForConditionalGeneration(
        ChatGLMConfig(**{**CONFIG, "tie_word_embeddings": True})
    )
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def write_pointer(file):
    file.write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:812edc55c969d2ef82dcda8c275e379ef689761b13860da8ea7c1f3a475975c8\n"
        "size 1827781090\n"
    )


def test_broken_checkpoint_folders_are_told_in_one_line(tmp_path):
    state = load_file(TINY / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    load = ChatGLMForConditionalGeneration.from_pretrained
    safetensors, shard = tmp_path / "model.safetensors", tmp_path / "pytorch_model-1.bin"
    write_pointer(safetensors)
    with pytest.raises(
        OSError, match=r"model\.safetensors \(1\d\d bytes\) is a Git LFS pointer.*git lfs"
    ):
        load(tmp_path)
    save_file(state, safetensors, metadata={"format": "pt"})
    check_weight_file(safetensors)
    whole = safetensors.read_bytes()
    damaged = [whole[:length] for length in (0, 5, 100, len(whole) - 1)]
    for content in [*damaged, bytes(len(whole)), whole[:8] + b"[1]" + whole[11:]]:
        safetensors.write_bytes(content)
        length = len(content)
        with pytest.raises(OSError, match=rf"\({length} bytes\) is truncated or damaged") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)
    safetensors.unlink()
    with pytest.raises(OSError, match=r"has no config\.json"):
        load(tmp_path / "..")
    index = {"weight_map": dict.fromkeys(state, shard.name)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert find_weight_files(tmp_path) == [shard]
    with pytest.raises(OSError, match=r"pytorch_model-1\.bin is missing: download it"):
        load(tmp_path)
    write_pointer(shard)
    with pytest.raises(OSError, match="Git LFS pointer"):
        load(tmp_path)
    for content in (b"<!DOCTYPE html>not found", bytes(100)):
        shard.write_bytes(content)
        with pytest.raises(OSError, match="truncated or damaged"):
            load(tmp_path)
    whole_index = (tmp_path / "pytorch_model.bin.index.json").read_text()
    for content in ("{}", "", "[]"):
        (tmp_path / "pytorch_model.bin.index.json").write_text(content)
        with pytest.raises(
            OSError, match=r"index\.json \(\d bytes\) is damaged: download it again"
        ):
            load(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(whole_index)
    torch.save(state, shard)
    assert zipfile.is_zipfile(shard)
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(OSError, match="truncated or damaged"):
        load(tmp_path)
    shard.write_bytes(
        b"\x80\x02" + pickle.dumps({})[2:]
    )  # the format before torch 1.6 is let through
    check_weight_file(shard)
