"""`serving/json_grammar.py`: answers follow the JSON schema, whatever the model prefers."""

import json

import pytest
import torch
from jsonschema import validate
from transformers import LogitsProcessorList

from chatglm2.serving.json_grammar import JsonGrammar, read_bytes

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["红", "green"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture(scope="module")
def grammar(tiny_model, tiny_tokenizer):
    return JsonGrammar(tiny_tokenizer, tiny_model.config.padded_vocab_size)


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_json_of_the_schema(grammar, tiny_model, tiny_tokenizer, seed):
    torch.manual_seed(seed)
    inputs = tiny_tokenizer([tiny_tokenizer.build_prompt("你好")], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    processor = grammar.compile(PERSON, length)
    ids = tiny_model.generate(
        **inputs,
        do_sample=True,
        temperature=2.0,
        max_new_tokens=300,
        logits_processor=LogitsProcessorList([processor]),
    )[0, length:]
    assert ids[-1] == tiny_tokenizer.eos_token_id
    validate(json.loads(tiny_tokenizer.decode(ids)), PERSON)


@pytest.mark.parametrize("text", ['{"名": "你好👋", "n": [1, -2.5e3, true, null]}', "{}"])
def test_any_json_object_can_be_written(grammar, any_tokenizer, text):
    grammar = JsonGrammar(any_tokenizer, 65024)
    first, *ids = any_tokenizer.encode("\n" + text, add_special_tokens=False)[1:]
    assert any_tokenizer.decode([first]) == "\n"
    processor = grammar.compile({"type": "object"}, 3)
    scores = torch.zeros(1, 65024)
    for i, token_id in enumerate([*ids, any_tokenizer.eos_token_id]):
        allowed = processor(torch.tensor([[9, 9, 9, *ids[:i]]]), scores)[0]
        assert allowed[token_id] == 0, text[:i]
        assert not torch.isfinite(allowed[any_tokenizer.vocab_size :]).any()
    finished = torch.isfinite(allowed).nonzero().flatten().tolist()
    assert finished == [any_tokenizer.eos_token_id]


def test_only_json_is_allowed(grammar, tiny_tokenizer):
    allowed = grammar.compile({"type": "object"}, 0)(
        torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 4096)
    )
    tokens = [tiny_tokenizer.decode([i]) for i in allowed[0].isfinite().nonzero().flatten()]
    assert tokens and all(token.startswith("{") for token in tokens)


def test_the_bytes_of_tokens_make_the_text(any_tokenizer):
    text = "你好👋, the 世界\t  𠮷\n{}"
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(read_bytes(any_tokenizer, i) for i in ids).decode().lstrip(" ") == text


def test_tokens_without_text_have_no_bytes(tiny_tokenizer):
    for token_id in (tiny_tokenizer.eos_token_id, *tiny_tokenizer.get_prefix_tokens(), 10**6):
        assert read_bytes(tiny_tokenizer, token_id) == b""


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "person"}, "Invalid type: person"),
        ({"type": "object", "properties": 7}, "properties must be an object"),
        ({"type": "string", "pattern": "a(b"}, r"regex parse error: a\(b error: unclosed group$"),
        ({"$ref": "http://127.0.0.1/schema"}, "does not fetch"),
        ({"not": {}}, "not"),
    ],
)
def test_unsupported_schemas_are_refused(grammar, schema, message):
    with pytest.raises(ValueError, match=message):
        grammar.compile(schema, 0)


def test_a_schema_that_is_too_large_fails_and_does_not_end_the_answer(grammar, tiny_tokenizer):
    names = [str(i) for i in range(3000)]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    processor, scores = grammar.compile(schema, 0), torch.zeros(1, 4096)
    brace = int(processor(torch.zeros(1, 0, dtype=torch.long), scores).argmax())
    assert tiny_tokenizer.decode([brace]) == "{"
    with pytest.raises(ValueError, match="items; max is"):
        processor(torch.tensor([[brace]]), scores)
