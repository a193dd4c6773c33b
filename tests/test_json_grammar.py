"""`serving/json_grammar.py`: answers follow the JSON schema, whatever the model prefers."""

import json

import pytest
import torch
from jsonschema import validate
from transformers import LogitsProcessorList

from chatglm2.serving.json_grammar import JsonGrammar, read_bytes


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
    for seed in range(6):
        torch.manual_seed(seed)
        processors = LogitsProcessorList([grammar.compile(PERSON, length)])
        ids = tiny_model.generate(**inputs, **settings, logits_processor=processors)[0, length:]
        assert ids[-1] == tiny_tokenizer.eos_token_id
        validate(json.loads(tiny_tokenizer.decode(ids)), PERSON)


@pytest.mark.parametrize("text", ['{"名": "你好👋", "n": [1, -2.5e3, true, null]}', "{}"])
def test_any_json_object_can_be_written(any_tokenizer, text):
    _, first, *ids = any_tokenizer.encode("\n" + text, add_special_tokens=False)
    assert any_tokenizer.decode([first]) == "\n"
    processor = JsonGrammar(any_tokenizer, 65024).compile({"type": "object"}, 3)
    scores = torch.zeros(1, 65024)
    for i, token_id in enumerate([*ids, any_tokenizer.eos_token_id]):
        allowed = processor(torch.tensor([[9, 9, 9, *ids[:i]]]), scores)[0]
        assert allowed[token_id] == 0, text[:i]
        assert not torch.isfinite(allowed[any_tokenizer.vocab_size :]).any()
    assert allowed.isfinite().nonzero().flatten().tolist() == [any_tokenizer.eos_token_id]


def test_a_schema_that_is_too_large_fails_and_does_not_end_the_answer(grammar, tiny_tokenizer):
    schema = {"type": "object", "properties": {str(i): {"type": "string"} for i in range(3000)}}
    processor, scores = grammar.compile(schema, 0), torch.zeros(1, 4096)
    allowed = processor(torch.zeros(1, 0, dtype=torch.long), scores)[0].isfinite().nonzero()
    assert all(tiny_tokenizer.decode(i).startswith("{") for i in allowed)  # only JSON is allowed
    with pytest.raises(ValueError, match="items; max is"):
        processor(allowed[:1], scores)


def test_the_bytes_of_tokens_make_the_text(any_tokenizer):
    text = "你好👋, the 世界\t  𠮷\n{}"
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    ids += [any_tokenizer.eos_token_id, *any_tokenizer.get_prefix_tokens(), 10**6]  # no text
    assert b"".join(read_bytes(any_tokenizer, i) for i in ids).decode().lstrip(" ") == text


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "person"}, "Invalid type: person"),
        ({"type": "string", "pattern": "a(b"}, r"regex parse error: a\(b error: unclosed group$"),
        ({"$ref": "http://127.0.0.1/schema"}, "does not fetch"),
        ({"not": {}}, "not"),
    ],
)
def test_unsupported_schemas_are_refused(grammar, schema, message):
    with pytest.raises(ValueError, match=message):
        grammar.compile(schema, 0)
