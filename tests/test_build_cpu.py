"""Building the C kernels: several processes at once, and everything that can be missing."""

import ctypes
import logging
import multiprocessing
import os
import platform
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from quantized_layers import create_exact_layer
from transformers.utils.logging import warning_once

from chatglm2 import ChatGLMForConditionalGeneration, kernels
from chatglm2.kernels import build_cpu
from chatglm2.kernels.cache import CACHE_VARIABLE, get_cache_folder
from chatglm2.kernels.cpu_backend import CPUBackend
from chatglm2.quantization import torch_matmul


@pytest.fixture
def need_compiler():
    try:
        build_cpu.find_compilers()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("CC", build_cpu.ISA_VARIABLE, CACHE_VARIABLE, "CHATGLM_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for module in (build_cpu, kernels):  # so that caplog sees them
        monkeypatch.setattr(module.logger, "parent", logging.getLogger())
    warning_once.cache_clear()
    build_cpu.get_library.cache_clear()
    yield
    build_cpu.get_library.cache_clear()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A stand-in for a compiler that counts its calls and makes what it is told."""

    def make(script: str) -> Path:
        path = tmp_path / "my cc"
        path.write_text(f"#!/bin/sh\necho \"$@\" >> '{tmp_path}/calls'\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CC", f"'{path}'")
        monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
        return tmp_path / "calls"

    return make


VERSION = '[ "$1" = --version ] && { echo "cc 1.0"; exit; }'
WRITE = 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'


@pytest.fixture
def quick(tmp_path, monkeypatch, need_compiler):
    """Compile in a second, into a new folder."""
    monkeypatch.setenv("CHATGLM_CPU_ISA", "portable")
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr(build_cpu, "FLAGS", [*build_cpu.FLAGS, "-O0"])


def build_and_load(results):
    library = build_cpu.build(get_cache_folder())
    results.put((library, build_cpu.load(library).chatglm_isa()))


def start_and_build(count: int) -> list:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=build_and_load, args=(results,)) for _ in range(count)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return outcomes


@pytest.mark.slow  # starts processes
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_several_processes_at_once(quick):
    sources = sorted(build_cpu.SOURCES[0].parent.iterdir())
    outcomes = start_and_build(4)
    (library,) = get_cache_folder().iterdir()  # and nothing unfinished
    assert outcomes == [(library, b"portable")] * 4
    before = library.stat()
    assert start_and_build(1) == [(library, b"portable")]
    assert library.stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(build_cpu.SOURCES[0].parent.iterdir()) == sources


def test_command(quick, capsys, caplog, monkeypatch):
    build_cpu.main()
    (library,) = get_cache_folder().iterdir()
    assert capsys.readouterr().out == f"portable: {library}\n"
    assert "once on this machine" in caplog.text
    monkeypatch.setenv("CHATGLM_CPU_ISA", "avx1024")
    build_cpu.get_library.cache_clear()
    with pytest.raises(SystemExit) as stop:
        build_cpu.main()
    allowed = "amx, avx512, avxvnni, avx2, i8mm, neon, portable"
    assert f"'avx1024': give one of {allowed}, or unset it" in stop.value.code


def test_compiled_once_for_what_it_depends_on(compiler, monkeypatch):
    calls = compiler(f"{VERSION}\n{WRITE}")

    def build():
        calls.unlink(missing_ok=True)
        library = build_cpu.build(get_cache_folder())
        assert library.read_text() == "made\n"
        return library, "-o" in calls.read_text()

    libraries = set()
    for change in (
        lambda: None,
        lambda: monkeypatch.setenv("CHATGLM_CPU_ISA", "avx2"),
        lambda: monkeypatch.setattr(build_cpu, "describe_cpu", lambda: "another CPU"),
        lambda: compiler(f"{VERSION.replace('1.0', '2.0')}\n{WRITE}"),
    ):
        change()
        library, is_compiled = build()
        assert is_compiled and library not in libraries and build() == (library, False)
        libraries.add(library)


def test_failing_compiler(compiler, tmp_path, monkeypatch):
    lines = "cpu.c:1: note: x", "cpu.c:2: error: no", "  2 | x", "    | ^", ""
    compiler("\n".join([VERSION, *(f"echo '{line}' >&2" for line in lines), "exit 1"]))
    for cc, problem in (
        (os.environ["CC"], f"{tmp_path}/my cc failed: cpu.c:2: error: no"),
        ("/bin/false", "/bin/false failed: exit code 1"),
        ("/no/such/cc", "/no/such/cc cannot run: .*No such file"),
    ):
        monkeypatch.setenv("CC", cc)
        build_cpu.get_library.cache_clear()
        library, found = build_cpu.get_library()
        assert library is None and re.match(problem, found)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("platform", "cures"),
    [
        ("linux", "pip install ziglang / apt install gcc"),
        ("darwin", "pip install ziglang / xcode-select --install"),
        ("win32", "pip install ziglang"),
    ],
)
def test_no_compiler(tmp_path, monkeypatch, platform, cures):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build_cpu, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(RuntimeError, match=r"^no C compiler \(.* 没有 C 编译器") as error:
        build_cpu.find_compilers()
    assert str(error.value).endswith(f"install one of them: {cures}")


def test_compilers_in_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build_cpu, "find_spec", lambda name: None)
    for name, script in (("gcc", "exit 3"), ("clang", f"{VERSION}\n{WRITE}")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "cc").symlink_to("gcc")
    found = [[str(tmp_path / "cc")], [str(tmp_path / "clang")]]
    assert build_cpu.find_compilers() == found
    assert build_cpu.build(tmp_path / "cache").parent == tmp_path / "cache"  # by the second
    monkeypatch.setattr(build_cpu, "find_spec", lambda name: name == "ziglang")
    assert build_cpu.find_compilers() == [*found, build_cpu.ZIG]
    monkeypatch.setattr(sys, "platform", "win32")
    assert build_cpu.find_compilers()[0] == build_cpu.ZIG
    monkeypatch.setenv("CC", "mine -x")
    assert build_cpu.find_compilers() == [["mine", "-x"]]


@pytest.mark.skipif(sys.platform != "linux", reason="torch has libgomp on Linux")
def test_threads_are_those_of_torch():
    """The kernels find the function that starts torch's threads; without it they start others."""
    assert ctypes.CDLL(None).GOMP_parallel


@pytest.fixture
def need_zig():
    if not find_spec("ziglang"):
        pytest.skip("needs zig: pip install ziglang")


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "portable"])
def test_zig(isa, tmp_path, monkeypatch, need_zig):
    """Zig compiles where nothing else does, without a home folder, and as requested."""
    for name in ("PATH", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CHATGLM_CPU_ISA", isa)
    library, problem = build_cpu.get_library()
    if problem and "this CPU lacks" in problem:
        pytest.skip(problem)
    assert problem is None and Path(library._name).parent == tmp_path / "cache"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert library.chatglm_isa().decode() == isa
    layer, x = create_exact_layer(4, 128, torch.float32), torch.eye(256)
    expected = torch_matmul(x, layer)
    torch.testing.assert_close(CPUBackend().matmul(x, layer), expected, rtol=1e-6, atol=0)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize(
    ("target", "isa", "start"),
    [
        ("x86_64-windows-gnu", "avx512", b"MZ"),
        ("x86_64-windows-gnu", "avx2", b"MZ"),
        ("x86_64-macos", "avx2", b"\xcf\xfa\xed\xfe"),
        ("x86_64-linux-gnu", "avxvnni", b"\x7fELF"),
        ("aarch64-macos", "i8mm", b"\xcf\xfa\xed\xfe"),
        ("aarch64-macos", "neon", b"\xcf\xfa\xed\xfe"),
        ("aarch64-macos", "portable", b"\xcf\xfa\xed\xfe"),
        ("aarch64-linux-gnu", "i8mm", b"\x7fELF"),
        ("aarch64-linux-gnu", "neon", b"\x7fELF"),
        ("aarch64-linux-gnu", "portable", b"\x7fELF"),
    ],
)
def test_other_systems(target, isa, start, tmp_path, monkeypatch, need_zig):
    """The kernels compile for systems that the tests do not run on."""
    monkeypatch.setenv("CHATGLM_CPU_ISA", isa)
    monkeypatch.setattr(build_cpu, "FLAGS", ["-target", target, *build_cpu.FLAGS])
    library = build_cpu.build_with(build_cpu.ZIG, tmp_path)
    assert list(tmp_path.iterdir()) == [library]
    content = library.read_bytes()
    assert content.startswith(start) and b"chatglm_compute_layer" in content
    assert b"%s\0" % isa.encode() in content


@pytest.mark.slow  # compiles
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86 compiler")
def test_avxvnni_is_used(need_compiler):
    """The instructions are in the program, even if this CPU cannot run them."""
    compiler, flags = build_cpu.find_compilers()[0], build_cpu.ISA_FLAGS["avxvnni"]
    source = str(build_cpu.SOURCES[0].with_name("cpu.c"))
    assembly = build_cpu.run([*compiler, *build_cpu.FLAGS, *flags, "-S", source, "-o", "-"])
    assert "vpdpwssd" in assembly and "zmm" not in assembly


def test_model_without_a_compiler(tiny_checkpoint, monkeypatch, caplog):
    monkeypatch.setenv("CC", "/bin/false")
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint).quantize(4).float()
    ids = model.generate(torch.tensor([[5, 7, 9]]), max_new_tokens=4, min_new_tokens=4)
    assert ids.shape == (1, 7)
    chosen = r"backend torch(_ops, in bfloat16)? \(not cpu: /bin/false failed: exit code 1"
    assert re.search(chosen, caplog.text)


def test_folder_that_cannot_be_written(quick, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "file" / "cache"))
    library, problem = build_cpu.get_library()
    assert problem is None and library.chatglm_isa() == b"portable"
    assert "file/cache'" in caplog.text and "CHATGLM_CACHE may name a folder" in caplog.text
    assert not Path(library._name).exists()


@pytest.mark.parametrize(("runs_here", "requested"), [(0, ""), (0, "avx512"), (1, "amx")])
def test_library_for_another_cpu(runs_here, requested, monkeypatch):
    returned = {"chatglm_isa": b"avx512", "chatglm_runs_here": runs_here}
    library = Mock(**{f"{name}.return_value": value for name, value in returned.items()})
    monkeypatch.setattr(build_cpu.ctypes, "CDLL", lambda path: library)
    monkeypatch.setenv("CHATGLM_CPU_ISA", requested)
    with pytest.raises(RuntimeError, match=f"this CPU lacks {requested or 'avx512'} instructions"):
        build_cpu.load(Path("x"))


@pytest.mark.parametrize(
    ("platform", "machine", "compiler", "flags"),
    [
        ("linux", "x86_64", ["gcc"], ["-march=native"]),
        ("linux", "aarch64", ["gcc"], ["-mcpu=native"]),
        ("linux", "aarch64", build_cpu.ZIG, ["-mcpu=native"]),
        ("darwin", "arm64", ["clang"], []),
        ("win32", "AMD64", ["gcc"], ["-static"]),
        ("win32", "AMD64", ["clang"], ["-march=native", "-static"]),
        ("win32", "AMD64", build_cpu.ZIG, ["-march=native"]),
    ],
)
def test_flags_of_other_systems(platform, machine, compiler, flags, monkeypatch, tmp_path):
    compile_into = Mock()
    monkeypatch.setattr(build_cpu, "compile_into", compile_into)
    monkeypatch.setattr(build_cpu, "run", lambda command: "x" if "gcc" in command else "clang 1")
    monkeypatch.setattr(build_cpu.sys, "platform", platform)
    monkeypatch.setattr(build_cpu.platform, "machine", lambda: machine)
    build_cpu.build_with(compiler, tmp_path)
    folder, name, command = compile_into.call_args.args
    assert command == [*compiler, *build_cpu.FLAGS, *flags]
    assert folder == tmp_path and name.endswith(".dll" if platform == "win32" else ".so")


@pytest.mark.parametrize("info", ["flags\t: fma {}", "Features\t: asimd {}", "CPU part\t: {}"])
def test_native_depends_on_the_cpu(info, tmp_path, monkeypatch):
    monkeypatch.setattr(build_cpu, "CPU_INFO", tmp_path / "cpuinfo")
    described = set()
    for value in ("avx2", "asimddp"):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{info.format(value)}\n")
        described.add(build_cpu.describe_cpu())
    assert len(described) == 2


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/chatglm2"),
        ("linux", {"HOME": "/h"}, "/h/.cache/chatglm2"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/chatglm2"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/chatglm2"),
        ("linux", {"CHATGLM_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
    ],
)
def test_cache_folder(platform, variables, expected, monkeypatch):
    monkeypatch.setattr(build_cpu.sys, "platform", platform)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert get_cache_folder() == Path(expected)
