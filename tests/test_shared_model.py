"""`shared_model`: answers in turn, caches of the latest chats, sliders."""

import gc
import time

import pytest
from page_models import SlowModel

from chatglm2 import CHAT_DEFAULTS
from chatglm2.chat.shared_model import MAX_CACHES, SharedModel, sampling_sliders


@pytest.fixture
def shared(tiny_model, tiny_tokenizer):
    return SharedModel(SlowModel(tiny_model), tiny_tokenizer)


def ask(shared, chat, query="你好", max_length=500):
    for _ in shared.answer(chat, query, max_length):
        pass


# Answers.


def test_an_answer(shared):
    chat = shared.start_chat()
    steps = shared.answer(chat, "你好", 500, top_p=0.5)
    next(steps)
    assert (chat.query, chat.rounds, len(shared.queue)) == ("你好", [], 1)
    next(steps)
    assert chat.query == "" and chat.rounds[0][0] == "你好"
    list(steps)
    assert "ChatGLM2-tiny" in chat.rounds[0][1]
    assert (chat.notices, shared.queue) == ([], [])
    assert shared.model.calls[0]["top_p"] == 0.5


def test_steps_are_not_too_many(shared):
    """A page that draws each of a hundred tokens a second would have no time to compute them."""
    chat = shared.start_chat()
    start = time.monotonic()
    num_steps = sum(1 for _ in shared.answer(chat, "晚上睡不着应该怎么办", 500))
    assert num_steps <= 3 + (time.monotonic() - start) / 0.05


@pytest.mark.parametrize("is_closed", [True, False])
def test_stopping_keeps_what_was_answered(shared, is_closed):
    chat = shared.start_chat()
    steps = shared.answer(chat, "讲个故事", 500)
    for _ in range(4):
        next(steps)
    answer = chat.rounds[-1][1]
    if is_closed:
        steps.close()
    else:
        chat.is_stopped = True
        assert list(steps) == []
    assert chat.rounds[0][1].startswith(answer) and len(chat.rounds[0][1]) <= len(answer) + 5
    assert chat.cache.history == chat.rounds and "已停止" in chat.notices[0]
    assert shared.queue == []
    ask(shared, chat)
    assert len(chat.rounds) == 2 and chat.notices == []


def test_first_come_first_served(shared):
    chats = [shared.start_chat() for _ in range(4)]
    first, second, third, fourth = (shared.answer(chat, "你好", 500) for chat in chats)
    for steps in (first, second, third, fourth):
        next(steps)
    assert "前面还有 1 个问题" in chats[1].notice and "1 question comes" in chats[1].notice
    assert "前面还有 2 个问题" in chats[2].notice and "2 questions come" in chats[2].notice
    chats[3].is_stopped = True  # while it waits
    assert list(fourth) == [] and len(shared.queue) == 3
    assert (chats[3].query, chats[3].notice, chats[3].rounds) == ("你好", chats[3].STOPPED, [])
    first.close()
    next(third)
    assert "前面还有 1 个问题" in chats[2].notice and chats[2].rounds == []
    assert list(second) and chats[1].rounds
    assert list(third) and chats[2].rounds and chats[2].notice == ""


def test_failures_become_notices(shared, caplog):
    chat = shared.start_chat()
    ask(shared, chat, "fail")
    assert "no memory" in chat.notice and chat.query == "fail" and shared.queue == []
    assert "Traceback" in caplog.text  # for who runs the server
    caplog.clear()
    ask(shared, chat, "很长" * 500)
    assert "at most 375 fit" in chat.notice and caplog.text == ""
    ask(shared, chat, "silent")
    assert "no answer" in chat.notice and chat.rounds == []
    ask(shared, chat)
    assert chat.notice == "" and chat.rounds[-1][0] == "你好"


def test_an_answer_that_is_cut_and_rounds_that_are_dropped(shared):
    chat = shared.start_chat()
    ask(shared, chat, "晚上睡不着应该怎么办", 64)
    assert "已截断" in chat.notices[0]
    for _ in range(3):
        ask(shared, chat, max_length=100)
    assert len(chat.notices) == 1 and f"最早的 {chat.first_round} 轮" in chat.notices[0]
    chat.clear()
    assert chat.notices == []


# Caches.


def find_cached(chats) -> set[int]:
    return {i for i, chat in enumerate(chats) if chat.cache.get_seq_length()}


def test_the_latest_caches_are_kept(shared):
    chats = [shared.start_chat() for _ in range(MAX_CACHES + 2)]
    for chat in chats:
        ask(shared, chat)
    assert find_cached(chats) == {2, 3, 4, 5}
    ask(shared, chats[2])
    ask(shared, chats[0])  # its history is computed anew, in place of the cache used longest ago
    assert find_cached(chats) == {0, 2, 4, 5}
    chats[4].leave()
    ask(shared, chats[1])  # in place of the freed one
    assert find_cached(chats) == {0, 1, 2, 5}
    assert [len(chat.rounds) for chat in chats[:3]] == [2, 2, 2]


def test_a_chat_is_freed_with_its_session(shared):
    ask(shared, shared.start_chat())
    gc.collect()
    assert shared.recent[0]() is None


# What the pages say.


def test_sliders(shared):
    sliders = sampling_sliders(shared.model)
    limits = {"max_length": shared.model.config.seq_length}
    for name, slider in sliders.items():
        assert slider["value"] == min(CHAT_DEFAULTS[name], limits.get(name, 1))
        assert slider["minimum"] < slider["value"] <= slider["maximum"]
