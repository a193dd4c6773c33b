"""The dialogues: a question has one answer, and no held-out question is learnt."""

import random
import re
from itertools import pairwise

import pytest
from data import (
    BEFORE,
    DEMONSTRATION,
    LANGUAGES,
    Dialogues,
    contains,
    fits,
    full_width,
    load_yaml,
    normalize,
)


@pytest.fixture(scope="module", params=LANGUAGES)
def dialogues(request):
    return Dialogues(request.param)


def test_a_question_has_one_answer(dialogues):
    seen = {}
    for intent in dialogues.intents:
        for question in intent.questions:
            assert seen.setdefault(normalize(question), intent.answer) == intent.answer, question
    answers = {intent.answer for intent in dialogues.intents}
    assert DEMONSTRATION[dialogues.language] not in answers
    assert answers.issuperset(answer for _, answer in dialogues.rewordings)
    assert all(question not in seen for question in map(normalize, dialogues.other_questions))


@pytest.mark.slow
def test_held_out_questions_share_nothing_with_training(dialogues):
    learnt = {normalize(q) for intent in dialogues.intents for q in intent.questions}
    others = {normalize(question) for question in dialogues.other_questions}
    held_out = [question for question, _ in dialogues.rewordings] + dialogues.held_out_others
    assert len(dialogues.held_out_others) == 100
    assert len(dialogues.rewordings) >= 2 * 160
    rng = random.Random(0)
    varied = {normalize(dialogues.vary("你好 hi", rng)) for _ in range(2000)}
    befores = len({normalize(b) for b in ["", *BEFORE[dialogues.language]]})
    assert len(varied) >= befores, "vary is what all_variations enumerates"
    reachable = dialogues.all_variations()
    assert not any(normalize(question) in reachable for question, _ in dialogues.rewordings)
    for question in map(normalize, held_out):
        assert question not in learnt | others
    for question in dialogues.held_out_others:
        assert not any(fits(template, question) for template in dialogues.templates), question
        assert not any(contains(question, w) for words in dialogues.words.values() for w in words)


def test_templates_and_words_are_found_in_questions():
    assert fits("How far is it from {city} to {city}?", "how far is it from Rome to the moon")
    assert not fits("How far is it from {city} to {city}?", "How far is Rome?")
    assert fits("{event}发生在哪一年？", "玄武门之变发生在哪一年") and not fits(
        "{n} * {n}", "2 * 3"
    )
    assert contains("天气在北京好吗", "北京") and contains("Is Rome old?", "rome")
    assert not contains("Is romance old?", "Rome")


def test_templates_are_filled(dialogues):
    rng = random.Random(0)
    assert len({dialogues.other_question(rng) for _ in range(300)}) > 280
    names = set(re.findall(r"\{(\w+)\}", "".join(dialogues.templates)))
    assert names - {"n"} == set(load_yaml(f"offtopic_{dialogues.language}.yaml")["words"])


def test_conversations_are_random_but_repeatable(dialogues):
    first, again, other = (dialogues.conversation(5, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 5


def test_a_follow_up_comes_right_after_its_question(dialogues):
    leads = {f.answer: intent.answer for intent in dialogues.intents for f in intent.follow_ups}
    rng, found = random.Random(3), 0
    for _ in range(300):
        conversation = dialogues.conversation(4, rng)
        for (_, previous), (_, answer) in pairwise(conversation):
            if answer in leads:
                found += 1
                assert previous == leads[answer]
    assert found > 5


def test_chinese_punctuation():
    assert full_width("好的, 你呢? 走吧.") == "好的，你呢？走吧。"
    assert full_width("GPT-3.5 很大.") == "GPT-3.5 很大。"
