"""Helpers for the generated benchmark pages: Markdown tables, and replacing text between marks."""

import re
from collections.abc import Sequence


def fill(text: str, name: str, body: str) -> str:
    r"""`text` with `body` between the marks of `name`.

    >>> fill("a\n<!-- x -->\nold\n<!-- /x -->\nb", "x", "new")
    'a\n<!-- x -->\nnew\n<!-- /x -->\nb'
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    return re.sub(f"(?<={start}\n).*?(?={end})", lambda _: body + "\n", text, flags=re.S)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
