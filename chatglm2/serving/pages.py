"""The pages of a server for a browser: `/`, and `/docs` with the fields of all requests.

They have no scripts and load nothing, so they work without the internet.
"""

import json
import re
from html import escape
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import HTMLResponse, PlainTextResponse

KINDS = {"string": "text", "boolean": "true or false"}  # of JSON schema
MAX_BOUND = 2**53  # a larger one is not worth a mention
HEADERS = {
    "Cache-Control": "no-store",  # the page depends on the headers Host and Accept
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>
:root {{color-scheme: light dark}}
body {{font: 16px/1.5 sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem}}
pre, code {{font-family: monospace; background: #8882}}
pre {{padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere}}
th, td {{text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0}}
</style></head><body><main><h1>{title}</h1>
{content}
</main></body></html>
"""


def describe_type(schema: dict, definitions: dict, plural: str = "") -> str:
    """Return in words which values a JSON schema allows; `plural` is "s" for those of a list."""
    schema = definitions.get(schema.get("$ref", "").rpartition("/")[2], schema)
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        kinds = [describe_type(choice, definitions, plural) for choice in choices]
        return " or ".join(kind for kind in kinds if not kind.startswith("null"))
    if values := schema.get("enum"):
        texts = ", ".join(f"`{json.dumps(value)}`" for value in values)
        return texts if "type" in schema else f"only {texts}"  # a type: all values have a meaning
    if schema["type"] == "array":
        most = f"up to {schema['maxItems']} " if "maxItems" in schema else ""
        return f"list{plural} of {most}{describe_type(schema['items'], definitions, 's')}"
    kind = KINDS.get(schema["type"], schema["type"]) + plural
    if properties := schema.get("properties"):
        return f"{kind} with " + ", ".join(f"`{name}`" for name in properties)
    if "maxLength" in schema and not plural:
        return f"{kind} of up to {schema['maxLength']} characters"
    low, high = schema.get("minimum", -MAX_BOUND), schema.get("maximum")
    if plural or low <= -MAX_BOUND:
        return kind
    return kind + (f", at least {low:.15g}" if high is None else f" from {low:.15g} to {high:.15g}")


def list_fields(schema: dict, definitions: dict):
    """Yield the name of each field of a request and its values in words, required ones first."""
    required = schema.get("required", [])
    for field in sorted(schema["properties"], key=lambda field: field not in required):
        kind = describe_type(schema["properties"][field], definitions)
        yield field, f"{kind}{' (required)' if field in required else ''}"


def format_route(path: str, method: str, operation: dict, definitions: dict) -> str:
    text = operation.get("description", "")
    parts = [
        f"<h2><code>{escape(f'{method.upper()} {path}')}</code></h2>",
        f"<p>{escape(text)}</p>",
    ]
    if body := operation.get("requestBody"):
        reference = body["content"]["application/json"]["schema"]["$ref"]
        parts.append("<table><tr><th>field</th><th>value</th></tr>")
        for row in list_fields(definitions[reference.rpartition("/")[2]], definitions):
            cells = (re.sub(r"`(.*?)`", r"<code>\1</code>", escape(cell)) for cell in row)
            parts.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        parts.append("</table>")
    return "\n".join(parts)


def add_pages(app: FastAPI, args, path: str, body: dict):
    """Add `/` and `/docs`.

    Args:
        path: Of the route in the example on the page, with a request's body.
    """
    name = Path(args.model).resolve().name  # resolve, because "." has no name

    @app.get("/", include_in_schema=False)
    async def show_start(request: HTTPRequest):
        """Show a page with an example for curl; needs no key."""
        base = str(request.base_url).rstrip("/")
        key = ' -H "Authorization: Bearer KEY"' if args.api_key else ""
        command = f"curl {base}{path}{key} \\\n    -H 'Content-Type: application/json' \\\n"
        command += f"    -d '{json.dumps(body, ensure_ascii=False)}'"
        docs = f"curl{key} {base}/docs > docs.html" if args.api_key else f"{base}/docs"
        about = "A key is needed, which a browser cannot send." if key else f"Model: {name}"
        if "text/html" not in request.headers.get("accept", ""):
            text = f"{app.title}\n{about}\n\n{command}\n\nAll fields: {docs}\n"
            return PlainTextResponse(text, headers=HEADERS)
        link = f"<code>{escape(docs)}</code>" if key else '<a href="docs">/docs</a>'
        content = f"<p>{escape(about)}</p>\n<pre>{escape(command)}</pre>\n<p>All fields: {link}</p>"
        return HTMLResponse(PAGE.format(title=escape(app.title), content=content), headers=HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def show_docs():
        """Show all routes and fields; /openapi.json has them as JSON."""
        document = app.openapi()
        definitions = document["components"]["schemas"]
        routes = [
            format_route(path, method, operation, definitions)
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        ]
        content = "\n".join(['<p>As JSON: <a href="openapi.json">/openapi.json</a></p>', *routes])
        return HTMLResponse(PAGE.format(title=escape(app.title), content=content), headers=HEADERS)
