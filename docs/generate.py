"""Write the tables of flags, of routes and of request fields into the documentation.

    python docs/generate.py            # write them
    python docs/generate.py --check    # exit with 1 if a page is stale

It imports every script, so it needs requirements-dev.txt.

A table stands between `<!-- flags SCRIPT -->`, `<!-- routes SCRIPT -->` or
`<!-- fields MODULE.CLASS -->` and `<!-- end -->`. After `SCRIPT - OTHER` it has only the rows that
the table of OTHER lacks.
"""

import argparse
import io
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils  # noqa: E402
from chatglm2.serving import pages  # noqa: E402

PAGES = [*sorted(ROOT.glob("docs/*.md")), ROOT / "evaluation" / "README.md"]
MARKED = re.compile(
    r"(<!-- (flags|routes|fields) (\S+)(?: - (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL
)
UNTITLED = ("positional arguments", "options")  # argparse's own groups


def read_help(script: str) -> str:
    """Return what `--help` of a script (or of a module a.b) prints, each text on one line."""
    sys.path.insert(0, str((ROOT / script).parent))
    module = import_module(Path(script).stem if script.endswith(".py") else script)
    output, run = io.StringIO(), getattr(module, "parse_args", None) or module.main
    with patch.dict(os.environ, COLUMNS="10000"), redirect_stdout(output), suppress(SystemExit):
        run(["--help"])
    return output.getvalue().replace(f"{ROOT}/", "")


def list_flags(script: str) -> dict[str, list[str]]:
    """Return a row for each flag, with the text of `--help`, by the titles of their groups."""
    groups = {}
    # A title, or a flag and its text, which stands in the next line if the flag is long.
    for title, flag, text in re.findall(
        r"^(?:(\S.*):|  (-.*?)(?:\n? {2,}(.*))?)$", read_help(script), re.MULTILINE
    ):
        if title:
            groups[title] = rows = []
        elif flag != "-h, --help":
            names = re.sub(r"^(-\w) \S+, ", r"\1, ", flag)  # the value stands after the last name
            rows.append(f"| `{names}` | {text} |")
    return groups


def list_routes(script: str) -> dict[str, list[str]]:
    """Return a row for each route of a server, with the text of its handler."""
    flags = ["--model", str(ROOT / "resources" / "chatglm2-tiny")]
    args = utils.parse_args("", utils.add_server_arguments, flags)
    tokenizer, model = utils.load_model(args)
    app = import_module(Path(script).stem).create_app(model, tokenizer, args)
    app.state.batcher.end()
    rows = [
        f"| `{method} {route.path}` | {route.endpoint.__doc__} |"
        for route in sorted(app.routes, key=lambda route: not route.path.startswith("/v1/"))
        if route.endpoint.__doc__
        for method in route.methods
    ]
    return {UNTITLED[0]: rows}


def list_fields(path: str) -> dict[str, list[str]]:
    """Return a row for each field of a request, the required ones first."""
    module, _, name = path.rpartition(".")
    schema = getattr(import_module(module), name).model_json_schema()
    rows = pages.list_fields(schema, schema.get("$defs", {}))
    return {UNTITLED[0]: [f"| `{field}` | {kind} |" for field, kind in rows]}


def make_table(found: re.Match) -> str:
    begin, kind, name, other, end = found.groups()
    list_rows, column = {
        "flags": (list_flags, "meaning"),
        "routes": (list_routes, "description"),
        "fields": (list_fields, "value"),
    }[kind]
    known = {row for rows in list_rows(other).values() for row in rows} if other else set()
    parts = [begin]
    for title, rows in list_rows(name).items():
        if rows := [row for row in rows if row not in known]:
            parts += [] if title in UNTITLED else [f"**{title.capitalize()}**\n"]
            parts.append("\n".join([f"| {kind[:-1]} | {column} |", "|---|---|", *rows, ""]))
    return "\n".join([*parts, end])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if a page is stale")
    is_check = parser.parse_args(argv).check
    pages = {page: MARKED.sub(make_table, page.read_text("utf-8")) for page in PAGES}
    stale = {page: text for page, text in pages.items() if text != page.read_text("utf-8")}
    for page, text in stale.items():
        print(page.relative_to(ROOT), "is stale" if is_check else "is updated")
        if not is_check:
            page.write_text(text, "utf-8")
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
