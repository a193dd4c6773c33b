"""Where files are, and what may import what: scripts, utils, the package, its remote code."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from chatglm2.configuration_chatglm import AUTO_MAP
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


def find_imports(nodes, package: str) -> set[str]:
    """Return the modules of this project that the nodes of a file in `package` import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return set(filter(is_module, found))


def read_imports(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text("utf-8")))
    return find_imports(nodes, name_of(file).rpartition(".")[0])


def test_the_only_python_files_of_the_root_are_the_scripts():
    assert {file.stem for file in ROOT.glob("*.py")} == SCRIPTS | {"utils"}


def test_pyproject_lists_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = {name_of(file).rpartition(".")[0] for file in PACKAGE}
    assert project["tool"]["setuptools"]["packages"] == sorted(packages)


@pytest.mark.parametrize("script", sorted(SCRIPTS | {"utils"}))
def test_scripts_import_no_script(script):
    assert not read_imports(ROOT / f"{script}.py") & SCRIPTS


@pytest.mark.parametrize("file", PACKAGE, ids=name_of)
def test_the_package_imports_neither_utils_nor_a_script(file):
    assert not read_imports(file) & {"utils", *SCRIPTS}


@pytest.mark.parametrize("part", ["chatglm2.chat", "chatglm2.serving"])
def test_only_scripts_import_what_they_share(part):
    for file in [*PACKAGE, ROOT / "utils.py"]:
        if not name_of(file).startswith(part):
            assert not any(name.startswith(part) for name in read_imports(file)), file


@pytest.mark.parametrize("file", CODE_FILES, ids=name_of)
def test_remote_code_imports_only_its_siblings(file):
    """Other files of the package only within a function or `try`, and only the kernels."""
    tree = ast.parse(file.read_text("utf-8"))
    assert find_imports(tree.body, "chatglm2") <= REMOTE_CODE
    guarded = find_imports(ast.walk(tree), "chatglm2") - REMOTE_CODE
    assert all(name.split(".")[1:2] in ([], ["kernels"]) for name in guarded)
    required = {name.split(".")[0] for name in get_imports(file)} - sys.stdlib_module_names
    assert required <= {"torch", "transformers", "safetensors", "sentencepiece", "packaging"}


def test_transformers_finds_all_remote_code():
    """It copies the files that AUTO_MAP names and the files that these import."""
    imported = {file.stem: set(get_relative_imports(file)) for file in CODE_FILES}
    named = {reference.split(".")[0] for reference in AUTO_MAP.values()} | {"tokenization_chatglm"}
    found = named.union(*(imported[module] for module in named))
    assert found == set(imported)
    assert all(imported[module] <= imported["modeling_chatglm"] for module in found - named)


def test_remote_code_has_no_cycle():
    left = {f"chatglm2.{file.stem}": read_imports(file) & REMOTE_CODE for file in CODE_FILES}
    while free := {name for name, imports in left.items() if not imports & left.keys()}:
        left = {name: imports for name, imports in left.items() if name not in free}
    assert not left
