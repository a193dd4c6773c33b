"""The weight files of a checkpoint folder: find them, and check that they are complete.

This file is also Hugging Face remote code.
"""

import json
import zipfile
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open


def find_weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers would read from a checkpoint folder.

    The files that an index names may be missing.

    Raises:
        OSError: The index is damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            try:
                shards = set(json.loads(index.read_bytes())["weight_map"].values())
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                size = index.stat().st_size
                raise OSError(f"{index} ({size} bytes) is damaged: download it again.") from error
            return [folder / shard for shard in sorted(shards)]
    return []


def check_weight_file(file: Path):
    """Check that a weight file is complete.

    Raises:
        OSError: It is missing, a Git LFS pointer, or truncated.
    """
    if not file.exists():
        raise OSError(f"{file} is missing: download it into the folder.")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
    if head == b"version ":  # of https://git-lfs.github.com/spec/v1
        raise OSError(
            f"{file} ({size} bytes) is a Git LFS pointer and not the file itself: run "
            "`git lfs pull` in the folder, or download the file and put it there."
        )
    if file.suffix == ".safetensors":
        with suppress(SafetensorError), safe_open(file, "pt"):
            return
    elif zipfile.is_zipfile(file) or head[:1] == b"\x80":  # \x80: a pickle, before torch 1.6
        return
    raise OSError(f"{file} ({size} bytes) is truncated or damaged: download it again.")
