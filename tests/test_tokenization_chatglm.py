"""The tokenizer against golden data of the official one, with its tokenizer.model."""

import json
from pathlib import Path

import pytest

from chatglm2 import ChatGLMTokenizer

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "tokenizer" / "tokenizer_golden.json").read_text("utf-8")
)
BATCHES = [name for name, batch in GOLDEN["batches"].items() if "kwargs" in batch]


def parse(value: str):
    """Golden keyword arguments are stored as text: "True", "16", "max_length"."""
    return {"True": True, "False": False}.get(value, int(value) if value.isdigit() else value)


def test_facts(official_tokenizer):
    facts, tokenizer = GOLDEN["facts"], official_tokenizer
    assert tokenizer.vocab_size == len(tokenizer) == facts["vocab_size"]
    assert len(tokenizer.get_vocab()) == facts["vocab_size"]
    assert tokenizer.get_prefix_tokens() == facts["prefix_tokens"]
    names = "pad_token pad_token_id eos_token eos_token_id unk_token unk_token_id special_tokens "
    names += "all_special_tokens all_special_ids padding_side truncation_side model_input_names"
    for name in (*names.split(), "special_tokens_map"):
        assert getattr(tokenizer, name) == facts[name], name
    assert tokenizer.bos_token is None
    for token, token_id in facts["get_command"].items():
        assert tokenizer.get_command(token) == token_id
    with pytest.raises(AssertionError, match="nope is not a special token"):
        tokenizer.get_command("nope")
    for token, token_id in facts["convert"].items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id
    for token_id, token in facts["ids_to_tokens"].items():
        assert tokenizer.convert_ids_to_tokens(int(token_id)) == token
    assert tokenizer.num_special_tokens_to_add() == facts["num_special_tokens_to_add"]
    assert tokenizer.num_special_tokens_to_add(True) == facts["num_special_tokens_to_add_pair"]


@pytest.mark.parametrize("case", GOLDEN["strings"], ids=lambda case: repr(case["text"][:20]))
def test_strings(official_tokenizer, case):
    text, tokenizer = case["text"], official_tokenizer
    encoded = tokenizer(text)
    assert dict(encoded) == {key: case[key] for key in case["keys"]}
    assert tokenizer.encode(text) == case["encode"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == case["encode_no_special"]
    assert tokenizer.tokenize(text) == case["tokenize"]
    assert tokenizer.decode(case["encode"]) == case["decode"]
    assert tokenizer.decode(ids) == case["decode_plain"]
    skipped = tokenizer.decode(case["encode"], skip_special_tokens=True)
    assert skipped == case["decode_skip_special"]


@pytest.mark.parametrize("name", BATCHES)
def test_batches(official_tokenizer, name):
    batch = GOLDEN["batches"][name]
    kwargs = {key: parse(value) for key, value in batch["kwargs"].items()}
    encoded = official_tokenizer(GOLDEN["batches"]["texts"], **kwargs)
    for key in ("input_ids", "attention_mask", "position_ids"):
        assert encoded[key] == batch[key], key


def test_pairs_and_padding(official_tokenizer):
    for pair in GOLDEN["pairs"]:
        assert official_tokenizer(pair["a"], pair["b"])["input_ids"] == pair["input_ids"]
    rows = {"input_ids": [[5, 6], [7]], "position_ids": [[3, 4], [9]]}
    assert official_tokenizer.pad(dict(rows))["position_ids"] == [[3, 4], [0, 9]]
    assert official_tokenizer.pad(rows, padding_side="right")["position_ids"] == [[3, 4], [9, 0]]


@pytest.mark.parametrize("case", GOLDEN["decode"], ids=lambda case: str(case["ids"])[:20])
def test_decode(official_tokenizer, case):
    if isinstance(case["decode"], dict):
        with pytest.raises(IndexError, match=f"{case['ids'][0]} is out of range"):
            official_tokenizer.decode(case["ids"])
    else:
        assert official_tokenizer.decode(case["ids"]) == case["decode"]


def test_prompts(official_tokenizer):
    for key in ("0", "1", "3"):
        case = GOLDEN["prompts"][key]
        prompt = official_tokenizer.build_prompt(case["query"], case["history"])
        assert prompt == case["prompt"]
        assert official_tokenizer.encode(prompt) == case["input_ids"]
    for number in (2, 4):
        case = GOLDEN["prompts"][f"stream_round_{number}"]
        query = case["prompt"].split("问：")[1].split("\n\n答：")[0]
        ids = official_tokenizer.build_round(query, [("", "")] * (number - 1))
        assert ids == case["after_drop_first"]


def test_chat_template_gives_the_ids_of_build_prompt(any_tokenizer):
    texts = ("user", "你好"), ("assistant", "你好👋！"), ("user", "[gMASK] sop </s>")
    messages = [{"role": role, "content": text} for role, text in texts]
    prompt = any_tokenizer.build_prompt("[gMASK] sop </s>", [("你好", "你好👋！")])
    ids, render = any_tokenizer.encode(prompt), any_tokenizer.apply_chat_template
    for options in ({}, {"add_generation_prompt": True}, {"sanitize_control_tokens": True}):
        encoded = render(messages, **options)
        assert encoded["input_ids"] == ids
        assert encoded["position_ids"] == list(range(len(ids)))
    assert render(messages, tokenize=False) == prompt
    batch = render([messages, messages[:1]], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist()[0] == len(ids)


@pytest.mark.parametrize(
    "roles, expected",
    [
        ("u", "[Round 1]\n\n问：u0\n\n答："),
        ("su", "[Round 1]\n\n问：s0\n\nu1\n\n答："),
        ("us", "[Round 1]\n\n问：s1\n\nu0\n\n答："),
        ("suasu", "[Round 1]\n\n问：s0\n\ns3\n\nu1\n\n答：a2\n\n[Round 2]\n\n问：u4\n\n答："),
        ("uu", "[Round 1]\n\n问：u0\n\nu1\n\n答："),
        ("uaau", "[Round 1]\n\n问：u0\n\n答：a1\n\na2\n\n[Round 2]\n\n问：u3\n\n答："),
        ("au", "[Round 1]\n\n问：\n\n答：a0\n\n[Round 2]\n\n问：u1\n\n答："),
        ("sau", "[Round 1]\n\n问：s0\n\n答：a1\n\n[Round 2]\n\n问：u2\n\n答："),
        ("s", "[Round 1]\n\n问：s0\n\n答："),
        ("ua", "[Round 1]\n\n问：u0\n\n答：a1\n\n[Round 2]\n\n问：\n\n答："),
    ],
)
def test_chat_template_folds_any_roles_into_rounds(any_tokenizer, roles, expected):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[r], "content": f"{r}{i}"} for i, r in enumerate(roles)]
    text = any_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == expected


def test_chat_template_takes_text_parts(any_tokenizer):
    parts = [{"type": "text", "text": "看"}, {"type": "text", "text": "图"}]
    messages = [{"role": "user", "content": parts}]
    text = any_tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == any_tokenizer.build_prompt("看图")


@pytest.mark.parametrize(
    "message, options, error",
    [
        ({"content": [{"type": "image"}]}, {}, "not a part of type image"),
        ({"role": "tool"}, {}, "not tool"),
        ({"tool_calls": [{"id": "1"}]}, {}, "not trained for tool_calls"),
        ({}, {"tools": [{"type": "function"}]}, "not trained for tools"),
        ({}, {"return_assistant_tokens_mask": True}, "needs a fast tokenizer"),
    ],
)
def test_chat_template_refuses_what_it_cannot_do(tiny_tokenizer, message, options, error):
    with pytest.raises(Exception, match=error):
        tiny_tokenizer.apply_chat_template([{"role": "user", "content": "x", **message}], **options)


def test_save_and_reload(any_tokenizer, tmp_path):
    any_tokenizer.save_pretrained(tmp_path)
    saved = (tmp_path / "tokenizer.model").read_bytes()
    assert saved == Path(any_tokenizer.vocab_file).read_bytes()
    reloaded = ChatGLMTokenizer.from_pretrained(tmp_path)
    text = "你好 world 👋\n"
    assert reloaded(text) == any_tokenizer(text)
    assert reloaded.decode(reloaded.encode(text)) == text
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    reloaded.pad_token = reloaded.eos_token  # as training scripts do
    assert reloaded.pad_token_id == reloaded.eos_token_id == 2
    assert 2 not in reloaded.encode("</s>")


def test_damaged_vocabulary(tiny_checkpoint, tmp_path):
    file = tmp_path / "tokenizer.model"
    cut = (tiny_checkpoint / file.name).read_bytes()[:-1000]
    contents = dict.fromkeys((cut, b"<html>not found</html>", b""), "truncated or damaged")
    contents[b"version https://git-lfs.github.com/spec/v1\n"] = "a Git LFS pointer"
    for content, problem in contents.items():
        file.write_bytes(content)
        message = rf"tokenizer\.model \({len(content)} bytes\) is {problem}"
        with pytest.raises(ValueError, match=message):
            ChatGLMTokenizer.from_pretrained(tmp_path)


def test_special_tokens_mask(any_tokenizer):
    for texts in (["a b"], ["a", "b c"]):
        encoded = any_tokenizer(*texts, return_special_tokens_mask=True)
        mask, ids = encoded["special_tokens_mask"], encoded["input_ids"]
        assert len(mask) == len(ids) and mask[:3] == [1, 1, 0]
        again = any_tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        assert again == mask
