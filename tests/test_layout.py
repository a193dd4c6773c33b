"""Where files are, and what may import what: scripts, utils, the package, its remote code."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from transformers.dynamic_module_utils import get_imports

from chatglm2.refresh import CODE_FILES

SCRIPTS = {"api", "cli_demo", "openai_api", "web_demo", "web_demo2"}
PACKAGE = sorted((ROOT / "chatglm2").rglob("*.py"))
REMOTE_CODE = {f"chatglm2.{file.stem}" for file in CODE_FILES}


def name_of(file: Path) -> str:
    """Return the name by which a module is imported; a package's own code is `__init__`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def read_imports(file: Path, at_top_only=False) -> set[str]:
    """Return the modules of this project that a file imports."""
    tree, package = ast.parse(file.read_text("utf-8")), name_of(file).rpartition(".")[0]
    found = set()
    for node in tree.body if at_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return set(filter(is_module, found))


def test_pyproject_lists_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = {name_of(file).rpartition(".")[0] for file in PACKAGE}
    assert project["tool"]["setuptools"]["packages"] == sorted(packages)


def test_scripts_are_imported_by_nothing():
    files = {file.stem: file for file in ROOT.glob("*.py")}
    assert files.keys() == {"utils", *SCRIPTS}
    for file in [*files.values(), *PACKAGE]:
        assert not read_imports(file) & SCRIPTS, file


@pytest.mark.parametrize("file", [*PACKAGE, ROOT / "utils.py"], ids=name_of)
def test_the_package_does_not_import_what_is_built_on_it(file):
    for part in ("utils", "chatglm2.chat", "chatglm2.serving"):
        is_above = name_of(file).startswith("chatglm2.chat") and part == "chatglm2.serving"
        if not name_of(file).startswith(part) and not is_above:
            assert not any(name.startswith(part) for name in read_imports(file))


@pytest.mark.parametrize("file", CODE_FILES, ids=name_of)
def test_remote_code_imports_only_its_siblings(file):
    """Other files of the package only within a function or `try`, and only the kernels."""
    assert read_imports(file, at_top_only=True) <= REMOTE_CODE
    guarded = read_imports(file) - REMOTE_CODE
    assert all(name.split(".")[1:2] in ([], ["kernels"]) for name in guarded)
    required = {name.split(".")[0] for name in get_imports(file)} - sys.stdlib_module_names
    allowed = "torch transformers huggingface_hub safetensors sentencepiece packaging"
    assert required <= set(allowed.split())
