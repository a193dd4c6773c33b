"""Rewrites Markdown of users and models, so that Gradio and Streamlit show it as it is meant."""

import re
from functools import lru_cache

from markdown_it import MarkdownIt

PARSER = MarkdownIt("commonmark").disable(["html_block", "html_inline", "reference"])
CODE_SPAN = re.compile(r"(?<!`)(``?)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
SPECIAL = re.compile(
    r"\\\[(?P<display>(?:[^\\]|\\[^\[\]])+?)\\\]|\$\$(?P<dollars>.+?)\$\$"
    r"|\\\((?P<inline>(?:[^\\]|\\[^()])+?)\\\)"  # not nested: the time would be quadratic
    r"|(?<![a-zA-Z\d$])\$(?P<dollar>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?![a-zA-Z\d$])"  # no prices
    r"|\\?(?P<tag><)|\\(?P<escaped>.)|(?P<image>!\[)|(?P<footnote>\[\^)|(?P<newline>\n)"
    r"|(?P<price>\$)|(?P<colon>:(?=[a-z]))",
    re.DOTALL,
)
# A display formula of several lines, some of which Markdown would read as items or headings.
FORMULA = re.compile(
    r"^ {0,3}(?:\\\[(?:(?!\n[ \t]*\n)(?:[^\\]|\\[^\[\]]))+?\\\]"
    r"|\$\$(?:(?!\n[ \t]*\n)[^$])+\$\$)",
    re.MULTILINE,
)
ALONE = re.compile(r"^ {0,3}\$\$([^$\n]+)\$\$ *$", re.MULTILINE)
ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t].*\n\S", re.MULTILINE)  # and text behind it
# A task, which would be drawn as a box without a name.
TASK = re.compile(r"\A([ \t>]*(?:[-*+]|\d+[.)])[ \t]+)\[([ xX])\](?= )")
# The replacement of each group of `SPECIAL`, in each library's Markdown.
GRADIO = {
    "display": r"\[{}\]",
    "inline": r"\({}\)",
    "image": "!&#91;",
    "footnote": "&#91;^",
    "newline": "\n",
    "price": "$",
    "colon": ":",
    "dollars": r"\g<0>",
    "alone": r"\g<0>",
    "<": "&lt;",
}
STREAMLIT = {
    "display": "$${}$$",
    "inline": "${}$",
    "image": "!&#91;",
    "footnote": "&#91;^",
    "newline": "  \n",
    "price": r"\$",
    "colon": "&#58;",  # Streamlit draws `:red[...]` and `:smile:`
    "dollars": r"\\textdollar ",
    "alone": r"$$\n\1\n$$",  # otherwise it would be drawn as in a line of text
    "<": "<",
}


@lru_cache(maxsize=1000)
def to_markdown(text: str, library: str) -> str:
    """Return Markdown for `library` ("gradio" or "streamlit").

    HTML tags and images are shown literally: no part of the text becomes HTML, and no browser sends
    a request to another host. Formulas get the library's delimiters. Code is not changed.
    """
    style = {"gradio": GRADIO, "streamlit": STREAMLIT}[library]
    text = end_lists(join_formulas(text))
    lines = text.split("\n")
    for token in reversed(PARSER.parse(text)):
        if token.type == "inline":  # the text of a paragraph, a heading or an item
            part = convert("\n".join(lines[slice(*token.map)]), token, style)
            part = TASK.sub(lambda found: found[1] + "☑☐"[found[2] == " "], part)
            lines[slice(*token.map)] = [
                ALONE.sub(style["alone"], part) if token.level == 1 else part
            ]
        elif token.type == "fence":
            first = token.map[0]
            lines[first] = re.sub("[<!]", "", lines[first])  # no language has them in its name
    return "\n".join(lines)


def end_lists(text: str) -> str:
    """Put a blank line before text that follows a list without one.

    In Markdown that text would belong to the last item; models mean a paragraph of its own.
    """
    if not ITEM.search(text):
        return text
    lines, end = text.split("\n"), False
    for token in reversed(PARSER.parse(text)):
        if token.type == "inline" and end:
            first, last = token.map
            for i in range(first + 1, last):
                if lines[i][:1].strip():  # not indented
                    lines.insert(i, "")
                    break
        is_end = token.level == 0 and token.type.endswith("list_close")
        end = is_end or (end and token.type.endswith("_close"))
    return "\n".join(lines)


def join_formulas(text: str) -> str:
    """Put each display formula outside of code on one line."""
    if not FORMULA.search(text):
        return text
    lines, result, end = text.split("\n"), [], 0
    codes = [token.map for token in PARSER.parse(text) if token.type in ("fence", "code_block")]
    for first, last in (*codes, (len(lines), len(lines))):
        part = "\n".join(lines[end:first])
        result += [FORMULA.sub(lambda found: join_lines(found[0]), part)] if first > end else []
        result, end = result + lines[first:last], last
    return "\n".join(result)


def join_lines(formula: str) -> str:
    return re.sub(r"\s*\n[\s>]*", " ", formula)


def convert(text: str, token, style: dict[str, str]) -> str:
    """Replace what `SPECIAL` finds in a paragraph, except in its code spans."""
    spans = list(CODE_SPAN.finditer(text))
    codes = [child.content for child in token.children if child.type == "code_inline"]
    if [span[2].replace("\n", " ").strip() for span in spans] != [code.strip() for code in codes]:
        spans = []  # in doubt, escape all: an entity in code is better than a tag elsewhere
    result, end = "", 0
    for span in spans:
        result += SPECIAL.sub(lambda found: replace(found, style), text[end : span.start()])
        result, end = result + join_lines(span[0]), span.end()
    return result + SPECIAL.sub(lambda found: replace(found, style), text[end:])


def replace(found: re.Match, style: dict[str, str]) -> str:
    body = found[found.lastgroup].replace("<", style["<"])
    match found.lastgroup:
        case "display" | "dollars":
            return style["display"].format(formula(body, style))
        case "inline" | "dollar":
            return style["inline"].format(formula(body, style))
        case "escaped":  # Gradio would search the end of an unfinished formula in later code
            return f"&#{ord(body)};" if body in "[]()" else "\\" + body
        case "tag":
            return body
    return style[found.lastgroup]


def formula(body: str, style: dict[str, str]) -> str:
    """Return TeX in which no Markdown parser finds an image, a footnote or the end of a formula."""
    body = join_lines(body).replace("![", "! [").replace("[^", "[ ^")
    return re.sub(r"\$+", style["dollars"], body)
