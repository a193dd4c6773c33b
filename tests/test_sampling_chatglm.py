"""Whose settings count, which ids are sampled, where an answer ends: on all paths alike."""

import asyncio
import json
import logging
import shutil
from types import SimpleNamespace

import core
import pytest
import torch
import torch.nn.functional as F
from servers import gather_answers
from transformers import (
    AutoModel,
    GenerationConfig,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import configuration_utils

from chatglm2 import CHAT_DEFAULTS
from chatglm2.chat.conversation import Conversation
from chatglm2.chat.shared_model import sampling_sliders
from chatglm2.sampling_chatglm import (
    CHECKPOINT_FIELDS,
    NUM_SORTED,
    PLAIN_FIELDS,
    SAMPLER_FIELDS,
    SPECIAL_IDS,
    InvalidScoreLogitsProcessor,
    SamplingLogitsProcessor,
    VocabularyLogitsProcessor,
    create_sampler,
    find_end_ids,
    own_settings,
    read_sampling,
)
from chatglm2.serving.batching import Batcher, Request

NAN, INF = float("nan"), float("inf")
QUERY = "你好"


def ask_chat(model, tokenizer, query=QUERY, **settings):
    return model.chat(tokenizer, query, **settings)[0]


def ask_stream(model, tokenizer, query=QUERY, **settings):
    *_, (answer, _) = model.stream_chat(tokenizer, query, **settings)
    return answer


def ask_conversation(model, tokenizer, query=QUERY, **settings):
    *_, answer = Conversation(model, tokenizer).stream(query, **settings)
    return answer


def ask_evaluation(model, tokenizer, query=QUERY):
    return core.generate(model, tokenizer, [tokenizer.build_prompt(query)])[0]


def ask_batcher(model, tokenizer, query=QUERY, **settings):
    batcher = Batcher(model, tokenizer)
    request = Request(tokenizer.encode(tokenizer.build_prompt(query)), **settings)
    try:
        return asyncio.run(gather_answers(batcher, request))[0].text
    finally:
        batcher.end()


CHATS = [ask_chat, ask_stream, ask_conversation, ask_batcher]
PATHS = pytest.mark.parametrize("ask", [*CHATS, ask_evaluation], ids=lambda ask: ask.__name__[4:])


@pytest.fixture
def configure(tiny_model, monkeypatch):
    """Give the model a generation_config with these fields, by default greedy."""

    def set_config(**fields):
        fields = {"eos_token_id": 2, "pad_token_id": 0, "do_sample": False} | fields
        monkeypatch.setattr(tiny_model, "generation_config", GenerationConfig(**fields))

    set_config()
    return set_config


@pytest.fixture
def answer(configure, tiny_model, tiny_tokenizer):
    """The greedy answer to QUERY."""
    return ask_chat(tiny_model, tiny_tokenizer)


# Scores


@pytest.mark.parametrize(
    ("row", "is_broken"),
    [
        ([1, 2, 3, 4, 5, 6, 7], False),
        ([-INF, 2, -INF, -INF, -INF, -INF, -INF], False),  # banned tokens
        ([1, 2, NAN, 4, 5, 6, 7], True),
        ([1, 2, INF, 4, 5, 6, 7], True),
        ([1, -INF, NAN, -INF, 5, 6, 7], True),
        ([-INF] * 7, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_is_broken_by_nan_or_infinity_or_without_any_score(row, is_broken, dtype):
    good = [0.0, -INF, 2, 3, 4, 5, 6]
    scores = torch.tensor([row, good], dtype=dtype)
    found = InvalidScoreLogitsProcessor()(None, scores)
    forced = [0, 0, 0, 0, 0, torch.tensor(5e4, dtype=dtype).item(), 0]
    assert found.tolist() == [forced if is_broken else row, good]


@pytest.mark.parametrize(
    "settings",
    [
        {"bad_words_ids": [[100]]},
        {"no_repeat_ngram_size": 40},
        {"suppress_tokens": [100]},
        {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(2, 4096))},
        {"num_beams": 2, "bad_words_ids": [[100]]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_banned_tokens_are_no_broken_scores(answer, tiny_model, tiny_tokenizer, settings):
    assert ask_chat(tiny_model, tiny_tokenizer, **settings) == answer
    if "num_beams" not in settings:
        assert ask_stream(tiny_model, tiny_tokenizer, **settings) == answer


def test_processors_of_a_request_that_leave_no_score(configure, tiny_model, tiny_tokenizer):
    def ban_all(input_ids, scores):
        return torch.full_like(scores, -INF)

    settings = {"processors": [ban_all], "max_new_tokens": 2}
    settings["processors"] = type(Request([1]).processors)(settings["processors"])
    assert ask_batcher(tiny_model, tiny_tokenizer, **settings) == "\x02\x02"


# Sampling

NUM_IDS = 1000
RANDOM = torch.randn(4, NUM_IDS, generator=torch.Generator().manual_seed(0)) * 3
ROWS = {
    "random": RANDOM,
    "flat": RANDOM / 1000,
    "peaked": RANDOM * 100,
    "few": torch.full((4, NUM_IDS), -INF).scatter(1, RANDOM.topk(7).indices, RANDOM[:, :7]),
    "one": torch.full((4, NUM_IDS), -INF).index_fill(1, torch.tensor(77), 1.0),
    "forced": torch.zeros(4, NUM_IDS).index_fill(1, torch.tensor(5), 5e4),
    "ties": RANDOM.round(),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.8, 50, 0.8, None),
        (None, None, None, None),
        (1.0, 0, 1.0, 0.0),
        (3.0, 0, 0.9, None),
        (0.1, 0, 0.9, None),
        (1.5, NUM_IDS - 1, 0.999, None),
        (1.5, NUM_IDS, 0.5, None),
        (1.5, 10 * NUM_IDS, 0.5, None),
        (1.0, 1, 1.0, None),
        (1.0, 50, 1e-6, None),
        (1.0, 50, 0.0, None),
        (2.0, 50, 0.95, 0.1),
    ],
)
def test_candidates_are_those_of_transformers(rows, temperature, top_k, top_p, min_p):
    scores = expected = ROWS[rows]
    if temperature:
        expected = TemperatureLogitsWarper(temperature)(None, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    num_tied = (expected > -INF).sum(-1).max()  # transformers keeps more than top_k
    for warper, value in ((TopPLogitsWarper, top_p), (MinPLogitsWarper, min_p)):
        if value is not None:
            expected = warper(value)(None, expected)
    expected = expected.softmax(-1)
    ids, found = SamplingLogitsProcessor(temperature, top_k, top_p, min_p).find_candidates(scores)
    assert (ids.diff() > 0).all()
    if top_k and num_tied > top_k:
        assert rows in ("ties", "forced") and ids.shape[1] == top_k
        cut = scores.gather(1, ids).amin(-1, keepdim=True)
        assert all(
            set(above.nonzero()[:, 0].tolist()) <= set(kept.tolist())
            for above, kept in zip(scores > cut, ids, strict=True)
        )
        return
    found = torch.zeros(scores.shape).scatter(1, ids, found)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.8, 0.95, 0.9999])
@pytest.mark.parametrize("rows", [*ROWS, "mixed"])
def test_candidates_of_a_whole_vocabulary_are_those_of_transformers(rows, top_p, monkeypatch):
    """Without top_k only the likeliest ids are sorted, if they suffice for each row."""
    calls = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda *args, **kw: calls.append(1) or sort(*args, **kw))
    scores = torch.randn(2, 65024, generator=torch.Generator().manual_seed(1)) * 3
    scale = {"flat": 1e-3, "peaked": 100, "random": 1, "ties": 1}
    if rows == "mixed":
        scores[1] /= 1000
    elif rows in scale:
        scores = (scores * scale[rows]).round(decimals=0 if rows == "ties" else 8)
    else:
        scores = F.pad(ROWS[rows], (0, 65024 - NUM_IDS), value=-INF)
    _, found = SamplingLogitsProcessor(None, 0, top_p).find_candidates(scores)
    is_whole = bool(calls)
    expected = TopPLogitsWarper(top_p)(None, scores).softmax(-1)
    if rows in ("ties", "forced", "few"):  # any of the ids with the same score may be dropped
        expected, found = expected.sort(-1).values, found.sort(-1).values
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    num_candidates = (expected > 0).sum(-1)
    assert is_whole == (num_candidates.max() > NUM_SORTED)
    assert torch.equal(num_candidates, (found > 0).sum(-1))


def test_samples_have_the_probabilities_of_the_candidates():
    scores = RANDOM[:1].expand(20000, -1)
    sampler = SamplingLogitsProcessor(1.5, 12, 0.9)
    torch.manual_seed(0)
    sampled = sampler(None, scores)
    assert sampled.isfinite().sum(-1).eq(1).all()
    counts = sampled.argmax(-1).bincount(minlength=NUM_IDS)
    ids, probabilities = sampler.find_candidates(scores[:1])
    assert counts.sum() == counts[ids].sum() == 20000
    torch.testing.assert_close(counts[ids] / 20000, probabilities, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"temperature": 0.0}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": -1.0}, "top_p")],
)
def test_wrong_sampling_is_refused_as_transformers_does(tiny_model, settings, error):
    with pytest.raises(ValueError, match=error):
        tiny_model.generate(torch.tensor([[5]]), do_sample=True, max_new_tokens=1, **settings)


@pytest.mark.parametrize("ask", [ask_chat, ask_stream, ask_conversation])
def test_a_seed_gives_the_same_answer_on_all_paths(configure, ask, tiny_model, tiny_tokenizer):
    settings = {"temperature": 5.0, "top_k": 30, "top_p": 0.95, "max_new_tokens": 20}
    configure(do_sample=True)
    answers = []
    for seed in range(3):
        torch.manual_seed(seed)
        answers.append(ask(tiny_model, tiny_tokenizer, **settings))
        assert answers[-1] == ask_batcher(tiny_model, tiny_tokenizer, seed=seed, **settings)
    assert len(set(answers)) == 3


@pytest.fixture
def widths(monkeypatch):
    """The numbers of probabilities from which `torch.multinomial` has sampled."""
    found, multinomial = set(), torch.multinomial

    def spy(probabilities, *args, **settings):
        found.add(probabilities.shape[-1])
        return multinomial(probabilities, *args, **settings)

    monkeypatch.setattr(torch, "multinomial", spy)
    return found


@pytest.mark.parametrize("given", ["arguments", "generation_config", "checkpoint", "both"])
@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({}, 50),
        ({"top_k": 7, "top_p": 0.9, "temperature": 0.7}, 7),
        ({"top_k": 7, "repetition_penalty": 1.1, "num_return_sequences": 1}, 7),
        ({"top_k": 7, "num_return_sequences": 2}, 4096),
        ({"top_k": 7, "typical_p": 0.9}, 4096),
        ({"top_k": 7, "output_scores": True, "return_dict_in_generate": True}, 4096),
        ({"top_k": 7, "num_beams": 2}, 2 * 4096),
    ],
)
def test_generate_samples_among_few_if_the_settings_allow_it(
    configure, tiny_model, widths, monkeypatch, caplog, given, settings, width
):
    monkeypatch.setattr(configuration_utils.logger, "parent", logging.getLogger())
    configuration_utils.logger.warning_once.cache_clear()
    settings = {"do_sample": True, "max_new_tokens": 3, "pad_token_id": 0, **settings}
    configure(**{"do_sample": None} | (settings if given in ("checkpoint", "both") else {}))
    arguments = settings if given == "arguments" else {}
    if given in ("generation_config", "both"):
        config = GenerationConfig(**settings if given != "both" else {"max_new_tokens": 2})
        arguments, before = {"generation_config": config}, config.to_dict()
    tiny_model.generate(torch.tensor([[64, 65, 5]]), **arguments)
    assert widths == {width}
    assert "not valid" not in caplog.text
    if "generation_config" in arguments:
        assert config.to_dict() == before


def test_other_fields_leave_sampling_to_transformers():
    """A new field of transformers, too."""
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in names | {"assistant_model", "custom_generate"}:
        sampler = create_sampler(
            {"do_sample": True, name: 7.0} | dict.fromkeys(CHECKPOINT_FIELDS, 1.0) | {"top_k": 5}
        )
        assert (sampler is not None) == (name in SAMPLER_FIELDS), name
    assert create_sampler({}) is create_sampler({"do_sample": False}) is None
    assert create_sampler({"do_sample": True, "use_cache": True, "min_length": 0}).top_k == 50
    assert create_sampler({"do_sample": True, "top_k": None}).top_k is None


# Ids


def test_rows_that_pad_the_matrix():
    scores = torch.arange(12.0).view(2, 6)
    expected = [[0, 1, 2, 3, -INF, -INF], [6, 7, 8, 9, -INF, -INF]]
    assert VocabularyLogitsProcessor(4)(None, scores).tolist() == expected
    for num_ids in (6, 9):
        assert VocabularyLogitsProcessor(num_ids)(None, scores) is scores


@PATHS
def test_rows_that_pad_the_matrix_are_never_sampled(answer, ask, tiny_model, tiny_tokenizer):
    hook = tiny_model.transformer.output_layer.register_forward_hook(
        lambda module, inputs, scores: F.pad(scores, (0, 8), value=1e4)
    )
    try:
        assert ask(tiny_model, tiny_tokenizer) == answer
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([7, 2, 3], [7]),
        ([[7, 8], 2, 3], [7, 8]),
        ([torch.tensor([7]), 2, 3], [7]),
        ([None, 2, 3], [2]),
        ([[], None, 3], [3]),
        ([[None], 2, 3], [2]),
        ([100, -1, 3], [3]),  # no tokens, such as the id of another model
        ([[100, 7], 2, 3], [7]),
        ([None, None, None], []),
    ],
)
def test_the_first_source_with_an_end_counts(sources, expected):
    sources = [SimpleNamespace(eos_token_id=ids) for ids in sources]
    assert find_end_ids(None, *sources, num_ids=100) == expected


@PATHS
@pytest.mark.parametrize("eos_token_id", [None, [], 130005, [-1, 4096]])
def test_answers_end_whatever_the_files_lack(
    answer, configure, ask, tiny_model, tiny_tokenizer, monkeypatch, eos_token_id
):
    configure(eos_token_id=eos_token_id)
    monkeypatch.setattr(tiny_model.config, "eos_token_id", None)
    assert ask(tiny_model, tiny_tokenizer) == answer


@pytest.mark.parametrize("given", [{}, {"generation_config": GenerationConfig(do_sample=False)}])
def test_generate_ends_whatever_the_files_lack(
    answer, configure, tiny_model, tiny_tokenizer, monkeypatch, given
):
    configure(eos_token_id=None)
    monkeypatch.setattr(tiny_model.config, "eos_token_id", None)
    ids = tiny_model.build_inputs(tiny_tokenizer, QUERY)["input_ids"]
    for config in given.values():
        config.max_length = 300
    settings = given or {"max_length": 300}
    generated = tiny_model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
    assert generated[-1] == 2 and tiny_tokenizer.decode(generated) == answer
    endless = tiny_model.generate(ids, eos_token_id=None, max_new_tokens=len(generated) + 5)
    assert endless.shape[1] == ids.shape[1] + len(generated) + 5


# Settings

WATERMARK = {"greenlist_ratio": 0.25, "bias": 9.0, "seeding_scheme": "lefthash"}
FOREIGN = {
    "num_beams": 4,
    "num_return_sequences": 2,
    "max_new_tokens": 5,
    "max_length": 40,
    "min_length": 200,
    "min_new_tokens": 150,
    "stop_strings": ["，"],
    "max_time": 1e-9,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "use_cache": False,
    "cache_implementation": "static",
    "prefill_chunk_size": 3,
    "prompt_lookup_num_tokens": 3,
    "num_assistant_tokens": 7,
    "is_assistant": True,
    "early_stopping": True,
    "length_penalty": 3.0,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "top_h": 0.5,
    "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 2.0,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[13]],
    "suppress_tokens": [13],
    "begin_suppress_tokens": [13],
    "sequence_bias": [[[13], -100.0]],
    "forced_bos_token_id": 14,
    "forced_eos_token_id": 14,
    "exponential_decay_length_penalty": [1, 9.0],
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": WATERMARK,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "force_words_ids": [[13]],
    "low_memory": True,
    "disable_compile": True,
    "unknown_field": 1,
}


@PATHS
def test_other_fields_of_a_checkpoint_have_no_effect(
    answer, configure, ask, tiny_model, tiny_tokenizer
):
    configure(**FOREIGN)
    assert ask(tiny_model, tiny_tokenizer) == answer


def test_each_field_has_a_class():
    """A field of transformers is the checkpoint's, or reset; a new one is reset too."""
    names = CHECKPOINT_FIELDS | SPECIAL_IDS
    others = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - names
    for name in others - {"transformers_version"}:
        config = GenerationConfig()
        setattr(config, name, 7)
        settings = own_settings(config, do_sample=False)
        assert settings == {name: PLAIN_FIELDS.get(name), "do_sample": False}, name
        assert own_settings(config, **{name: 9}) == {name: 9}


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "return_dict"])
def test_output_flags_of_the_config_have_no_effect(
    answer, tiny_checkpoint, tiny_tokenizer, tmp_path, name
):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {name: name != "return_dict"}))
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    greedy = {"temperature": 0}
    for ask in CHATS:
        assert ask(model, tiny_tokenizer, **greedy) == answer
    assert ask_evaluation(model, tiny_tokenizer) == answer
    prompts = [tiny_tokenizer.build_prompt(QUERY)]
    assert core.choose(model, tiny_tokenizer, prompts)[0] in "ABCD"


@PATHS
def test_a_repetition_penalty_acts_everywhere(answer, configure, ask, tiny_model, tiny_tokenizer):
    expected = ask_chat(tiny_model, tiny_tokenizer, repetition_penalty=3.0)
    configure(repetition_penalty=3.0)
    assert ask(tiny_model, tiny_tokenizer) == expected != answer
    if ask is not ask_evaluation:
        assert ask(tiny_model, tiny_tokenizer, repetition_penalty=1.0) == answer


@pytest.mark.parametrize(
    ("fields", "do_sample", "expected"),
    [
        ({}, None, {}),
        ({"temperature": 0.3, "top_k": 7}, None, {"temperature": 0.3, "top_k": 7}),
        (
            {"top_p": 0.5, "repetition_penalty": 1.2},
            True,
            {"top_p": 0.5, "repetition_penalty": 1.2},
        ),
        ({"min_p": 0.1}, None, {"min_p": 0.1}),
        ({"do_sample": False, "temperature": 0.3}, None, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.3}, True, {"temperature": 0.3}),
        ({}, False, {"temperature": 0.0}),
        ({"num_beams": 4, "max_length": 20}, None, {}),
    ],
)
def test_the_sampling_of_a_checkpoint(fields, do_sample, expected):
    plain = {name: CHAT_DEFAULTS[name] for name in ("temperature", "top_k", "top_p")}
    found = read_sampling(GenerationConfig(**fields), do_sample)
    assert found == plain | {"min_p": None, "repetition_penalty": 1.0} | expected


def test_the_sampling_of_a_checkpoint_acts_everywhere(
    answer, configure, tiny_model, tiny_tokenizer
):
    configure(do_sample=None, temperature=5.0, top_p=1.0, top_k=0)
    settings = {"max_new_tokens": 12}
    for ask in CHATS:
        assert not answer.startswith(ask(tiny_model, tiny_tokenizer, **settings)[:12])
        greedy = ask(tiny_model, tiny_tokenizer, temperature=0, **settings)
        assert answer.startswith(greedy)
    configure(do_sample=None, temperature=0.25, top_p=0.5)
    sliders = sampling_sliders(tiny_model)
    assert (sliders["temperature"]["value"], sliders["top_p"]["value"]) == (0.25, 0.5)
    for field in ({"top_k": 1}, {"min_p": 1.0}):
        configure(do_sample=None, **field)
        for ask in CHATS:
            assert ask(tiny_model, tiny_tokenizer) == answer


def test_a_given_generation_config_counts_in_chat(answer, tiny_model, tiny_tokenizer):
    given = GenerationConfig(max_new_tokens=5, do_sample=False)
    for ask in (ask_chat, ask_stream):
        short = ask(tiny_model, tiny_tokenizer, generation_config=given)
        assert answer.startswith(short) and 0 < len(short) < 12


@pytest.mark.parametrize(
    ("ask", "setting", "message"),
    [
        (ask_chat, {"num_return_sequences": 2}, "num_return_sequences=2: "),
        (ask_chat, {"return_dict_in_generate": True}, "return_dict_in_generate=True: "),
        (ask_stream, {"num_return_sequences": 2}, "num_return_sequences=2: "),
        (ask_stream, {"num_beams": 3}, "num_beams=3 cannot be streamed"),
    ],
)
def test_more_than_one_text_is_refused(tiny_model, tiny_tokenizer, ask, setting, message):
    with pytest.raises(ValueError, match=message):
        ask(tiny_model, tiny_tokenizer, **setting)
