"""The READMEs: Python blocks run, links resolve, commands name scripts and flags that exist."""

import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

READMES = ["README.md", "README_ZH.md", "FAQ.md"]
READMES += ["resources/chatglm2-tiny/README.md", "evaluation/README.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def strip_prompts(block: str) -> str:
    """Reduce an interactive session to its statements."""
    if not block.startswith(">>>"):
        return block
    return "\n".join(line[4:] for line in block.splitlines() if line.startswith((">>>", "...")))


def commands(text: str) -> list[list[str]]:
    """Return the words of each `python ...` command in the shell blocks."""
    whole = [block.replace("\\\n", " ") for block in blocks(text, "shell")]
    lines = [line for block in whole for line in block.splitlines()]
    parts = [part for line in lines for part in line.split("&&")]
    words = [shlex.split(part, comments=True) for part in parts]
    return [command for command in words if command[:1] == ["python"]]


@cache
def read_help(*script: str) -> str:
    run = [sys.executable, *script, "--help"]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "README_ZH.md"])
def test_python_blocks_run(name, tiny_checkpoint, int4_checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one block saves a model
    source = "\n".join(
        strip_prompts(block)
        for block in blocks((ROOT / name).read_text("utf-8"), "python")
        if "openai" not in block  # needs a server: test_openai_api.py
    )
    for old, new in (
        ("THUDM/chatglm2-6b-int4", str(int4_checkpoint)),
        ("THUDM/chatglm2-6b", str(tiny_checkpoint)),
        ("device='cuda'", "device='cpu'"),
        (".cuda()", ".cpu()"),
        ('.to("mps")', '.to("cpu")'),
        ("num_gpus=2", "device_map={'': 'cpu'}"),
    ):
        assert old in source
        source = source.replace(old, new)
    exec(compile(source, name, "exec"), {})
    output = capsys.readouterr().out
    assert "ChatGLM2-tiny" in output and "Paris" in output


@pytest.mark.parametrize("name", READMES)
def test_links_resolve(name):
    path = ROOT / name
    text = path.read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


@pytest.mark.parametrize("name", READMES)
def test_commands_name_scripts_and_flags_that_exist(name):
    for _, *words in commands((ROOT / name).read_text("utf-8")):
        script = words[: 2 if words[0] == "-m" else 1]
        if script[0] != "-m":
            assert (ROOT / script[0]).exists(), script
        flags = [word for word in words[len(script) :] if word.startswith("-")]
        for flag in flags:
            assert flag in read_help(*script), f"{script} has no {flag}"


def test_both_languages_show_the_same_commands_and_code():
    english, chinese = ((ROOT / name).read_text("utf-8") for name in READMES[:2])
    assert commands(english) == commands(chinese)
    code = [
        [strip_prompts(block) for block in blocks(text, "python")] for text in (english, chinese)
    ]
    assert [re.sub("#.*", "", block) for block in code[0]] == [
        re.sub("#.*", "", block) for block in code[1]
    ]
    headings, pictures, tables = r"^(#{2,4}) ", r"!\[.*?\]\((.*?)\)", r"^(\|[-|: ]+\|)$"
    for pattern in (headings, pictures, tables):
        found = [re.findall(pattern, text, re.MULTILINE) for text in (english, chinese)]
        assert found[0] == found[1]


def test_sections_stand_in_the_order_of_the_original():
    sections = re.findall(r"^##+ (.*)$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    wanted = """Introduction, Evaluation, Inference performance, Examples, Installation, Code,
        Local loading, Web pages, Terminal, API, OpenAI API, Quantization, CPU, Mac, Several GPUs,
        Licence, Citation, Thanks, Development, Differences from the original,
        Not run on real hardware"""
    places = [sections.index(" ".join(name.split())) for name in wanted.split(",")]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["README.md", "README_ZH.md"])
def test_examples_are_the_answers_of_the_bundled_model(name, tiny_model, tiny_tokenizer):
    examples = blocks((ROOT / name).read_text("utf-8"), "text")
    assert len(examples) == 2
    for example in examples:
        rounds = re.findall(r"用户：(.*?)\nChatGLM：(.*?)\n(?:\n|$)", example, re.DOTALL)
        assert len(rounds) == example.count("用户：")
        history = []
        for query, answer in rounds:
            response, history = tiny_model.chat(tiny_tokenizer, query, history, do_sample=False)
            assert response == answer


@pytest.mark.parametrize("name", ["README.md", "README_ZH.md"])
def test_the_file_table_names_every_module(name):
    text = (ROOT / name).read_text("utf-8")
    named = set(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    named = {file for cell in named for file in re.findall(r"`(.*?)`", cell)}
    modules = [*ROOT.glob("*.py"), *(ROOT / "chatglm2").glob("[!_]*.py")]
    modules += (ROOT / "chatglm2" / "serving").glob("[!_]*.py")
    assert named.issuperset(str(path.relative_to(ROOT)) for path in modules)
    assert all((ROOT / file).exists() for file in named if re.search(r"/$|\.(py|md)$", file))


def test_ci_runs_the_readmes_test_command():
    command = "pip install -r requirements-dev.txt && python -m pytest"
    assert command in blocks((ROOT / "README.md").read_text("utf-8"), "shell")[-1]
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text("utf-8")
