"""Makes moe/telemetry/sinks/grafana.json: `python -m tests.moe.telemetry.sinks.grafana_dashboard`."""

import json
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode

FILE = Path(__file__).resolve().parents[4] / "moe" / "telemetry" / "sinks" / "grafana.json"

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN = '{run=~"$run"}'
# Prometheus sorts labels as text: numbers of one length keep experts in their order.
LOAD = 'switchyard_expert_load{run=~"$run", layer="$layer"}'
LOAD = f'label_replace({LOAD}, "expert", "0$1", "expert", "([0-9]{{1,2}})")'
LOAD = f'label_replace({LOAD}, "expert", "0$1", "expert", "([0-9]{{2}})")'

# title, what it says, unit, ((query, legend), ...)
LINES = (
    (
        "Loss",
        "Nats per token, of training and of every validation domain.",
        "short",
        (
            (f"switchyard_train_loss{RUN}", "{{run}} training"),
            (f"switchyard_eval_loss{RUN}", "{{run}} {{domain}}"),
        ),
    ),
    (
        "Tokens per second",
        "Of all ranks together.",
        "short",
        ((f"switchyard_train_tokens_per_second{RUN}", "{{run}}"),),
    ),
    (
        "MFU",
        "The model's own work over the GPUs' peak; empty where `cluster.peak_tflops` is not set.",
        "percentunit",
        ((f"switchyard_train_mfu{RUN}", "{{run}}"),),
    ),
    (
        "Alarms",
        "Since the process began, by kind; what each says stands in alarms.jsonl.",
        "short",
        ((f"sum by (run, kind) (switchyard_alarms_total{RUN})", "{{run}} {{kind}}"),),
    ),
    (
        "MaxVio by layer, over the window",
        "The busiest expert's load over the mean, less 1: 0 is even.",
        "short",
        ((f"switchyard_layer_max_vio_window{RUN}", "{{run}} layer {{layer}}"),),
    ),
    (
        "Bias spread by layer",
        "The widest distance of a selection bias from its layer's mean.",
        "short",
        ((f"switchyard_layer_bias_spread{RUN}", "{{run}} layer {{layer}}"),),
    ),
    (
        "Dead experts by layer",
        "Experts that received no token in the step.",
        "short",
        ((f"switchyard_layer_dead{RUN}", "{{run}} layer {{layer}}"),),
    ),
    (
        "Dropped by layer",
        "Assignments per second that found no place.",
        "short",
        (
            (
                f"sum by (run, layer) (rate(switchyard_dropped_total{RUN}[$__rate_interval]))",
                "{{run}} layer {{layer}}",
            ),
        ),
    ),
    (
        "Busiest rank by layer",
        "Rows that an expert-parallel rank received, over the mean of the ranks.",
        "short",
        ((f"switchyard_layer_rank_share{RUN}", "{{run}} layer {{layer}}"),),
    ),
    (
        "Traffic by link",
        "What dispatches keep on the rank, send within the node, send over the network.",
        "Bps",
        ((f"rate(switchyard_link_bytes_total{RUN}[$__rate_interval])", "{{run}} {{link}}"),),
    ),
)


def make() -> str:
    """The dashboard as the text of its file."""
    board = (
        dashboard.Dashboard("Switchyard")
        .uid("switchyard")
        .description("Loss, speed and expert load of Mixture-of-Experts runs.")
        .tags(["switchyard", "mixture-of-experts"])
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("5s")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Source").type("prometheus"))
        .with_variable(_variable("run", "Run", "switchyard_train_loss").multi(True).include_all(True))
        .with_variable(_variable("layer", "Layer of the heatmap", "switchyard_layer_entropy"))
        .with_row(dashboard.Row("Training"))
    )
    for line in LINES[:4]:
        board.with_panel(_lines(*line))
    board.with_row(dashboard.Row("Experts"))
    board.with_panel(_loads())
    for line in LINES[4:]:
        board.with_panel(_lines(*line))
    built = board.build()
    for number, panel in enumerate(built.panels, start=1):
        panel.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _variable(name: str, label: str, metric: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values({metric}, {name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.NUMERICAL_ASC)
    )


def _lines(title: str, text: str, unit: str, queries: tuple[tuple[str, str], ...]) -> timeseries.Panel:
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = timeseries.Panel().title(title).description(text).unit(unit).datasource(SOURCE)
    panel.height(8).span(12).legend(legend.show_legend(True)).show_points(VisibilityMode.NEVER)
    for number, (expression, name) in enumerate(queries):
        query = prometheus.Dataquery().expr(expression).legend_format(name).datasource(SOURCE).range()
        panel.with_target(query.ref_id("ABC"[number]))
    return panel


def _loads() -> heatmap.Panel:
    """One heatmap per chosen run: time across, a layer's experts up."""
    query = prometheus.Dataquery().expr(LOAD).legend_format("{{expert}}").datasource(SOURCE).range()
    return (
        heatmap.Panel()
        .title("Load of experts, layer $layer, $run")
        .description(
            "Tokens over the layer's mean, from the /metrics of `switchyard dashboard`; blank: no token."
        )
        .datasource(SOURCE)
        .height(12)
        .span(24)
        .repeat("run")
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("RdBu")
            .reverse(True)
            .steps(64)
            .min(0)
            .max(2)
        )
        .y_axis(heatmap.YAxisConfig().axis_label("expert"))
        .cell_values(heatmap.CellValues().decimals(2))
        .scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LINEAR))
        .show_legend()
        .show_tooltip()
        .with_target(query.ref_id("A"))
    )


if __name__ == "__main__":
    FILE.write_text(make(), encoding="utf-8")
