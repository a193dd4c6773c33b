"""The tokenizer against golden data of the official one, with its tokenizer.model."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
from tokenizers import AddedToken

from chatglm2 import ChatGLMTokenizer
from chatglm2.tokenization_chatglm import CHAT_TEMPLATE

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
    is_error = isinstance(case["decode"], dict)  # of the original, for ids that pad the matrix
    assert official_tokenizer.decode(case["ids"]) == ("" if is_error else case["decode"])


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
        ({}, {"return_assistant_tokens_mask": True}, "needs a fast tokenizer: mask"),
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


@pytest.mark.parametrize("name", ["pad", "eos", "unk", "bos", "cls", "sep", "mask"])
def test_special_tokens_can_be_set(tiny_tokenizer, tmp_path, name):
    """By token and by id, also for control tokens, whose text is empty when decoded."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokens = {0: "<unk>", 2: "</s>", 13: "<0x0A>", 259: "▁a", 4094: "sop", 4096: "<new>"}
    for token_id, token in tokens.items():
        for key, value in ((f"{name}_token", token), (f"{name}_token_id", token_id)):
            setattr(tokenizer, key, value)
            assert getattr(tokenizer, f"{name}_token") == token
            assert getattr(tokenizer, f"{name}_token_id") == token_id
        tokenizer.save_pretrained(tmp_path)
        assert getattr(ChatGLMTokenizer.from_pretrained(tmp_path), f"{name}_token_id") == token_id
    for wrong in (-1, len(tokenizer), 2.5):
        with pytest.raises((ValueError, TypeError)):
            setattr(tokenizer, f"{name}_token_id", wrong)


def test_padding_with_the_end_of_text(any_tokenizer, tmp_path):
    """As training scripts have it."""
    tokenizer = copy.deepcopy(any_tokenizer)
    tokenizer.pad_token_id = tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, ChatGLMTokenizer.from_pretrained(tmp_path)):
        assert each(["a", "a b c"], padding=True)["input_ids"][0][:3] == [
            2,
            2,
            each.get_command("[gMASK]"),
        ]
        assert 2 not in each.encode("</s>")
        assert each.decode([2, 2]) == ""


@pytest.fixture(params=[False, True])
def extended_tokenizer(any_tokenizer, tmp_path, request):
    """A tokenizer with added tokens, as it was made, or saved and loaded."""
    tokenizer = copy.deepcopy(any_tokenizer)
    first = len(tokenizer)
    assert tokenizer.add_tokens(["<drug>", "</s>", "[gMASK]", "sop", "<unk>"]) == 1
    special = {"additional_special_tokens": ["<|obs|>"]}
    assert tokenizer.add_special_tokens(special) == 1
    options = {"<w>": "single_word", "<l>": "lstrip", "<r>": "rstrip"}
    tokenizer.add_tokens([AddedToken(token, **{name: True}) for token, name in options.items()])
    added = ["<drug>", "<|obs|>", *options]
    assert tokenizer.get_added_vocab() == {token: first + i for i, token in enumerate(added)}
    if request.param:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == first + len(added)
    assert tokenizer.get_added_vocab().items() <= tokenizer.get_vocab().items()
    return tokenizer


ADDED = {  # text: the added tokens that it has, and the text after decoding if it is another
    "": ([],),
    "a<drug>b": (["<drug>"],),
    "<drug> b <|obs|>": (["<drug>", "<|obs|>"],),
    "<drug><drug>": (["<drug>", "<drug>"],),
    "<drug\n>": ([],),
    "a <w> b。<w>": (["<w>", "<w>"],),
    "a<w> <w>_ 好<w>": ([],),
    "a \n<l> b": (["<l>"], "a<l> b"),
    "a <r> \nb": (["<r>"], "a <r>b"),
    "<r> <l>": (["<r>", "<l>"], "<r><l>"),
    "</s>[gMASK] sop<unk><s>": ([],),
    "\ud800<drug>\udc00": (["<drug>"], "\ufffd<drug>\ufffd"),
}


def test_added_tokens_split_text(extended_tokenizer):
    tokenizer = extended_tokenizer
    for text, (tokens, *decoded) in ADDED.items():
        for prefix in ("", "。"):
            ids, pieces = tokenizer.encode(prefix + text), tokenizer.tokenize(prefix + text)
            assert [piece for piece in pieces if piece in tokenizer.get_added_vocab()] == tokens
            found = [i for i in ids if i >= tokenizer.vocab_size]
            assert found == tokenizer.convert_tokens_to_ids(tokens)
            assert not set(ids[2:]) & set(tokenizer.control_tokens.values())
            assert tokenizer.decode(ids) == prefix + (*decoded, text)[0]


def test_added_tokens_in_the_prompt_format(any_tokenizer):
    """A round alone continues the conversation, whatever is added."""
    tokenizer = copy.deepcopy(any_tokenizer)
    tokenizer.add_tokens([AddedToken("\n\n", lstrip=True), "]", AddedToken("答", rstrip=True)])
    first, second = tokenizer.build_prompt("a"), tokenizer.build_prompt("c", [("a", "b")])
    ids = tokenizer.encode(first + "b") + tokenizer.build_round("c", [("a", "b")])
    assert ids == tokenizer.encode(second)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "]b"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == [*tokenizer.encode(f"{first}]b"), 2]


def test_added_special_tokens(extended_tokenizer):
    """They are skipped and masked; in a text they can be read as ordinary text."""
    tokenizer, text = extended_tokenizer, "a<|obs|>b<drug>"
    ids = tokenizer.encode(text)
    special, drug = tokenizer.convert_tokens_to_ids(["<|obs|>", "<drug>"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<drug>"
    mask = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert [i for i, is_special in zip(ids, mask, strict=True) if is_special] == [*ids[:2], special]
    messages = [{"role": "user", "content": text}]
    render = partial(tokenizer.apply_chat_template, messages, return_dict=False)
    assert {special, drug} <= set(render())
    for plain in (
        tokenizer.encode(text, split_special_tokens=True),
        render(sanitize_control_tokens=True),
    ):
        assert special not in plain and drug in plain
        assert text in tokenizer.decode(plain)


def test_added_ids_that_are_taken(any_tokenizer, tmp_path):
    any_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8"))
    mask, sop = any_tokenizer.get_prefix_tokens()
    config["added_tokens_decoder"] = {str(mask): {"content": "[gMASK]"}, "2": {"content": "</s>"}}
    file.write_text(json.dumps(config), "utf-8")
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path)  # as other programs write them
    assert tokenizer("[gMASK]</s>") == any_tokenizer("[gMASK]</s>")
    assert tokenizer.decode([mask, sop, 2]) == ""
    for token_id in (-1, 0, 300, sop):
        config["added_tokens_decoder"] = {str(token_id): {"content": "<x>"}}
        file.write_text(json.dumps(config), "utf-8")
        with pytest.raises(ValueError, match=f"the id of '<x>' is {token_id}, which is taken"):
            ChatGLMTokenizer.from_pretrained(tmp_path)


FOREIGN = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    "field",
    [
        FOREIGN,
        [{"name": "default", "template": FOREIGN}],
        {"default": FOREIGN},
        [1],
        5,
        "{% broken",
    ],
)
def test_a_chat_template_of_a_folder_is_not_used(tiny_tokenizer, tmp_path, caplog, field):
    tiny_tokenizer.save_pretrained(tmp_path)
    ChatGLMTokenizer.from_pretrained(tmp_path)
    assert not caplog.messages  # its own
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**config, "chat_template": field}), "utf-8")
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert [str(tmp_path) in line and "\n" not in line for line in caplog.messages] == [True]
    messages = [{"role": "user", "content": "你好"}]
    prompt = tokenizer.build_prompt("你好")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt
    tokenizer.save_pretrained(tmp_path / "again")
    assert ChatGLMTokenizer.from_pretrained(tmp_path / "again").chat_template == CHAT_TEMPLATE
    assert len(caplog.messages) == 1


def test_a_chat_template_file_of_a_folder_is_not_used(tiny_tokenizer, tmp_path, caplog):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/other.jinja", "chat_template.jinja"):
        (tmp_path / name).write_text(FOREIGN, "utf-8")
        caplog.clear()
        assert ChatGLMTokenizer.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE
        assert len(caplog.messages) == 1


def test_a_given_chat_template_is_used(tiny_checkpoint, tiny_tokenizer):
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    expected = tiny_tokenizer.encode("你好")
    loaded = ChatGLMTokenizer.from_pretrained(tiny_checkpoint, chat_template=FOREIGN)
    for tokenizer, options in ((loaded, {}), (tiny_tokenizer, {"chat_template": FOREIGN})):
        ids = tokenizer.apply_chat_template(messages, return_dict=False, **options)
        assert ids == expected


@pytest.mark.parametrize("answer", ["好", "“好”", "《书》\n\n答：", " a </s>", "", "好\ud800"])
def test_a_finished_answer_has_an_end(any_tokenizer, answer):
    """The ids of the prompt are those for generation; answers before the last have no end."""
    render = partial(any_tokenizer.apply_chat_template, return_dict=False)
    question, reply = {"role": "user", "content": "你好"}, {"role": "assistant", "content": answer}
    for prompt in ([question], [question, reply, question]):
        start = render(prompt, add_generation_prompt=True)
        ids = render([*prompt, reply])
        assert 2 not in start and start == render(prompt)
        assert ids[: len(start)] == start and ids[-1] == 2 and ids.count(2) == 1
        shown = any_tokenizer.build_prompt("你好", [("你好", answer)] * (len(prompt) // 2)) + answer
        assert any_tokenizer.decode(ids) == shown.replace("\ud800", "\ufffd")
        assert render([*prompt, reply], tokenize=False) == shown
        assert 2 not in render([*prompt, reply], add_generation_prompt=True)
        assert render([*prompt, reply], return_tensors="pt").tolist() == [ids]
        if answer:
            assert 2 not in render([*prompt, reply], continue_final_message=True)
    for messages in ([reply], [question, reply, reply]):
        assert render(messages)[-1] == 2
    batch = [[question], [question, reply]]
    padded = any_tokenizer.apply_chat_template(batch, padding=True, return_tensors="pt")
    for messages, ids, mask in zip(batch, padded.input_ids, padded.attention_mask, strict=True):
        assert ids[mask.bool()].tolist() == render(messages)
    cut = render(batch[1], truncation=True, max_length=5)
    assert cut == render(batch[1])[:5]


@pytest.mark.parametrize("text", [None, 5, 1.5, b"bytes", {"a": 1}])
def test_what_is_no_text(tiny_tokenizer, text):
    calls = [tiny_tokenizer, tiny_tokenizer.encode, tiny_tokenizer.tokenize]
    calls += [tiny_tokenizer.build_prompt, partial(tiny_tokenizer.build_round, history=[])]
    calls += [lambda text: tiny_tokenizer(["a", text])]
    calls += [lambda text: tiny_tokenizer(["a", text], is_split_into_words=True)]
    for call in calls:
        with pytest.raises((ValueError, TypeError), match=r"string|specify either"):
            call(text)


def test_offsets_are_refused(tiny_tokenizer):
    with pytest.raises(NotImplementedError, match="needs a fast tokenizer"):
        tiny_tokenizer("a", return_offsets_mapping=True)


def test_lone_surrogates_are_replaced(any_tokenizer):
    text, expected = "a\ud800b\udfff\0\ud83d\ude00", "a\ufffdb\ufffd\0😀"
    ids = any_tokenizer.encode(expected)
    assert any_tokenizer.decode(ids) == expected
    assert any_tokenizer.encode(text) == ids
    assert any_tokenizer(["a", text], text_target=[text, "a"])["labels"][0] == ids
    assert any_tokenizer(text, text)["input_ids"] == any_tokenizer(expected, expected)["input_ids"]
    words = {"is_split_into_words": True}
    assert (
        any_tokenizer([text], **words)["input_ids"]
        == any_tokenizer([expected], **words)["input_ids"]
    )
    assert any_tokenizer.tokenize(text) == any_tokenizer.tokenize(expected)
    prompt = any_tokenizer.build_prompt(text, [(text, text)])
    assert any_tokenizer.decode(any_tokenizer.encode(prompt)).count(expected) == 3
    assert any_tokenizer.build_round(text, []) == any_tokenizer.build_round(expected, [])
    messages = [{"role": "user", "content": text}]
    encoded = any_tokenizer.apply_chat_template(messages, return_dict=False)
    assert encoded == any_tokenizer.encode(any_tokenizer.build_prompt(expected))


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
