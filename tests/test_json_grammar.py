"""`serving/json_grammar.py`: answers follow the JSON schema, whatever the model prefers."""

import asyncio
import json
import threading

import pytest
import torch
from jsonschema import validate
from transformers import LogitsProcessorList

from chatglm2.serving import json_grammar
from chatglm2.serving.batching import InvalidRequest, Unavailable
from chatglm2.serving.json_grammar import JsonGrammar, JsonProcessor, read_bytes


def make_object(**properties) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


PERSON = make_object(
    name={"type": "string", "maxLength": 8},
    age={"type": "integer", "minimum": 0, "maximum": 150},
    tags={"type": "array", "items": {"enum": ["红", "green"]}, "maxItems": 3},
    home={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
)
PERSON["$defs"] = {"place": make_object(zip={"type": "string", "pattern": "^[0-9]{5}$"})}


@pytest.fixture(scope="module")
def grammar(tiny_model, tiny_tokenizer):
    return JsonGrammar(tiny_tokenizer, tiny_model.config.padded_vocab_size)


def test_answers_are_json_of_the_schema(grammar, tiny_model, tiny_tokenizer):
    inputs = tiny_tokenizer([tiny_tokenizer.build_prompt("你好")], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    settings = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 300}
    matcher = grammar.compile(json.dumps(PERSON))
    for seed in range(6):
        torch.manual_seed(seed)
        processors = LogitsProcessorList([JsonProcessor(matcher, length)])
        ids = tiny_model.generate(**inputs, **settings, logits_processor=processors)[0, length:]
        assert ids[-1] == tiny_tokenizer.eos_token_id
        validate(json.loads(tiny_tokenizer.decode(ids)), PERSON)


@pytest.mark.parametrize("text", ['{"名": "你好👋", "n": [1, -2.5e3, true, null]}', "{}"])
def test_any_json_object_can_be_written(any_tokenizer, text):
    _, first, *ids = any_tokenizer.encode("\n" + text, add_special_tokens=False)
    assert any_tokenizer.decode([first]) == "\n"
    matcher = JsonGrammar(any_tokenizer, 65024).compile('{"type": "object"}')
    processor = JsonProcessor(matcher, 3)
    scores = torch.zeros(1, 65024)
    for i, token_id in enumerate([*ids, any_tokenizer.eos_token_id]):
        allowed = processor(torch.tensor([[9, 9, 9, *ids[:i]]]), scores)[0]
        assert allowed[token_id] == 0, text[:i]
        assert not torch.isfinite(allowed[any_tokenizer.vocab_size :]).any()
    assert allowed.isfinite().nonzero().flatten().tolist() == [any_tokenizer.eos_token_id]


def make_branches(count: int) -> dict:
    return {"anyOf": [{"type": "string", "minLength": i, "maxLength": 2 * i} for i in range(count)]}


def test_a_schema_that_turns_out_to_be_too_large_fails_and_does_not_end_the_answer(grammar):
    schema = {"type": "array", "items": {"type": "array", "items": make_branches(900)}}
    matcher, scores = grammar.compile(json.dumps(schema)), torch.zeros(1, 4096)
    processor = JsonProcessor(matcher, 0)
    ids = grammar.tokenizer.tokenize_str('[["')
    with pytest.raises(InvalidRequest, match=r"^response_format: .*too many expressions"):
        for i in range(4):
            processor(torch.tensor([ids[:i]], dtype=torch.long), scores)


def test_the_character_that_stands_for_a_space_in_tokens(any_tokenizer):
    """An answer has U+2581 as three tokens of bytes."""
    schema = make_object(**{"a▁b": {"enum": ["▁", "x▁▁ y"]}})
    matcher = JsonGrammar(any_tokenizer, 65024).compile(json.dumps(schema))
    processor, ids = JsonProcessor(matcher, 0), []
    while True:
        scores = processor(torch.tensor([ids], dtype=torch.long), torch.zeros(1, 65024))[0]
        allowed = scores.isfinite().nonzero().flatten().tolist()
        if allowed == [any_tokenizer.eos_token_id]:
            break
        ids.append(allowed[-1])
    text = any_tokenizer.decode(ids)
    validate(json.loads(text), schema)
    assert "a▁b" in text


def test_one_slow_token_ends_an_answer_with_the_reason(grammar, monkeypatch):
    monkeypatch.setattr(json_grammar, "STEP_TIMEOUT_S", 0.05)
    processor, end = JsonProcessor(grammar.compile("{}"), 0), threading.Event()
    processor.thread.submit(end.wait, 60)
    with pytest.raises(InvalidRequest, match="simplify the schema"):
        processor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 4096))
    end.set()


def test_compiling_is_limited_in_time_and_its_result_is_kept(grammar, monkeypatch):
    def compile(schema: dict):
        return asyncio.run(grammar.compile_in_time(schema))

    assert compile(PERSON) is compile(PERSON)
    monkeypatch.setattr(json_grammar, "COMPILE_TIMEOUT_S", 0.05)
    end = threading.Event()
    monkeypatch.setattr(grammar, "compile_once", lambda text: end.wait(60))
    with pytest.raises(InvalidRequest, match=r"takes more than 0\.05 s"):
        compile({})
    with pytest.raises(Unavailable):  # the first one still runs
        compile({})
    end.set()


def test_the_bytes_of_tokens_make_the_text(any_tokenizer):
    text = "你好👋, the 世界\t  𠮷\n{}"
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    ids += [any_tokenizer.eos_token_id, *any_tokenizer.get_prefix_tokens(), 10**6]  # no text
    assert b"".join(read_bytes(any_tokenizer, i) for i in ids).decode().lstrip(" ") == text


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "person"}, "Invalid type: person"),
        ({"type": "string", "pattern": "a(b"}, r"regex parse error: a\(b error: unclosed group\.$"),
        ({"$ref": "http://127.0.0.1/schema"}, "does not fetch"),
        ({"not": {}}, "not"),
        (make_branches(500), "too many expressions"),
        ({"type": "object", "properties": {str(i): {} for i in range(700)}}, "items; max is"),
        ({"enum": [f"value {i}" for i in range(50_000)]}, "too big"),
        ({"type": "integer", "multipleOf": 999_999_937}, "fuel"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "NoExtension"),
    ],
)
def test_unsupported_schemas_are_refused(grammar, schema, message):
    with pytest.raises(InvalidRequest, match=message):
        grammar.compile(json.dumps(schema))
