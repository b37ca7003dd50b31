"""What a run is, told from its settings and surroundings in words. No torch.

Settings are read as they lie: a run of an older version, which lacks some or has others, can be looked at.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moe.selection import Selection, spread
from parallel.layout import DEGREES

Settings = Mapping[str, Any]


def group(settings: Settings, name: str) -> Settings:
    """The settings of a group; none where the file has no such group."""
    found: Settings = settings.get(name) or {}
    return found


def facts(settings: Settings, environment: Settings, recipe: str, last: Settings) -> list[tuple[str, str]]:
    """(name, value) of what is known; `last` is the newest row of metrics.jsonl."""
    told = [
        ("Recipe", recipe.strip()),
        ("Model", _model(group(settings, "model"))),
        ("Layout", _layout(group(settings, "layout"), environment.get("ranks", 1))),
        ("Balance", _balance(group(settings, "balance"))),
        ("Steps", _steps(last.get("step"), group(settings, "train").get("steps"))),
        ("Tokens", f"{last['tokens']:,}" if last.get("tokens") is not None else ""),
        ("Machine", _machine(environment)),
        ("Versions", _versions(environment)),
    ]
    return [(name, value) for name, value in told if value]


def seats(
    settings: Settings, kept: Settings, selection: Settings, layers: Sequence[int | str], ep: int
) -> Mapping[str, Sequence[int]]:
    """The expert in each seat by layer, from a run's own placement.json or selection.json; {} if in order."""
    if kept or group(settings, "tune").get("method") != "esft" or not ep:
        return group(kept, "placement")
    model = group(settings, "model")
    num_layers, num_experts = model["num_layers"], model["num_experts"]
    chosen = {
        str(number) if number < num_layers else f"mtp{number - num_layers}": tuple(experts)
        for number, experts in ((int(key), value) for key, value in group(selection, "experts").items())
    }
    return spread(Selection(experts=chosen), list(map(str, layers)), num_experts, ep)


def placement(
    layers: Sequence[int | str], num_experts: int, num_ranks: int, seats: Mapping[str, Sequence[int]]
) -> list[list[int]]:
    """By layer, the rank of each expert; `seats` has the expert in each seat, and without it is in order."""
    in_order = range(num_experts)
    placed = []
    for layer in layers:
        ranks = [0] * num_experts
        for seat, expert in enumerate(seats.get(str(layer), in_order)):
            ranks[expert] = seat * num_ranks // num_experts
        placed.append(ranks)
    return placed


def _model(model: Settings) -> str:
    if "num_layers" not in model:
        return ""
    words = f"{model['num_layers']} layers"
    if model.get("num_experts"):
        words += f", {model['num_experts']} experts, top {model.get('top_k', '?')}"
    return words


def _layout(layout: Settings, ranks: int) -> str:
    if not layout:
        return ""
    degrees: dict[str, Any] = {axis: layout.get(axis) or 1 for axis in DEGREES}
    if layout.get("dp") is None:  # as many as the ranks that were started allowed
        degrees["dp"] = max(1, ranks // (degrees["tp"] * degrees["cp"] * degrees["pp"]))
    words = ["·".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1) or "one rank"]
    if layout.get("pp", 1) > 1:
        words.append(str(layout.get("schedule", "1f1b")))
    if (count := layout.get("microbatches", 1)) > 1:
        words.append(f"{count} microbatches")
    return ", ".join(words)


def _balance(balance: Settings) -> str:
    if not balance:
        return ""
    bias = balance.get("bias", "none")
    words = ["no bias" if bias == "none" else f"bias {bias}"]
    words += [
        f"{kind} loss {balance[f'{kind}_aux']:g}"
        for kind in ("sequence", "microbatch", "global")
        if balance.get(f"{kind}_aux")
    ]
    return ", ".join(words)


def _steps(step: int | None, total: int | None) -> str:
    words = f"{step or 0:,}"
    return words if total is None else f"{words} of {total:,}"


def _machine(environment: Settings) -> str:
    if "ranks" not in environment:
        return ""
    return f"{environment['ranks']} x {environment.get('device', 'unknown device')}"


def _versions(environment: Settings) -> str:
    words = [
        f"torch {version}" for name, version in group(environment, "packages").items() if name == "torch"
    ]
    git = group(environment, "git")
    if "commit" in git:
        changed = f" and {git['changed_files']} changed files" if git.get("changed_files") else ""
        words.append(f"commit {git['commit'][:10]}{changed}")
    return ", ".join(words)
