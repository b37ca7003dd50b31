"""Questions and answers that every machine has: a Python function, and what its docstring says. No torch."""

import ast
import textwrap
import warnings
from collections.abc import Iterator

TASK = "Describe this function.\n\n"
CUT = "# ..."  # stands for the lines of a long function that were left out
CHARACTERS_PER_TOKEN = 2.5  # fewer than nearly all code has under a BPE of a few thousand tokens


def read_pairs(source: str, sequence_length: int) -> Iterator[tuple[int, str, str]]:
    """(line, question, answer) for each function of a module that has a docstring and does something.

    The question is the function without its docstring, the answer the docstring's first paragraph on one
    line. A function too long for a sequence of so many tokens is cut at a line's end; one whose
    signature and docstring alone would not fit is no pair.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of a module's own escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and samples lie among modules
        return
    lines = source.splitlines()
    most = int(CHARACTERS_PER_TOKEN * sequence_length) - len(TASK)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        docstring, first = node.body[0], node.body[1]
        if not answer or docstring.lineno == node.lineno or first.lineno == docstring.end_lineno:
            continue
        signature = lines[node.lineno - 1 : docstring.lineno - 1]
        body = lines[docstring.end_lineno : node.end_lineno]
        function = _shorten(signature, body, most - len(answer))
        if function:
            yield node.lineno, TASK + function, answer


def _shorten(signature: list[str], body: list[str], most: int) -> str:
    """A function in at most so many characters, or nothing where not even its first line fits."""
    while not body[0].strip():
        body = body[1:]
    whole = textwrap.dedent("\n".join([*signature, *body])).split("\n")
    if sum(len(line) + 1 for line in whole) <= most:
        return "\n".join(whole)
    first = whole[len(signature)]
    indent = first[: len(first) - len(first.lstrip())]
    kept: list[str] = []
    room = most - len(indent) - len(CUT)
    for line in whole:
        room -= len(line) + 1
        if room < 0:
            break
        kept.append(line)
    return "\n".join([*kept, indent + CUT]) if len(kept) > len(signature) else ""
