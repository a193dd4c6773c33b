"""`python -m chatglm2.quantize`: the folder that it writes, and what it refuses."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from loading import fail, load
from memory import PeakMemory
from safetensors.torch import load_file
from transformers import AutoModel

from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, quantize
from chatglm2.refresh import refresh


def run_and_fail(checkpoint, folder, *flags) -> str:
    line = fail(quantize.main, [str(checkpoint), str(folder), *flags])
    assert line.startswith(f"{checkpoint} was not quantized: ")
    assert not folder.with_name(f"{folder.name}.unfinished").exists()
    return line


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_folder(tiny_checkpoint, tmp_path, bits, capsys):
    """It holds what quantizing after loading gives; scripts and remote code load it."""
    folder = tmp_path / "new" / "quantized"
    quantize.main([str(tiny_checkpoint), str(folder), "--bits", str(bits)])
    assert f"{folder}: {tiny_checkpoint} with INT{bits} weights, 0.0" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    expected = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint).quantize(bits)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    tokenizer, model = load(folder)
    answer = model.chat(tokenizer, "你好", do_sample=False)[0]
    assert "ChatGLM2-tiny" in answer
    refresh(folder)
    remote = AutoModel.from_pretrained(folder, trust_remote_code=True).float()
    assert remote.chat(tokenizer, "你好", do_sample=False)[0] == answer


def test_refused(tiny_checkpoint, int4_checkpoint, tmp_path, monkeypatch):
    folder, full = tmp_path / "new", tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert "it has 4 bits already" in run_and_fail(int4_checkpoint, folder)
    assert "is not an empty folder" in run_and_fail(tiny_checkpoint, full)
    assert "no config.json" in run_and_fail(full, folder)
    assert "there is no such folder" in run_and_fail(tmp_path / "missing", folder)
    monkeypatch.setattr(quantize, "get_free_memory", lambda device: 1e6)
    assert "GB of memory are needed" in run_and_fail(tiny_checkpoint, folder)
    monkeypatch.setattr(quantize, "get_free_memory", lambda device: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    assert "on the disk of" in run_and_fail(tiny_checkpoint, folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_disk_that_is_full_while_writing(tiny_checkpoint, tmp_path):
    """A limit on the size of files stands for the full disk; nothing is left behind."""
    program = (
        "import resource, signal, sys; from chatglm2 import quantize;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); quantize.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, str(tiny_checkpoint), str(tmp_path / "new")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "File too large" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_the_quantized_tensors_need_memory(tiny_checkpoint, tmp_path):
    size = {"hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 8}
    config = ChatGLMConfig(**size, kv_channels=128, num_layers=12, padded_vocab_size=4224)
    model = ChatGLMForConditionalGeneration(config).half()
    model.save_pretrained(tmp_path / "float")
    shutil.copy(tiny_checkpoint / "tokenizer.model", tmp_path / "float")
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    del model
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        quantize.quantize(tmp_path / "float", tmp_path / "int4", 4)
    assert memory.peak - before.peak < 0.5 * num_bytes
