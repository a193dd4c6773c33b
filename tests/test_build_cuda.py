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
    assert [f"{file.stem} {file.suffix}" for file in files] == [
        "sm_75 .cubin", "sm_80 .cubin", "sm_90 .cubin", "compute_75 .ptx",
    ]  # fmt: skip
    assert all(file.read_text() == file.stem for file in files)


def test_build_from_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path))
    monkeypatch.setattr(build_cuda, "find_compiler", FakeCompiler)
    build_cuda.main(["--arch", "90", "80"])
    assert capsys.readouterr().out == (
        f"fake 1.0 wrote to {get_kernel_folder()}: sm_80.cubin, sm_90.cubin, compute_80.ptx\n"
    )


def test_failures_leave_no_file(monkeypatch, tmp_path):
    def fail(self, target):
        raise RuntimeError("no space")

    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build_cuda, "find_in_wheels", lambda patterns: [])
    with pytest.raises(SystemExit, match=r"^error: no compiler for CUDA .*install .*\Z"):
        build_cuda.main([])
    monkeypatch.setattr(build_cuda, "find_compiler", FakeCompiler)
    with pytest.raises(SystemExit, match=r"know the architecture 70: give some of 75, 80, 90, 110"):
        build_cuda.main(["--arch", "70", "80"])
    monkeypatch.setattr(FakeCompiler, "compile", fail)
    with pytest.raises(SystemExit, match="error: no space"):
        build_cuda.main(["--arch", "80"])
    assert not list(tmp_path.rglob("*.*"))


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
