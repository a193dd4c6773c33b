"""The weight files of a checkpoint folder: find them, and check that they are complete and safe.

This file is also Hugging Face remote code.
"""

import io
import json
import os
import pickle
import pickletools
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
LEGACY_PICKLES = 5  # before torch 1.6: magic number, version, system, tensors, names of storages
# A pickle needs about 200 bytes for each tensor. Reading one takes 100 times its size in memory.
MAX_PICKLE_BYTES = 4_000_000
TENSOR_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
}
STORAGE = re.compile(r"torch \w+Storage")
TIED_WEIGHT = "output_layer.weight"  # may share the memory of the embedding
FLOATS = {"float64", "float32", "float16", "bfloat16"}
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
}
SCALE = ".weight_scale"  # of a quantized layer
TORCH_LOAD_ERRORS = (  # of a damaged file
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


# Files.


def check_inside(folder: Path, file: Path):
    """Check that a file is a regular file whose data lies in the folder, wherever links lead.

    The files of a snapshot in the hub's cache are links to the folder `blobs` beside `snapshots`.

    Raises:
        OSError: It is missing, leads out of the folder, or is a folder, a device or a pipe.
    """
    root, real = (Path(os.path.realpath(path)) for path in (folder, file))
    blobs = [path.parent / "blobs" for path in root.parents if path.name == "snapshots"]
    if not any(real.is_relative_to(path) for path in (root, *blobs)):
        raise OSError(f"{file} leads to {real}, out of its folder: put the file itself there.")
    if not real.exists():
        raise OSError(f"{file} is missing: download it into the folder.")
    if not real.is_file():
        raise OSError(f"{file} is no regular file: put the file itself there.")


def find_weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers would read from a checkpoint folder.

    The files that an index names may be missing.

    Raises:
        OSError: The index is damaged, or names a file out of the folder.
    """
    for name in WEIGHT_NAMES:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            return [folder / shard for shard in sorted({*read_index(index)["weight_map"].values()})]
    return []


def read_index(index: Path) -> dict:
    """Return an index; its `weight_map` has the shard of each tensor.

    Raises:
        OSError: The index is damaged, or names a file out of the folder.
    """
    check_inside(index.parent, index)
    try:
        fields = json.loads(index.read_bytes())
        shards = {*fields["weight_map"].values()}
        is_whole = shards and all(isinstance(shard, str) for shard in shards)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        size = index.stat().st_size
        raise OSError(f"{index} ({size} bytes) is damaged: download it again.")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for shard in shards:
        if Path(shard).name != shard or not shard.isprintable() or not shard.endswith(suffix):
            raise OSError(f"{index} names {shard!r}: allowed are *{suffix} files of its folder.")
    return fields


def check_weight_file(file: Path):
    """Check that a weight file is complete, and that it holds tensors only.

    Raises:
        OSError: It is missing, out of its folder, a Git LFS pointer, truncated or damaged.
        ValueError: It holds something else than tensors.
    """
    check_inside(file.parent, file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
    if head == b"version ":  # of https://git-lfs.github.com/spec/v1
        raise OSError(
            f"{file} ({size} bytes) is a Git LFS pointer and not the file itself: run "
            "`git lfs pull` in the folder, or download the file and put it there / 它只是 Git LFS "
            "指针：请在该文件夹运行 `git lfs pull`，或另行下载这个文件放进去"
        )
    if file.suffix == ".safetensors":
        with suppress(SafetensorError), safe_open(file, "pt"):
            return
    elif head[:4] == b"PK\3\4" or head[:1] == b"\x80":  # \x80: a pickle, before torch 1.6
        try:
            names = read_zip(file, size) if head[:1] == b"P" else read_legacy(file)
        except (zipfile.BadZipFile, LookupError, ValueError, RuntimeError):
            pass  # refused below
        else:
            return check_names(file, names)
    raise OSError(f"{file} ({size} bytes) is truncated or damaged: download it again.")


def read_zip(file: Path, size: int) -> set[str]:
    """Return the functions and classes that the pickle in a file of torch.save names.

    Raises:
        BadZipFile, LookupError, ValueError, RuntimeError: The file is damaged, or its entries are
            larger than the file: torch.save does not compress.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        is_small = sum(entry.file_size for entry in pickles) <= MAX_PICKLE_BYTES
        if not (pickles and is_stored and is_small) or sum(e.file_size for e in entries) > size:
            raise LookupError(file)
        return {name for entry in pickles for name in list_globals(archive.read(entry), 1)}


def read_legacy(file: Path) -> set[str]:
    """As `read_zip`, for the format of torch before 1.6."""
    with open(file, "rb") as stream:
        return list_globals(stream.read(MAX_PICKLE_BYTES), LEGACY_PICKLES)


def list_globals(content: bytes, num_pickles: int) -> set[str]:
    stream, names = io.BytesIO(content), set()
    while num_pickles and stream.tell() < len(content):
        operations = pickletools.genops(stream)
        names |= {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}
        num_pickles -= 1
    return names


def check_names(file: Path, names: set[str]):
    """Check that a pickle names nothing but what makes tensors: others could take any memory.

    Raises:
        ValueError: It does.
    """
    others = [name for name in names - TENSOR_GLOBALS if not STORAGE.fullmatch(name)]
    if others:
        raise ValueError(
            f"{file} holds something else than tensors, {max(others).replace(' ', '.')!r}: not "
            "loaded; save it anew as torch.save(model.state_dict(), file)."
        )


# Tensors.


def read_pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .bin file, mapped into memory: a page is read when it is used.

    Raises:
        OSError: The file is damaged.
        ValueError: It holds something else than plain tensors, or they repeat their data.
    """
    size = file.stat().st_size
    try:
        tensors = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except TORCH_LOAD_ERRORS as error:
        raise OSError(f"{file} ({size} bytes) is damaged: download it again.") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds something else than tensors by name: not loaded.")
    for name, tensor in tensors.items():
        if problem := find_problem(name, tensor):
            raise ValueError(f"{file} holds something else than plain tensors: {problem}.")
    num_bytes = sum(x.nbytes for name, x in tensors.items() if not name.endswith(TIED_WEIGHT))
    if num_bytes > size:
        raise ValueError(f"{file} ({size} bytes) holds tensors of {num_bytes} bytes: not loaded.")
    return tensors


def find_problem(name, tensor) -> str | None:
    if not isinstance(name, str):
        return f"the name {name!r:.80}"
    if not isinstance(tensor, torch.Tensor):
        return f"{name!r:.80} is of the type {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return f"{name!r:.80} is sparse, quantized or without data"
    is_repeated = any(n > 1 and not s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if is_repeated or tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"{name!r:.80} repeats its data (strides {tensor.stride()})"
    return None


def read_shapes(file: Path) -> dict[str, tuple]:
    """Return dtype (such as "float16") and shape of each tensor in a weight file.

    Raises:
        OSError, ValueError: As `check_weight_file` and `read_pickled_tensors`.
    """
    check_weight_file(file)
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {k: (name_dtype(v.get_dtype()), *v.get_shape()) for k, v in parts.items()}
    return {k: (name_dtype(v.dtype), *v.shape) for k, v in read_pickled_tensors(file).items()}


def name_dtype(dtype) -> str:
    return SAFETENSORS_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def check_weights(found: dict[str, tuple], model: torch.nn.Module):
    """Check the tensors of a checkpoint against a model without data, before any is loaded.

    Args:
        found: From `read_all_shapes`.

    Raises:
        ValueError: A tensor is missing, or is of another shape or dtype.
    """
    prefix = f"{model.base_model_prefix}."
    # A tied parameter has only its first name.
    wanted = {k: (name_dtype(p.dtype), *p.shape) for k, p in model.named_parameters()}
    present = {k: found.get(k) or found.get(k.removeprefix(prefix)) for k in wanted}
    wrong = [k for k in wanted if not present[k] or not is_loadable(present[k], wanted[k])]
    wrong += [k for k in found.keys() - wanted if k.endswith(SCALE)]
    if not wrong:
        return
    if any(k.endswith(SCALE) for k in wanted) and not any(k.endswith(SCALE) for k in found):
        raise ValueError(
            "the checkpoint's weights are not quantized, but its config says that they are: remove "
            "quantization_bit and quantization_config from config.json, and use --quantize."
        )
    name = min(wrong)
    raise ValueError(
        f"the weights do not belong to config.json: {len(wrong)} tensors are missing, unknown or "
        f"of another shape or dtype, among them {name}: {describe(present.get(name))} in the "
        f"files, {describe(wanted.get(name))} in the config; download both again."
    )


def read_all_shapes(folder: Path) -> dict[str, tuple]:
    """As `read_shapes`, of all weight files of a checkpoint.

    Raises:
        OSError: A file is missing or damaged, or lacks a tensor that the index names.
        ValueError: As `read_shapes`.
    """
    files = find_weight_files(folder)
    by_file = {file.name: read_shapes(file) for file in files}
    for name in WEIGHT_NAMES:
        if files[0].suffix == Path(name).suffix and files[0].name != name:
            check_index(folder / f"{name}.index.json", by_file)
    return {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}


def is_loadable(present: tuple, wanted: tuple) -> bool:
    is_same_kind = present[0] == wanted[0] or {present[0], wanted[0]} <= FLOATS
    return is_same_kind and present[1:] == wanted[1:]


def describe(tensor: tuple | None) -> str:
    return f"{tensor[0]} {list(tensor[1:])}" if tensor else "nothing"


def check_index(index: Path, by_file: dict[str, dict]):
    """Check that the shards hold the tensors that the index names."""
    fields = read_index(index)
    if not isinstance(fields.get("metadata"), dict):
        raise OSError(f"{index} has no metadata: download it again.")
    for name, shard in fields["weight_map"].items():
        if name not in by_file[shard]:
            raise OSError(f"{index.parent / shard} lacks {name!r}: download shard and index again.")
