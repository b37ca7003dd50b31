"""The words of alarms: where, the value and its limit, and what to try. No torch.

Settings stand between backticks by their whole names, so that they can be copied.
"""

import math
from collections.abc import Mapping, Sequence

from moe.telemetry.load import Layer

Limits = Mapping[str, float | int | None]
MOST_NAMED = 8  # of a list; the others are counted


def dead_expert(
    layer: Layer, experts: Sequence[int], ranks: Sequence[int], limit: int, others: Sequence[Layer]
) -> str:
    """Experts without a token; `ranks` hold them, none where that is not known."""
    many = f"{len(experts)} experts ({_listed(experts)})" if len(experts) > 1 else f"expert {experts[0]}"
    where = f" on rank{'s' if len(ranks) > 1 else ''} {_listed(ranks)}" if ranks else ""
    return (
        f"layer {layer}: {many}{where} had no token for {limit} step{'s' * (limit > 1)} "
        f"(`telemetry.alarms.dead_steps={limit}`){_elsewhere(others)}. Try `balance.bias=update` with a "
        "higher `balance.bias_rate`, or an auxiliary loss such as `balance.sequence_aux`."
    )


def max_vio(
    layer: Layer,
    expert: int,
    rank: int | None,
    value: float,
    limit: float,
    window: int,
    others: Sequence[Layer],
) -> str:
    """A layer's load is uneven over the window; `expert` has the most."""
    return (
        f"layer {layer}: MaxVio over {window} steps is {value:.2f} (`telemetry.alarms.max_vio={limit:g}`), "
        f"as {_expert(expert, rank)} takes {value + 1:.2f} times the mean{_elsewhere(others)}. "
        "Try `balance.bias=update` with a higher `balance.bias_rate`, or more of `balance.sequence_aux`."
    )


def bias(
    layer: Layer,
    expert: int,
    rank: int | None,
    distance: float,
    load: float,
    limit: float,
    window: int,
    others: Sequence[Layer],
) -> str:
    """An expert's bias moves away from its layer's mean, and its load does not follow."""
    side = "above" if distance > 0 else "below"
    return (
        f"layer {layer}: the bias of {_expert(expert, rank)} is {abs(distance):.2f} {side} the layer's mean "
        f"and moves on (`telemetry.alarms.bias={limit:g}`), yet its load over {window} steps is {load:.2f} "
        f"times the mean{_elsewhere(others)}. Try `balance.bias_center=true` with a lower "
        "`balance.bias_rate`, or an auxiliary loss such as `balance.sequence_aux`, which moves the router."
    )


def rank_share(
    layer: Layer,
    rank: int,
    expert: int | None,
    value: float,
    limit: float,
    window: int,
    others: Sequence[Layer],
) -> str:
    """A rank receives too much; `expert` is its busiest one, where it is known what it holds."""
    busiest = "" if expert is None else f", its busiest expert is {expert}"
    return (
        f"layer {layer}: rank {rank} received {value:.2f} times the rows of a mean rank over {window} steps "
        f"(`telemetry.alarms.rank_share={limit:g}`){busiest}{_elsewhere(others)}. "
        "Spread the experts anew: `switchyard place-experts RUN`."
    )


def domain(name: str, now: float, before: float, limit: float, samples: int) -> str:
    """A domain's share of the assignments has fallen."""
    return (
        f"domain {name}: {now:.2%} of the assignments of the last {samples} samples, {before:.2%} before "
        f"(`telemetry.alarms.domain={limit:g}`). Look whether its texts have run out, and at its share of "
        "`data.paths`."
    )


def loss_spike(
    loss: float,
    usual: float,
    deviations: float,
    limit: float,
    tokens: int | None,
    norm: float | None,
    usual_norm: float | None,
) -> str:
    """The loss has jumped; `usual` are medians."""
    return (
        f"loss {loss:.3f} is {deviations:.1f} deviations above its recent median {usual:.3f} "
        f"(`telemetry.alarms.loss_spike={limit:g}`){_position(tokens)}, {_norm(norm, usual_norm)}. "
        "If it stays, resume from the checkpoint before with a lower `optim.lr` or `optim.clip_norm`."
    )


def not_finite(loss: float | None, norm: float | None, tokens: int | None, usual_norm: float | None) -> str:
    """The loss or the gradient norm is no number: None."""
    broken = [name for name, value in (("loss", loss), ("gradient norm", norm)) if value is None]
    return (
        f"{' and '.join(broken)} not finite{_position(tokens)}, {_norm(norm, usual_norm)}. "
        "Look at grad_norm in the steps before, and resume from the checkpoint before with a lower "
        "`optim.lr` or `optim.clip_norm`."
    )


def fp8_error(layer: Layer, value: float, limit: float, others: Sequence[Layer]) -> str:
    """FP8 products of a layer are far from those of bf16."""
    distance = f"{value:.1%} off" if math.isfinite(value) else "no number beside"
    return (
        f"layer {layer}: an FP8 product is {distance} bf16's on the same inputs "
        f"(`telemetry.alarms.fp8_error={limit:g}`){_elsewhere(others)}. Look for outliers in its activations "
        "or weights (a higher `optim.weight_decay`), or resume with `train.precision=bf16`."
    )


def _expert(expert: int, rank: int | None) -> str:
    return f"expert {expert}" if rank is None else f"expert {expert} on rank {rank}"


def _elsewhere(layers: Sequence[Layer]) -> str:
    if not layers:
        return ""
    return f"; likewise in layer{'s' if len(layers) > 1 else ''} {_listed(layers)}"


def _listed(names: Sequence[Layer]) -> str:
    shown = ", ".join(map(str, names[:MOST_NAMED]))
    return f"{shown} and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else shown


def _position(tokens: int | None) -> str:
    return "" if tokens is None else f", after {tokens:,} tokens of data"


def _norm(norm: float | None, usual: float | None) -> str:
    now = "no number" if norm is None else f"{norm:.3g}"
    return f"grad_norm {now}" if usual is None else f"grad_norm {now} (median {usual:.3g})"
