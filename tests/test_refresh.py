"""`python -m chatglm2.refresh`: today's code into a downloaded folder, and back."""

import json
import os
import shutil
from pathlib import Path

import pytest

from chatglm2 import refresh
from chatglm2.configuration_chatglm import AUTO_MAP, TRANSFORMERS_RANGE

OLD_AUTO_MAP = {"AutoConfig": "configuration_chatglm.OldConfig"}
CONFIG = {
    "_name_or_path": "测试/chatglm2-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": OLD_AUTO_MAP,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "padded_vocab_size": 65024,
}
TOKENIZER_CONFIG = {
    "remove_space": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
OLD_CODE = [f"{name}_chatglm.py" for name in ("configuration", "modeling", "tokenization")]
OLD_CODE += ["quantization.py"]
NEW_CODE = {file.name: file.read_bytes() for file in refresh.CODE_FILES}


def write_checkpoint(folder: Path, **config) -> Path:
    """Write a folder as it was downloaded in 2023, without weights."""
    folder.mkdir(parents=True)
    for name in OLD_CODE:
        (folder / name).write_bytes(f"# {name} of 2023，原文件\r\n".encode())
    (folder / "config.json").write_text(json.dumps(CONFIG | config, indent=4), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), "utf-8")
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    return folder


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


@pytest.fixture(params=[{}, {"quantization_bit": 4}], ids=["fp16", "int4"])
def folder(request, tmp_path):
    return write_checkpoint(tmp_path / "my model", **request.param)


def test_refresh(folder, capsys):
    old = read_files(folder)
    refresh.main([str(folder)])
    new = read_files(folder)
    for name, code in NEW_CODE.items():
        assert new[name] == code
    assert new["tokenizer.model"] == old["tokenizer.model"]
    names = {name for name in new if "/" not in name}
    assert names == {"tokenizer.model", "config.json", "tokenizer_config.json", *NEW_CODE}
    auto_maps = {"config.json": AUTO_MAP, "tokenizer_config.json": TOKENIZER_CONFIG["auto_map"]}
    for name, auto_map in auto_maps.items():
        old_fields, fields = json.loads(old[name]), json.loads(new[name])
        assert fields == old_fields | {"auto_map": auto_map}
        assert list(fields) == list(old_fields)
    assert '"_name_or_path": "测试/chatglm2-6b"' in new["config.json"].decode()
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert f"python -m chatglm2.refresh '{folder}' --undo" in output
    assert all(name in output for name in (*NEW_CODE, ".before_refresh", *TRANSFORMERS_RANGE))
    refresh.main([str(folder), "--undo"])
    assert read_files(folder) == old
    assert not (folder / ".before_refresh").exists()
    assert capsys.readouterr().out.count("\n") == 1
    assert "nothing to undo" in run_and_fail(capsys, folder, "--undo")


def test_second_refresh_keeps_the_originals(folder):
    old = read_files(folder)
    refresh.main([str(folder)])
    first = read_files(folder)
    (folder / "modeling_chatglm.py").write_text("# last year's version")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"seq_length": 8192}))
    refresh.main([str(folder)])
    second = read_files(folder)
    assert json.loads(second.pop("config.json")) == CONFIG | {
        "auto_map": AUTO_MAP,
        "seq_length": 8192,
    }
    assert second == {name: content for name, content in first.items() if name != "config.json"}
    refresh.main([str(folder), "--undo"])
    assert read_files(folder) == old


def test_folder_without_code(tmp_path):
    folder = write_checkpoint(tmp_path / "data only")
    for name in (*OLD_CODE, "tokenizer_config.json"):
        (folder / name).unlink()
    old = read_files(folder)
    refresh.main([str(folder)])
    assert NEW_CODE.items() <= read_files(folder).items()
    auto_map = {"auto_map": TOKENIZER_CONFIG["auto_map"]}
    assert json.loads((folder / "tokenizer_config.json").read_bytes()) == auto_map
    refresh.main([str(folder), "--undo"])
    assert read_files(folder) == old


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json is not valid JSON (Expecting property name"),
        ("config.json", b"\xff\xfe", "config.json is not valid JSON ("),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("config.json", "{}", "config.json has model_type None, not 'chatglm'"),
        ("config.json", '{"model_type": "glm"}', "has model_type 'glm', not 'chatglm'"),
        (
            "config.json",
            '{"model_type": "chatglm", "position_encoding_2d": true}',
            "has no multi_query_attention, so it is not ChatGLM2",
        ),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json is not valid JSON"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}',
            "tokenizer_config.json knows the token <|user|>, so it is ChatGLM3",
        ),
        (
            "tokenization_chatglm.py",
            'special_tokens = ["<|system|>", "<|user|>"]',
            "tokenization_chatglm.py knows the token <|user|>, so it is ChatGLM3",
        ),
    ],
)
def test_refused_folders(tmp_path, capsys, name, content, message):
    folder = write_checkpoint(tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    old = read_files(folder)
    assert message in run_and_fail(capsys, folder)
    assert read_files(folder) == old


def test_no_such_folder(tmp_path, capsys):
    for option in ([], ["--undo"]):
        message = run_and_fail(capsys, tmp_path / "THUDM" / "chatglm2-6b", *option)
        assert "THUDM/chatglm2-6b is not a folder" in message and "hf download" in message


@pytest.mark.parametrize("option", [(), ("--undo",)])
def test_read_only_folder(tmp_path, capsys, monkeypatch, option):
    folder = write_checkpoint(tmp_path / "model")
    if option:
        refresh.main([str(folder)])
        capsys.readouterr()
    old = read_files(folder)
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # root may write everywhere

        def refuse(path, *args):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "mkdir", refuse)
    message = run_and_fail(capsys, folder, *option)
    assert "cannot be changed ([Errno 13] Permission denied: " in message
    assert "make the folder writable" in message
    folder.chmod(0o755)
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
    blobs, commit = tmp_path / "models--THUDM--chatglm2-6b" / "blobs", "d" * 40
    original = write_checkpoint(tmp_path / "original")
    old = read_files(original)
    snapshot = blobs.parent / "snapshots" / commit
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, (name, content) in enumerate(old.items()):
        (blobs / f"{i}").write_bytes(content)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", f"{i}"))
    stored = read_files(blobs)
    modules = tmp_path / "modules"
    monkeypatch.setenv("HF_MODULES_CACHE", str(modules))
    copy = modules / "transformers_modules" / "THUDM" / "chatglm2_hyphen_6b" / commit
    other = copy.with_name("e" * 40)
    link = tmp_path / "link"
    link.symlink_to(snapshot)

    for option, expected in (((), NEW_CODE), (("--undo",), old)):
        for path in (copy, other):
            path.mkdir(parents=True, exist_ok=True)
            (path / "modeling_chatglm.py").write_text("# what transformers copied")
        refresh.main([str(link), *option])
        assert expected.items() <= read_files(snapshot).items()
        assert read_files(blobs) == stored
        assert not copy.exists() and other.exists()
    assert read_files(snapshot) == old
