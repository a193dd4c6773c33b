"""Generation, chat and the cache against golden data of the official code, and themselves."""

import json
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_modeling_chatglm import IDS, OUTPUTS, TINY, assert_close, create_model, padded_batch
from transformers import BatchEncoding, DynamicCache, LogitsProcessorList, StaticCache

from chatglm2 import ChatGLMCache, ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm2.generation_chatglm import (
    CACHE_BLOCK,
    CACHE_NAME,
    AnswerDecoder,
    InvalidScoreLogitsProcessor,
    find_end,
)

GENERATION = json.loads((TINY / "generation.json").read_text("utf-8"))
SINGLE = torch.tensor(GENERATION["single"]["input_ids"])
CHAT_FOLDER = TINY.parent / "chat"
CHAT = json.loads((CHAT_FOLDER / "chat_golden.json").read_text("utf-8"))
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def model():
    return create_model()


@pytest.fixture(scope="module")
def chat_model():
    """The golden chat model: random weights with the official vocabulary."""
    config = ChatGLMConfig.from_pretrained(CHAT_FOLDER)
    model = ChatGLMForConditionalGeneration(config)
    state = load_file(CHAT_FOLDER / "model_fp16.safetensors")
    model.load_state_dict(
        {name: value.float() for name, value in state.items() if "inv_freq" not in name}
    )
    return model.float().eval()


# generate


@pytest.mark.parametrize("name", ["single", "short", "one", "left_padded_batch"])
@pytest.mark.parametrize("cache_class", [ChatGLMCache, DynamicCache])
def test_greedy_generation(model, name, cache_class):
    case = GENERATION[name]
    names = {"input_ids", "attention_mask", "position_ids"} & case.keys()
    inputs = {key: torch.tensor(case[key]) for key in names}
    length = len(case["output_ids"][0])
    generated = model.generate(
        **inputs, max_length=length, eos_token_id=None, past_key_values=cache_class()
    )
    assert generated.tolist() == case["output_ids"]


def test_generation_ends_at_any_eos_and_pads_finished_rows(model):
    case = GENERATION["single_with_eos"]
    ids = SINGLE
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


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_has_two_names_and_no_warning(model, tiny_model, tiny_tokenizer, name):
    expected = GENERATION["single"]["output_ids"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        cache = ChatGLMCache()
        settings = {"max_length": len(expected[0]), "eos_token_id": None, name: cache}
        assert model.generate(SINGLE, **settings).tolist() == expected
        assert cache.get_seq_length() == len(expected[0]) - 1
        *_, ids = model.stream_generate(SINGLE, **settings | {name: ChatGLMCache()})
        assert ids.tolist() == expected
        cache = ChatGLMCache()
        model(IDS[:, :10], **{name: cache})
        outputs = model(IDS[:, 10:], **{name: cache})
        assert getattr(outputs, CACHE_NAME) is cache
        assert_close(outputs.logits, OUTPUTS["a.logits"][:, 10:])
        settings = {"max_new_tokens": 2, "do_sample": False}
        tiny_model.chat(tiny_tokenizer, "你好", **settings)
        _, history, cache = stream(tiny_model, tiny_tokenizer, "你好", **settings)
        stream(tiny_model, tiny_tokenizer, "你好", history, cache, **settings)


def test_two_different_caches_are_refused(model):
    for call in (model, model.base_model, model.generate):
        call(IDS, past_key_values=(cache := ChatGLMCache()), cache=cache)
        with pytest.raises(ValueError, match="give the cache once"):
            call(IDS, past_key_values=ChatGLMCache(), cache=ChatGLMCache())


def test_generation_in_training_with_checkpointing():
    """Nothing is computed again without a gradient, so the cache is used."""
    model, lengths = create_model().train(), []
    model.gradient_checkpointing_enable()
    model.transformer.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    expected = GENERATION["single"]["output_ids"]
    generated = model.generate(SINGLE, max_length=len(expected[0]), eos_token_id=None)
    assert generated.tolist() == expected
    assert lengths == [SINGLE.shape[1]] + [1] * (len(expected[0]) - SINGLE.shape[1] - 1)


def test_the_end_of_an_answer():
    assert find_end(10, 100) == 100
    assert find_end(10, 100, max_length=50) == 50
    assert find_end(10, 100, max_length=50, max_new_tokens=7) == 17
    assert find_end(10, 100, max_new_tokens=0) == 10
    assert find_end(200, 100, max_new_tokens=7) == 100


def test_stream_generate_yields_all_ids_at_each_step(model):
    ids = SINGLE
    steps = model.stream_generate(ids, max_length=25, eos_token_id=None)
    golden = GENERATION["stream_generate_max_length_25"]["yielded"]
    assert [step[0].tolist() for step in steps] == golden
    for sequences, cache in model.stream_generate(ids, max_length=19, return_past_key_values=True):
        assert cache.get_seq_length() >= sequences.shape[1] - 1
    assert cache.get_seq_length() == 18


def test_stream_generate_ends_when_it_is_closed_and_hands_over_errors(model):
    ids = SINGLE
    num_threads = threading.active_count()
    cache = ChatGLMCache()
    steps = model.stream_generate(ids, max_length=120, eos_token_id=None, past_key_values=cache)
    next(steps)
    steps.close()
    assert threading.active_count() == num_threads
    assert cache.get_seq_length() < 119
    with pytest.raises(ValueError, match="not_an_argument"):
        next(model.stream_generate(ids, max_length=25, not_an_argument=1))


def test_stream_generate_computes_under_the_callers_autocast(model):
    dtypes = set()
    hook = model.transformer.encoder.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        list(model.stream_generate(IDS, max_length=19))
    hook.remove()
    assert dtypes == {torch.bfloat16}


def test_batch_of_the_golden_chat_model(chat_model):
    case = CHAT["batch"]
    ids = torch.tensor(case["input_ids"])
    generated = chat_model.generate(
        ids, attention_mask=(ids != 0).long(), max_length=18, do_sample=False
    )
    assert generated.tolist() == case["output_ids"]


# Sampling


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
        return IDS[0].tolist()

    def __call__(self, texts, return_tensors):
        return BatchEncoding({"input_ids": IDS})


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


# chat and stream_chat


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


def test_chat_and_stream_chat_end_at_eos_or_after_max_new_tokens(chat_model, official_tokenizer):
    for name in ("stream_chat", "stream_chat_eos"):
        case = CHAT[name]
        settings = {"max_length": case.get("max_length", 64), "do_sample": False}
        if name == "stream_chat_eos":
            settings["eos_token_id"] = case["eos_token_id"]
        steps = list(chat_model.stream_chat(official_tokenizer, "你好", **settings))
        yielded = [[text, [list(turn) for turn in history]] for text, history in steps]
        assert yielded == case["yielded"]
        assert steps[-1] == chat_model.chat(official_tokenizer, "你好", **settings)
    assert steps[-1][0] == CHAT["chat_eos"]["response"]
    response, _ = chat_model.chat(official_tokenizer, "你好", max_new_tokens=5, **GREEDY)
    assert response == CHAT["chat_max_new_tokens_5"]["response"]


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


@pytest.mark.slow
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


# The cache


@torch.no_grad()
def test_cache_grows_in_blocks_and_is_written_in_place(model):
    cache, ids = ChatGLMCache(), IDS
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
    cache, ids = ChatGLMCache(), IDS
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


def test_kept_cache_survives_inference_mode(model):
    ids, cache = IDS, ChatGLMCache()
    with torch.inference_mode():
        model(ids[:, :10], past_key_values=cache)
    with torch.no_grad():
        assert_close(model(ids[:, 10:], past_key_values=cache).logits, OUTPUTS["a.logits"][:, 10:])


def count_bytes(cache) -> int:
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.buffers)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_narrow_cache(model, dtype, implementation):
    narrow, ids = create_model(attn_implementation=implementation), IDS
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
    narrow, ids = create_model(), SINGLE
    narrow.base_model.cache_dtype = torch.float16
    settings = {"max_new_tokens": 8, "eos_token_id": None, "return_dict_in_generate": True}
    settings |= {"num_beams": num_beams, "output_logits": True}
    expected = model.generate(ids, **settings)
    found = narrow.generate(ids, past_key_values=cache_class(), **settings)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert_close(torch.cat(found.logits), torch.cat(expected.logits), 1e-2)
    assert found.past_key_values.layers[0].keys.dtype == torch.float16


def test_gradients_with_a_narrow_cache():
    grads, ids = [], IDS
    for dtype in (None, torch.float16):
        trained = create_model()
        trained.base_model.cache_dtype = dtype
        trained(ids, labels=ids, past_key_values=ChatGLMCache()).loss.backward()
        layer = trained.base_model.encoder.layers[0].self_attention.query_key_value
        grads.append(layer.weight.grad)
    assert 0 < (grads[0] - grads[1]).norm() < 0.01 * grads[0].norm()
