"""`python -m chatglm2.refresh`: today's code into a downloaded folder, and back."""

import json
import os
import shutil
from pathlib import Path

import pytest

from chatglm2 import refresh
from chatglm2.configuration_chatglm import AUTO_MAP, TRANSFORMERS_RANGE

TOKENIZER_AUTO_MAP = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
CONFIG = {
    "_name_or_path": "测试/chatglm2-6b",
    "model_type": "chatglm",
    "auto_map": {"AutoConfig": "configuration_chatglm.OldConfig"},
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
}
AUTO_MAPS = {"config.json": AUTO_MAP, "tokenizer_config.json": TOKENIZER_AUTO_MAP}
OLD_CODE = [f"{name}_chatglm.py" for name in ("configuration", "modeling", "tokenization")]
OLD_CODE += ["quantization.py"]
COMMIT = "d" * 40
NEW_CODE = {file.name: file.read_bytes() for file in refresh.CODE_FILES}


def write_checkpoint(folder: Path, **config) -> Path:
    """Write a folder as it was downloaded in 2023, without weights."""
    folder.mkdir(parents=True)
    for name in OLD_CODE:
        (folder / name).write_bytes(f"# {name} of 2023，原文件\r\n".encode())
    (folder / "config.json").write_text(json.dumps(CONFIG | config, indent=4), "utf-8")
    fields = {"remove_space": False, "auto_map": TOKENIZER_AUTO_MAP}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), "utf-8")
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    return folder


def write_snapshot(hub: Path, source: Path) -> Path:
    """Write a folder as the Hugging Face cache holds it, links to blobs; return the snapshot."""
    repo = hub / "models--THUDM--chatglm2-6b"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for i, file in enumerate(source.iterdir()):
        shutil.copy(file, repo / "blobs" / f"{i}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{i}"))
    return snapshot


def write_copies(modules: Path, snapshot: Path) -> Path:
    """Copy the code of a snapshot as transformers does before it executes the code."""
    copies = modules / "transformers_modules" / "THUDM" / "chatglm2_hyphen_6b" / COMMIT
    copies.mkdir(parents=True)
    for file in snapshot.glob("*.py"):
        shutil.copy(file, copies)
    return copies


def read_files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run_and_fail(capsys, *args) -> str:
    """Run the command, which must end with exit code 1, and return its one line."""
    with pytest.raises(SystemExit) as error:
        refresh.main([str(arg) for arg in args])
    message = error.value.code
    assert isinstance(message, str) and "\n" not in message  # Python prints it and exits with 1
    assert capsys.readouterr().out == ""
    return message


def test_refresh(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "my model", quantization_bit=4)
    old = read_files(folder)
    refresh.main([str(folder)])
    new = read_files(folder)
    assert new.items() >= NEW_CODE.items()
    assert new["tokenizer.model"] == old["tokenizer.model"]
    assert {name for name in new if "/" not in name} == {"tokenizer.model", *AUTO_MAPS, *NEW_CODE}
    for name, auto_map in AUTO_MAPS.items():
        old_fields, fields = json.loads(old[name]), json.loads(new[name])
        assert fields == old_fields | {"auto_map": auto_map}
        assert list(fields) == list(old_fields)
    assert '"_name_or_path": "测试/chatglm2-6b"' in new["config.json"].decode()
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert f"python -m chatglm2.refresh '{folder}' --undo" in output
    assert all(name in output for name in (*NEW_CODE, ".before_refresh", *TRANSFORMERS_RANGE))
    # A second refresh keeps the originals.
    (folder / "modeling_chatglm.py").write_text("# last year's version")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"seq_length": 8192}))
    refresh.main([str(folder)])
    again = read_files(folder)
    config = CONFIG | {"auto_map": AUTO_MAP, "seq_length": 8192}
    assert json.loads(again["config.json"]) == config
    assert again == new | {"config.json": again["config.json"]}
    capsys.readouterr()
    refresh.main([str(folder), "--undo"])
    assert read_files(folder) == old
    assert not (folder / ".before_refresh").exists()
    assert capsys.readouterr().out.count("\n") == 1
    assert "nothing to undo" in run_and_fail(capsys, folder, "--undo")


def test_folder_without_code(tmp_path):
    folder = write_checkpoint(tmp_path / "data only")
    for name in (*OLD_CODE, "tokenizer_config.json"):
        (folder / name).unlink()
    old = read_files(folder)
    refresh.main([str(folder)])
    assert NEW_CODE.items() <= read_files(folder).items()
    fields = json.loads((folder / "tokenizer_config.json").read_bytes())
    assert fields == {"auto_map": TOKENIZER_AUTO_MAP}
    refresh.main([str(folder), "--undo"])
    assert read_files(folder) == old


CHATGLM3 = b'{"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "config.json is not valid JSON (Expecting property name"),
        ("config.json", b"\xff\xfe", "config.json is not in UTF-8 ("),
        ("config.json", b"[]", "config.json holds no JSON object"),
        ("config.json", b"{}", "config.json has model_type None, not 'chatglm'"),
        ("config.json", b'{"model_type": "glm"}', "has model_type 'glm', transformers' own"),
        ("config.json", b'{"model_type": "chatglm"}', "has no multi_query_attention, so it is not"),
        ("tokenizer_config.json", b"nonsense", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", CHATGLM3, "knows the token <|user|>, so it is ChatGLM3"),
        ("tokenization_chatglm.py", b'"<|user|>"', "knows the token <|user|>, so it is ChatGLM3"),
    ],
)
def test_refused_folders(tmp_path, capsys, name, content, message):
    folder = write_checkpoint(tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    old = read_files(folder)
    assert message in run_and_fail(capsys, folder)
    assert read_files(folder) == old


@pytest.mark.parametrize("option", [(), ("--undo",)])
def test_folders_that_cannot_be_changed(tmp_path, capsys, monkeypatch, option):
    message = run_and_fail(capsys, tmp_path / "chatglm2-6b", *option)
    assert "chatglm2-6b is not a folder" in message and "hf download" in message
    folder = write_checkpoint(tmp_path / "model")
    if option:
        refresh.main([str(folder)])
        capsys.readouterr()
    old = read_files(folder)

    def refuse(path, *args):  # permissions do not stop root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    message = run_and_fail(capsys, folder, *option)
    assert "cannot be changed ([Errno 13] Permission denied: " in message
    assert "make the folder writable" in message
    assert read_files(folder) == old


def interrupt_before(monkeypatch, num_steps: int):
    """Raise in front of a step that writes."""
    steps = iter(range(num_steps))

    def wrap(function):
        def count(*args, **kwargs):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return count

    for name in ("mkdir", "write_bytes", "replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, wrap(getattr(Path, name)))
    monkeypatch.setattr(shutil, "copy2", wrap(shutil.copy2))


@pytest.mark.parametrize("option", [(), ("--undo",)])
def test_interruption_loses_nothing(tmp_path, option):
    folder = write_checkpoint(tmp_path / "model")
    old = read_files(folder)
    refresh.main([str(folder)])
    refreshed = read_files(folder)
    for steps in range(100):
        shutil.rmtree(folder)
        write_checkpoint(folder)
        if option:
            refresh.main([str(folder)])
        with pytest.MonkeyPatch.context() as monkeypatch:
            interrupt_before(monkeypatch, steps)
            try:
                refresh.main([str(folder), *option])
                break
            except KeyboardInterrupt:
                files = read_files(folder)
        for name, content in old.items():
            assert content in (files.get(name), files.get(f".before_refresh/{name}"))
        refresh.main([str(folder)])
        assert read_files(folder) == refreshed
        refresh.main([str(folder), "--undo"])
        assert read_files(folder) == old
    assert 10 < steps < 99


def test_snapshot_of_links(tmp_path, monkeypatch):
    """The blobs stay; what transformers copied from this snapshot is deleted, another commit not.

    DIR may be a link to the snapshot.
    """
    original = write_checkpoint(tmp_path / "original")
    snapshot, modules = write_snapshot(tmp_path / "hub", original), tmp_path / "modules"
    blobs, old = snapshot.parent.parent / "blobs", read_files(original)
    stored = read_files(blobs)
    monkeypatch.setenv("HF_MODULES_CACHE", str(modules))
    (tmp_path / "link").symlink_to(snapshot)
    for option, expected in (((), NEW_CODE), (("--undo",), old)):
        copies = write_copies(modules, snapshot)
        other = copies.with_name("e" * 40)
        other.mkdir(exist_ok=True)
        refresh.main([str(tmp_path / "link"), *option])
        assert expected.items() <= read_files(snapshot).items()
        assert read_files(blobs) == stored
        assert not copies.exists() and other.exists()
    assert read_files(snapshot) == old
