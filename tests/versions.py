"""Run tests/test_versions.py with other versions of transformers and torch.

    python tests/versions.py [oldest] [pinned] [newest]

Each word makes a virtual environment in a temporary folder: with the lowest versions that
pyproject.toml allows, with those of requirements.txt, or with the newest that pip finds. Without a
word, all three run. The exit code is 1 if any of them fails. A transformers newer than the
supported range is tried as if it were within it, so that the tests show what it breaks.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = ("accelerate", "sentencepiece", "torch", "transformers")
KINDS = ("oldest", "pinned", "newest")


def choose_requirements(kind: str) -> list[str]:
    """Return what pip installs: the pair under test, and the pinned packages of the server."""
    pinned = (ROOT / "requirements.txt").read_text("utf-8").replace("_", "-").split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    oldest = [re.sub(r">=([\d.]+).*", r"==\1", line) for line in project["dependencies"]]
    core = {
        "oldest": oldest,
        "pinned": [line for line in pinned if line.split("==")[0] in CORE],
        "newest": list(CORE),
    }[kind]
    extras = {re.split("[=>]", line)[0] for line in project["optional-dependencies"]["serving"]}
    return [*core, *(line for line in pinned if line.split("==")[0] in extras), "pytest"]


def copy_project(folder: Path, transformers_version: str):
    """Copy what the tests need, with a range of versions that includes `transformers_version`."""
    for name in ("chatglm2", "resources/chatglm2-tiny", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    file = folder / "chatglm2" / "configuration_chatglm.py"
    text = file.read_text("utf-8")
    oldest, newest = re.search(r'TRANSFORMERS_RANGE = \("([\d.]+)", "([\d.]+)"\)', text).groups()
    found = ".".join(transformers_version.split(".")[:2])
    if [int(x) for x in found.split(".")] > [int(x) for x in newest.split(".")]:
        file.write_text(
            text.replace(f'("{oldest}", "{newest}")', f'("{oldest}", "{found}")'), "utf-8"
        )


def run(kind: str) -> str:
    """Run the tests in a new environment; return one line that says what passed or failed."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        bin_folder = "Scripts" if sys.platform == "win32" else "bin"
        python = [str(environment / bin_folder / "python")]
        pip = [*python, "-m", "pip"]
        if subprocess.run([*pip, "install", "-qq", *choose_requirements(kind)]).returncode:
            return f"{kind}: FAILED, pip cannot install {' '.join(choose_requirements(kind))}"
        packages = json.loads(subprocess.check_output([*pip, "list", "--format", "json"]))
        versions = {package["name"]: package["version"] for package in packages}
        copy_project(Path(folder, "project"), versions["transformers"])
        options = ["-q", "-p", "no:cacheprovider", "--noconftest", "-o", "addopts=", "--tb=short"]
        tests = [*python, "-m", "pytest", *options, "tests/test_versions.py"]
        failed = subprocess.run([*tests, "-k", "not range"], cwd=Path(folder, "project")).returncode
        result = "FAILED" if failed else "passed"
        return (
            f"{kind}: {result}, transformers {versions['transformers']}, torch {versions['torch']}"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="kind", help=", ".join(KINDS))
    kinds = parser.parse_args(argv).kinds or KINDS
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"{', '.join(sorted(unknown))}: give any of {', '.join(KINDS)}")
    lines = []
    for kind in kinds:
        lines.append(run(kind))
        print(lines[-1], flush=True)
    sys.exit(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    main()
