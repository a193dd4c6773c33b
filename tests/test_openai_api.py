"""`openai_api.py` over HTTP: each request field, the shapes, streams, and OpenAI's own client."""

import base64
import json
import math
import re
import socket
import time

import jsonschema
import numpy as np
import openai
import pytest
import torch
from conftest import ROOT
from servers import serve, wait_until

import openai_api
from chatglm2 import CHAT_DEFAULTS
from chatglm2.serving.responses import read_token

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
GREETING = "你好👋！我是 ChatGLM2-tiny，一个小小的演示模型，很高兴见到你，欢迎和我聊聊天。"
HELLO = {"messages": [{"role": "user", "content": "你好"}], "temperature": 0}
WILD = {"temperature": 2, "top_p": 1, "top_k": 0, "max_tokens": 12}  # few answers are equal


@pytest.fixture(scope="module")
def server(tiny_model, tiny_tokenizer):
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's client."""
    address = str(server.base_url).rstrip("/")
    return openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)


def chat(server, **body) -> dict:
    response = server.post(CHAT, json=HELLO | body)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def read_events(response) -> list[dict]:
    """Return the chunks of a stream that ends properly."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def stream(server, path=CHAT, **body) -> list[dict]:
    return read_events(server.post(path, json={"stream": True, **body}))


# Shapes.


def test_a_chat_completion(server, tiny_tokenizer):
    answer = chat(server, model="any/model", user="me")
    assert answer["object"] == "chat.completion" and answer["model"] == "any/model"
    assert answer["id"].startswith("chatcmpl-") and abs(answer["created"] - time.time()) < 60
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": GREETING},
    }
    prompt = tiny_tokenizer.encode(tiny_tokenizer.build_prompt("你好"))
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["total_tokens"] == len(prompt) + usage["completion_tokens"]
    ids = tiny_tokenizer.encode(GREETING, add_special_tokens=False)
    assert usage["completion_tokens"] == len(ids)


def test_a_stream_has_role_deltas_reason_and_usage(server):
    first, *middle, last, usage = stream(server, **HELLO, stream_options={"include_usage": True})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for chunk in middle:
        (choice,) = chunk["choices"]
        assert set(choice) == {"index", "delta", "finish_reason"}
        assert set(choice["delta"]) == {"content"} and choice["finish_reason"] is None
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == GREETING
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] >= len(middle)
    assert {chunk["object"] for chunk in [first, *middle, last, usage]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [first, *middle, last, usage]}) == 1


def test_a_stream_has_no_usage_unless_asked(server):
    assert not any("usage" in chunk for chunk in stream(server, **HELLO))
    assert "usage" not in stream(server, **HELLO, stream_options={})[-1]


def test_the_first_piece_arrives_while_the_answer_is_computed(server):
    body = json.dumps(HELLO | {"stream": True, "ignore_eos": True, "max_tokens": 300}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    received = b""
    with socket.create_connection((server.base_url.host, server.base_url.port)) as connection:
        connection.sendall(head.encode() + body)
        while received.count(b"data: ") < 5:
            received += connection.recv(4096)
        assert server.batcher.running and b"[DONE]" not in received
        while part := connection.recv(65536):
            received += part
    assert b"data: [DONE]" in received


def test_completions_continue_text(server, tiny_tokenizer):
    prompt = tiny_tokenizer.build_prompt("你好")
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 100}
    answer = server.post(COMPLETIONS, json=body).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": GREETING, "finish_reason": "stop"}]
    chunks = stream(server, COMPLETIONS, **body)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == GREETING
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert set(reasons[:-1]) == {None} and reasons[-1] == "stop"


def test_completions_take_texts_and_ids_of_one_or_several(server, tiny_tokenizer):
    texts = ["The capital of France is", tiny_tokenizer.build_prompt("你好")]
    ids = [tiny_tokenizer.encode(text) for text in texts]

    def complete(prompt) -> dict:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 5}
        return server.post(COMPLETIONS, json=body).json()

    def read(answer: dict) -> list[str]:
        assert [choice["index"] for choice in answer["choices"]] == [*range(len(answer["choices"]))]
        return [choice["text"] for choice in answer["choices"]]

    expected = [read(complete(text))[0] for text in texts]
    assert read(complete(texts)) == read(complete(ids)) == expected
    assert read(complete(ids[1])) == expected[1:] and all(expected)
    assert complete(texts)["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_completions_end_after_16_tokens_unless_told(server):
    body = {"prompt": "a", "ignore_eos": True}
    assert server.post(COMPLETIONS, json=body).json()["usage"]["completion_tokens"] == 16
    body |= {"max_length": 30}
    assert server.post(COMPLETIONS, json=body).json()["usage"]["total_tokens"] == 30


# Honoured fields.


@pytest.mark.parametrize("value", [0, 1e-300])
def test_temperature_zero_is_greedy(server, value):
    assert text_of(chat(server, **WILD | {"temperature": value, "max_tokens": 100})) == GREETING


def test_top_p_zero_and_top_k_one_keep_the_likeliest_token(server):
    for fields in ({"top_p": 0}, {"top_k": 1}):
        assert text_of(chat(server, **WILD | {"max_tokens": 100} | fields)) == GREETING


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_number_of_tokens_is_limited(server, name):
    answer = chat(server, **{name: 3})
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_max_length_counts_the_prompt_too(server):
    assert chat(server, max_length=20)["usage"]["total_tokens"] == 20
    response = server.post(CHAT, json=HELLO | {"max_length": 18})
    assert response.status_code == 400 and response.json()["error"]["param"] == "max_length"


def test_tokens_beyond_the_context_are_clamped(tiny_model, tiny_tokenizer):
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, "--context", "40") as server:
        answer = chat(server, max_tokens=20000, ignore_eos=True)
        assert answer["usage"]["total_tokens"] == 40
        assert answer["choices"][0]["finish_reason"] == "length"
        messages = [{"role": "user", "content": "你好" * 100}]
        error = server.post(CHAT, json={"messages": messages}).json()["error"]
    assert "the context 40" in error["message"] and error["param"] == "messages"
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stop", ["小小的", ["没有的", "小的演示", "小的"]])
def test_stop_ends_the_answer_and_is_never_shown(server, stop):
    answer = chat(server, stop=stop)
    shown = GREETING.partition("小小的" if isinstance(stop, str) else "小的")[0]
    assert text_of(answer) == shown and answer["choices"][0]["finish_reason"] == "stop"
    chunks = stream(server, **HELLO, stop=stop)
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == shown


def test_a_seed_fixes_the_text(server):
    texts = [text_of(chat(server, **WILD, seed=seed)) for seed in (1, 2, 1, -1)]
    assert texts[0] == texts[2] and len(set(texts)) > 1
    assert len({text_of(chat(server, **WILD)) for _ in range(6)}) > 1


def test_n_answers_take_the_seeds_from_the_first_on(server):
    alone = [text_of(chat(server, **WILD, seed=seed)) for seed in (5, 6, 7)]
    answer = chat(server, **WILD, seed=5, n=3)
    assert [choice["message"]["content"] for choice in answer["choices"]] == alone
    assert answer["usage"]["prompt_tokens"] == chat(server)["usage"]["prompt_tokens"]
    texts = ["", "", ""]
    for chunk in stream(server, **HELLO | WILD, seed=5, n=3):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == alone


def test_penalties_and_biases_change_what_is_likeliest(server, tiny_tokenizer):
    greedy = {"max_tokens": 60, "ignore_eos": True, "logprobs": True}

    def repeated(**fields) -> int:
        (choice,) = chat(server, **greedy, **fields)["choices"]
        tokens = [token["token"] for token in choice["logprobs"]["content"]]
        return len(tokens) - len(set(tokens))

    plain = repeated()
    assert plain > 5
    for name, value in (
        ("presence_penalty", 2),
        ("frequency_penalty", 2),
        ("repetition_penalty", 1.5),
    ):
        assert repeated(**{name: value}) < plain, name
    first = tiny_tokenizer.convert_tokens_to_ids("你")
    assert text_of(chat(server, logit_bias={str(first): -100})) != GREETING
    assert text_of(chat(server, logit_bias={str(first): 0})) == GREETING


def test_the_defaults_are_those_of_chat(server, monkeypatch):
    wanted = []
    submit = server.batcher.submit
    monkeypatch.setattr(server.batcher, "submit", lambda r: wanted.append(r) or submit(r))
    nulls = dict.fromkeys(["temperature", "top_p", "stop", "seed", "n", "logit_bias", "tools"])
    chat(server, **nulls)
    (request,) = wanted
    names = ["temperature", "top_p", "top_k"]
    assert [getattr(request, name) for name in names] == [CHAT_DEFAULTS[name] for name in names]
    assert not request.processors and request.max_new_tokens is None


def test_logprobs_of_a_chat(server, tiny_model, tiny_tokenizer):
    (choice,) = chat(server, logprobs=True, top_logprobs=3, max_tokens=5)["choices"]
    tokens = choice["logprobs"]["content"]
    data = b"".join(bytes(token["bytes"]) for token in tokens)
    assert data.decode().strip() == "你好👋！我"
    prompt = tiny_tokenizer.encode(tiny_tokenizer.build_prompt("你好"))
    with torch.inference_mode():
        scores = tiny_model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    values, ids = scores.topk(3)
    for top, value, token_id in zip(tokens[0]["top_logprobs"], values, ids, strict=True):
        assert top["token"] == read_token(tiny_tokenizer, int(token_id))[0]
        assert math.isclose(top["logprob"], float(value), abs_tol=1e-4)
    assert tokens[0]["logprob"] == tokens[0]["top_logprobs"][0]["logprob"]
    streamed = stream(server, **HELLO, logprobs=True, top_logprobs=3, max_tokens=5)
    parts = [chunk["choices"][0].get("logprobs", {"content": []}) for chunk in streamed]
    assert [t["token"] for part in parts for t in part["content"]] == [t["token"] for t in tokens]


def test_logprobs_only_if_asked(server):
    for fields in ({}, {"logprobs": False}, {"logprobs": False, "top_logprobs": 0}):
        assert "logprobs" not in chat(server, **fields)["choices"][0]
    assert chat(server, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_logprobs_of_a_completion(server, tiny_tokenizer):
    prompt = tiny_tokenizer.build_prompt("你好")
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 2}
    (choice,) = server.post(COMPLETIONS, json=body).json()["choices"]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {12}
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert len(top) == 2 and math.isclose(top[token], value)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("\\x"):
            assert choice["text"].startswith(token.lstrip() if offset == 0 else token, offset)
    chunks = stream(server, COMPLETIONS, **body)
    parts = [c["choices"][0]["logprobs"] for c in chunks if "logprobs" in c["choices"][0]]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    assert offsets == logprobs["text_offset"]


def test_the_bytes_of_a_token(tiny_tokenizer):
    def token(piece: str):
        return read_token(tiny_tokenizer, tiny_tokenizer.convert_tokens_to_ids(piece))

    assert token("<0xE4>") == ("\\xe4", [0xE4]) and token("<0x0A>") == ("\n", [10])
    assert token("▁the") == (" the", list(b" the")) and token("sop") == ("", [])
    assert read_token(tiny_tokenizer, 10**6) == ("", [])


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (
            [("system", "甲"), ("user", "乙"), ("system", "丙")],
            "[Round 1]\n\n问：甲\n\n丙\n\n乙\n\n答：",
        ),
        ([("developer", "甲"), ("user", "乙")], "[Round 1]\n\n问：甲\n\n乙\n\n答："),
        (
            [("user", "甲"), ("user", [{"type": "text", "text": "乙"}]), ("assistant", "丙")],
            "[Round 1]\n\n问：甲\n\n乙\n\n答：丙\n\n[Round 2]\n\n问：\n\n答：",
        ),
        (
            [("assistant", "甲"), ("user", "乙"), ("assistant", None)],
            "[Round 1]\n\n问：\n\n答：甲\n\n[Round 2]\n\n问：乙\n\n答："
            "\n\n[Round 3]\n\n问：\n\n答：",
        ),
    ],
)
def test_messages_in_any_order_are_all_in_the_prompt(server, monkeypatch, messages, prompt):
    wanted = []
    submit = server.batcher.submit
    monkeypatch.setattr(server.batcher, "submit", lambda r: wanted.append(r) or submit(r))
    chat(server, messages=[{"role": r, "content": c} for r, c in messages], max_tokens=1)
    assert wanted[0].input_ids == server.batcher.tokenizer.encode(prompt)


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 999}, "ok": {"type": "boolean"}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}


def test_response_formats(server):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    for seed in range(3):
        body = WILD | {"max_tokens": 100, "seed": seed}
        answer = chat(server, **body, response_format=wanted)
        assert answer["choices"][0]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text_of(answer)), SCHEMA)
        answer = chat(server, **body, response_format={"type": "json_object"})
        if answer["choices"][0]["finish_reason"] == "stop":
            assert isinstance(json.loads(text_of(answer)), dict)
        assert text_of(answer).startswith("{")
    assert text_of(chat(server, response_format={"type": "text"})) == GREETING


def test_each_of_n_answers_has_a_grammar_of_its_own(server):
    wanted = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    answer = chat(server, **WILD | {"max_tokens": 60}, n=3, seed=1, response_format=wanted)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1


# Accepted without effect, and refused.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "gpt-4"),
        ("user", "me"),
        ("store", True),
        ("metadata", {"a": "b"}),
        ("parallel_tool_calls", False),
        ("service_tier", "auto"),
        ("tools", []),
        ("tools", None),
        ("tool_choice", "none"),
        ("tool_choice", "auto"),
        ("functions", []),
        ("function_call", "none"),
        ("modalities", ["text"]),
        ("n", 1),
        ("logit_bias", {}),
        ("stop", []),
        ("unknown", {"x": [1]}),
    ],
)
def test_accepted_without_effect(server, name, value):
    answer = chat(server, **{name: value})
    assert text_of(answer) == GREETING
    assert answer["model"] == (value if name == "model" else "chatglm2-6b")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", []),
        ("messages", None),
        ("messages", "你好"),
        ("messages", [{"role": "tool", "content": "a", "tool_call_id": "b"}]),
        ("messages", [{"role": "user", "content": [IMAGE]}]),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": "a"}, AUDIO]}]),
        ("messages", [{"role": "assistant", "tool_calls": [TOOL]}]),
        ("messages", [{"content": "a"}]),
        ("tools", [TOOL]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("web_search_options", {}),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 1.01),
        ("top_k", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_completion_tokens", -1),
        ("max_length", 0),
        ("n", 0),
        ("n", 17),
        ("seed", 2**63),
        ("seed", "1"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", "a" * 257),
        ("stop", ["a", "b" * 257]),
        ("stream_options", {}),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"4096": 1}),
        ("logit_bias", {str(i): 1 for i in range(4097)}),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("response_format", {"type": "yaml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}),
        ("stream", 1),
        ("stream_options", {"include_usage": "yes"}),
        ("model", 7),
    ],
)
def test_refused_with_the_fields_name(server, name, value):
    response = server.post(CHAT, json=HELLO | {name: value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == name and error["type"] == "invalid_request_error"
    assert error["message"].startswith(name)


JSON_FORMATS = [
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("top_logprobs", {"top_logprobs": 2, "logprobs": False}),
        ("stream_options", {"stream_options": {"include_usage": True}, "stream": False}),
        *(("ignore_eos", {"ignore_eos": True, "response_format": f}) for f in JSON_FORMATS),
    ],
)
def test_fields_that_exclude_each_other(server, name, fields):
    response = server.post(CHAT, json=HELLO | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == name and error["message"].startswith(name)


def test_the_cause_of_a_wrong_pattern_is_told(server):
    pattern = {"type": "string", "pattern": "a(b"}
    wanted = {"type": "json_schema", "json_schema": {"schema": pattern}}
    message = server.post(CHAT, json=HELLO | {"response_format": wanted}).json()["error"]["message"]
    assert message.endswith("regex parse error: a(b error: unclosed group")


def test_the_empty_schema_is_any_json(server):
    for seed in range(4):
        body = WILD | {"max_tokens": 200, "seed": seed, "response_format": JSON_FORMATS[1]}
        answer = chat(server, **body)
        if answer["choices"][0]["finish_reason"] == "stop":
            json.loads(text_of(answer))
        assert re.match(r'[\[{"\-0-9tfn]', text_of(answer))
    assert text_of(chat(server, ignore_eos=True, max_tokens=2, response_format={"type": "text"}))


@pytest.mark.parametrize("name", ["temperature", "top_p", "presence_penalty"])
@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_numbers_that_are_none_are_refused(server, name, value):
    body = json.dumps(HELLO | {name: float(value)})
    response = server.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["param"] == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", None),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [4096]),
        ("prompt", [-1]),
        ("prompt", ["a", 1]),
        ("echo", True),
        ("suffix", "b"),
        ("best_of", 2),
        ("logprobs", 21),
    ],
)
def test_refused_completions(server, name, value):
    response = server.post(COMPLETIONS, json={"prompt": "a"} | {name: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == name


def test_harmless_fields_of_completions(server):
    body = {"prompt": "", "echo": False, "suffix": "", "best_of": 1, "n": 1, "temperature": 0}
    assert server.post(COMPLETIONS, json=body).status_code == 200


def test_half_a_character_is_replaced(server):
    headers = {"Content-Type": "application/json"}
    content = json.dumps(HELLO | {"model": "\ud83d", "stop": "\udc4b"})
    answer = server.post(CHAT, content=content, headers=headers)
    assert answer.status_code == 200 and answer.json()["model"] == "\ufffd"


HELD = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("path", "name", "item"),
    [
        *((CHAT, "messages", item) for item in (1, {}, "a", HELD)),
        *((COMPLETIONS, "prompt", item) for item in ([0], [[]], 0, -1, "a", None)),
        *((EMBEDDINGS, "input", item) for item in ([0], {})),
        (CHAT, "stop", 1),
        (CHAT, "tools", {}),
    ],
)
def test_a_long_wrong_list_is_refused_without_checking_each_item(server, path, name, item):
    """4 MB of wrong items kept everyone else waiting for 7 to 20 s."""
    content = json.dumps(item)
    content = f'{{"{name}": [{",".join([content] * (3_900_000 // (len(content) + 1)))}]}}'
    if name in ("stop", "tools"):
        content = content.replace("{", f'{{"messages": [{json.dumps(HELD)}], ', 1)
    headers = {"Content-Type": "application/json"}
    begin = time.monotonic()
    response = server.post(path, content=content, headers=headers)
    assert time.monotonic() - begin < 5
    assert response.status_code == 400 and response.json()["error"]["param"] == name
    assert len(response.json()["error"]["message"]) < 300


@pytest.mark.parametrize("value", [[], None, {}, [None]])
def test_what_is_no_text_is_told_clearly(server, value):
    error = server.post(EMBEDDINGS, json={"input": value}).json()["error"]
    assert error["message"].startswith("input: Input should be a text, or a list of texts")


# Embeddings, models.


def test_embeddings_are_means_of_the_last_hidden_states(server, tiny_model, tiny_tokenizer):
    texts = ["你好", "a longer sentence of English words"]
    answer = server.post(EMBEDDINGS, json={"input": texts, "model": "m"}).json()
    assert answer["object"] == "list" and answer["model"] == "m"
    ids = [tiny_tokenizer.encode(text) for text in texts]
    num_tokens = sum(map(len, ids))
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    for i, row in enumerate(ids):
        with torch.inference_mode():
            hidden = tiny_model.transformer(torch.tensor([row])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        item = answer["data"][i]
        assert (item["index"], item["object"]) == (i, "embedding")
        torch.testing.assert_close(torch.tensor(item["embedding"]), expected, atol=1e-5, rtol=0)


def test_embeddings_in_base64_and_of_ids(server, tiny_tokenizer):
    ids = tiny_tokenizer.encode("你好")
    plain = server.post(EMBEDDINGS, json={"input": "你好"}).json()["data"]
    coded = server.post(EMBEDDINGS, json={"input": [ids], "encoding_format": "base64"}).json()
    values = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(values, plain[0]["embedding"], atol=1e-6)


def test_more_inputs_than_places_are_embedded_in_order(server):
    texts = [f"{i} 你好" for i in range(200)]
    data = server.post(EMBEDDINGS, json={"input": texts}).json()["data"]
    last = server.post(EMBEDDINGS, json={"input": texts[-1]}).json()["data"][0]
    assert [item["index"] for item in data] == [*range(200)]
    np.testing.assert_allclose(data[-1]["embedding"], last["embedding"], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("input", []), ("input", None), ("encoding_format", "int8"), ("dimensions", 8)],
)
def test_refused_embeddings(server, name, value):
    response = server.post(EMBEDDINGS, json={"input": "a"} | {name: value})
    assert response.status_code == 400 and response.json()["error"]["param"] == name


def test_a_text_longer_than_the_context_is_refused(server):
    error = server.post(EMBEDDINGS, json={"input": ["a", "你好" * 3000]}).json()["error"]
    assert error["param"] == "input" and "the context 2048" in error["message"]


def test_models(server):
    (model,) = server.get("/v1/models").json()["data"]
    assert model["id"] == "chatglm2-tiny" and model["object"] == "model"
    assert server.get("/v1/models/chatglm2-tiny").json() == model
    error = server.get("/v1/models/other").json()["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model"


# Failing in mid-stream, and the schema.


def test_a_failing_stream_ends_with_an_error_and_without_done(tiny_model, tiny_tokenizer):
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, "--max-batch", "1") as server:
        body = HELLO | {"ignore_eos": True, "stream": True}
        with server.stream("POST", CHAT, json=body) as first:
            lines = first.iter_lines()
            next(lines)
            with server.stream("POST", CHAT, json=body) as waiting:
                wait_until(lambda: server.batcher.waiting)
                server.batcher.close()
                events = waiting.read().decode().split("\n\n")
            *_, last, _, done, _ = lines
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
    assert "[DONE]" not in events[-1]
    assert '"finish_reason":"length"' in last and done == "data: [DONE]"


def test_the_schema_documents_no_other_errors_than_error_objects(server):
    schema = server.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/health",
        "/metrics",
        CHAT,
        COMPLETIONS,
        EMBEDDINGS,
        "/v1/models",
        "/v1/models/{name}",
    }
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    for path in (CHAT, COMPLETIONS, EMBEDDINGS):
        responses = schema["paths"][path]["post"]["responses"]
        assert set(responses) == {"200", "4XX", "503"}


# OpenAI's own client.


def test_openais_client_chats(client):
    answer = client.chat.completions.create(model="chatglm2-6b", **HELLO)
    assert answer.choices[0].message.content == GREETING
    chunks = client.chat.completions.create(model="chatglm2-6b", **HELLO, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == GREETING
    with client.chat.completions.stream(model="chatglm2-6b", **HELLO) as events:
        assert events.get_final_completion().choices[0].message.content == GREETING


def test_openais_client_completes_embeds_and_lists(client):
    answer = client.completions.create(
        model="m", prompt="你好", logprobs=1, max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert len(answer.choices[0].logprobs.tokens) == 3
    data = client.embeddings.create(model="m", input=["你好", "a"]).data
    assert len(data) == 2
    assert all(math.isclose(np.linalg.norm(item.embedding), 1, abs_tol=1e-5) for item in data)
    assert [model.id for model in client.models.list()] == ["chatglm2-tiny"]


def test_openais_client_raises_its_errors(client, tiny_model, tiny_tokenizer):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=HELLO["messages"], tools=[TOOL])
    assert caught.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, "--api-key", "k") as server:
        address = str(server.base_url).rstrip("/") + "/v1"
        other = client.with_options(base_url=address)
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
        assert other.with_options(api_key="k").models.list().data
        server.batcher.close()
        with pytest.raises(openai.InternalServerError):
            other.with_options(api_key="k").chat.completions.create(model="m", **HELLO)


def test_langchains_client(client):
    langchain_openai = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    llm = langchain_openai.ChatOpenAI(base_url=str(client.base_url), api_key="none", temperature=0)
    assert llm.invoke("你好").content == GREETING
    assert "".join(chunk.content for chunk in llm.stream("你好")) == GREETING


@pytest.mark.parametrize("name", ["README.md", "README_ZH.md"])
def test_the_readmes_code(server, capsys, name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)
    (source,) = [block for block in blocks if block.startswith("from openai import")]
    assert "http://127.0.0.1:8000/" in source
    exec(source.replace("http://127.0.0.1:8000/", f"{str(server.base_url).rstrip('/')}/"), {})
    assert "ChatGLM2-tiny" in capsys.readouterr().out
