"""No request field is accepted and ignored: `serving/schema.py`, and how fields are passed on."""

from dataclasses import fields

import pytest
from conftest import ROOT

import api
from chatglm2.serving import schema, server
from chatglm2.serving.batching import Request

CHAT = {"messages": [{"role": "user", "content": "你好"}]}
BODIES = [
    ("openai_api.py", schema.ChatRequest, CHAT),
    ("openai_api.py", schema.CompletionRequest, {"prompt": "a"}),
    ("openai_api.py", schema.EmbeddingRequest, {"input": "a"}),
    ("api.py", api.Question, {"prompt": "a"}),
]
# A value that is not the default, for each field that `Request` has too.
VALUES = {"max_length": 77, "temperature": 0.0, "top_p": 0.0, "top_k": 0, "seed": 9}
VALUES |= {"stop": ["end"], "ignore_eos": True, "repetition_penalty": 1.5}
IN_SCHEMA = {"tools", "functions"}  # refused by the schema unless no call is wanted


@pytest.mark.parametrize(("script", "body_type", "valid"), BODIES)
def test_every_field_is_passed_on_or_read_or_refused(script, body_type, valid):
    source = (ROOT / script).read_text("utf-8")
    shared = {}
    for name, field in body_type.model_json_schema()["properties"].items():
        if name in {field.name for field in fields(Request)}:
            shared[name] = VALUES[name]
        else:
            is_read = f"body.{name}" in source or f"question.{name}" in source
            assert is_read or None in field.get("enum", ()) or name in IN_SCHEMA, name
    request = server.build_request(body_type(**valid | shared), [1, 2])
    assert request.input_ids == [1, 2]
    assert {name: getattr(request, name) for name in shared} == shared
    nulls = body_type(**valid | dict.fromkeys(shared))
    assert server.build_request(nulls, [1, 2]) == Request([1, 2])


def test_converted_values():
    body = schema.ChatRequest(**CHAT, stop="end", temperature=1e-300, max_length=7.0)
    expected = Request([1], stop=["end"], temperature=0.0, max_length=7, seed=3)
    assert server.build_request(body, [1], seed=3) == expected
