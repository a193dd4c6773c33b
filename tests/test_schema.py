"""No request field is accepted and ignored: `serving/schema.py`, and how fields are passed on."""

from dataclasses import dataclass, fields

import pytest
from conftest import ROOT

import api
from chatglm2.serving import schema, server
from chatglm2.serving.batching import Request

MESSAGES = [{"role": "user", "content": "你好"}]
CHAT = {"messages": MESSAGES}
BODIES = [
    ("openai_api.py", schema.ChatRequest, CHAT),
    ("openai_api.py", schema.CompletionRequest, {"prompt": "a"}),
    ("openai_api.py", schema.EmbeddingRequest, {"input": "a"}),
    ("api.py", api.Question, {"prompt": "a"}),
]
# A value that is not the default, for each field that `Request` has too.
VALUES = {
    "max_length": 77,
    "temperature": 0.0,
    "top_p": 0.0,
    "top_k": 0,
    "seed": 9,
    "stop": ["end"],
    "ignore_eos": True,
}


def is_refused(field: dict) -> bool:
    return None in field.get("enum", ())


def list_shared(body_type) -> set[str]:
    return {field.name for field in fields(Request)} & body_type.model_fields.keys()


@pytest.mark.parametrize(("script", "body_type", "valid"), BODIES)
def test_every_field_is_passed_on_or_read_or_refused(script, body_type, valid):
    source = (ROOT / script).read_text("utf-8")
    for name, field in body_type.model_json_schema()["properties"].items():
        is_read = f"body.{name}" in source or f"question.{name}" in source
        assert name in list_shared(body_type) or is_read or is_refused(field), name


@pytest.mark.parametrize(("script", "body_type", "valid"), BODIES)
def test_shared_fields_reach_the_batcher(script, body_type, valid):
    shared = {name: VALUES[name] for name in list_shared(body_type)}
    request = server.build_request(body_type(**valid | shared), [1, 2])
    assert request.input_ids == [1, 2]
    assert {name: getattr(request, name) for name in shared} == shared
    nulls = body_type(**valid | dict.fromkeys(shared))
    assert server.build_request(nulls, [1, 2]) == Request([1, 2])


def test_a_new_field_is_passed_on_by_its_name_alone(monkeypatch):
    @dataclass
    class NewRequest(Request):
        min_p: float = 0.0

    class NewBody(schema.ChatRequest):
        min_p: schema.real(0, 1) = None

    monkeypatch.setattr(server, "Request", NewRequest)
    assert server.build_request(NewBody(**CHAT, min_p=0.1), [1]).min_p == 0.1
    assert server.build_request(NewBody(**CHAT), [1], seed=3) == NewRequest([1], seed=3)


def test_converted_values():
    body = schema.ChatRequest(**CHAT, stop="end", temperature=1e-300, max_length=7.0)
    request = server.build_request(body, [1])
    assert (request.stop, request.temperature, request.max_length) == (["end"], 0.0, 7)
