"""No request field is accepted and ignored: `serving/schema.py`, and how fields are passed on."""

import re
from dataclasses import fields

import pytest
from conftest import ROOT
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

import api
from chatglm2.serving import responses_schema, schema, server, tokens_api
from chatglm2.serving.batching import Request
from chatglm2.serving.errors import describe_invalid

CHAT = {"messages": [{"role": "user", "content": "你好"}]}
RESPONSES = "openai_api.py chatglm2/serving/responses_api.py chatglm2/serving/responses_schema.py"
BODIES = [
    ("openai_api.py", schema.ChatRequest, CHAT),
    ("openai_api.py", schema.CompletionRequest, {"prompt": "a"}),
    ("openai_api.py", schema.EmbeddingRequest, {"input": "a"}),
    ("chatglm2/serving/tokens_api.py", tokens_api.TokenizeRequest, {"prompt": "a"}),
    ("chatglm2/serving/tokens_api.py", tokens_api.DetokenizeRequest, {"tokens": [5]}),
    (RESPONSES, responses_schema.ResponsesRequest, {"input": "a"}),
    ("api.py", api.Question, {"prompt": "a"}),
]
# A value that is not the default, for each field that `Request` has too.
VALUES = {"max_length": 77, "temperature": 0.0, "top_p": 0.0, "top_k": 0, "min_p": 0.1, "seed": 9}
VALUES |= {"stop": ["end"], "ignore_eos": True, "repetition_penalty": 1.5}
# The schema refuses all values with an effect; metadata is shown in a response.
IN_SCHEMA = {"tools", "functions", "reasoning", "metadata"}


@pytest.mark.parametrize(("files", "body_type", "valid"), BODIES)
def test_every_field_is_passed_on_or_read_or_refused(files, body_type, valid):
    source = "".join((ROOT / file).read_text("utf-8") for file in files.split())
    shared = {}
    for name, field in body_type.model_json_schema()["properties"].items():
        if name in {field.name for field in fields(Request)}:
            shared[name] = VALUES[name]
        else:
            is_read = re.search(rf"\b(body|question|self|response)\.{name}\b", source)
            assert is_read or None in field.get("enum", ()) or name in IN_SCHEMA, name
    request = server.build_request(body_type(**valid | shared), [1, 2])
    assert request.input_ids == [1, 2]
    assert {name: getattr(request, name) for name in shared} == shared
    nulls = body_type(**valid | dict.fromkeys(shared))
    assert server.build_request(nulls, [1, 2]) == Request([1, 2])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", 3, "temperature: expected at most 2, not 3."),
        ("n", True, "n: expected an integer, not true."),
        ("stop", 7, "stop: expected a text or a list, not 7."),
        ("stop", ["a"] * 17, "stop: expected at most 16 texts; it has 17."),
        ("stop", ["a", ""], "stop.1: expected at least 1 character; it is empty."),
        ("stop", "a" * 257, "stop: expected at most 256 characters; it has 257."),
        ("messages", [], "messages: expected at least 1 item; it is empty."),
        ("messages", [{"role": "user", "contents": "a"}], "messages.0.content is missing."),
        ("store", True, "store: Answers are not stored; allowed: null, false; the value is true."),
        ("logit_bias", {"x": 1}, 'logit_bias.x: expected a token id, not "x".'),
    ],
)
def test_messages_have_the_field_the_value_and_what_is_allowed(field, value, message):
    with pytest.raises(ValidationError) as caught:
        schema.ChatRequest(**CHAT | {field: value})
    errors = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()]
    described, param = describe_invalid(RequestValidationError(errors))
    assert described.startswith(message) and param == field


def test_converted_values():
    body = schema.ChatRequest(**CHAT, stop="end", temperature=1e-300, max_length=7.0)
    expected = Request([1], stop=["end"], temperature=0.0, max_length=7, seed=3)
    assert server.build_request(body, [1], seed=3) == expected
