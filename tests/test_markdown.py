"""`markdown`: text as Markdown for both libraries."""

import time

import pytest

from chatglm2.chat.markdown import to_markdown


@pytest.mark.parametrize(
    ("text", "gradio", "streamlit"),
    [
        ("<b>x</b>", "&lt;b>x&lt;/b>", "<b>x</b>"),
        (r"\<b>", "&lt;b>", "<b>"),
        ("![x](http://a/b)", "!&#91;x](http://a/b)", "!&#91;x](http://a/b)"),
        ("a\nb", "a\nb", "a  \nb"),
        (":red[a] 1:2 http://a", ":red[a] 1:2 http://a", "&#58;red[a] 1:2 http://a"),
        ("$E=mc^2$ 和 \\(a<b\\)", "\\(E=mc^2\\) 和 \\(a&lt;b\\)", "$E=mc^2$ 和 $a<b$"),
        ("$$a$$ \\[b\\]", "\\[a\\] \\[b\\]", "$$a$$ $$b$$"),
        ("价格 $5 和 $6，$x$", "价格 $5 和 $6，\\(x\\)", "价格 \\$5 和 \\$6，$x$"),
        ("`<b> $x$`, <b>", "`<b> $x$`, &lt;b>", "`<b> $x$`, <b>"),
        ("`a\n<b>` <b>", "`a <b>` &lt;b>", "`a <b>` <b>"),
        ("```\n<b>$x$\n```\n<b>", "```\n<b>$x$\n```\n&lt;b>", "```\n<b>$x$\n```\n<b>"),
        ("```\n<b>", "```\n<b>", "```\n<b>"),
        ("```<b>![\nx\n```", "```b>[\nx\n```", "```b>[\nx\n```"),
        ("- ```\n  <b>\n- <b>", "- ```\n  <b>\n- &lt;b>", "- ```\n  <b>\n- <b>"),
        ("x\n\n    <b>", "x\n\n    <b>", "x\n\n    <b>"),
        ("`a\n- b` <b> `", "`a\n- b` <b> `", "`a\n- b` <b> `"),
        ("[a]: <b>", "[a]: &lt;b>", "[a]: <b>"),
        ("see[^1]\n\n[^1]: a", "see&#91;^1]\n\n&#91;^1]: a", "see&#91;^1]\n\n&#91;^1]: a"),
        ("`a\n[^1]: b`", "`a [^1]: b`", "`a [^1]: b`"),
        ("$$a \\\\\nb$$\nc", "\\[a \\\\ b\\]\nc", "$$\na \\\\ b\n$$\nc"),
        ("\\[\na\n+ b\n- c\n\\]", "\\[ a + b - c \\]", "$$\n a + b - c \n$$"),
        ("- $$a\n  b$$", "- \\[a b\\]", "- $$a b$$"),
        ("```\n$$a\nb$$\n```", "```\n$$a\nb$$\n```", "```\n$$a\nb$$\n```"),
        ("\\[a$$ ![x](u)\\]", "\\[a$$ ! [x](u)\\]", "$$\na\\textdollar  ! [x](u)\n$$"),
        ("\\[\n```\n\\]\n<b>", "&#91;\n```\n\\]\n<b>", "&#91;\n```\n\\]\n<b>"),
        ("\\(a \\) \\)", "\\(a \\) &#41;", "$a $ &#41;"),
        ("\\[a \\\\[2pt] b\\]", "\\[a \\\\[2pt] b\\]", "$$\na \\\\[2pt] b\n$$"),
        ("1. a\n2. b\nc\nd", "1. a\n2. b\n\nc\nd", "1. a\n2. b\n\nc  \nd"),
        ("- a\n  - b\nc\n> d", "- a\n  - b\n\nc\n> d", "- a\n  - b\n\nc\n> d"),
        ("1. a\nb\n2. c\n   d", "1. a\nb\n2. c\n   d", "1. a  \nb\n2. c  \n   d"),
        ("- [x] a\n- [ ] b", "- ☑ a\n- ☐ b", "- ☑ a\n- ☐ b"),
        ("1. [X] a - [x] b", "1. ☑ a - [x] b", "1. ☑ a - [x] b"),
        ("", "", ""),
    ],
)
def test_markdown(text, gradio, streamlit):
    assert to_markdown(text, "gradio") == gradio
    assert to_markdown(text, "streamlit") == streamlit


def test_where_code_begins_in_doubt_tags_are_escaped():
    """Three backticks within a line are code to some parsers only."""
    assert to_markdown("a ```<b>``` c", "gradio") == "a ```&lt;b>``` c"


@pytest.mark.slow
@pytest.mark.parametrize("part", [r"\[", r"\(", "$$", "$", "`", "[^", "\\[\n", "$$a\n"])
def test_the_time_grows_with_the_length_only(part):
    start = time.process_time()
    to_markdown(part * (200_000 // len(part)), "streamlit")
    assert time.process_time() - start < 5  # quadratic time would be minutes
