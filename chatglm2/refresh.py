"""Put today's code into a downloaded ChatGLM2 folder, so that any tool loads it on transformers 5.

    python -m chatglm2.refresh DIR
    python -m chatglm2.refresh DIR --undo

DIR is the folder of chatglm2-6b, -int4 or another ChatGLM2 checkpoint, or a snapshot in the Hugging
Face cache. The command replaces the remote-code files and sets `auto_map` in config.json and
tokenizer_config.json; nothing else changes. The first refresh moves the files that it found to
DIR/.before_refresh, later ones leave this backup alone, and `--undo` restores it. Links are
replaced by files; the files that they point to stay as they are.
"""

import argparse
import json
import os
import shlex
import shutil
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from .configuration_chatglm import AUTO_MAP, TRANSFORMERS_RANGE
from .errors import exit_on_error, print_result, run_command
from .json_files import read_json
from .recognition import check_kind, check_names
from .weights_chatglm import find_weight_files, read_all_shapes

BACKUP = ".before_refresh"
STAGING = ".before_refresh.tmp"  # files that are not complete yet or no longer needed
PACKAGE = Path(__file__).parent
CODE_FILES = sorted([*PACKAGE.glob("*_chatglm.py"), PACKAGE / "quantization.py"])
AUTO_MAPS = {
    "config.json": AUTO_MAP,
    "tokenizer_config.json": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
MANAGED = sorted({file.name for file in CODE_FILES} | set(AUTO_MAPS))


def set_auto_map(path: Path, auto_map: dict) -> bytes:
    """Return the text of a JSON file with `auto_map` set and the other fields unchanged."""
    fields = (read_json(path) if path.exists() else {}) | {"auto_map": auto_map}
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def put(folder: Path, contents: dict[str, bytes]):
    """Replace the managed files of a folder by `contents`, each file in one step."""
    staging = folder / STAGING
    staging.mkdir()
    for name, content in contents.items():
        (staging / name).write_bytes(content)
        (staging / name).replace(folder / name)
    staging.rmdir()
    for name in set(MANAGED) - set(contents):
        (folder / name).unlink(missing_ok=True)


def drop_cached_code(folder: Path):
    """Delete the copies that transformers made of the code in a Hugging Face snapshot.

    transformers keeps one copy for each commit and never compares it with the snapshot again.
    """
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        modules = Path(os.environ.get("HF_MODULES_CACHE", Path(HF_HOME, "modules")))
        for copy in list(modules.glob(f"transformers_modules/**/{folder.name}")):
            shutil.rmtree(copy)


def refresh(folder: Path):
    """Put today's code and `auto_map` into a checkpoint folder; keep the old files in the backup.

    Raises:
        ValueError: The folder holds no ChatGLM2 checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder that holds the checkpoint.")
    check_kind(folder)
    if find_weight_files(folder):
        check_names(folder, read_all_shapes(folder))
    contents = {file.name: file.read_bytes() for file in CODE_FILES}
    contents |= {name: set_auto_map(folder / name, value) for name, value in AUTO_MAPS.items()}
    backup, staging = folder / BACKUP, folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    if not backup.is_dir():
        staging.mkdir()
        for name in MANAGED:
            if (folder / name).exists():
                shutil.copy2(folder / name, staging / name)
        staging.rename(backup)
    put(folder, contents)
    drop_cached_code(folder)


def undo(folder: Path):
    """Restore the files of the backup and remove the backup.

    Raises:
        ValueError: There is no backup.
    """
    backup, staging = folder / BACKUP, folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    if not backup.is_dir():
        raise ValueError(f"{folder} has no {BACKUP} folder: there is nothing to undo.")
    put(folder, {file.name: file.read_bytes() for file in backup.iterdir()})
    drop_cached_code(folder)
    backup.rename(staging)
    shutil.rmtree(staging)


def describe(folder: Path) -> str:
    """Return the line that `refresh` prints."""
    names = ", ".join(file.name for file in CODE_FILES)
    return (
        f"{folder}: wrote {names} for transformers {' to '.join(TRANSFORMERS_RANGE)}, and auto_map "
        f"in {' and '.join(AUTO_MAPS)}; the old files are in {folder / BACKUP}; undo with: "
        f"python -m chatglm2.refresh {shlex.quote(str(folder))} --undo"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m chatglm2.refresh",
        description="Put today's code into a downloaded ChatGLM2 folder.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the checkpoint folder")
    parser.add_argument("--undo", action="store_true", help="restore the old files")
    args = parser.parse_args(argv)
    folder = args.folder
    with exit_on_error(""):
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is not a folder: give the path of a downloaded ChatGLM2 checkpoint (`hf "
                "download THUDM/chatglm2-6b` prints where it put it)."
            )
        try:
            undo(folder) if args.undo else refresh(folder)
        except OSError as error:
            raise OSError(
                f"{folder} cannot be changed ({error}). Nothing is lost: make the folder writable "
                "or use a copy, and run the command again."
            ) from error
    if args.undo:
        print_result(f"{folder}: restored the old code and auto_map, and removed {BACKUP}.")
    else:
        print_result(describe(folder))


if __name__ == "__main__":
    run_command(main)
