"""The bundled checkpoint against its bars on a sample; `check.py` asks all questions."""

import random

import pytest
from check import BARS, measure
from data import LANGUAGES, Dialogues


@pytest.mark.parametrize("language", LANGUAGES)
def test_bars_on_a_sample(language, tiny_model, tiny_tokenizer):
    data, rng = Dialogues(language), random.Random(0)
    for intent in data.intents:
        intent.questions = intent.questions[:1]
    data.intents = rng.sample(data.intents, 60)
    data.rewordings = rng.sample(data.rewordings, 60)
    data.held_out_others = rng.sample(data.held_out_others, 40)
    figures, wrong = measure(tiny_model, tiny_tokenizer, data)
    assert figures["learnt"] >= BARS["learnt"] - 0.03
    assert figures["reworded"] >= BARS["reworded"] - 0.1
    assert figures["other"] >= BARS["other"] - 0.08
    assert figures["mistaken"] < BARS["mistaken"]
    assert figures["ended"] >= 0.99
    num_wrong = round((1 - figures["reworded"]) * 60 + (1 - figures["other"]) * 40)
    assert sum(not line.startswith("learnt") for line in wrong) == num_wrong


def test_size():
    from conftest import ROOT

    folder = ROOT / "resources" / "chatglm2-tiny"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
