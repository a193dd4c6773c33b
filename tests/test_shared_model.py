"""`shared_model`: answers at the same time, rounds and system texts in prompts, sliders."""

import asyncio
import time
from contextlib import aclosing

import pytest
from page_models import ScriptedBatcher

from chatglm2 import CHAT_DEFAULTS
from chatglm2.chat import shared_model
from chatglm2.chat.conversation import Conversation
from chatglm2.chat.shared_model import Chat, SharedModel, sampling_sliders


@pytest.fixture
def shared(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(shared_model, "Batcher", ScriptedBatcher)
    ScriptedBatcher.requests.clear()
    shared = SharedModel(tiny_model, tiny_tokenizer)
    yield shared
    shared.batcher.end()


def ask(shared, chat, query="你好", max_length=500, **sampling) -> Chat:
    async def run():
        async for _ in shared.answer(chat, query, max_length, **sampling):
            pass

    asyncio.run(run())
    return chat


# Answers.


def test_an_answer(shared):
    async def run():
        chat = Chat()
        steps = shared.answer(chat, "你好", 500, top_p=0.5)
        await anext(steps)
        assert (chat.query, chat.rounds) == ("你好", [])
        texts = [chat.rounds[0][1] async for _ in steps if chat.rounds]
        assert texts == sorted(texts, key=len)
        return chat

    chat = asyncio.run(run())
    [(query, answer, remark)] = chat.rounds
    assert (query, chat.query, chat.notices) == ("你好", "", [])
    assert "ChatGLM2-tiny" in answer and " tokens · " in remark
    assert ScriptedBatcher.requests[0]["top_p"] == 0.5


def test_the_answers_are_those_of_chat(shared):
    """With temperature 0, also in later rounds and from a kept cache."""
    chat, history = Chat(), []
    for query in ("晚上睡不着应该怎么办", "你好", "What is the capital of France?"):
        ask(shared, chat, query, temperature=0)
        expected, history = shared.model.chat(shared.tokenizer, query, history, temperature=0)
        assert chat.rounds[-1][:2] == [query, expected]
    assert shared.batcher.kept


def test_a_system_text_stands_before_the_first_question(shared):
    chat = Chat(system="Be brief.")
    ask(shared, chat)
    ask(shared, chat)
    prompts = [request["prompt"] for request in ScriptedBatcher.requests]
    assert all(prompt.startswith("[Round 1]\n\n问：Be brief.\n\n你好") for prompt in prompts)
    assert all(prompt.count("Be brief.") == 1 for prompt in prompts)


def test_steps_are_not_too_many(shared):
    """A page that draws each of a hundred tokens a second would have no time to compute them."""

    async def run():
        return [None async for _ in shared.answer(Chat(), "晚上睡不着应该怎么办", 500)]

    start = time.monotonic()
    assert 2 < len(asyncio.run(run())) <= 3 + (time.monotonic() - start) / 0.05


@pytest.mark.parametrize("is_closed", [True, False])
def test_stopping_keeps_what_was_answered(shared, is_closed):
    chat = Chat()

    async def run():
        async with aclosing(shared.answer(chat, "讲个故事", 500)) as steps:
            async for _ in steps:
                if chat.rounds and len(chat.rounds[0][1]) > 3:
                    if is_closed:
                        return
                    chat.is_stopped = True

    asyncio.run(run())
    [(query, answer, _)] = chat.rounds
    assert query == "讲个故事" and 3 < len(answer) < 30 and chat.notice == Conversation.STOPPED
    ask(shared, chat)
    assert len(chat.rounds) == 2 and chat.notices == []
    assert shared.batcher.running == []


def test_answers_at_the_same_time_and_waiting(shared):
    """The batch has two places: the third question waits, and can be stopped meanwhile."""
    shared.batcher.max_batch = 2
    chats = [Chat() for _ in range(4)]
    notices = [set() for _ in chats]

    async def run(i):
        await asyncio.sleep(0.2 * i)  # one after the other
        async for _ in shared.answer(chats[i], "讲个故事", 500):
            notices[i].add(chats[i].notice)
            if i == 3 and chats[i].notice:
                chats[0].is_stopped = chats[3].is_stopped = True
            chats[i].is_stopped |= bool(chats[2].rounds)

    async def run_all():
        await asyncio.gather(*map(run, range(4)))

    asyncio.run(run_all())
    assert all(chat.rounds for chat in chats[:3]) and notices[:2] == [{""}, {""}]
    assert "排队中，前面还有 1 个问题 / waiting: 1 question comes first" in notices[2]
    assert "排队中，前面还有 2 个问题 / waiting: 2 questions come first" in notices[3]
    assert (chats[3].query, chats[3].notice) == ("讲个故事", Conversation.STOPPED)


def test_failures_become_notices(shared, caplog):
    chat = ask(shared, Chat(), "fail")
    assert "no memory" in chat.notice and chat.query == "fail"
    assert "Traceback" in caplog.text  # for who runs the server
    caplog.clear()
    ask(shared, chat, "很长" * 500)
    assert "at most 375 fit" in chat.notice and caplog.text == ""
    ask(shared, chat, "silent")
    assert "no answer" in chat.notice and chat.rounds == []
    shared.batcher.max_batch = shared.batcher.max_queue = 0
    ask(shared, chat)
    assert "try again later" in chat.notice and chat.query == "你好"
    shared.batcher.max_batch = 1
    ask(shared, chat)
    assert chat.notice == "" and chat.rounds[-1][0] == "你好"


def test_an_answer_that_is_cut_and_rounds_that_are_dropped(shared):
    chat = ask(shared, Chat(), "晚上睡不着应该怎么办", 64)
    assert "已截断" in chat.notices[0]
    for _ in range(3):
        ask(shared, chat, max_length=100)
    assert 0 < chat.first_round < 4 and len(chat.rounds) == 4
    assert len(chat.notices) == 1 and f"最早的 {chat.first_round} 轮" in chat.notices[0]
    assert len(ScriptedBatcher.requests[-1]["input_ids"]) <= 75


def test_cut():
    chat = Chat(rounds=[["a", "1", ""], ["b", "2", ""], ["c", "3", ""]], first_round=1)
    assert chat.cut(-1) == "c" and chat.first_round == 1
    assert chat.cut(1) == "b" and [query for query, *_ in chat.rounds] == ["a"]
    assert chat.first_round == 0
    assert chat.cut(-1) == "a" and chat.cut(-1) == "" and chat.rounds == []


# Pages with threads.


# What the pages say.


def test_sliders(shared):
    sliders = sampling_sliders(shared.model)
    limits = {"max_length": shared.model.config.seq_length}
    for name, slider in sliders.items():
        assert slider["value"] == min(CHAT_DEFAULTS[name], limits.get(name, 1))
        assert slider["minimum"] < slider["value"] <= slider["maximum"]
