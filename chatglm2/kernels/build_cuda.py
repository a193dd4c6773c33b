"""Compile quantization.cu for GPUs, once on each machine. This needs no GPU.

    python -m chatglm2.kernels.build_cuda
    python -m chatglm2.kernels.build_cuda --arch 80 90

The compiler is nvcc if it is in PATH, or else the NVRTC that pip installs with PyTorch for CUDA. It
writes a cubin for each architecture that it knows, and PTX for the oldest of them, from which the
driver makes code for GPUs without a cubin. A second compiler may add files for more architectures:
CUDA 12 has sm_70 (V100), CUDA 13 does not.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .cache import get_cache_folder

SOURCE = Path(__file__).with_name("quantization.cu")
ARCHS = (70, 75, 80, 86, 89, 90)  # compute capability * 10
FLAGS = ["-std=c++17"]


def get_kernel_folder() -> Path:
    """Return the folder of the files compiled from the present source; it may not exist."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return get_cache_folder() / f"cuda-{digest}"


class NVCC:
    """The compiler of the CUDA toolkit."""

    def __init__(self):
        self.path = shutil.which("nvcc")
        if self.path is None:
            raise OSError("no nvcc in PATH")
        self.name = "nvcc " + self.run("--version").partition("release ")[2].partition(",")[0]

    def run(self, *args) -> str:
        done = subprocess.run([self.path, *args], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def get_archs(self) -> list[int]:
        return [int(line.rpartition("_")[2]) for line in self.run("--list-gpu-arch").split()]

    def compile(self, target: str) -> bytes:
        """Return a cubin for a target such as sm_80, PTX for a target such as compute_80."""
        kind = "-cubin" if target.startswith("sm_") else "-ptx"
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / target
            self.run(*FLAGS, f"-arch={target}", kind, "-o", str(result), str(SOURCE))
            return result.read_bytes()


def find_in_wheels(patterns: list[str]) -> list[Path]:
    """Return the files that match in the installed wheels of NVIDIA and Triton."""
    specs = [importlib.util.find_spec(name) for name in ("nvidia", "triton")]
    folders = [Path(path) for spec in specs if spec for path in spec.submodule_search_locations]
    return [path for folder in folders for pattern in patterns for path in folder.glob(pattern)]


class NVRTC:
    """CUDA's runtime compiler, installed by pip."""

    def __init__(self):
        libraries = find_in_wheels(["*/lib/libnvrtc.so.[0-9]*"])
        headers = find_in_wheels(["*/include/cuda_bf16.h", "backends/nvidia/include/cuda_bf16.h"])
        if not libraries or not headers:
            raise OSError("no NVRTC of pip with its headers (nvidia-cuda-nvrtc, -runtime)")
        self.library = ctypes.CDLL(str(libraries[0]))
        self.include = headers[0].parent
        version = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", *map(ctypes.byref, version))
        self.name = f"NVRTC {version[0].value}.{version[1].value}"

    def call(self, function: str, *args):
        if code := getattr(self.library, function)(*args):
            raise RuntimeError(f"{function} failed with code {code}")

    def get_archs(self) -> list[int]:
        count = ctypes.c_int()
        self.call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self.call("nvrtcGetSupportedArchs", archs)
        return list(archs)

    def read(self, what: str, program) -> bytes:
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, target: str) -> bytes:
        """Return a cubin for a target such as sm_80, PTX for a target such as compute_80."""
        program, code = ctypes.c_void_p(), SOURCE.read_bytes()
        self.call("nvrtcCreateProgram", ctypes.byref(program), code, None, 0, None, None)
        flags = [*FLAGS, f"--gpu-architecture={target}", f"--include-path={self.include}"]
        options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        try:
            self.call("nvrtcCompileProgram", program, len(flags), options)
            return self.read("CUBIN" if target.startswith("sm_") else "PTX", program)
        except RuntimeError as error:
            log = self.read("ProgramLog", program).decode(errors="replace")
            raise RuntimeError(f"{error}:\n{log}") from None
        finally:
            self.call("nvrtcDestroyProgram", ctypes.byref(program))


def find_compiler():
    """Return nvcc or NVRTC.

    Raises:
        RuntimeError: Neither is installed.
    """
    problems = []
    for compiler in (NVCC, NVRTC):
        try:
            return compiler()
        except OSError as error:
            problems.append(str(error))
    raise RuntimeError(f"no compiler for CUDA ({'; '.join(problems)}): install the CUDA toolkit")


def build(compiler, archs: list[int] | None = None, folder: Path | None = None) -> list[Path]:
    """Compile for the given architectures, by default all of `ARCHS` that the compiler knows."""
    known = sorted(compiler.get_archs())
    if unknown := sorted(set(archs or []) - set(known)):
        raise RuntimeError(
            f"{compiler.name} does not know the architecture {unknown[0]}: give some of "
            f"{', '.join(map(str, known))}, or use another version of CUDA"
        )
    archs = sorted(set(archs or ARCHS) & set(known))
    folder = folder or get_kernel_folder()
    folder.mkdir(parents=True, exist_ok=True)
    targets = [*(f"sm_{arch}" for arch in archs), f"compute_{archs[0]}"]
    files = [folder / f"{target}{'.cubin' if target[0] == 's' else '.ptx'}" for target in targets]
    for target, file in zip(targets, files, strict=True):
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(compiler.compile(target))
        unfinished.replace(file)
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = " ".join(map(str, ARCHS))
    parser.add_argument(
        "--arch", type=int, nargs="+", help=f"10 * compute capability, as 80 90; default: {default}"
    )
    args = parser.parse_args(argv)
    try:
        compiler = find_compiler()
        files = build(compiler, args.arch)
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"{compiler.name} wrote to {files[0].parent}: {', '.join(file.name for file in files)}")


if __name__ == "__main__":
    main()
