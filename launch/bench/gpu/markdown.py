"""A result as Markdown, from its JSON: a table for each part; what is missing is said in words. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "not measured"


def markdown(result: Mapping[str, Any]) -> str:
    """The page of one run of `switchyard bench gpu`."""
    lines = [f"# {result['device']}, {result['date']}", ""]
    lines += [", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".", ""]
    for part in result["parts"]:
        lines += [f"## {part['name'].capitalize()}", "", f"{part['does']}. {part['seconds']:.0f} s.", ""]
        if part["problem"]:
            lines += [f"**{part['problem']}**", ""]
        lines += table(part["rows"])
    return "\n".join(lines).rstrip() + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table over rows, whose columns are all that any of them has."""
    if not rows:
        return [f"{NOTHING}.", ""]
    columns = list(dict.fromkeys(column for row in rows for column in row["values"]))
    has_checks, has_notes = (any(row[key] not in (None, "") for row in rows) for key in ("ok", "note"))
    head = ["", *(["held"] if has_checks else []), *columns, *(["note"] if has_notes else [])]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [row["name"]]
        if has_checks:
            cells.append({True: "yes", False: "**NO**", None: ""}[row["ok"]])
        cells += [cell(row["values"].get(column), skipped=not row["values"]) for column in columns]
        lines.append(_line(cells + ([row["note"]] if has_notes else [])))
    return [*lines, ""]


def cell(value: Any, *, skipped: bool = False) -> str:
    """Four digits of a number; a row that was skipped was not measured, others lack a column by nature."""
    if value is None:
        return NOTHING if skipped else ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(each.replace('|', '/') for each in cells)} |"
