"""The two pictures of a run: its loss, and how evenly its experts are loaded. No torch.

Figures are made with matplotlib's objects, never its global state, and matplotlib is imported only
when a picture is drawn. A picture is rendered in memory and then replaces its file in one step.

Legend: L layers, E experts.
"""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe.telemetry.frames import History
from moe.telemetry.rows import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e7eb"
BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe-Ito: told apart under every common colour blindness
DOTS_PER_INCH = 150
FLOOR = 0.01  # the smallest MaxVio that is told from 0 in a picture


def plot_loss(metrics_rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Training and validation loss (nats per token) over the learning rate, from rows of metrics.jsonl."""
    rows = list(metrics_rows)
    train = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if row.get("domain") == "all"]
    steps = [row["step"] for row in train]
    loss = _numbers(train, "loss")

    figure = _figure(9.0, 5.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top.plot(steps, loss, color=BLUE, alpha=0.3, linewidth=0.8, label="training, each step")
    top.plot(steps, _smooth(loss), color=BLUE, linewidth=1.8, label="training, smoothed")
    if evaluated:
        top.plot(
            [row["step"] for row in evaluated],
            _numbers(evaluated, "eval_loss"),
            color=ORANGE,
            marker="o",
            markersize=5,
            linewidth=1.0,
            label="validation",
        )
    top.set_ylabel("loss (nats per token)")
    tokens = f", {train[-1]['tokens']:,} tokens" if train else ""
    _title(top, f"Loss over {steps[-1] if steps else 0:,} steps{tokens}")
    top.legend(frameon=False, fontsize=9, labelcolor=INK)
    bottom.plot(steps, _numbers(train, "lr"), color=MUTED, linewidth=1.4)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    for axes in (top, bottom):
        _dress(axes)
    _save(figure, path)


def plot_expert_load(load: History, recent: History, path: str | Path) -> None:
    """Each expert's share of its layer's mean load, beside MaxVio of every layer over time.

    The shares are those of `recent`, the run's last steps; MaxVio is that of `load`, the whole run.
    """
    figure = _figure(15.0, float(np.clip(1.6 + 0.2 * len(load.layers), 4.6, 12.0)))
    left, right = figure.subplots(1, 2, width_ratios=[1.75, 1])
    _draw_shares(left, recent)
    _draw_max_vio(right, load)
    _save(figure, path)


def _draw_shares(axes: "Axes", recent: History) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    layers, counts_LE = recent.layers, recent.counts.sum(0)
    shares_LE = counts_LE / np.maximum(1.0, counts_LE.mean(1, keepdims=True))
    # The scale is symmetric about an even load and opens with the imbalance, so that a run of 3 %
    # does not look like one of 300 %; dead experts are black at any scale.
    reach = float(np.clip(np.abs(shares_LE - 1).max(initial=0.0), 0.25, 1.0))
    colours = ListedColormap(colormaps["RdBu_r"](np.linspace(0.06, 0.94, 256))).with_extremes(bad="black")
    image = axes.imshow(
        np.ma.masked_equal(shares_LE, 0.0),
        cmap=colours,
        vmin=1 - reach,
        vmax=1 + reach,
        aspect="auto",
        interpolation="nearest",
    )
    _add_scale(axes, image, bool(shares_LE.max(initial=1.0) > 1 + reach))
    every = -(-len(layers) // 32)
    rows = range(len(layers) - 1, -1, -every)  # counted from the last, so that "mtp0" keeps its name
    axes.set_yticks(rows, [str(layers[row]) for row in rows])
    if shares_LE.size and len(layers) <= 16 and shares_LE.shape[1] <= 16:
        _write_cells(axes, shares_LE, reach)
    axes.set_xlabel("expert (black: no token)" if (shares_LE == 0).any() else "expert")
    axes.set_ylabel("layer")
    _title(axes, f"Expert load over the last {recent.spans.sum():,} steps")
    _dress(axes, grid=False)


def _add_scale(axes: "Axes", image: "AxesImage", open_ended: bool) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    thin = 4.5 * figure.get_figheight()  # length over width: as wide beside a tall map as beside a low one
    extend = "max" if open_ended else "neither"
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, aspect=thin, extend=extend)
    bar.set_label("share of the layer's mean load (1 = even)", color=MUTED, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)


def _write_cells(axes: "Axes", shares_LE: NDArray[np.float64], reach: float) -> None:
    for (layer, expert), share in np.ndenumerate(shares_LE):
        dark = share == 0 or abs(share - 1) > 0.6 * reach
        colour = "white" if dark else INK
        axes.text(expert, layer, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=7.5)


def _draw_max_vio(axes: "Axes", load: History) -> None:
    from matplotlib import colormaps

    layers = load.layers
    # Averaged over a frame's steps, and kept off the zero that a log scale cannot show.
    curves = [np.maximum(_smooth(values), FLOOR) for values in load.scalars["max_vio"].T]
    steps = load.steps - (load.spans - 1) / 2
    tones = colormaps["viridis"](np.linspace(0.0, 0.92, max(1, len(layers))))
    for tone, layer, values in zip(tones, layers, curves, strict=True):
        axes.plot(steps, values, color=tone, linewidth=1.0, label=f"layer {layer}")
    if curves:
        axes.plot(steps, np.mean(curves, axis=0), color=INK, linewidth=2.4, label="mean over layers")
        handles, _ = axes.get_legend_handles_labels()
        few = (
            handles if len(layers) <= 8 else [handles[0], handles[len(layers) // 2], handles[-2], handles[-1]]
        )
        axes.legend(handles=few, frameon=False, fontsize=9, labelcolor=INK)
    # From a collapsed start to an even end MaxVio spans decades, and the end is what matters.
    axes.set_yscale("log", subs=(2, 5))
    for side in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        side("{x:g}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("MaxVio of a batch, smoothed, log scale")
    _title(axes, "MaxVio per layer")
    _dress(axes)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over about a twentieth of the series, weighted towards the middle; NaN is passed over."""
    if len(values) < 3:
        return values
    kernel = np.bartlett(2 * (len(values) // 40) + 5)[1:-1]  # without its zeros: at least three steps
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    weight = np.convolve(finite.astype(float), kernel, mode="same")
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def _numbers(rows: Iterable[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    return np.array([np.nan if row[key] is None else row[key] for row in rows], dtype=float)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")


def _title(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", color=INK, fontsize=12, fontweight="bold", pad=10)


def _dress(axes: "Axes", grid: bool = True) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", colors=MUTED, labelsize=9, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=MUTED, fontsize=10)
    if grid:
        axes.grid(axis="y", which="both", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)


def _save(figure: "Figure", path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    replace_file(path, picture.getvalue())
