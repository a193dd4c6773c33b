"""The Markdown tables of all reports."""


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table that is aligned in a terminal too; its first column is text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    texts = []
    for name, *cells in lines:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        texts.append(f"| {' | '.join([name.ljust(widths[0]), *cells])} |")
    return "\n".join(texts)
