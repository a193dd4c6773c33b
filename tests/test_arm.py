"""The C kernels for ARM, cross-compiled and run by an emulator.

On Debian: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
"""

import platform
import shutil
from pathlib import Path

import pytest

from chatglm2.kernels import build_cpu

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
PROGRAM = Path(__file__).with_name("print_results.c")

pytestmark = [
    pytest.mark.slow,  # compiles
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR}",
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that returns what `print_results.c` prints with some instructions."""
    folder = tmp_path_factory.mktemp("programs")

    def run(compiler: str, isa: str, *emulator: str) -> dict[str, str]:
        program = folder / isa
        if not program.exists():
            flags = [flag for flag in build_cpu.FLAGS if flag not in ("-shared", "-fPIC")]
            flags += [*build_cpu.ISA_FLAGS[isa], "-static", f"-I{build_cpu.SOURCES[0].parent}"]
            sources = [str(source) for source in build_cpu.SOURCES if source.suffix == ".c"]
            build_cpu.run([compiler, *flags, str(PROGRAM), *sources, "-o", str(program), "-lm"])
        lines = build_cpu.run([*emulator, str(program)]).splitlines()
        return dict(line.split(": ") for line in lines)

    return run


@pytest.mark.parametrize("isa", ["i8mm", "neon"])
def test_bits_are_those_of_portable(run, isa):
    results = run(COMPILER, isa, EMULATOR)
    portable = run(COMPILER, "portable", EMULATOR)
    assert results.pop(f"{isa} runs here") == portable.pop("portable runs here") == "1"
    assert results == portable and len(results) == 326


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with AVX2")
def test_bits_are_those_of_avx2(run):
    """Except for sums across the lanes of a vector, of which AVX2 has more."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    expected = run("gcc", "avx2")
    if expected.pop("avx2 runs here") == "0":
        pytest.skip("this CPU lacks AVX2")
    neon, kinds = run(COMPILER, "neon", EMULATOR), ("INT", "attention")
    expected = {name: value for name, value in expected.items() if name.startswith(kinds)}
    assert {name: neon[name] for name in expected} == expected and len(expected) == 203


@pytest.mark.parametrize(("isa", "cpu"), [("i8mm", "cortex-a76"), ("neon", "cortex-a53")])
def test_older_cpu(run, isa, cpu):
    assert run(COMPILER, isa, EMULATOR, "-cpu", cpu) == {f"{isa} runs here": "0"}
