"""Each expert's newest numbers in the text format of Prometheus (version 0.0.4). No torch."""

from collections.abc import Iterator, Sequence

import numpy as np

from launch.dashboard.view import RunView

HELP = {
    "switchyard_expert_load": "Tokens of an expert in the newest step, over the mean of its layer",
    "switchyard_expert_bias": "What balancing adds to an expert's score for the choice",
    "switchyard_expert_step": "The step that the other numbers are of",
}


def gauges(runs: Sequence[RunView]) -> str:
    """Lines for `GET /metrics`: labels `run`, `layer`, `expert`; the load of a frame is of all its steps."""
    samples: dict[str, list[str]] = {name: [] for name in HELP}
    for run in runs:
        for name, line in _samples(run):
            samples[name].append(line)
    return "".join(
        f"# HELP {name} {HELP[name]}\n# TYPE {name} gauge\n" + "".join(lines)
        for name, lines in samples.items()
        if lines
    )


def _samples(run: RunView) -> Iterator[tuple[str, str]]:
    load, bias, step = HELP
    history, frame = run.newest()
    if frame < 0:
        return
    label = f'run="{_escaped(run.name)}"'
    yield step, f"{step}{{{label}}} {history.steps[frame]}\n"
    counts = history.counts[frame]
    loads = counts / np.maximum(counts.mean(-1, keepdims=True), 1e-9)
    for name, values in ((load, loads), (bias, history.bias[frame])):
        for layer, row in zip(history.layers, values.tolist(), strict=True):
            for expert, value in enumerate(row):
                yield name, f'{name}{{{label},layer="{layer}",expert="{expert}"}} {value:.6g}\n'


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
