"""Alarms: each begins where it should and only then, says why, and survives a resume."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from moe.config import AlarmConfig, RunConfig
from moe.telemetry.alarms import Alarm, Watch

WINDOW, DEAD, EXPERTS = 4, 6, 8
LIMITS = {**asdict(AlarmConfig()), "dead_steps": DEAD}
PLACEMENT = {layer: [0, 0, 0, 0, 1, 1, 1, 1] for layer in (1, 2, "mtp0")}
Row = dict[str, Any]
EVEN = [100] * EXPERTS


def load_row(step: int, layer: int | str = 1, counts: Sequence[int] = EVEN, **extra: Any) -> Row:
    """A row of expert load whose ranks receive what the placement says."""
    halves = [sum(counts[:4]), sum(counts[4:])]
    rows = [[half // 2 for half in halves], [half - half // 2 for half in halves]]
    return {
        "step": step,
        "layer": layer,
        "counts": list(counts),
        "bias": [0.0] * EXPERTS,
        "rank_rows": rows,
        **extra,
    }


def metrics_row(step: int, loss: float | None = 2.0, grad_norm: float | None = 1.0) -> Row:
    return {"step": step, "tokens": 1000 * step, "loss": loss, "grad_norm": grad_norm}


def watch(**limits: float | None) -> Watch:
    return Watch({**LIMITS, **limits}, WINDOW, PLACEMENT)


def told(make: Callable[[int], list[Row]], steps: int, **limits: float | None) -> list[Alarm]:
    """The alarms of so many steps, of which `make` gives the rows of expert load."""
    watching = watch(**limits)
    return [alarm for step in range(1, steps + 1) for alarm in watching.step(metrics_row(step), make(step))]


def losses_told(losses: Sequence[float | None]) -> list[Alarm]:
    watching = watch()
    return [a for step, loss in enumerate(losses, 1) for a in watching.step(metrics_row(step, loss), [])]


def without(*experts: int) -> list[int]:
    return [0 if expert in experts else 100 for expert in range(EXPERTS)]


def brief(alarms: Sequence[Alarm]) -> list[tuple[Any, ...]]:
    return [(a.step, a.kind, a.layer, a.expert, a.rank) for a in alarms]


def test_an_expert_is_dead_after_so_many_steps_and_told_once() -> None:
    alarms = told(lambda step: [load_row(step, counts=without(5) if step > 3 else EVEN)], 60)
    assert brief(alarms) == [(3 + DEAD, "dead_expert", 1, 5, 1)]
    assert "layer 1: expert 5 on rank 1 had no token for 6 steps" in alarms[0].message


def test_a_single_token_ends_the_count() -> None:
    assert not told(lambda step: [load_row(step, counts=without(5) if step % DEAD else EVEN)], 60)


def test_experts_dead_at_once_are_one_alarm_and_a_later_one_another() -> None:
    dead = tuple(range(7))  # all but the last: MaxVio and rank share are looked at elsewhere
    limits = {"max_vio": None, "rank_share": None}
    early = told(lambda step: [load_row(step, counts=without(*dead))], 30, **limits)
    assert brief(early) == [(DEAD, "dead_expert", 1, None, None)]
    assert "7 experts (0, 1, 2, 3, 4, 5, 6) on ranks 0, 1 had" in early[0].message
    later = told(
        lambda step: [load_row(step, counts=without(0, 1) if step > 9 else without(0))], 30, **limits
    )
    assert brief(later) == [(DEAD, "dead_expert", 1, 0, 0), (9 + DEAD, "dead_expert", 1, 1, 0)]


def test_long_lists_are_cut() -> None:
    watching = Watch({**LIMITS, "max_vio": None}, WINDOW)
    rows = [{"layer": 1, "counts": [0] * 12 + [5] * 12}]
    for step in range(1, DEAD + 1):
        alarms = watching.step(metrics_row(step), [{**row, "step": step} for row in rows])
    assert "12 experts (0, 1, 2, 3, 4, 5, 6, 7 and 4 more) had" in alarms[0].message  # on ranks unknown
    assert alarms[0].rank is None


def test_an_alarm_is_told_again_only_after_a_clear_end() -> None:
    def flickers(step: int) -> list[Row]:  # a token every tenth step
        return [load_row(step, counts=EVEN if step % 10 == 0 else without(2))]

    assert [a.step for a in told(flickers, 100)] == [DEAD]

    def returns(step: int) -> list[Row]:  # alive for more than twice the steps of its measure
        return [load_row(step, counts=EVEN if 20 <= step < 20 + 2 * DEAD else without(2))]

    assert [a.step for a in told(returns, 60)] == [DEAD, 20 + 3 * DEAD - 1]


def test_a_layer_without_tokens_has_no_dead_experts() -> None:
    assert not told(lambda step: [load_row(step, counts=[0] * EXPERTS)], 30)


HOT = [100] * 7 + [900]  # 4.5 times the mean


def test_max_vio_is_that_of_a_full_window() -> None:
    alarms = told(lambda step: [load_row(step, counts=HOT)], 40, rank_share=None)
    assert brief(alarms) == [(WINDOW, "max_vio", 1, 7, 1)]
    assert "MaxVio over 4 steps is 3.50 (`telemetry.alarms.max_vio=2`)" in alarms[0].message
    assert "expert 7 on rank 1 takes 4.50 times the mean" in alarms[0].message
    rolled = told(lambda step: [load_row(step, counts=np.roll(HOT, step).tolist())], 40, rank_share=None)
    assert not rolled  # every batch is uneven, the window is not


def test_what_begins_in_several_layers_is_one_alarm_about_the_worst() -> None:
    def make(step: int) -> list[Row]:
        hotter = [*HOT[:7], 2000]
        return [load_row(step), load_row(step, 2, hotter), load_row(step, "mtp0", HOT)]

    alarms = told(make, 20, rank_share=None)
    assert brief(alarms) == [(WINDOW, "max_vio", 2, 7, 1)]
    assert "likewise in layer mtp0. Try" in alarms[0].message


def biased(rise: Callable[[int], float], counts: Sequence[int], common: float = 0.0) -> list[Alarm]:
    """The alarms of a run in which expert 3's bias is `rise` of the step, all others' `common` a step."""

    def make(step: int) -> list[Row]:
        bias = [common * step] * EXPERTS
        bias[3] += rise(step)
        return [load_row(step, counts=counts, bias=bias)]

    return told(make, 60, dead_steps=None, max_vio=None, rank_share=None)


@pytest.mark.parametrize(("sign", "load", "side"), [(1, 40, "above"), (-1, 200, "below")])
def test_a_bias_that_moves_without_effect_has_run_away(sign: int, load: int, side: str) -> None:
    counts = [100] * EXPERTS
    counts[3] = load
    alarms = biased(lambda step: sign * 0.1 * step, counts, common=0.5)
    first = next(step for step in range(60) if 0.1 * step * (1 - 1 / EXPERTS) > 1.0)
    assert brief(alarms) == [(first, "bias", 1, 3, 0)]
    assert f"bias of expert 3 on rank 0 is 1.05 {side} the layer's mean" in alarms[0].message


def test_a_bias_that_works_rests_or_drifts_with_all_others_has_not() -> None:
    hungry, full = without(), without()
    hungry[3], full[3] = 40, 200
    assert not biased(lambda step: 0.1 * step, EVEN)  # far off, and the load is even
    assert not biased(lambda step: 0.1 * step, full)  # raised, and the load with it
    assert not biased(lambda step: 3.0, hungry)  # frozen
    assert not biased(lambda step: 0.0, hungry, common=1.0)  # every bias alike
    assert not biased(lambda step: max(0.0, 3.0 - 0.03 * step), hungry)  # comes back


def test_a_rank_over_its_share_of_one_layer() -> None:
    left, right = [500] * 4 + [100] * 4, [100] * 4 + [500] * 4

    def make(step: int) -> list[Row]:  # the two layers together are even
        return [load_row(step, 1, [600, *left[1:]]), load_row(step, 2, right)]

    alarms = told(make, 40)
    assert brief(alarms) == [(WINDOW, "rank_share", 1, 0, 0)]
    assert "rank 0 received 1.68 times the rows" in alarms[0].message
    assert "its busiest expert is 0; likewise in layer 2." in alarms[0].message
    assert not told(lambda step: [load_row(step, 1, left if step % 2 else right)], 40)


def samples(shares: Sequence[Sequence[int]]) -> list[Alarm]:
    """The alarms of runs whose every second step counts tokens of domains a, b, ..."""

    def make(step: int) -> list[Row]:
        if step % 2:
            return [load_row(step)]
        counted = {
            name: [tokens] * EXPERTS
            for name, tokens in zip("abcdef", shares[step // 2 - 1], strict=False)
            if tokens
        }
        return [load_row(step, domains=counted)]

    return told(make, 2 * len(shares))


def test_a_domain_that_ends_is_told_once() -> None:
    rng = np.random.default_rng(0)
    whole = [[60 + int(rng.integers(20)), 20 + int(rng.integers(20))] for _ in range(45)]
    alarms = samples(whole + [[first + second, 0] for first, second in whole])
    assert [a.kind for a in alarms] == ["domain"]
    assert 2 * 45 + 10 < alarms[0].step <= 2 * 55
    assert re.search(
        r"domain b: \d\.\d\d% of the assignments of the last 10 samples, 30\.\d\d%", alarms[0].message
    )


def test_rare_domains_in_clumps_are_not_starved() -> None:
    """As in a real run on Python's sources: 16 sequences a step, of 20 packages."""
    rng = np.random.default_rng(1)
    shares = rng.dirichlet(np.full(6, 0.7), size=1)[0]
    assert not samples([rng.multinomial(16, shares).tolist() for _ in range(400)])


def noise(count: int, level: float = 2.0) -> list[float]:
    return (level + 0.02 * np.random.default_rng(2).standard_normal(count)).tolist()


def test_a_loss_spike_is_far_above_the_recent_median() -> None:
    losses = noise(300)
    assert not losses_told(losses)
    losses[200:204] = [2.6, 2.7, 2.5, 2.4]
    alarms = losses_told(losses)
    assert brief(alarms) == [(201, "loss_spike", None, None, None)]
    assert "loss 2.600 is" in alarms[0].message and "after 201,000 tokens" in alarms[0].message


def test_earlier_spikes_do_not_hide_a_spike() -> None:
    losses = noise(700)
    losses[300:320] = [8.0] * 20
    losses[540] = 2.6
    assert [a.step for a in losses_told(losses)] == [301, 541]


def test_the_start_and_small_ripples_are_no_spike() -> None:
    falling = [8.0 * math.exp(-step / 40) + 2.0 + 0.3 * math.sin(step) for step in range(300)]
    assert not losses_told(falling)
    assert not losses_told([2.0] * 100 + [2.1] + [2.0] * 50)  # without any spread: below 6 times 1%
    assert not losses_told([2.0] * 49 + [9.0])  # too early to know


@pytest.mark.parametrize("broken", [None, float("nan"), float("inf")])
def test_what_is_not_finite_is_told_whatever_the_limits(broken: float | None) -> None:
    watching = Watch(dict.fromkeys(LIMITS), WINDOW)
    assert not watching.step(metrics_row(1), [load_row(1, counts=HOT)])
    (alarm,) = watching.step(metrics_row(2, 2.0, broken), [])
    assert alarm.kind == "not_finite" and alarm.message.startswith("gradient norm not finite, after 2,000 ")
    assert "grad_norm no number (median 1)" in alarm.message
    (alarm,) = watch().step(metrics_row(1, broken, broken), [])
    assert alarm.message.startswith("loss and gradient norm not finite")


def test_null_switches_every_other_alarm_off() -> None:
    metrics, loads = eventful()
    watching = Watch(dict.fromkeys(LIMITS), WINDOW, PLACEMENT)
    assert {a.kind for row in metrics for a in watching.step(row, loads[row["step"]])} == {"not_finite"}


def fp8_rows(step: int, *errors: float | None) -> list[Row]:
    """As a file gives them: null where a product was no number."""
    return [
        {"step": step, "layer": layer, "error": error}
        for layer, error in zip((0, 1, "mtp0"), errors, strict=True)
    ]


def test_fp8_products_far_off_are_told_by_layer_when_they_begin() -> None:
    watching, found = watch(fp8_error=0.1), []
    samples = [(0.03, 0.04, 0.05), (0.03, 0.2, 0.4), (0.03, 0.2, 0.4), (0.03, None, 0.04), (0.5, 0.04, 0.04)]
    for step, errors in enumerate(samples, 1):
        found += watching.step(metrics_row(100 * step), [], fp8_rows(100 * step, *errors))
        assert not watching.step(metrics_row(100 * step + 1), [])  # steps between make no end
    assert brief(found) == [(200, "fp8_error", "mtp0", None, None), (500, "fp8_error", 0, None, None)]
    assert "an FP8 product is 40.0% off bf16's on the same inputs (`telemetry.alarms.fp8_error=0.1`)" in (
        found[0].message
    )
    assert "; likewise in layer 1." in found[0].message
    for cut in range(1, len(samples)):
        resumed = watch(fp8_error=0.1)
        before = [fp8_rows(100 * step, *errors) for step, errors in enumerate(samples[:cut], 1)]
        resumed.replay([], [], [row for rows in before for row in rows])
        told = [
            alarm
            for step, errors in enumerate(samples[cut:], cut + 1)
            for alarm in resumed.step(metrics_row(100 * step), [], fp8_rows(100 * step, *errors))
        ]
        assert told == [alarm for alarm in found if alarm.step > 100 * cut]
    (broken,) = watch().step(metrics_row(1), [], fp8_rows(1, None, 0.04, 0.04))
    assert broken.layer == 0 and "an FP8 product is no number beside bf16's" in broken.message
    assert not watch(fp8_error=None).step(metrics_row(1), [], fp8_rows(1, 9.0, None, 9.0))


def test_older_rows_lack_keys() -> None:
    watching = watch()
    for step in range(1, DEAD + 1):
        alarms = watching.step(
            {"step": step, "loss": 2.0}, [{"step": step, "layer": 1, "counts": without(1)}]
        )
    assert [a.kind for a in alarms] == ["dead_expert"]


def eventful(steps: int = 420) -> tuple[list[Row], dict[int, list[Row]]]:
    """A run in which everything goes wrong, some of it twice."""
    rng = np.random.default_rng(3)
    losses = noise(steps)
    losses[150], losses[160], losses[390] = 4.0, 4.0, float("nan")
    loads = {}
    for step in range(1, steps + 1):
        rows = []
        for layer in (1, 2, "mtp0"):
            mean = np.full(EXPERTS, 100.0)
            mean[2] *= layer == 1 or step == 60 or not (40 < step < 80 or 200 < step < 230)
            mean[7] *= 12 if layer != 2 and (100 < step < 110 or 140 < step < 150 or step > 300) else 1
            bias = np.zeros(EXPERTS)
            mean[3] *= 0.3 if layer == 2 else 1
            bias[3] = 0.01 * step if layer == 2 else 0.0
            domains = {"a": [9] * EXPERTS, "b": [step < 250] * EXPERTS}
            sampled = {"domains": domains} if step % 2 == 0 else {}
            rows.append(load_row(step, layer, rng.poisson(mean).tolist(), bias=bias.tolist(), **sampled))
        loads[step] = rows
    metrics = [metrics_row(step, loss) for step, loss in enumerate(losses, 1)]
    return json.loads(json.dumps(metrics)), loads


def flat(loads: dict[int, list[Row]], first: int, last: int) -> Iterator[Row]:
    return (row for step, rows in loads.items() if first <= step <= last for row in rows)


def test_a_resumed_run_raises_the_alarms_of_an_undisturbed_one() -> None:
    metrics, loads = eventful()
    straight = watch()
    alarms = [a for row in metrics for a in straight.step(row, loads[row["step"]])]
    kinds = [a.kind for a in alarms]
    assert set(kinds) == {
        "dead_expert",
        "max_vio",
        "bias",
        "rank_share",
        "domain",
        "loss_spike",
        "not_finite",
    }
    assert kinds.count("dead_expert") == 2 and kinds.count("max_vio") == 3 and len(kinds) < 16
    cuts = {*range(0, len(metrics), 60), 60 + DEAD - 1, *(a.step + off for a in alarms for off in (-1, 0))}
    for cut in sorted(cuts):
        later = [a for a in alarms if cut < a.step <= cut + 60]
        for limits, kept in ({}, 2 * 70), ({"domain": None}, straight.horizon):  # sampled every second step
            resumed = watch(**limits)
            evaluation = {"step": cut, "eval_loss": 99.0, "domain": "all"}
            resumed.replay([evaluation, *metrics[max(0, cut - 300) : cut]], flat(loads, cut - kept + 1, cut))
            found = [a for row in metrics[cut : cut + 60] for a in resumed.step(row, loads[row["step"]])]
            assert found == [a for a in later if a.kind not in limits], f"cut after step {cut}"


def test_every_message_names_settings_that_exist() -> None:
    def keys(values: Row, path: str = "") -> Iterator[str]:
        for key, value in values.items():
            yield from keys(value, f"{path}{key}.") if isinstance(value, dict) else (path + key,)

    known = set(keys(asdict(RunConfig())))
    metrics, loads = eventful()
    watching = watch()
    for alarm in (a for row in metrics for a in watching.step(row, loads[row["step"]])):
        quoted = re.findall(r"`([^`]+)`", alarm.message)
        named = {text.split("=")[0] for text in quoted if not text.startswith("switchyard ")}
        assert quoted and named <= known, alarm.message
        limit = {"dead_expert": "dead_steps", "not_finite": None}.get(alarm.kind, alarm.kind)
        assert limit is None or f"telemetry.alarms.{limit}" in named
        assert alarm.message.count(". ") <= 1 and alarm.message.endswith(".")


def test_an_alarm_is_a_row_and_a_line() -> None:
    alarm = Alarm(120, "max_vio", "mtp0", 3, None, "layer mtp0: uneven.")
    assert alarm.line() == "step 120: alarm: layer mtp0: uneven."
    assert Alarm(**json.loads(json.dumps(alarm.row()))) == alarm
    metrics, loads = eventful()
    watching = watch()  # no number of numpy's is left in a row
    rows = [a.row() for row in metrics for a in watching.step(row, loads[row["step"]])]
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize(("before", "now"), [(1, 2), (4, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(before: int, now: int) -> None:
    def rows(step: int, ranks: int) -> list[Row]:
        return [load_row(step, 1, rank_rows=[[100] * (ranks - 1) + [300]] * ranks)]

    watching = watch(rank_share=1.4)
    watching.replay(map(metrics_row, range(1, 21)), flat({s: rows(s, before) for s in range(1, 21)}, 1, 20))
    found = [a for step in range(21, 41) for a in watching.step(metrics_row(step), rows(step, now))]
    assert [(a.step, a.kind, a.layer, a.rank) for a in found] == [(20 + WINDOW, "rank_share", 1, 1)]
