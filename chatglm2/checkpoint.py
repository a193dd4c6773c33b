"""Find a checkpoint: a folder, a copy in the hub's cache, or a model on the hub."""

import sys
import threading
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file

from .configuration_chatglm import ChatGLMConfig
from .errors import one_line
from .hardware import get_free_space, gigabytes
from .json_files import check_tokenizer_files, read_config
from .recognition import check_description, check_kind, check_names, check_shapes
from .weights_chatglm import (
    check_inside,
    check_weight_file,
    find_weight_files,
    read_all_shapes,
    read_pickled_tensors,
)

ROOT = Path(__file__).resolve().parent.parent
CURE = (
    "try the bundled checkpoint (--model resources/chatglm2-tiny), a folder with a downloaded one "
    "(--model FOLDER), or a mirror of the hub (environment variable HF_ENDPOINT)"
)
HUB_TIMEOUT_S = 8
DESCRIPTIONS = (".json", ".model", ".jinja", "tokenization_chatglm.py")  # ends of file names


def locate_checkpoint(model: str, revision: str | None):
    """Return the folder of a checkpoint, or the hub's `ModelInfo` if it has to be downloaded.

    A relative path is looked up in the current directory, then in the repository. A complete copy
    in the hub's cache is used if the hub has nothing newer, or does not answer.

    Returns:
        (folder, None) or (None, information).

    Raises:
        SystemExit: There is no such checkpoint.
        ValueError: It lacks a file, holds something else, or a file is damaged.
    """
    for folder in (Path(model).expanduser(), ROOT / model):
        if folder.exists():
            if revision is not None:
                raise SystemExit(
                    f"--revision {revision} needs a model on the hub; {model} is a folder."
                )
            check_folder(folder)
            return folder, None
    try:
        validate_repo_id(model)
        hub_info = query_hub(model, revision)
    except HFValidationError as error:
        raise SystemExit(f"{model}: 没有这个文件夹 / there is no such folder: {CURE}.") from error
    except (OSError, HTTPError, ValueError) as error:
        cause = f"does not provide it ({one_line(error)})"
        if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
            cause = "has no such model or revision, or it is private"
        if folder := find_cached_copy(model, revision):
            print(
                f"{model}: {constants.ENDPOINT} {cause}; using the copy in {folder}",
                file=sys.stderr,
            )
            return folder, None
        raise SystemExit(
            f"{model}: 没有这个文件夹，也下载不了；请用 --model 指定已下载的文件夹，或用环境变量 "
            "HF_ENDPOINT 指定镜像站 / there is no such folder and no downloaded copy, and "
            f"{constants.ENDPOINT} {cause}: {CURE}."
        ) from error
    if folder := find_cached_copy(model, hub_info.sha):
        return folder, None
    check_file_names(model, {file.rfilename for file in hub_info.siblings})
    return None, hub_info


def query_hub(model: str, revision: str | None):
    """Return the hub's `ModelInfo`, with the files' sizes, within `HUB_TIMEOUT_S`.

    The request runs in a thread, because name resolution has no time-out of its own.

    Raises:
        OSError, HTTPError, ValueError: The hub cannot be reached, or has no such model.
    """
    outcome = []

    def ask():
        try:
            outcome.append(
                HfApi().model_info(
                    model, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S
                )
            )
        except (OSError, HTTPError, ValueError) as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    if not outcome:
        raise TimeoutError(f"no answer within {HUB_TIMEOUT_S} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def find_cached_copy(model: str, revision: str | None) -> Path | None:
    """Return the folder of a completely downloaded model in the hub's cache."""
    config = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    files = [folder / "tokenizer.model", *find_weight_files(folder)]
    if len(files) < 2 or not all(file.exists() for file in files):
        return None
    check_kind(folder)
    return folder


def check_file_names(model: str, names: set[str]):
    """Check that the names of a checkpoint's files include all that loading needs.

    Raises:
        ValueError: They do not.
    """
    weights = {"model.safetensors", "pytorch_model.bin"}
    weights |= {f"{name}.index.json" for name in weights}
    for needed, what in (
        ({"config.json"}, "config.json"),
        ({"tokenizer.model"}, "tokenizer.model"),
        (weights, "weights (model.safetensors or pytorch_model.bin, or their index)"),
    ):
        if not needed & names:
            raise ValueError(f"{model} is not a complete checkpoint: it has no {what}; {CURE}.")


def check_folder(folder: Path):
    """Check that a folder holds a complete ChatGLM2 checkpoint, in files of its own.

    Raises:
        ValueError: It lacks a file, holds something else, or a file is damaged.
        OSError: A file cannot be read.
    """
    if not folder.exists():
        raise ValueError(f"{folder}: 没有这个文件夹 / there is no such folder.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the checkpoint folder that holds it.")
    check_kind(folder)
    names = {file.name for file in folder.iterdir()}
    if "tokenizer.model" not in names and find_weight_files(folder):
        check_names(folder, read_all_shapes(folder))  # perhaps an adapter
    check_file_names(str(folder), names)
    for name in names:
        if name.endswith((".json", ".model", ".jinja")):
            check_inside(folder, folder / name)


def read_checkpoint(folder: Path, check_config) -> ChatGLMConfig:
    """Check all files of a checkpoint folder, and return its configuration.

    Args:
        check_config: Raises a ValueError for a configuration that the caller cannot use.

    Raises:
        ValueError: It lacks a file, holds something else, or a file is damaged.
        OSError: A file cannot be read.
    """
    check_folder(folder)
    config = read_config(folder)
    check_config(config)
    check_tokenizer_files(folder)
    check_shapes(folder, config)
    return config


def check_new_folder(folder: Path):
    """Check that a folder to be written is new or empty.

    Raises:
        ValueError: It is not.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: give a new one.")


def read_tensors(*files: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in weight files, mapped into memory: a page is read when it is used.

    Raises:
        OSError: A file is missing, truncated or a Git LFS pointer.
        ValueError: A file holds something else than tensors.
    """
    tensors = {}
    for file in files:
        check_weight_file(file)
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
            continue
        tensors |= read_pickled_tensors(file)
    return tensors


# Downloads.


def locate_descriptions(model: str, revision: str | None):
    """As `locate_checkpoint`, but all files except the weights are in the folder, also for the hub.

    Returns:
        (folder, None) or (folder, information) if the weights have to be downloaded.

    Raises:
        SystemExit, ValueError: As `locate_checkpoint`.
        OSError, HTTPError: The hub cannot be reached.
    """
    folder, hub_info = locate_checkpoint(model, revision)
    if hub_info is not None:
        folder = download_descriptions(model, revision, hub_info)
    return folder, hub_info


def download_descriptions(model: str, revision: str | None, hub_info) -> Path:
    """Download all files but the weights; return their folder in the hub's cache.

    Raises:
        ValueError: They describe no ChatGLM2 model.
        OSError, HTTPError: The hub cannot be reached.
    """
    names = {file.rfilename for file in hub_info.siblings}
    folder = download(model, revision, {name for name in names if name.endswith(DESCRIPTIONS)})
    check_description(folder)
    return folder


def download_weights(model: str, revision: str | None, hub_info) -> Path:
    """Download the weights, if the disk can hold them; return their folder in the hub's cache.

    Raises:
        SystemExit: The disk is too small.
        ValueError: They are no ChatGLM2 model.
        OSError, HTTPError: The hub cannot be reached.
    """
    if size := check_disk(model, hub_info):
        print(
            f"{model}: 下载 {gigabytes(size)} 到 {constants.HF_HUB_CACHE}（环境变量 HF_HOME "
            "可更改）；已有模型请用 --model 指定文件夹 / "
            f"downloading {gigabytes(size)} into that folder (environment variable HF_HOME); if "
            "you have the model already: --model FOLDER",
            file=sys.stderr,
        )
    names = {file.rfilename for file in hub_info.siblings}
    suffix = find_weight_suffix(names)
    weights = {x for x in names if x.startswith(("model", "pytorch_model")) and x.endswith(suffix)}
    folder = download(model, revision, weights)
    check_folder(folder)
    return folder


def download(model: str, revision: str | None, names: set[str]) -> Path:
    names = sorted(name for name in names if "/" not in name)
    paths = [hf_hub_download(model, name, revision=revision or "main") for name in names]
    return Path(paths[0]).parent


def find_weight_suffix(names: set[str]) -> str:
    return ".safetensors" if any(name.endswith(".safetensors") for name in names) else ".bin"


def check_disk(model: str, hub_info) -> int:
    """Check that the disk of the hub's cache can hold the download; return its bytes.

    Raises:
        SystemExit: It cannot.
    """
    names = {file.rfilename for file in hub_info.siblings}
    suffix = find_weight_suffix(names)
    needed = sum(
        file.size or 0
        for file in hub_info.siblings
        if file.rfilename.endswith((suffix, ".model", ".json"))
        and not isinstance(
            try_to_load_from_cache(model, file.rfilename, revision=hub_info.sha), str
        )
    )
    free = get_free_space(Path(constants.HF_HUB_CACHE))
    if needed > free:
        raise SystemExit(
            f"{model}: 磁盘空间不足 / "
            f"the download needs {gigabytes(needed)}, {gigabytes(free)} free in "
            f"{constants.HF_HUB_CACHE}: free some space, or choose another disk (environment "
            "variable HF_HOME)."
        )
    return needed
