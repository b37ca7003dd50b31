"""`bench layer` at a size of which every contestant takes milliseconds: all agree, and rows are sound."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.bench import layer
from launch.bench.case import AS_ROUTED, Case, Shape, make_case
from launch.bench.field import field
from launch.bench.floor import Floor
from launch.bench.timing import KINDS, in_turn, median_ratio, peak_bytes, shares
from parallel import cpu
from parallel.errors import UserError

CPU = torch.device("cpu")
SMALL = Shape(tokens=48, hidden=32, experts=8, width=16, top_k=3, shared=2)
WORDS = ["--tokens", "48", "--hidden", "32", "--experts", "8", "--width", "16", "--top-k", "3"]
PEERS = {"plain loop", "transformers grouped_mm", "transformers eager", "transformers batched_mm"}
PEERS |= {"Megatron-Core allgather", "Megatron-Core alltoall"}
OURS = {"ours", "ours, fp32 gradient buffers"}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def written_out(case: Case) -> dict[str, Tensor]:
    """Output and gradients in fp64, every token by every expert, the unwanted ones with weight 0."""
    weights = {each.name: getattr(case.weights, each.name).double() for each in fields(case.weights)}
    for tensor in weights.values():
        tensor.requires_grad_()
    hidden = case.hidden.detach()[0].double().requires_grad_()

    def mlp(gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (hidden @ gate_up.t()).chunk(2, -1)
        return (F.silu(gate) * up) @ down.t()

    scores_TE = (hidden @ weights["router"].t()).softmax(-1)
    chosen_TE = torch.zeros_like(scores_TE).scatter(1, case.experts_TK, 1.0)
    out = mlp(weights["shared_gate_up"], weights["shared_down"])
    for expert in range(case.shape.experts):
        weight = (scores_TE * chosen_TE)[:, expert, None]
        out = out + weight * mlp(weights["gate_up"][expert], weights["down"][expert])
    out.backward(case.grad[0].double())
    return {"output": out.detach(), "hidden": hidden.grad} | {name: t.grad for name, t in weights.items()}


@pytest.mark.parametrize(
    ("routing", "dtype", "limit"),
    [("zipf", torch.float32, 1e-5), (AS_ROUTED, torch.float32, 1e-5), ("balanced", torch.bfloat16, 3e-2)],
    ids=["zipf", "as routed", "bf16"],
)
def test_all_compute_the_same(routing: str, dtype: torch.dtype, limit: float) -> None:
    case = make_case(SMALL, routing, dtype, CPU)
    wanted = written_out(case)
    with field(case, compiled=False) as (present, absent):
        assert set(present) >= PEERS | OURS and "torchtitan" in present | absent
        for name, contestant in present.items():
            if isinstance(contestant, Floor):
                continue
            found = {"output": contestant.forward(case.hidden)}
            contestant.backward(found["output"], case.grad)
            found |= {"hidden": case.hidden.grad} | vars(contestant.gradients())  # type: ignore[attr-defined]
            case.hidden.grad = None
            for what, tensor in wanted.items():
                most = 3e-2 if name == "torchtitan" else limit  # its experts compute in bf16
                assert relative_error(found[what].view_as(tensor).double(), tensor) < most, (name, what)
            contestant.clear()
            left = vars(contestant.gradients()).values()  # type: ignore[attr-defined]
            assert not any(grad.any() for grad in left), name


def test_routing_is_forced() -> None:
    sizes = Shape(hidden=64, width=8)
    even = make_case(sizes, "balanced", torch.float32, CPU)
    assert even.load == 1.0 and set(even.counts) == {384}
    skewed = make_case(sizes, "zipf", torch.float32, CPU)
    assert 8.4 < skewed.load < 8.7 and min(skewed.counts) > 0
    expected = sorted(skewed.counts, reverse=True)
    assert expected[9] / expected[39] == pytest.approx(40 / 10, rel=0.2)  # Zipf, away from the head
    free = make_case(sizes, AS_ROUTED, torch.float32, CPU)
    assert 1.0 < free.load < 2.0


def test_the_floor_is_all_the_work_and_no_other() -> None:
    case = make_case(SMALL, "zipf", torch.float32, CPU)
    assert Floor(case).flops() == Floor(case, at_once=True).flops() == SMALL.flops
    assert Shape().flops == 310_848_258_048
    mm, seen = torch.mm, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", lambda *sides, out: seen.append(out) or mm(*sides, out=out))
        floor = Floor(case)
        floor.backward(floor.forward(case.hidden), case.grad)
    used = sum(count > 0 for count in case.counts)
    assert len(seen) == 3 * (3 + 2 * used)


def test_rows_and_their_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--routing", "zipf", "--rounds", "1", "--json", str(tmp_path / "rows.json")]
    assert layer.main([*words, "--dtype", "fp32", "--compiled", "no"]) == 0
    result = json.loads((tmp_path / "rows.json").read_text())
    assert (
        result["device"] == "cpu"
        and result["dtype"] == "fp32"
        and "transformers sonicmoe" in result["absent"]
    )
    for routing in ("zipf", AS_ROUTED):
        rows = {row["name"]: row for row in result["rows"] if row["routing"] == routing}
        assert set(rows) >= PEERS | OURS | {"floor", "one product"}
        for row in rows.values():  # one round: medians are that round
            assert row["total_seconds"] == pytest.approx(row["forward_seconds"] + row["backward_seconds"])
            assert row["ratio_to_floor"] == pytest.approx(
                row["total_seconds"] / rows["floor"]["total_seconds"]
            )
            assert sum(row["shares"].values()) == pytest.approx(1.0)
    out = capsys.readouterr().out
    assert "zipf: the busiest expert has" in out and "as routed: the busiest expert has" in out


def test_fp32_is_also_measured_as_training_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for helps, settings in ((False, ["none"]), (True, ["none", "bf16"])):
        monkeypatch.setattr(cpu, "leaves_vectors_aside", lambda info, helps=helps: helps)
        monkeypatch.setattr(cpu, "product_error", lambda: 0.0)
        assert layer._products("fp32") == settings and layer._products("bf16") == ["none"]


def test_everyone_begins_a_round_once() -> None:
    turns = list(in_turn(["a", "b", "c"], 2))
    assert [index for index, _ in turns] == [0] * 3 + [1] * 3 + [2] * 3
    assert [name for _, name in turns] == list("abcbcacab")
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_the_profiler_tells_kinds_and_memory() -> None:
    big, thin = torch.randn(400, 400), torch.randn(400, 1)
    found = shares(lambda: big @ big, CPU)
    assert set(found) == set(KINDS) and found["products"] > 0.5
    assert shares(lambda: big.index_select(0, torch.arange(399)), CPU)["gather"] > 0.1

    def run() -> Tensor:
        kept = big + 1  # 640 kB
        twice = kept + kept
        del kept
        return twice @ thin

    assert peak_bytes(run, CPU) == pytest.approx(2 * 640_000, rel=0.05)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"^`--top-k` must be at most `--experts`, but 6 is more than 4: use"):
        layer.main(["--experts", "4"])
    with pytest.raises(UserError, match=r"^`--hidden` must be at least `--experts`.* use at least 64$"):
        layer.main(["--hidden", "8"])
    with pytest.raises(UserError, match="invalid choice: 'fp16'"):
        layer.main(["--dtype", "fp16"])
    with pytest.raises(UserError, match=r"^`--top-k` must be at least 1, but is 0: use 6"):
        layer.main(["--top-k", "0"])
