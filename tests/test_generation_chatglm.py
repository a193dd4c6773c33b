"""Generation, chat and the cache against golden data of the official code, and themselves."""

import atexit
import itertools
import json
import random
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_modeling_chatglm import IDS, OUTPUTS, TINY, assert_close, create_model, padded_batch
from transformers import (
    BatchEncoding,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
)

from chatglm2 import ChatGLMCache, ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm2.generation_chatglm import (
    CACHE_BLOCK,
    CACHE_NAME,
    RUNNING,
    AnswerDecoder,
    StopOnEvent,
    find_end,
)

GENERATION = json.loads((TINY / "generation.json").read_text("utf-8"))
SINGLE = torch.tensor(GENERATION["single"]["input_ids"])
CHAT_FOLDER = TINY.parent / "chat"
CHAT = json.loads((CHAT_FOLDER / "chat_golden.json").read_text("utf-8"))
GREEDY = {"do_sample": False}
CACHES = pytest.mark.parametrize("cache_class", [ChatGLMCache, DynamicCache])


@pytest.fixture(scope="module")
def model():
    return create_model()


@pytest.fixture(scope="module")
def golden_chat(official_tokenizer):
    """The golden chat model: random weights with the official vocabulary."""
    model = ChatGLMForConditionalGeneration(ChatGLMConfig.from_pretrained(CHAT_FOLDER))
    state = load_file(CHAT_FOLDER / "model_fp16.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items() if "inv_freq" not in k})
    return Chat(model.float().eval(), official_tokenizer)


@pytest.fixture
def tiny_chat(tiny_model, tiny_tokenizer):
    return Chat(tiny_model, tiny_tokenizer)


class Chat:
    """A model with its tokenizer; greedy."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def answer(self, query, history=(), **settings):
        return self.model.chat(self.tokenizer, query, history, **GREEDY | settings)

    def steps(self, query, history=(), cache=None, **settings):
        """Return the generator of (answer so far, history, cache)."""
        settings = {**GREEDY, "return_past_key_values": True, **settings}
        return self.model.stream_chat(self.tokenizer, query, history, cache, **settings)

    def stream(self, *args, max_length=64, **settings):
        """Return the last (answer, history, cache), and set `num_fed`, the ids computed."""
        with counting(self.model) as lengths:
            *_, last = self.steps(*args, max_length=max_length, **settings)
        self.num_fed = sum(lengths)
        return last

    def encode(self, query, history=()):
        return self.tokenizer.encode(self.tokenizer.build_prompt(query, history))

    def encode_text(self, text):
        return self.tokenizer.encode("\n" + text, add_special_tokens=False)[2:]


@contextmanager
def counting(model):
    """Yield a list that gets the number of ids in each step of the model."""
    lengths = []
    hook = model.transformer.register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    try:
        yield lengths
    finally:
        hook.remove()


def as_lists(history):
    return [list(turn) for turn in history]


# generate


def check(model, name, given=None, **settings):
    """Generate from the input of one golden case; the result must be the output of another."""
    case = GENERATION[given or name]
    names = {"input_ids", "attention_mask", "position_ids"} & case.keys()
    golden = GENERATION[name]["output_ids"]
    settings = {"max_length": len(golden[0]), "eos_token_id": None, **settings}
    generated = model.generate(**{key: torch.tensor(case[key]) for key in names}, **settings)
    assert generated.tolist() == golden


@pytest.mark.parametrize("name", ["single", "short", "one", "left_padded_batch"])
def test_greedy_generation(model, name):
    for cache in (ChatGLMCache(), DynamicCache()):
        check(model, name, past_key_values=cache)
    if name == "single":
        cache = StaticCache(config=model.config, max_cache_len=64)
        check(model, name, past_key_values=cache)
        check(model, name, prompt_lookup_num_tokens=3)


@CACHES
@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_left_padded_prompts_in_chunks(model, cache_class, chunk_size):
    """The first row begins with padding, which can be several chunks."""
    case = GENERATION["left_padded_batch"]
    names = "input_ids", "attention_mask", "position_ids"
    inputs = {name: torch.tensor(case[name]).flip(0) for name in names}
    assert inputs["attention_mask"][0, :8].sum() == 0
    settings = {"max_length": len(case["output_ids"][0]), "eos_token_id": None}
    settings |= {"prefill_chunk_size": chunk_size, "past_key_values": cache_class()}
    assert model.generate(**inputs, **settings).flip(0).tolist() == case["output_ids"]


@pytest.mark.parametrize(
    ("checkpoint", "given", "expected"),
    [
        ({}, {}, ChatGLMCache),
        ({"use_cache": None}, {}, ChatGLMCache),
        ({"use_cache": False}, {}, type(None)),
        ({}, {"use_cache": False}, type(None)),
        ({}, {"cache_implementation": "dynamic"}, DynamicCache),
        ({"cache_implementation": "static"}, {}, StaticCache),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_config", [False, True])
def test_the_cache_that_generate_creates(checkpoint, given, expected, is_config):
    """A field that a `GenerationConfig` leaves out is the checkpoint's, else the default."""
    model = create_model()
    model.generation_config.update(**checkpoint)
    settings = {"max_length": 20, "return_dict_in_generate": True, **given}
    if is_config:
        settings = {"generation_config": GenerationConfig(**settings)}
    assert type(getattr(model.generate(SINGLE, **settings), CACHE_NAME)) is expected


def test_generate_takes_the_librarys_arguments_by_position(model):
    def force_7(input_ids, scores):
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([7]), 1e4)

    config, stop = GenerationConfig(max_new_tokens=3, eos_token_id=None), threading.Event()
    stop.set()
    for criteria, expected in (([], [7, 7, 7]), ([StopOnEvent(stop)], [7])):
        lists = LogitsProcessorList([force_7]), StoppingCriteriaList(criteria)
        generated = model.generate(SINGLE, config, *lists)
        assert generated[0, SINGLE.shape[1] :].tolist() == expected


def test_generation_ends_at_any_eos_and_pads_finished_rows(model):
    case = GENERATION["single_with_eos"]
    check(model, "single_with_eos", "single", max_length=41, eos_token_id=case["eos_token_id"])
    golden, eos = case["output_ids"][0], GENERATION["batch_with_eos"]["eos_token_id"]
    other = golden[SINGLE.shape[1] + 2]
    generated = model.generate(SINGLE, max_length=41, eos_token_id=[case["eos_token_id"], other])
    assert generated[0].tolist() == golden[: golden.index(other, SINGLE.shape[1]) + 1]
    check(model, "batch_with_eos", "left_padded_batch", eos_token_id=eos)


@CACHES
def test_beams_and_repetition_penalty(model, cache_class):
    # Without the length penalty: transformers 4.30.2 divided by prompt and answer, 5 by the answer.
    settings = {"length_penalty": 0.0, "eos_token_id": 2, "max_length": 29}
    check(model, "beam3", num_beams=3, past_key_values=cache_class(), **settings)
    beams = {"num_beams": 2, "past_key_values": cache_class()}
    check(model, "beam2_batch", "left_padded_batch", **beams)
    check(model, "repetition_penalty_1.5", "beam3", repetition_penalty=1.5)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@torch.no_grad()
def test_the_cache_has_two_names_and_no_warning(model, tiny_chat, name):
    expected, cache = GENERATION["single"]["output_ids"], ChatGLMCache()
    settings = {"max_length": len(expected[0]), "eos_token_id": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, "single", **{name: cache})
        assert cache.get_seq_length() == len(expected[0]) - 1
        *_, ids = model.stream_generate(SINGLE, **settings, **{name: ChatGLMCache()})
        assert ids.tolist() == expected
        cache = ChatGLMCache()
        model(IDS[:, :10], **{name: cache})
        outputs = model(IDS[:, 10:], past_key_values=cache, cache=cache)
        assert getattr(outputs, CACHE_NAME) is cache
        assert_close(outputs.logits, OUTPUTS["a.logits"][:, 10:])
        tiny_chat.answer("你好", max_new_tokens=2)
        _, history, cache = tiny_chat.stream("你好", max_new_tokens=2)
        tiny_chat.stream("你好", history, cache, max_new_tokens=2)
    for call in (model, model.base_model, model.generate):
        with pytest.raises(ValueError, match="give the cache once"):
            call(IDS, past_key_values=ChatGLMCache(), cache=ChatGLMCache())


def test_generation_in_training_with_checkpointing():
    """Nothing is computed again without a gradient, so the cache is used."""
    model = create_model().train()
    model.gradient_checkpointing_enable()
    with counting(model) as lengths:
        check(model, "single")
    assert lengths[0] == SINGLE.shape[1] and set(lengths[1:]) == {1}


def test_the_end_of_an_answer():
    assert find_end(10, 100) == 100
    assert find_end(10, 100, max_length=50) == 50
    assert find_end(10, 100, max_length=50, max_new_tokens=7) == 17
    assert find_end(10, 100, max_new_tokens=0) == 10
    assert find_end(200, 100, max_new_tokens=7) == 100


def test_stream_generate(model):
    steps = model.stream_generate(SINGLE, max_length=25, eos_token_id=None)
    golden = GENERATION["stream_generate_max_length_25"]["yielded"]
    assert [step[0].tolist() for step in steps] == golden
    for ids, cache in model.stream_generate(SINGLE, max_length=19, return_past_key_values=True):
        assert cache.get_seq_length() >= ids.shape[1] - 1
    assert cache.get_seq_length() == 18
    num_threads, cache = threading.active_count(), ChatGLMCache()
    steps = model.stream_generate(SINGLE, max_length=120, eos_token_id=None, past_key_values=cache)
    next(steps)
    steps.close()
    assert threading.active_count() == num_threads
    assert cache.get_seq_length() < 119
    with pytest.raises(ValueError, match="not_an_argument"):
        next(model.stream_generate(SINGLE, max_length=25, not_an_argument=1))


def test_streaming_leaves_nothing_to_do_at_the_end_of_the_program(model):
    with patch.object(atexit, "register") as register:
        steps = model.stream_generate(SINGLE, max_length=25, eos_token_id=None)
        next(steps)
        assert len(RUNNING) == 1
        steps.close()
    register.assert_not_called()
    assert not RUNNING


def test_stream_generate_computes_under_the_callers_autocast(model):
    dtypes = set()
    hook = model.transformer.encoder.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        list(model.stream_generate(IDS, max_length=19))
    hook.remove()
    assert dtypes == {torch.bfloat16}


# Sampling


def sample(model, method, **settings):
    """Return the candidates' probabilities in `chat` or `stream_chat`, and the likeliest id."""
    found, tokenizer = [], MagicMock(return_value=BatchEncoding({"input_ids": IDS}))
    tokenizer.__len__.return_value = model.config.padded_vocab_size
    tokenizer.encode.return_value, tokenizer.decode.return_value = IDS[0].tolist(), ""

    def multinomial(probabilities, num_samples):
        found.append(probabilities)
        return probabilities.argmax(-1, keepdim=True)

    with patch.object(torch, "multinomial", multinomial):
        list(getattr(model, method)(tokenizer, "x", max_new_tokens=1, **settings))
    return found[0], tokenizer.decode.call_args.args[0][-1]


@pytest.mark.parametrize("method", ["chat", "stream_chat"])
def test_sampling_from_the_golden_probabilities(method):
    """Temperature, top_k and top_p of the original, by default and as given; id 5 for NaN."""
    model = create_model()
    for golden, settings in (("chat_defaults", {}), ("top_p.8_t.95", {"temperature": 0.95})):
        probabilities, likeliest = sample(model, method, **settings)
        expected = OUTPUTS[f"e.warped_scores_{golden}"].softmax(-1)
        assert_close(probabilities[probabilities > 0], expected[expected > 0], 1e-5)
        assert likeliest == expected.argmax()
    torch.nn.init.constant_(model.transformer.output_layer.weight, float("nan"))
    assert sample(model, method)[1] == 5


def test_chat_samples_by_its_seed_and_temperature_0_is_greedy(tiny_chat):
    settings = {"do_sample": True, "temperature": 5.0, "top_p": 1.0, "max_length": 32}
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(tiny_chat.answer("abc", **settings))
    assert answers[0] == answers[1] != answers[2]
    torch.manual_seed(1)
    assert tiny_chat.stream("abc", **settings)[:2] == answers[0], "both sample alike"
    expected = tiny_chat.answer("abc", max_length=32)
    assert tiny_chat.answer("abc", **settings | {"temperature": 0}) == expected


# chat and stream_chat


def test_chat_rounds(golden_chat):
    history = []
    for case in CHAT["chat_rounds"]:
        given, max_length = as_lists(history), case["gen_kwargs"]["max_length"]
        response, new_history = golden_chat.answer(case["query"], given, max_length=max_length)
        assert response == case["response"]
        assert given == as_lists(history), "the given history is not changed"
        assert as_lists(new_history) == case["history_after"]
        history = new_history
    ids = torch.tensor(CHAT["batch"]["input_ids"])
    settings = {"attention_mask": (ids != 0).long(), "max_length": 18}
    assert golden_chat.model.generate(ids, **settings).tolist() == CHAT["batch"]["output_ids"]


def test_chat_and_stream_chat_end_at_eos_or_after_max_new_tokens(golden_chat):
    for name in ("stream_chat", "stream_chat_eos"):
        settings = {"max_length": CHAT[name].get("max_length", 64)}
        if name == "stream_chat_eos":
            settings["eos_token_id"] = CHAT[name]["eos_token_id"]
        steps = list(golden_chat.steps("你好", return_past_key_values=False, **settings))
        assert [[text, as_lists(history)] for text, history in steps] == CHAT[name]["yielded"]
        assert steps[-1] == golden_chat.answer("你好", **settings)
    assert steps[-1][0] == CHAT["chat_eos"]["response"]
    response, _ = golden_chat.answer("你好", max_new_tokens=5)
    assert response == CHAT["chat_max_new_tokens_5"]["response"]


def test_stream_chat_with_a_kept_cache_as_the_original(golden_chat):
    """The original's cache lacks the last generated id; without it, all yields are its."""
    history, cache = [], ChatGLMCache()
    for case in CHAT["stream_chat_past"]:
        cache.pending_ids = []
        settings = {"max_length": case["max_length"]}
        steps = list(golden_chat.steps(case["query"], history, cache, **settings))
        _, history, cache = steps[-1]
        assert [text for text, _, _ in steps] == case["responses"]
        assert as_lists(history) == case["history"]
        assert cache.get_seq_length() == case["past_len"]


def test_kept_cache_gives_the_same_answers_as_none(tiny_chat):
    history, kept, cache = [], [], None
    for query in ("你好", "What is the capital of France?", "讲个笑话", "thank you"):
        response, kept, cache = tiny_chat.stream(query, kept, cache, max_length=512)
        expected, history = tiny_chat.answer(query, history)
        assert response == expected
        assert cache.history == kept == history
        assert cache.get_seq_length() == len(cache.input_ids)
        assert cache.pending_ids == []


def test_cache_of_another_history_keeps_the_common_beginning(tiny_chat):
    _, _, cache = tiny_chat.stream("你好", max_length=512)
    other, prompt = [("你好", "不是它说的话。")], len(tiny_chat.encode("你好"))
    expected = tiny_chat.answer("谢谢", other)
    *result, cache = tiny_chat.stream("谢谢", other, cache, max_length=512)
    assert tuple(result) == expected
    assert tiny_chat.num_fed == len(cache.input_ids) - prompt
    # A cache of another kind is not used.
    foreign = DynamicCache()
    tiny_chat.model(torch.tensor([[5, 6, 7]]), past_key_values=foreign)
    *result, cache = tiny_chat.stream("谢谢", other, foreign, max_length=512)
    assert tuple(result) == expected and isinstance(cache, ChatGLMCache)


@pytest.mark.parametrize("is_closed", [False, True])
def test_history_and_cache_agree_after_a_cut_answer(tiny_chat, is_closed):
    """Cut by its length, or by the reader while `generate` is ahead of the answer yielded last."""
    prompt = tiny_chat.encode("讲个故事")
    steps = tiny_chat.steps("讲个故事", max_new_tokens=300 if is_closed else 4)
    *_, (response, history, cache) = itertools.islice(steps, 3 if is_closed else None)
    while is_closed and cache.get_seq_length() < len(prompt) + 20:
        time.sleep(0.01)
    steps.close()
    ids = cache.input_ids + cache.pending_ids
    assert ids[: len(prompt)] == prompt
    assert tiny_chat.tokenizer.decode(ids[len(prompt) :]) == response
    assert cache.get_seq_length() == len(cache.input_ids) == len(ids) - 1
    assert cache.history == history == [("讲个故事", response)]
    tiny_chat.stream("再见", history, cache, max_new_tokens=1)
    assert tiny_chat.num_fed <= 2 + len(tiny_chat.tokenizer.build_round("再见", history))
    assert cache.input_ids[: len(ids)] == ids


def test_failing_generation_leaves_a_usable_cache(tiny_chat):
    _, history, cache = tiny_chat.stream("你好", max_length=512)

    def fail(*args):
        raise RuntimeError("no memory")

    hook = tiny_chat.model.transformer.encoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        tiny_chat.stream("谢谢", history, cache)
    hook.remove()
    answer, _, _ = tiny_chat.stream("谢谢", history, cache, max_length=512)
    assert answer == tiny_chat.answer("谢谢", history)[0]


def test_no_partial_answer_ends_in_half_a_character(tiny_chat):
    """An emoji of four byte tokens is forced: nothing is yielded until it is whole."""
    emoji, prompt_length = tiny_chat.encode_text("🦭"), len(tiny_chat.encode("你好"))
    assert len(emoji) == 4, "no token of its own"

    def force(input_ids, scores):
        step = input_ids.shape[1] - prompt_length
        scores = torch.full_like(scores, -1e4)
        scores[:, [*emoji, *emoji, 2][step]] = 1e4
        return scores

    for length, expected in ((8, ["🦭", "🦭🦭"]), (6, ["🦭"]), (2, [])):
        settings = {"logits_processor": [force], "max_new_tokens": length}
        assert [text for text, _, _ in tiny_chat.steps("你好", **settings)] == expected
        assert tiny_chat.answer("你好", **settings)[0] == "".join(expected[-1:])


def test_further_arguments_of_generate(tiny_chat):
    processors, settings = LogitsProcessorList(), {"max_length": 256}
    answer, _ = tiny_chat.answer("你好", logits_processor=processors, **settings)
    assert len(processors) == 0, "the given list is not changed"
    stop = answer[5:7]
    response, _ = tiny_chat.answer("你好", stop_strings=[stop], **settings)
    assert stop in response and len(response) < len(answer)
    assert tiny_chat.stream("你好", prompt_lookup_num_tokens=3, **settings)[0] == answer


@pytest.mark.parametrize("held", [20, 149])
@torch.no_grad()
def test_generate_continues_with_a_kept_cache(tiny_chat, held):
    """Given all ids, or the new ones alone with the mask of all; with prompt lookup or without."""
    model = tiny_chat.model
    _, history = tiny_chat.answer("讲个故事")
    ids = torch.tensor([tiny_chat.encode("讲个故事", history)])
    settings = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)[0, -20:].tolist()
    cases = (ids, {}), (ids[:, held:], {}), (ids, {"prompt_lookup_num_tokens": 5})
    for cache_class, (given, lookup) in itertools.product((ChatGLMCache, DynamicCache), cases):
        cache = cache_class()
        model(ids[:, :held], past_key_values=cache)
        with counting(model) as lengths:
            sequences = model.generate(given, past_key_values=cache, **settings, **lookup)
        assert sequences[0, -20:].tolist() == expected
        assert lengths[0] == ids.shape[1] - held + (5 if lookup else 0)


def test_questions_that_are_refused(tiny_chat):
    length = len(tiny_chat.encode("你好"))
    room = rf"prompt has {length} tokens; max_length is {length} and the context 2048"
    for ask in (tiny_chat.answer, tiny_chat.stream):
        with pytest.raises(ValueError, match=room):
            ask("你好", max_length=length)
        with pytest.raises(ValueError, match="the context 2048"):
            ask("你好" * 1100, max_length=10**6)
        for history in ([{"role": "user", "content": "x"}], [("a", None)], ["ab"]):
            with pytest.raises(ValueError, match=r"is a list of \(question, answer\), not of"):
                ask("你好", history)
    response, _ = tiny_chat.answer("你好", max_length=length + 1)
    assert len(tiny_chat.encode_text(response)) <= 1


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


def test_answer_decoder_after_ids_without_text(any_tokenizer):
    """The space before a word stays, also behind a special token or an id that is none."""
    tokenizer, choose = any_tokenizer, random.Random(0).choice
    pieces = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    words = [i for i, piece in enumerate(pieces) if piece.startswith("▁")]
    without_text = [0, 2, tokenizer.get_command("sop"), tokenizer.vocab_size + 5]
    kinds = words, without_text, range(3, 259), range(tokenizer.vocab_size)
    for length in range(3000):
        ids = [choose(choose(kinds)) for _ in range(1 + length % 12)]
        decoder = AnswerDecoder(tokenizer)
        for end in range(1, len(ids) + 1):
            whole = tokenizer.decode(ids[:end])
            expected = None if whole.endswith("\ufffd") else whole
            assert decoder.decode(ids[:end]) == expected, ids


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


def test_kept_cache_and_new_ids_never_exceed_the_context(tiny_chat, monkeypatch):
    config = tiny_chat.model.config
    _, history, cache = tiny_chat.stream("你好", max_length=512)
    held, num_new = cache.get_seq_length(), len(tiny_chat.tokenizer.build_round("再见", history))
    monkeypatch.setattr(config, "seq_length", held + num_new + 3)
    assert len(list(tiny_chat.steps("再见", history, cache, eos_token_id=None))) <= 3
    assert cache.get_seq_length() <= config.seq_length
    monkeypatch.setattr(config, "seq_length", held + num_new)
    _, history, cache = tiny_chat.stream("你好", max_length=held + 1)
    before = list(cache.input_ids)
    message = f"{num_new} tokens after {held} of the conversation so far"
    with pytest.raises(ValueError, match=message):
        tiny_chat.stream("再见", history, cache, max_length=8192)
    assert cache.input_ids == before and cache.history == history, "nothing is lost"


def test_the_continuous_batching_of_transformers(tiny_checkpoint, tiny_chat):
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    prompts = [tiny_chat.encode(query) for query in ("你好", "天空为什么是蓝色的？" * 9)]
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = [
        model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in prompts
    ]
    sizes = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 128}
    plain = {"use_cuda_graph": False, "use_async_batching": False, "default_compile_level": 0}
    generation = GenerationConfig(**settings, eos_token_id=2, pad_token_id=0)
    batching = ContinuousBatchingConfig(**sizes, **plain)
    outputs = model.generate_batch(prompts, generation, batching, warmup=False)
    assert [outputs[key].generated_tokens for key in sorted(outputs)] == expected


def test_build_stream_inputs_follow_the_earlier_rounds(tiny_chat):
    model, tokenizer, history = tiny_chat.model, tiny_chat.tokenizer, [("你好", "你好！")]
    first, second = (
        model.build_stream_inputs(tokenizer, *arguments)["input_ids"][0].tolist()
        for arguments in (("你好",), ("再见", history))
    )
    answer = tokenizer.encode("\n你好！", add_special_tokens=False)[2:]
    whole = model.build_inputs(tokenizer, "再见", history)["input_ids"][0].tolist()
    assert first + answer + second == whole


def test_build_inputs_and_process_response(tiny_chat):
    history = [("你好", "你好！")]
    inputs = tiny_chat.model.build_inputs(tiny_chat.tokenizer, "再见", history)
    assert inputs["input_ids"].tolist() == [tiny_chat.encode("再见", history)]
    for text, expected in CHAT["process_response"].items():
        assert tiny_chat.model.process_response(text) == expected


# The cache


@torch.no_grad()
def test_cache_grows_in_blocks_and_is_written_in_place(model):
    cache = ChatGLMCache()
    model(IDS, past_key_values=cache)
    layer = cache.layers[0]
    assert layer.buffers[0].shape[2] == CACHE_BLOCK
    address = layer.buffers[0].data_ptr()
    model(IDS[:, :3], past_key_values=cache)
    assert layer.keys.data_ptr() == layer.buffers[0].data_ptr() == address
    key, before = torch.randn(1, 2, CACHE_BLOCK, 16), layer.keys.clone()
    keys, _ = cache.update(key, key, 0)
    assert layer.buffers[0].shape[2] == 2 * CACHE_BLOCK
    assert torch.equal(keys, torch.cat((before, key), dim=2))


@torch.no_grad()
def test_cropped_cache_continues_also_one_of_inference_mode(model):
    cache = ChatGLMCache()
    with torch.inference_mode():
        model(torch.cat((IDS[:, :10], IDS[:, 3:9]), dim=1), past_key_values=cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 10
    logits = model(IDS[:, 10:], past_key_values=cache).logits
    assert_close(logits, OUTPUTS["a.logits"][:, 10:])
    cache.crop(0)
    assert cache.get_seq_length() == 17
    cache.reset()
    assert all(layer.buffers is layer.keys is layer.values is None for layer in cache.layers)


@torch.no_grad()
def test_batch_operations_of_the_cache(model):
    cache, expected = ChatGLMCache(), DynamicCache()
    for past in (cache, expected):
        model(**padded_batch(), past_key_values=past)
        past.batch_repeat_interleave(2)
        past.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
        past.batch_select_indices(torch.tensor([0, 3]))
        past.update(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16), 0)
    assert torch.equal(cache.layers[0].keys, expected.layers[0].keys)
    assert torch.equal(cache.layers[1].values, expected.layers[1].values)
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_narrow_cache(model, dtype, implementation):
    narrow = create_model(attn_implementation=implementation)
    narrow.base_model.cache_dtype = dtype
    cache, wide = ChatGLMCache(), ChatGLMCache()
    tolerance = 1e-2 if dtype == torch.float16 else 0.1
    for chunk in IDS.split([5, 5, 1, 6], dim=1):
        logits = narrow(chunk, past_key_values=cache).logits
        expected = model(chunk, past_key_values=wide).logits
        assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
        assert_close(logits, expected, tolerance)
    copied = cache.copy_prefix(10)
    cache.crop(10 - IDS.shape[1])
    for past in (cache, copied):
        logits = narrow(IDS[:, 10:], past_key_values=past).logits
        assert_close(logits, OUTPUTS["a.logits"][:, 10:], tolerance)
        buffers = [buffer for layer in past.layers for buffer in layer.buffers]
        assert {(x.dtype, x.is_contiguous()) for x in buffers} == {(dtype, True)}


@CACHES
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_a_narrow_cache(model, cache_class, num_beams):
    narrow, cache = create_model(), cache_class()
    narrow.base_model.cache_dtype = torch.float16
    settings = {"max_new_tokens": 8, "eos_token_id": None, "num_beams": num_beams}
    expected = model.generate(SINGLE, **settings)
    found = narrow.generate(SINGLE, past_key_values=cache, **settings)
    assert found.tolist() == expected.tolist()
    assert cache.layers[0].keys.dtype == torch.float16


# PEFT


@pytest.mark.parametrize(
    "config_class", [PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig]
)
@pytest.mark.parametrize("multi_query", [True, False])
def test_prompt_learning_of_peft_trains_and_generates(config_class, multi_query):
    """Generated with a cache, the tokens are the likeliest of the whole sequence at once."""
    config = ChatGLMConfig.from_pretrained(TINY)
    config.multi_query_attention = multi_query
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(config, empty_init=False).float()
    peft_model = get_peft_model(model, config_class("CAUSAL_LM", num_virtual_tokens=4))
    batch = {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.ones(2, IDS.shape[1])}
    batch["attention_mask"][1, :3] = 0
    loss = peft_model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert any(weight.grad is not None for weight in peft_model.prompt_encoder.parameters())
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    sequences = peft_model.eval().generate(**batch, **settings)
    logits = peft_model(input_ids=sequences[:1, :-1]).logits[0, -4:]
    assert logits.argmax(-1).tolist() == sequences[0, -4:].tolist()
    beams = peft_model.generate(**batch, **settings, num_beams=2)
    assert beams.shape == sequences.shape
    plain = model.generate(**batch, **settings)
    assert plain.tolist() != sequences.tolist(), "what was trained has an effect"
