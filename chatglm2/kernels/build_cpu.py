"""Compile the C kernels with the system's C compiler, once on each machine, and load them.

    python -m chatglm2.kernels.build_cpu

compiles now and prints the result; otherwise the first use compiles. The compiler is $CC, or else
the first of cc, gcc, clang and zig (the Python package ziglang) that works. Environment variables:
CHATGLM_CPU_ISA (amx, avx512, avxvnni, avx2, i8mm, neon or portable) chooses these instructions
instead of all that this CPU has; CHATGLM_CACHE names the folder of the compiled files instead of
the user's cache.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from transformers.utils import logging

from chatglm2.errors import one_line

from .cache import CACHE_VARIABLE, get_cache_folder

logger = logging.get_logger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("[a-z]*.[ch]"))
COMPILERS = ("cc", "gcc", "clang")
ZIG = [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]  # a later flag replaces it
ZIG_ARM = ("-march=armv8.2-a", "-mcpu=generic+v8_2a")  # the same for gcc or clang, and for zig
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
FLAGS += ["-shared", "-fPIC", "-pthread"]
SYSTEM_COMPILERS = {"linux": "apt install gcc", "darwin": "xcode-select --install"}
ISA_VARIABLE = "CHATGLM_CPU_ISA"
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vnni", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "amx": [*AVX512_FLAGS, "-mamx-tile", "-mamx-int8"],
    "avx512": AVX512_FLAGS,
    "avxvnni": ["-mavx2", "-mavxvnni", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
    "neon": ["-march=armv8.2-a+dotprod"],
    "portable": ["-DPORTABLE"],
}
CPU_INFO = Path("/proc/cpuinfo")
TIMEOUT_S = 300


def name_compiler(command: list[str]) -> str:
    return "python -m ziglang cc" if command[: len(ZIG)] == ZIG else command[0]


def run(command: list[str]) -> str:
    """Run a command and return its output.

    Raises:
        RuntimeError: The command failed; the error has its last message.
    """
    try:
        with tempfile.TemporaryDirectory() as cache:  # else zig keeps 50 MB in the home folder
            folders = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                env=os.environ | folders,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{name_compiler(command)} cannot run: {error}") from None
    if done.returncode:
        messages = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in messages if "error" in line]  # other lines quote the source
        last = (errors or messages or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{name_compiler(command)} failed: {last}")
    return done.stdout


def find_compilers() -> list[list[str]]:
    """Return the compilers to try: only $CC if it is set.

    Raises:
        RuntimeError: There is no compiler.
    """
    if named := os.environ.get("CC"):
        return [shlex.split(named)]
    paths = [path for path in map(shutil.which, COMPILERS) if path]
    programs = {os.path.realpath(path): [path] for path in reversed(paths)}  # cc is often a link
    compilers, zig = list(programs.values())[::-1], [ZIG] if find_spec("ziglang") else []
    # On Windows zig is the first, because gcc cannot use AVX there.
    compilers = zig + compilers if sys.platform == "win32" else compilers + zig
    if not compilers:
        cure = SYSTEM_COMPILERS.get(sys.platform)
        cures = " / ".join(filter(None, ["pip install ziglang", cure]))
        raise RuntimeError(
            f"no C compiler ({', '.join(COMPILERS)}, zig): 没有 C 编译器，INT4 会慢很多，请安装一种"
            f" / without one INT4 is much slower, install one of them: {cures}"
        )
    return compilers


def choose_isa_flags(is_clang: bool) -> list[str]:
    """Return the flags for $CHATGLM_CPU_ISA, or for all instructions of this CPU.

    Raises:
        RuntimeError: $CHATGLM_CPU_ISA has an unknown value.
    """
    if name := os.environ.get(ISA_VARIABLE):
        if name not in ISA_FLAGS:
            allowed = ", ".join(ISA_FLAGS)
            raise RuntimeError(f"{ISA_VARIABLE} is {name!r}: give one of {allowed}, or unset it")
        return ISA_FLAGS[name]
    machine = platform.machine().lower()
    if machine == "aarch64" and sys.platform == "linux":
        return ["-mcpu=native"]
    if machine not in ("x86_64", "amd64"):
        return []  # clang for macOS uses what every Mac with an Apple CPU has
    if sys.platform == "win32" and not is_clang:
        return []  # gcc for Windows does not align the stack for wider vectors (its bug 54412)
    return ["-march=native"]


def describe_cpu() -> str:
    """Return what "native" depends on, because several machines may share a home folder."""
    lines = CPU_INFO.read_text().split("\n") if CPU_INFO.exists() else []
    known = [line for line in lines if line.startswith(("flags", "model", "Features", "CPU "))]
    return "".join(sorted(set(known))) or platform.processor()


def compile_into(folder: Path, name: str, command: list[str]) -> Path:
    """Run the compiler unless the folder already has its result.

    Each process writes into its own folder and moves the library from there, because compilers for
    Windows write other files beside it. All libraries are equal, and the last one stays.
    """
    library = folder / name
    if not library.exists():
        programs = [str(source) for source in SOURCES if source.suffix == ".c"]
        compiler = name_compiler(command)
        logger.warning_once(f"Compiling the CPU kernels with {compiler}, once on this machine")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, suffix=".unfinished") as unfinished:
            run([*command, *programs, "-o", str(Path(unfinished, name)), "-lm"])
            os.replace(Path(unfinished, name), library)
    return library


def build_with(compiler: list[str], folder: Path) -> Path:
    version = run([*compiler, "--version"])
    isa_flags = choose_isa_flags("clang" in version)
    if compiler == ZIG:
        isa_flags = [flag.replace(*ZIG_ARM) for flag in isa_flags]
    command = [*compiler, *FLAGS, *isa_flags]
    if sys.platform == "win32" and "zig" not in " ".join(compiler):
        # Windows does not search PATH for the DLLs of a DLL. With zig there are none.
        command.append("-static")
    key = repr([command, version, describe_cpu()]).encode()
    key += b"".join(source.read_bytes() for source in SOURCES)
    name = f"cpu-{hashlib.sha256(key).hexdigest()[:16]}"
    return compile_into(folder, name + (".dll" if sys.platform == "win32" else ".so"), command)


def build(folder: Path) -> Path:
    """Compile with the first compiler that works, and return the library.

    Raises:
        RuntimeError: No compiler works.
        OSError: The folder cannot be written.
    """
    problems = []
    for compiler in find_compilers():
        try:
            return build_with(compiler, folder)
        except RuntimeError as error:
            problems.append(str(error))
    raise RuntimeError("; ".join(dict.fromkeys(problems)))


def list_fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class Linear(ctypes.Structure):
    """A linear layer; see cpu.h."""

    _fields_ = list_fields(ctypes.c_void_p, "weight", "scale", "bias")
    _fields_ += list_fields(ctypes.c_int64, "in_features", "out_features", "group_size", "bits")


class Layer(ctypes.Structure):
    """A transformer layer; see layer.h."""

    _fields_ = [
        *list_fields(Linear, "qkv", "dense", "h_to_4h", "h4_to_h"),
        *list_fields(ctypes.c_void_p, "input_norm", "post_norm"),
        ("epsilon", ctypes.c_double),
        *list_fields(ctypes.c_int64, "num_heads", "num_kv_heads", "head_dim", "rotated_dim"),
        ("adds_to_normed", ctypes.c_int64),
    ]


class Conversation(ctypes.Structure):
    """The cache of a layer for one conversation; see layer.h."""

    _fields_ = list_fields(ctypes.c_void_p, "keys", "values")
    _fields_ += list_fields(ctypes.c_int64, "length", "capacity")


def load(library: Path) -> ctypes.CDLL:
    """Load the library and declare its functions.

    Raises:
        RuntimeError: This CPU lacks its instructions, or those of $CHATGLM_CPU_ISA.
    """
    loaded = ctypes.CDLL(str(library))
    loaded.chatglm_isa.restype = ctypes.c_char_p
    runs_here, isa = loaded.chatglm_runs_here(), loaded.chatglm_isa().decode()
    wanted = os.environ.get(ISA_VARIABLE) or isa
    if not runs_here or isa != wanted:
        raise RuntimeError(f"this CPU lacks {wanted} instructions")
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name in ("pack", "restore"):
        function = getattr(loaded, f"chatglm_{name}")
        function.argtypes, function.restype = [*2 * [pointer], *2 * [size], *2 * [number]], None
    loaded.chatglm_multiply.argtypes = [*3 * [pointer], size, number]
    loaded.chatglm_size_layer.argtypes = [*2 * [pointer], *2 * [size]]
    loaded.chatglm_size_layer.restype = size
    types = [*5 * [pointer], *2 * [size], number, pointer, number]
    loaded.chatglm_compute_layer.argtypes = types
    loaded.chatglm_multiply_stored.argtypes = [*3 * [pointer], *3 * [size], *2 * [number]]
    return loaded


@cache
def get_library() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library, compiled if necessary, and None; or None and the reason."""
    try:
        try:
            return load(build(get_cache_folder())), None
        except OSError as error:
            logger.warning_once(
                f"{error}: the CPU kernels are compiled at every start; {CACHE_VARIABLE} may name "
                "a folder where programs can be stored"
            )
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return load(build(Path(folder))), None
    except (OSError, RuntimeError) as error:
        return None, one_line(error)


def main():
    library, problem = get_library()
    if problem:
        sys.exit(f"error: {problem}")
    print(f"{library.chatglm_isa().decode()}: {library._name}")


if __name__ == "__main__":
    main()
