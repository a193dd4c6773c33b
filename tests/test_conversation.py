"""`conversation`: rounds, room for an answer, and a cache that agrees with them."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from chatglm2 import ChatGLMForConditionalGeneration
from chatglm2.chat.conversation import Conversation


def ask(conversation: Conversation, query: str, max_length=1000) -> str:
    for _ in conversation.stream(query, max_length, do_sample=False):
        pass
    return conversation.rounds[-1][1]


@pytest.fixture
def conversation(tiny_model, tiny_tokenizer):
    return Conversation(tiny_model, tiny_tokenizer)


def test_each_round_computes_only_its_own_ids(conversation):
    lengths = []
    hook = conversation.model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True
    )
    try:
        while len(conversation.rounds) < 10:
            lengths.clear()
            ask(conversation, "你好", max_length=2048)
            new_ids = len(conversation.tokenizer.build_round("你好", conversation.history[:-1]))
            assert lengths[0] <= new_ids + 3  # [gMASK] sop and the dummy space, or the last id
            assert set(lengths[1:]) <= {1}
    finally:
        hook.remove()
    assert conversation.first_round == 0


def test_a_closed_stream_leaves_what_was_yielded(conversation):
    whole = ask(conversation, "讲个故事")
    conversation.clear()
    answers = conversation.stream("讲个故事", do_sample=False)
    next(answers)
    partial = next(answers)
    answers.close()
    assert whole.startswith(partial) and len(partial) < len(whole)
    assert conversation.rounds == conversation.cache.history == [("讲个故事", partial)]
    assert conversation.was_cut  # its end was not generated


def test_taking_a_round_back(conversation):
    """The cache of three rounds serves the second one again, and the answer is the same."""
    answers = [ask(conversation, query) for query in ("你好", "讲个笑话", "再讲一个")]
    assert conversation.pop() == "再讲一个"
    assert conversation.pop() == "讲个笑话"
    history = conversation.history
    assert conversation.cache.continue_with(conversation.tokenizer, "讲个笑话", history)[1] > 20
    assert ask(conversation, "讲个笑话") == answers[1]
    assert [query for query, _ in conversation.rounds] == ["你好", "讲个笑话"]


def test_the_oldest_rounds_are_dropped_but_not_forgotten_by_the_page(conversation):
    for _ in range(8):
        ask(conversation, "你好", max_length=200)
        assert conversation.cache.get_seq_length() <= 200
    assert len(conversation.rounds) == 8
    assert 0 < conversation.first_round < 8
    assert conversation.history == conversation.cache.history
    while conversation.rounds:
        conversation.pop()
    assert conversation.first_round == 0
    assert ask(conversation, "你好") and len(conversation.history) == 1


def test_too_long_a_question_changes_nothing(conversation):
    ask(conversation, "你好")
    rounds, cache = list(conversation.rounds), conversation.cache
    with pytest.raises(ValueError, match=r"The question has .* tokens, at most 150 fit"):
        conversation.stream("很长" * 500, 200)
    assert (conversation.rounds, conversation.first_round) == (rounds, 0)
    assert conversation.cache is cache and cache.history == rounds


def test_a_cache_with_more_ids_than_its_text(conversation):
    ask(conversation, "你好")
    cache = conversation.cache
    cache.input_ids = cache.input_ids + [cache.input_ids[-1]] * 100  # as if spelt in bytes
    prompt = conversation.tokenizer.build_prompt("你好", conversation.history)
    assert conversation.fit("你好", 75) == (conversation.tokenizer.encode(prompt), 0)
    assert conversation.num_dropped == 0 and conversation.cache is not cache


@pytest.mark.parametrize("bits", [0, 4])
def test_prompt_lookup_changes_no_answer(tiny_checkpoint, tiny_tokenizer, bits):
    """Nor the cache, also if the stream is closed early; where an answer quotes, steps are less."""
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint).quantize(bits).float()
    conversations, steps = {}, Counter()
    model.transformer.register_forward_pre_hook(lambda *_: steps.update([lookup]))
    for lookup in (None, 5):
        conversation = conversations[lookup] = Conversation(model.eval(), tiny_tokenizer)
        settings = {"do_sample": False, "prompt_lookup_num_tokens": lookup}
        for query in ("讲个故事", "讲个故事", "你好"):
            for answer in conversation.stream(query, 2048, **settings):
                if query == "你好" and len(answer) > 5:
                    break
    plain, other = conversations.values()
    assert plain.rounds[:2] == other.rounds[:2] and plain.rounds[0][1] == plain.rounds[1][1]
    assert steps[5] < 0.8 * steps[None]
    held = other.cache.get_seq_length()
    assert other.cache.history == other.rounds and len(other.cache.input_ids) == held
    ids, _ = other.cache.continue_with(tiny_tokenizer, "谢谢", other.history)
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30)
    settings = {"do_sample": False, "prompt_lookup_num_tokens": 5, "max_new_tokens": 30}
    *_, answer = other.stream("谢谢", **settings)
    assert answer == tiny_tokenizer.decode(expected[0, len(ids) :].tolist())


class CharTokenizer:
    """One id for each character."""

    def build_prompt(self, query, history):
        return "".join(f"{q}{a}" for q, a in history) + query

    def encode(self, text):
        return [ord(character) for character in text]


class Recorder:
    """A model that answers nothing and keeps the arguments of `stream_chat`."""

    config = SimpleNamespace(seq_length=132)

    def stream_chat(self, tokenizer, query, history, **settings):
        self.history, self.settings = history, settings
        yield from ()


@pytest.mark.parametrize(
    ("max_length", "num_kept"), [(1000, 6), (132, 6), (131, 6), (53, 2), (26, 0), (13, 0)]
)
def test_the_oldest_rounds_make_room(max_length, num_kept):
    """A quarter of the limit is for the answer; a history that is cut gets half of the limit."""
    conversation = Conversation(model := Recorder(), CharTokenizer())
    conversation.rounds = rounds = [(f"{i}" * 5, "a" * 5) for i in range(9)]
    list(conversation.stream("x" * 10, max_length))
    ids, num_computed = model.settings["prompt"]
    assert (len(ids), num_computed) == (10 + 10 * num_kept, 0)
    assert model.history == rounds[9 - num_kept :] == conversation.history
    assert model.settings["max_length"] == min(max_length, 132)
    assert conversation.num_dropped == conversation.first_round == 9 - num_kept
    assert len(conversation.rounds) == 9  # the page still shows them
    list(conversation.stream("x" * 10, max_length))
    assert conversation.num_dropped == 0
