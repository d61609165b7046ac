"""Text is UTF-8 in every locale: whatever opens a file as text, or reads what a process prints, says so."""

import ast
from collections.abc import Iterator

from tests.test_layers import MODULES

OPENS_NO_TEXT = {"os", "Image", "gzip", "self", "run", "parent"}  # owners of other functions named open


def without_encoding(tree: ast.AST) -> Iterator[str]:
    for call in (each for each in ast.walk(tree) if isinstance(each, ast.Call)):
        keywords = {word.arg: word.value for word in call.keywords}
        if "encoding" in keywords:
            continue
        match call.func:
            case ast.Attribute(attr="read_text" | "write_text"):
                yield ast.unparse(call)
            case ast.Attribute(value=ast.Name(id=owner), attr="open") if owner in OPENS_NO_TEXT:
                pass
            case ast.Attribute(attr="open" | "fdopen") | ast.Name(id="open"):
                words = [*call.args, *keywords.values()]
                modes = [word.value for word in words if isinstance(word, ast.Constant)]
                if not any(isinstance(mode, str) and "b" in mode for mode in modes):
                    yield ast.unparse(call)
        if ast.unparse(keywords.get("text", ast.Constant(False))) == "True":
            yield ast.unparse(call)


def test_an_open_without_encoding_is_found():
    code = (
        'a.open(); open(b, "w"); c.read_text(); run(d, text=True); os.open(e, 0); f.open("rb"); open(g, encoding="x")'
    )
    assert [*without_encoding(ast.parse(code))] == ["a.open()", "open(b, 'w')", "c.read_text()", "run(d, text=True)"]


def test_no_module_reads_text_in_the_encoding_of_the_locale():
    found = {path: [*without_encoding(ast.parse(path.read_text(encoding="utf-8")))] for path in MODULES}
    assert {path: calls for path, calls in found.items() if calls} == {}
