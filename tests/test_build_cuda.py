"""Compiling the CUDA kernels; no GPU is needed, but one test needs nvcc or NVRTC."""

import shutil

import pytest

from chatglm2.kernels import build_cuda
from chatglm2.kernels.build_cuda import NVCC, NVRTC, build, get_kernel_folder


def test_each_source_has_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path))
    folder = get_kernel_folder()
    assert folder.parent == tmp_path
    other = tmp_path / "other.cu"
    other.write_bytes(build_cuda.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(build_cuda, "SOURCE", other)
    assert get_kernel_folder() != folder


class FakeCompiler:
    name = "fake 1.0"

    def get_archs(self):
        return [110, 75, 80, 90]

    def compile(self, target):
        return target.encode()


def test_build_writes_cubins_and_ptx_of_the_oldest(tmp_path):
    files = build(FakeCompiler(), folder=tmp_path / "new")
    assert sorted(tmp_path.rglob("*.*")) == sorted(files)
    names = {file.name: file.read_text() for file in files}
    assert names == {
        "sm_75.cubin": "sm_75",
        "sm_80.cubin": "sm_80",
        "sm_90.cubin": "sm_90",
        "compute_75.ptx": "compute_75",
    }


def test_build_of_an_unknown_architecture(tmp_path):
    message = r"^fake 1.0 does not know the architecture 70: give some of 75, 80, 90, 110, or"
    with pytest.raises(RuntimeError, match=message):
        build(FakeCompiler(), [70, 80], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_leaves_no_file(tmp_path):
    class FailingCompiler(FakeCompiler):
        def compile(self, target):
            raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        build(FailingCompiler(), [80], tmp_path)
    assert not list(tmp_path.iterdir())


def test_build_from_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path))
    monkeypatch.setattr(build_cuda, "find_compiler", FakeCompiler)
    build_cuda.main(["--arch", "90", "80"])
    assert capsys.readouterr().out == (
        f"fake 1.0 wrote to {get_kernel_folder()}: sm_80.cubin, sm_90.cubin, compute_80.ptx\n"
    )
    with pytest.raises(SystemExit, match=r"^error: fake 1.0 does not know the architecture 70"):
        build_cuda.main(["--arch", "70"])


def test_build_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build_cuda, "find_in_wheels", lambda patterns: [])
    with pytest.raises(SystemExit, match="no compiler for CUDA") as error:
        build_cuda.main([])
    assert "\n" not in str(error.value)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("compiler", [NVCC, NVRTC])
def test_compiler(compiler, monkeypatch, tmp_path):
    try:
        compiler = compiler()
    except OSError as error:
        pytest.skip(str(error))
    files = build(compiler, [80], tmp_path)
    assert [file.name for file in files] == ["sm_80.cubin", "compute_80.ptx"]
    cubin, ptx = (file.read_bytes() for file in files)
    assert cubin.startswith(b"\x7fELF")
    for bits in (8, 4):
        for dtype in ("float16", "bfloat16", "float32"):
            name = f"int{bits}_to_{dtype}".encode()
            assert name in cubin and b".entry " + name + b"(" in ptx

    broken = tmp_path / "broken.cu"
    broken.write_text("nonsense")
    monkeypatch.setattr(build_cuda, "SOURCE", broken)
    with pytest.raises(RuntimeError, match="nonsense"):
        compiler.compile("sm_80")
