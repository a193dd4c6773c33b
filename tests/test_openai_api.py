"""`openai_api.py` over HTTP: each request field, the shapes, streams, and OpenAI's own client."""

import base64
import json
import math
import re
import time

import jsonschema
import numpy as np
import openai
import pydantic
import pytest
import torch
from conftest import ROOT
from fastapi.exceptions import RequestValidationError
from servers import check_error, record_requests, serve, wait_until

import openai_api
from chatglm2.serving import responses, responses_schema, schema, tokens_api
from chatglm2.serving.errors import describe_invalid
from chatglm2.serving.json_grammar import read_bytes

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
RESPONSES = "/v1/responses"
JSON = {"Content-Type": "application/json"}
GREETING = "你好👋！我是 ChatGLM2-tiny，一个小小的演示模型，很高兴见到你，欢迎和我聊聊天。"
USER = {"role": "user", "content": "你好"}
HELLO = {"messages": [USER], "temperature": 0}
WILD = {"temperature": 2, "top_p": 1, "top_k": 0, "max_tokens": 12}  # few answers are equal


def post(server, path: str, **body) -> dict:
    response = server.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code == 200, response.text
    return response.json()


def chat(server, **body) -> dict:
    return post(server, CHAT, **HELLO | body)


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def read_chunks(response) -> list[dict]:
    """Return the chunks of a stream that ends properly."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def stream(server, path=CHAT, **body) -> list[dict]:
    return read_chunks(server.post(path, json={"stream": True, **body}))


def check_refused(response, name: str) -> str:
    """Check that a field is refused with its name; return the message."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == name and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300
    return error["message"]


# Shapes.


def test_a_chat_completion(server, tiny_tokenizer):
    answer = chat(server, model="any/model")
    assert answer["object"] == "chat.completion" and answer["model"] == "any/model"
    assert answer["id"].startswith("chatcmpl-") and abs(answer["created"] - time.time()) < 60
    message = {"role": "assistant", "content": GREETING}
    assert answer["choices"] == [{"index": 0, "finish_reason": "stop", "message": message}]
    prompt = tiny_tokenizer.encode(tiny_tokenizer.build_prompt("你好"))
    ids = tiny_tokenizer.encode(GREETING, add_special_tokens=False)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(ids))
    assert usage["total_tokens"] == len(prompt) + len(ids)


def test_a_stream_has_role_deltas_reason_and_usage(server):
    chunks = stream(server, **HELLO, stream_options={"include_usage": True})
    first, *middle, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for chunk in middle:
        (choice,) = chunk["choices"]
        assert set(choice) == {"index", "delta", "finish_reason"}
        assert set(choice["delta"]) == {"content"} and choice["finish_reason"] is None
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == GREETING
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] >= len(middle)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for options in (None, {}):
        assert not any("usage" in c for c in stream(server, **HELLO, stream_options=options))


def test_the_first_chunk_arrives_while_the_answer_is_computed(server):
    body = HELLO | {"stream": True, "ignore_eos": True, "max_tokens": 300}
    with server.stream("POST", CHAT, json=body) as response:
        parts = response.iter_raw()
        received = b""
        while received.count(b"data: ") < 5:
            received += next(parts)
        assert server.batcher.running and b"[DONE]" not in received
        assert b"data: [DONE]" in b"".join(parts)


def test_completions_continue_text(server, tiny_tokenizer):
    prompt = tiny_tokenizer.build_prompt("你好")
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 100}
    answer = post(server, COMPLETIONS, **body)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": GREETING, "finish_reason": "stop"}]
    chunks = stream(server, COMPLETIONS, **body)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == GREETING
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert set(reasons[:-1]) == {None} and reasons[-1] == "stop"
    body = {"prompt": "a", "ignore_eos": True}
    assert post(server, COMPLETIONS, **body)["usage"]["completion_tokens"] == 16  # the default
    assert post(server, COMPLETIONS, **body, max_length=30)["usage"]["total_tokens"] == 30


def test_completions_take_texts_and_ids_of_one_or_several(server, tiny_tokenizer):
    texts = ["The capital of France is", tiny_tokenizer.build_prompt("你好")]
    ids = [tiny_tokenizer.encode(text) for text in texts]

    def read(prompt) -> list[str]:
        answer = post(server, COMPLETIONS, prompt=prompt, temperature=0, max_tokens=5)
        assert [choice["index"] for choice in answer["choices"]] == [*range(len(answer["choices"]))]
        assert prompt != texts or answer["usage"]["prompt_tokens"] == sum(map(len, ids))
        return [choice["text"] for choice in answer["choices"]]

    expected = [read(text)[0] for text in texts]
    assert read(texts) == read(ids) == expected and all(expected)
    assert read(ids[1]) == expected[1:]


# Honoured fields.


def test_the_number_of_tokens_is_limited(server):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(server, **{name: 3})
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"


def test_the_context_limits_an_answer_and_refuses_a_longer_prompt(tiny_model, tiny_tokenizer):
    long = "你好" * 100
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, "--context", "40") as server:
        answer = chat(server, max_tokens=20000, ignore_eos=True)
        assert answer["usage"]["total_tokens"] == 40
        assert answer["choices"][0]["finish_reason"] == "length"
        response = server.post(CHAT, json={"messages": [USER | {"content": long}]})
        assert "the context 40" in check_refused(response, "messages")
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert chat(server, max_length=20)["usage"]["total_tokens"] == 20
        check_refused(server.post(CHAT, json=HELLO | {"max_length": 18}), "max_length")
        response = server.post(EMBEDDINGS, json={"input": ["a", long]})
        assert "the context 40" in check_refused(response, "input")


def test_a_seed_fixes_the_text_and_n_answers_take_the_next_seeds(server):
    alone = [text_of(chat(server, **WILD, seed=seed)) for seed in (5, 6, 7)]
    assert len({*alone}) > 1
    answer = chat(server, **WILD, seed=5, n=3)
    assert [choice["message"]["content"] for choice in answer["choices"]] == alone
    assert answer["usage"]["prompt_tokens"] == chat(server)["usage"]["prompt_tokens"]
    texts = ["", "", ""]
    for chunk in stream(server, **HELLO | WILD, seed=5, n=3):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == alone
    unseeded = chat(server, **WILD, n=6)["choices"]
    assert len({choice["message"]["content"] for choice in unseeded}) > 1


def test_penalties_and_biases_change_the_likeliest_tokens(server, tiny_tokenizer):
    def count_repeated(**fields) -> int:
        (choice,) = chat(server, max_tokens=60, ignore_eos=True, logprobs=True, **fields)["choices"]
        tokens = [token["token"] for token in choice["logprobs"]["content"]]
        return len(tokens) - len(set(tokens))

    plain = count_repeated()
    assert plain > 5
    penalties = {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 1.5}
    for name, value in penalties.items():
        assert count_repeated(**{name: value}) < plain, name
    first = tiny_tokenizer.convert_tokens_to_ids("你")
    assert text_of(chat(server, logit_bias={str(first): -100})) != GREETING
    assert text_of(chat(server, logit_bias={str(first): 0})) == GREETING


def test_logprobs_of_a_chat(server):
    (choice,) = chat(server, logprobs=True, top_logprobs=3, max_tokens=5)["choices"]
    tokens = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode().strip() == "你好👋！我"
    for token in tokens:
        likeliest, *others = token.pop("top_logprobs")
        assert token == likeliest and len(others) == 2 and token["logprob"] <= 0
        assert all(other["logprob"] <= token["logprob"] for other in others)
    streamed = stream(server, **HELLO, logprobs=True, top_logprobs=3, max_tokens=5)
    parts = [chunk["choices"][0].get("logprobs", {"content": []}) for chunk in streamed]
    assert [t["token"] for part in parts for t in part["content"]] == [t["token"] for t in tokens]
    for fields in ({}, {"logprobs": False}, {"logprobs": False, "top_logprobs": 0}):
        assert "logprobs" not in chat(server, **fields)["choices"][0]
    assert chat(server, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_logprobs_of_a_completion(server, tiny_tokenizer):
    prompt = tiny_tokenizer.build_prompt("你好")
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 2}
    (choice,) = post(server, COMPLETIONS, **body)["choices"]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {12}
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    for token, value, top, offset in zip(*(logprobs[name] for name in names), strict=True):
        assert len(top) == 2 and math.isclose(top[token], value)
        if not token.startswith("\\x"):
            assert choice["text"].startswith(token.lstrip() if offset == 0 else token, offset)
    chunks = stream(server, COMPLETIONS, **body)
    parts = [c["choices"][0]["logprobs"] for c in chunks if "logprobs" in c["choices"][0]]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    assert offsets == logprobs["text_offset"]


def check_offsets(text: str, logprobs: dict):
    """Check that each token with a text stands at its offset."""
    character = b""  # the bytes of a character so far
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if byte := re.fullmatch(r"\\x([0-9a-f]{2})", token):
            character += bytes.fromhex(byte[1])
            shown = text[offset : offset + 1].encode()
            is_broken = shown == "\ufffd".encode()
            # An answer ends before half a character.
            assert is_broken or shown.startswith(character) or offset == len(text), token
            character = b"" if is_broken or shown == character else character
        elif token not in ("[gMASK]", "sop", "</s>"):
            forms = (token, token.removeprefix(" ")) if offset == 0 else token
            assert not character and text.startswith(forms, offset), (token, offset)


@pytest.mark.parametrize(
    "prompt", ["你好", " a龘\n🤖🤖é 好", "", "\nꙮ  b ", "[gMASK]", [[5, 800, 5], [4, 3, 2, 900]]]
)
def test_echo_has_the_prompt_with_its_logprobs(server, tiny_tokenizer, prompt):
    """Also of byte tokens, several of which make one character, and in a stream."""
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "temperature": 0, "seed": 1}
    several = prompt if isinstance(prompt, list) else [tiny_tokenizer.encode(prompt)]
    for max_tokens in (0, 1, 9):
        answer = post(server, COMPLETIONS, **body, max_tokens=max_tokens)
        assert answer["usage"]["completion_tokens"] <= max_tokens * len(several)
        for ids, choice in zip(several, answer["choices"], strict=True):
            text = choice["text"]
            begin = prompt if isinstance(prompt, str) else tiny_tokenizer.decode(ids)
            assert text.startswith(begin) and (max_tokens or text == begin)
            logprobs = choice["logprobs"]
            length = min(len(logprobs["tokens"]), len(ids) + max_tokens)
            assert {len(values) for values in logprobs.values()} == {length} and length >= len(ids)
            assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
            assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
            check_offsets(text, logprobs)
    chunks = stream(server, COMPLETIONS, **body, max_tokens=9)
    for choice in answer["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            parts = [part["logprobs"][name] for part in own if part.get("logprobs")]
            assert [value for part in parts for value in part] == values
    plain = post(server, COMPLETIONS, **body | {"logprobs": None}, max_tokens=9)["choices"]
    assert [c["text"] for c in plain] == [c["text"] for c in answer["choices"]]
    assert not any("logprobs" in choice for choice in plain)


def test_several_answers_share_the_echo_of_each_prompt(server, monkeypatch, tiny_tokenizer):
    requests = record_requests(server, monkeypatch)
    prompts = ["你好" * 20, "再见" * 20]
    body = {"prompt": prompts, "n": 2, "echo": True, "logprobs": 0, "max_tokens": 2}
    choices = post(server, COMPLETIONS, **body)["choices"]
    measured = [request.prompt_logprobs for request in requests]
    assert measured[0] is measured[1] is not measured[2] is measured[3]
    for prompt, pair in zip(prompts, (choices[:2], choices[2:]), strict=True):
        for choice in pair:
            values = choice["logprobs"]["token_logprobs"]
            assert len(values) >= len(tiny_tokenizer.encode(prompt)) and values[0] is None
            assert choice["text"].startswith(prompt)


def test_the_tokens_of_an_echo_are_limited(server):
    body = {"echo": True, "logprobs": 20, "max_tokens": 0}
    for prompt, n, limit in (
        ([[5] * 2048] * 9, 1, "at most 16384"),
        ([5] * 2048, 9, "at most 16384"),
        ([5] * 2049, 1, "the context 2048"),
    ):
        response = server.post(COMPLETIONS, json=body | {"prompt": prompt, "n": n})
        assert limit in check_refused(response, "prompt")


def test_offsets_of_an_answer_at_the_start_of_a_text(server, tiny_tokenizer):
    """SentencePiece drops a space there, and keeps it behind other text."""
    end = [*tiny_tokenizer.encode("问："), tiny_tokenizer.eos_token_id]
    for prompt in ("", "问：", [[tiny_tokenizer.get_command("sop")]], end):
        bias = {str(tiny_tokenizer.convert_tokens_to_ids("▁a")): 100}
        body = {"prompt": prompt, "max_tokens": 3, "logprobs": 0, "logit_bias": bias}
        (choice,) = post(server, COMPLETIONS, **body)["choices"]
        has_text = prompt in ("问：", end)
        assert choice["text"] == (" a a a" if has_text else "a a a")
        offsets = [0, 2, 4] if has_text else [0, 1, 3]
        assert choice["logprobs"]["text_offset"] == offsets


@pytest.mark.parametrize(
    "text", ["你好，龘ꙮ🤖", "  a\n\t🤖b é ", "\n好", "▁ \u3000Ａ①\x00", "[gMASK]</s>"]
)
def test_text_offsets_are_the_lengths_of_decoded_beginnings(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    offsets = responses.TextOffsets(drops_space=True)
    for i, token_id in enumerate(ids):
        begin = any_tokenizer.decode(ids[:i]).rstrip("\ufffd")  # half a character
        assert offsets.add(read_bytes(any_tokenizer, token_id)) == len(begin)
    assert offsets.add(b"") == len(text)


def test_text_offsets_of_bytes_that_are_no_text():
    offsets = responses.TextOffsets(drops_space=True)
    tokens = [
        b"",
        b" a",
        b"\xe4",
        b"\xbd",
        b"\xa0",
        b"\xe4",
        b"b",
        b"\x80",
        b"\x80",
        "你好".encode(),
        b"",
    ]
    assert [offsets.add(token) for token in tokens] == [0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 8]


def test_messages_in_any_order_are_all_in_the_prompt(server, monkeypatch):
    requests = record_requests(server, monkeypatch)
    parts = [{"type": "text", "text": "乙"}]
    messages = [("system", "甲"), ("user", parts), ("developer", "丙"), ("assistant", None)]
    chat(server, messages=[{"role": r, "content": c} for r, c in messages], max_tokens=1)
    prompt = "[Round 1]\n\n问：甲\n\n丙\n\n乙\n\n答：\n\n[Round 2]\n\n问：\n\n答："
    assert requests[0].input_ids == server.batcher.tokenizer.encode(prompt)


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 999}, "ok": {"type": "boolean"}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}


def json_schema(wanted: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": wanted}}


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_in_the_form_of_llama_cpp(server, kind):
    wanted = {"type": kind, "schema": SCHEMA}
    jsonschema.validate(json.loads(text_of(chat(server, response_format=wanted))), SCHEMA)


def test_a_schema_that_turns_out_to_be_too_large_ends_only_its_answer(server, caplog):
    branches = [{"type": "string", "minLength": i, "maxLength": 2 * i} for i in range(900)]
    properties = {"a": {"enum": ["x", "y"]}, "b": {"anyOf": branches}}
    wanted = {"type": "object", "properties": properties, "required": ["a", "b"]}
    wanted = json_schema(wanted | {"additionalProperties": False})
    with server.stream("POST", CHAT, json=HELLO | {"stream": True}) as other:
        response = server.post(CHAT, json=HELLO | {"response_format": wanted, "n": 2})
        assert "too many expressions" in check_refused(response, "response_format")
        body = HELLO | {"response_format": wanted, "stream": True}
        *_, last, _ = server.post(CHAT, json=body).text.split("\n\n")  # the status is 200
        assert json.loads(last.removeprefix("data: ")) == response.json()
        assert b"[DONE]" in other.read()
    assert "Traceback" not in caplog.text  # it is the client's mistake


def test_answers_that_are_json(server):
    body = WILD | {"max_tokens": 40, "n": 3, "seed": 1}  # each answer has its own grammar
    choices = chat(server, **body, response_format=json_schema(SCHEMA))["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len({*texts}) > 1
    for wanted, begin in (({"type": "json_object"}, r"\{"), (json_schema({}), r'[\[{"\-0-9tfn]')):
        for choice in chat(server, **body, response_format=wanted)["choices"]:
            text = choice["message"]["content"]
            assert re.match(begin, text)
            if choice["finish_reason"] == "stop":
                json.loads(text)
    assert text_of(chat(server, response_format={"type": "text"})) == GREETING


# Fields without effect, and refused fields.


def test_fields_without_effect(server):
    unknown = {"user": "me", "metadata": {"a": "b"}, "parallel_tool_calls": False, "x": [1]}
    harmless = {"tools": [], "tool_choice": "auto", "functions": [], "function_call": "none"}
    empty = {"modalities": ["text"], "n": 1, "logit_bias": {}, "stop": "\udc4b"}
    empty |= {"store": False, "service_tier": "auto", "reasoning_effort": "none"}
    nulls = dict.fromkeys(schema.ChatRequest.model_fields.keys() - {"messages", "model"})
    nulls |= {"max_tokens": 40.0, "temperature": 0}
    answer = chat(server, model="\ud83d", **unknown, **harmless, **empty)
    assert text_of(answer) == GREETING and answer["model"] == "\ufffd"  # half a character
    assert text_of(chat(server, **nulls | {"top_k": 1, "stop": []})) == GREETING
    for name, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        assert text_of(chat(server, **{name: [TOOL], choice: "none"})) == GREETING
    body = {"prompt": "", "echo": False, "suffix": "", "best_of": 1, "n": 1, "temperature": 0}
    assert post(server, COMPLETIONS, **body)["choices"]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
REFUSED = {
    (CHAT, "messages"): [
        *([], None, "你好", [{"content": "a"}], [USER | {"content": [IMAGE]}]),
        *([USER | {"role": "tool"}], [{"role": "assistant", "content": "", "tool_calls": [TOOL]}]),
        *([{"role": "user", "contents": "hi"}], [USER | {"content": None}]),
        [{"role": "assistant"}, USER],
    ],
    (CHAT, "tools"): [[TOOL], ["f"], "none"],
    (CHAT, "tool_choice"): ["required"],
    (CHAT, "functions"): [[{"name": "f"}]],
    (CHAT, "function_call"): [{"name": "f"}],
    (CHAT, "modalities"): [["text", "audio"]],
    (CHAT, "audio"): [{"voice": "alloy", "format": "wav"}],
    (CHAT, "web_search_options"): [{}],
    (CHAT, "prediction"): [{"type": "content", "content": "a"}],
    (CHAT, "reasoning_effort"): ["high"],
    (CHAT, "store"): [True],
    (CHAT, "service_tier"): ["flex"],
    (CHAT, "guided_json"): [{}],
    (CHAT, "model"): [7],
    (CHAT, "temperature"): [2.1, -0.1, "1", True, math.nan, math.inf],
    (CHAT, "top_p"): [1.01, math.nan],
    (CHAT, "top_k"): [-1],
    (CHAT, "min_p"): [1.1, -0.1],
    (CHAT, "max_tokens"): [0, 1.5, True, "8"],
    (CHAT, "max_completion_tokens"): [-1],
    (CHAT, "max_length"): [0],
    (CHAT, "n"): [0, 17],
    (CHAT, "seed"): [2**63, "1"],
    (CHAT, "stop"): ["", ["a", ""], ["a"] * 17, "a" * 257, ["a", "b" * 257]],
    (CHAT, "presence_penalty"): [2.1, math.inf],
    (CHAT, "frequency_penalty"): [-2.1],
    (CHAT, "repetition_penalty"): [0],
    (CHAT, "logit_bias"): [{"x": 1}, {"1": 101}, {"4096": 1}, {str(i): 1 for i in range(4097)}],
    (CHAT, "logprobs"): [1],
    (CHAT, "top_logprobs"): [21],
    (CHAT, "response_format"): [
        {"type": "yaml"},
        {"type": "json_schema"},
        {"type": "text", "schema": {}},
        {"type": "json_object", "schema": {}, "json_schema": {"schema": {}}},
        json_schema({"type": "x"}),
        json_schema({"description": "a" * 2**16}),
    ],
    (CHAT, "stream"): [1],
    (CHAT, "stream_options"): [{}, {"include_usage": "yes"}],
    (COMPLETIONS, "prompt"): [
        *(None, [], [[]], [4096], [-1], ["a", 1], [True], [1, True], [1.5], [[1, "1"]])
    ],
    (COMPLETIONS, "echo"): [1, "yes"],
    (COMPLETIONS, "max_tokens"): [-1, 0.5],
    (COMPLETIONS, "max_completion_tokens"): [0],
    (COMPLETIONS, "suffix"): ["b"],
    (COMPLETIONS, "best_of"): [2],
    (COMPLETIONS, "logprobs"): [21],
    (EMBEDDINGS, "input"): [[], None, {}, [None], [[1] * 2000] * 9],
    (EMBEDDINGS, "encoding_format"): ["int8"],
    (EMBEDDINGS, "dimensions"): [8, 0, "256"],
    (TOKENIZE, "prompt"): [None, 7, ["a"]],
    (TOKENIZE, "messages"): [[], [USER], "你好"],  # VALID has a prompt
    (TOKENIZE, "add_special_tokens"): [1],
    (TOKENIZE, "add_generation_prompt"): [True],
    (TOKENIZE, "continue_final_message"): [True],
    (TOKENIZE, "chat_template"): ["{{messages}}"],
    (TOKENIZE, "tools"): [[TOOL]],
    (DETOKENIZE, "tokens"): [None, [], "a", ["a"], [4096], [-1], [1.5], [[5]]],
}
ANY_VALUES = [None, True, False, 0, 1, -1, 8.0, 1.5, 2**63, 1e308, math.nan, "", "8", "\ud83d"]
ANY_VALUES += [[], [None], [8.0], ["a"], [[]], [[7.0]], [{}], {}, {"a": None}, {"type": "text"}]
ANY_VALUES += [[{"role": "user", "content": None}], [{"type": "text", "text": "a"}], {"1": 1}]
VALID = {CHAT: HELLO, COMPLETIONS: {"prompt": "a"}, EMBEDDINGS: {"input": "a"}}
VALID |= {TOKENIZE: {"prompt": "a"}, DETOKENIZE: {"tokens": [5]}}
VALID[RESPONSES] = {"input": "a", "max_tokens": None, "max_output_tokens": 1}


@pytest.mark.parametrize(("path", "name"), REFUSED)
def test_wrong_values_are_refused_with_the_name_of_the_field(server, path, name):
    for value in REFUSED[path, name]:
        content = json.dumps(VALID[path] | {name: value})  # NaN is none of JSON's numbers
        message = check_refused(server.post(path, content=content, headers=JSON), name)
        assert message.startswith(name)


@pytest.mark.parametrize(
    ("path", "body_type"),
    [
        (CHAT, schema.ChatRequest),
        (COMPLETIONS, schema.CompletionRequest),
        (EMBEDDINGS, schema.EmbeddingRequest),
        (RESPONSES, responses_schema.ResponsesRequest),
        (TOKENIZE, tokens_api.TokenizeRequest),
        (DETOKENIZE, tokens_api.DetokenizeRequest),
    ],
)
def test_no_value_of_a_field_makes_the_server_fail(server, path, body_type):
    """Each field with each value: what passes the validation is answered or refused."""
    document = body_type.model_json_schema()
    for name, field in document["properties"].items():
        definitions = {"$defs": document.get("$defs", {})}
        published = jsonschema.Draft202012Validator(definitions | field)
        for value in ANY_VALUES:
            body = {"max_tokens": 1} | VALID[path] | {name: value}
            try:
                body_type.model_validate(body)
            except pydantic.ValidationError as error:
                errors = [e | {"loc": ("body", *e["loc"])} for e in error.errors()]
                message, param = describe_invalid(RequestValidationError(errors))
                assert param == name and "Input should" not in message  # pydantic's words
                continue
            assert published.is_valid(value), body
            response = server.post(path, content=json.dumps(body), headers=JSON)
            is_unknown = response.status_code == 404  # a stored response
            assert response.is_success or is_unknown or check_refused(response, name), body


def test_bodies_and_routes_that_are_none(server):
    for content, words in (
        ("{", "is not JSON"),
        ("", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"messages": "\xff"}', "not in UTF-8"),
        (f'{{"seed": {"9" * 5000}}}', "too many digits"),
    ):
        assert words in check_error(server.post(CHAT, content=content, headers=JSON), 400)
    for status, method, path in (
        (404, "POST", "/chat/completions"),  # the base URL lacks /v1
        (404, "GET", "/v1/models/THUDM/chatglm2-6b"),
        (405, "GET", CHAT),
        (405, "POST", "/v1/responses/compact"),
        (404, "GET", "/" + "a" * 5000),
    ):
        message = check_error(server.request(method, path), status)
        assert f"no route {method} {path[:100]};" in message and len(message) < 200
    assert server.get(CHAT).headers["allow"] == "POST"


def test_fields_that_exclude_each_other(server):
    for name, fields in (
        ("top_logprobs", {"top_logprobs": 2, "logprobs": False}),
        ("stream_options", {"stream_options": {"include_usage": True}, "stream": False}),
        ("ignore_eos", {"ignore_eos": True, "response_format": {"type": "json_object"}}),
        ("ignore_eos", {"ignore_eos": True, "response_format": json_schema({})}),
    ):
        check_refused(server.post(CHAT, json=HELLO | fields), name)


@pytest.mark.slow
def test_a_long_wrong_list_is_refused_without_checking_each_item(server):
    """To check each item of 4 MB would block all other clients for 7 to 20 s."""
    lists = {
        (CHAT, "messages"): [1, {}, "a", USER],
        (CHAT, "stop"): [1],
        (CHAT, "tools"): [{}],
        (COMPLETIONS, "prompt"): [[0], [[]], 0, -1, "a", None],
        (EMBEDDINGS, "input"): [[0], {}],
        (RESPONSES, "input"): [1, {}, "a", USER, {"type": "item_reference", "id": "a"}],
    }
    for (path, name), items in lists.items():
        for item in items:
            long = [item] * (3_900_000 // (len(json.dumps(item)) + 2))
            content = json.dumps(VALID[path] | {name: long})
            begin = time.process_time()
            response = server.post(path, content=content, headers=JSON)
            assert time.process_time() - begin < 5
            check_refused(response, name)


# Embeddings, models.


def test_embeddings(server, tiny_model, tiny_tokenizer):
    """Means of the last hidden states, of length 1; also of ids, and in base64."""
    texts = ["你好", "long " * 200, *map(str, range(30))]  # more than there are places
    ids = [tiny_tokenizer.encode(text) for text in texts]
    answer = post(server, EMBEDDINGS, input=texts, model="m")
    assert answer["object"] == "list" and answer["model"] == "m"
    num_tokens = sum(map(len, ids))
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    fields = {"encoding_format": "base64", "dimensions": 256.0}
    coded = post(server, EMBEDDINGS, input=[[*map(float, item)] for item in ids], **fields)
    for i, (item, other) in enumerate(zip(answer["data"], coded["data"], strict=True)):
        with torch.inference_mode():
            hidden = tiny_model.transformer(torch.tensor([ids[i]])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
        assert (item["index"], item["object"]) == (i, "embedding")
        np.testing.assert_allclose(item["embedding"], expected, atol=1e-5)
        data = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        np.testing.assert_allclose(data, expected, atol=1e-5)


def test_models(server):
    (model,) = server.get("/v1/models").json()["data"]
    assert model["id"] == "chatglm2-tiny" and model["object"] == "model"
    assert server.get("/v1/models/chatglm2-tiny").json() == model
    for path in ("/v1/models", "/v1/models/chatglm2-tiny", "/metrics", "/openapi.json", "/health"):
        head, get = server.head(path), server.get(path)
        assert (head.status_code, head.content) == (200, b"") and get.content
    assert server.head("/v1/models/other").status_code == 404
    assert server.head(CHAT).status_code == 405
    error = server.get("/v1/models/other").json()["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model"


# Tokens.


def test_tokens_of_a_text(server, tiny_tokenizer):
    for text in ("你好，龘🤖", " a\n\tb ", ""):
        ids = tiny_tokenizer.encode(text)
        answer = post(server, TOKENIZE, prompt=text, return_token_strs=True)
        assert (answer["tokens"], answer["count"]) == (ids, len(ids))
        assert answer["max_model_len"] == 2048
        *special, begin = answer["token_strs"][:3] if text else (*answer["token_strs"], "")
        assert special == ["[gMASK]", "sop"] and begin.startswith(" " if text else "")
        assert post(server, DETOKENIZE, tokens=ids) == {"prompt": text}
        plain = post(server, TOKENIZE, prompt=text, add_special_tokens=False, model="any")
        assert plain["tokens"] == ids[2:] and plain["token_strs"] is None
    assert post(server, TOKENIZE, prompt="a" * 9000)["count"] > 2048  # longer than the context


def test_tokens_of_a_conversation(server, tiny_tokenizer):
    messages = [{"role": "developer", "content": "甲"}, USER]
    answer = post(server, TOKENIZE, messages=messages)
    usage = chat(server, messages=messages, max_tokens=1)["usage"]
    assert answer["count"] == len(answer["tokens"]) == usage["prompt_tokens"]
    text = tiny_tokenizer.decode(answer["tokens"])
    assert post(server, DETOKENIZE, tokens=answer["tokens"]) == {"prompt": text}
    messages.append({"role": "assistant", "content": "好"})
    whole = post(server, TOKENIZE, messages=messages, add_generation_prompt=False)["tokens"]
    assert whole[-1] == tiny_tokenizer.eos_token_id and whole[: answer["count"]] == answer["tokens"]
    body = {"add_special_tokens": False, "messages": messages}
    check_refused(server.post(TOKENIZE, json=body), "add_special_tokens")


# Failing in mid-stream, and the schema.


def test_a_failing_stream_ends_with_an_error_and_without_done(tiny_model, tiny_tokenizer):
    body = HELLO | {"ignore_eos": True, "stream": True}
    with (
        serve(openai_api.create_app, tiny_model, tiny_tokenizer, "--max-batch", "1") as server,
        server.stream("POST", CHAT, json=body) as first,
    ):
        lines = first.iter_lines()
        next(lines)
        with server.stream("POST", CHAT, json=body) as waiting:
            wait_until(lambda: server.batcher.waiting)
            server.batcher.close()
            *_, event, rest = waiting.read().decode().split("\n\n")
        *_, last, _, done, _ = lines
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "unavailable"
    assert not rest and '"finish_reason":"length"' in last and done == "data: [DONE]"


def test_the_schema_documents_only_error_objects_as_errors(server):
    document = server.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path in (CHAT, RESPONSES, COMPLETIONS, EMBEDDINGS):
        assert set(document["paths"][path]["post"]["responses"]) == {"200", "4XX", "503"}


# OpenAI's own client.


def test_openais_client(client):
    create = client.chat.completions.create
    assert create(model="m", **HELLO).choices[0].message.content == GREETING
    chunks = create(model="m", **HELLO, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == GREETING
    with client.chat.completions.stream(model="m", **HELLO) as events:
        assert events.get_final_completion().choices[0].message.content == GREETING
    settings = {"logprobs": 1, "max_tokens": 3, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(model="m", prompt="你好", **settings)
    assert len(answer.choices[0].logprobs.tokens) == 3
    settings = {"echo": True, "logprobs": 1, "max_tokens": 0}
    (choice,) = client.completions.create(model="m", prompt="你好", **settings).choices
    assert choice.text == "你好" and choice.logprobs.token_logprobs[0] is None
    for item in client.embeddings.create(model="m", input=["你好", "a"]).data:  # in base64
        assert math.isclose(np.linalg.norm(item.embedding), 1, abs_tol=1e-5)
    assert [model.id for model in client.models.list()] == ["chatglm2-tiny"]


def test_openais_client_raises_its_errors(client, tiny_model, tiny_tokenizer):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=HELLO["messages"], tools=[TOOL])
    assert caught.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, "--api-key", "k") as server:
        other = client.with_options(base_url=str(server.base_url).rstrip("/") + "/v1")
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
        other = other.with_options(api_key="k")
        assert other.models.list().data
        server.batcher.close()
        with pytest.raises(openai.InternalServerError):
            other.chat.completions.create(model="m", **HELLO)


def test_langchains_client(client):
    langchain_openai = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    llm = langchain_openai.ChatOpenAI(base_url=str(client.base_url), api_key="none", temperature=0)
    assert llm.invoke("你好").content == GREETING
    assert "".join(chunk.content for chunk in llm.stream("你好")) == GREETING


@pytest.mark.parametrize("name", ["README.md", "README_ZH.md"])
def test_the_code_of_the_readme(server, capsys, name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)
    (source,) = [block for block in blocks if block.startswith("from openai import")]
    exec(source.replace("http://127.0.0.1:8000", str(server.base_url).rstrip("/")), {})
    assert "ChatGLM2-tiny" in capsys.readouterr().out
