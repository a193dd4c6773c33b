"""The commands of the documentation parse, and its Python code runs on the bundled model."""

import argparse
import re
import shlex
from functools import cache
from unittest.mock import patch

import pytest
from conftest import ROOT
from test_docs import PAGES, generate

CODE = [page for page in PAGES if page.parent == ROOT / "docs" and not page.stem.endswith("_zh")]
CODE.remove(ROOT / "docs" / "api_examples.md")  # needs a server: test_api_examples.py
CODE += [ROOT / "README.md", ROOT / "FAQ.md"]
TRANSLATED = {
    "README_ZH.md": "README.md",
    "docs/cpu_zh.md": "docs/cpu.md",
    "docs/deployment_zh.md": "docs/api.md",
    "docs/quantization_zh.md": "docs/quantization.md",
}
REPLACED = {
    "device='cuda'": "device='cpu'",
    ".cuda()": ".cpu()",
    '.to("mps")': '.to("cpu")',
    "num_gpus=2": "device_map={'': 'cpu'}",
}


def relative(page) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def strip_prompts(block: str) -> str:
    """Reduce an interactive session to its statements."""
    if not block.startswith(">>>"):
        return block
    return "\n".join(line[4:] for line in block.splitlines() if line.startswith((">>>", "...")))


def find_commands(text: str) -> list[list[str]]:
    """Return the words after `python` of each command, up to a redirection or a pipe."""
    lines = "\n".join(blocks(text, "shell")).replace("\\\n", " ").replace("&&", "\n").splitlines()
    lines += re.findall(r"`(python [^`]*)`", text)
    commands = [shlex.split(re.split(" [<|] ", line)[0], comments=True) for line in lines]
    return [words[1:] for words in commands if words[:1] == ["python"] and "pytest" not in words]


@cache
def load_parser(script: str) -> argparse.ArgumentParser:
    """Return the parser that a script (or a module a.b) uses."""
    used = []

    def stop(parser, *args, **kwargs):
        used.append(parser)
        raise SystemExit

    with patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        generate.read_help(script)
    return used[0]


def parse(words: list[str]):
    """Parse a command with the parser of its script; exit if it cannot."""
    script, flags = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    assert words[0] == "-m" or (ROOT / script).exists(), script
    if flags:
        _, rest = load_parser(script).parse_known_args(flags)
        if rest:  # load_test.py hands what it does not know to openai_api.py
            assert script == "evaluation/load_test.py", rest
            load_parser("openai_api.py").parse_args(rest)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_parse(page, tmp_path):
    (tmp_path / "keys").write_text("key\n", "utf-8")
    for words in find_commands(page.read_text("utf-8")):
        parse([f"@{tmp_path}/keys" if word.startswith("@") else word for word in words])


@pytest.mark.parametrize("page", CODE, ids=relative)
def test_python_blocks_run(page, tiny_checkpoint, int4_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one block saves a model
    source = "\n".join(
        strip_prompts(block)
        for block in blocks(page.read_text("utf-8"), "python")
        if "openai" not in block  # needs a server: test_openai_api.py
        and "llama_cpp" not in block  # has an environment of its own: test_gguf.py
    )
    source = source.replace("THUDM/chatglm2-6b-int4", str(int4_checkpoint))
    source = source.replace("THUDM/chatglm2-6b", str(tiny_checkpoint))
    for old, new in REPLACED.items():
        source = source.replace(old, new)
    exec(compile(source, page.name, "exec"), {})


@pytest.mark.parametrize("name", TRANSLATED)
def test_chinese_pages_have_the_code_of_the_english_ones(name):
    chinese, english = [
        [re.sub(" *#.*", "", block) for kind in ("python", "text") for block in blocks(text, kind)]
        for text in ((ROOT / page).read_text("utf-8") for page in (name, TRANSLATED[name]))
    ]
    assert chinese and set(chinese) <= set(english)


def test_examples_are_the_answers_of_the_bundled_model(tiny_model, tiny_tokenizer):
    for example in blocks((ROOT / "README.md").read_text("utf-8"), "text"):
        rounds = re.findall(r"用户：(.*?)\nChatGLM：(.*?)\n(?:\n|$)", example, re.DOTALL)
        assert len(rounds) == example.count("用户：") > 0
        history = []
        for query, answer in rounds:
            response, history = tiny_model.chat(tiny_tokenizer, query, history, do_sample=False)
            assert response == answer
