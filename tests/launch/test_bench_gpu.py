"""`bench gpu` on the CPU at sizes that mean nothing: structure, arithmetic, and that it sees defects."""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from launch.__main__ import main
from launch.bench.gpu import (
    check_kernels,
    check_model,
    check_parts,
    check_products,
    command,
    eighths,
    layers,
    models,
    streams,
)
from launch.bench.gpu.card import peak_tflops
from launch.bench.gpu.checks import CHECKS, Check, judge
from launch.bench.gpu.command import PARTS, exit_code, measure, write_page
from launch.bench.gpu.exact import Found, gradients, relative, wide
from launch.bench.gpu.markdown import markdown
from launch.bench.gpu.parts import Bench, Missing, Part, Row, run_parts
from launch.bench.gpu.shapes import EXPERT_SHAPES, TINY_SHAPES, V2_LITE, choices
from launch.bench.gpu.timer import Timer
from moe.model.mlp import SwiGLU
from moe.model.norm import RMSNorm
from moe.model.rope import Rotation
from moe.model.router import Router
from moe.model.transformer import Transformer
from moe.train.adam import TorchAdam
from parallel.collectives import Splits
from parallel.errors import UserError
from parallel.fp8 import Emulated
from parallel.linear import GroupedLinear

CPU = torch.device("cpu")
NOT_NEEDED = (
    *("matplotlib", "tqdm", "pyarrow", "tokenizers", "einops", "transformers", "hydra", "omegaconf"),
    *("triton", "transformer_engine"),
)
BY_NAME = {check.name: check for check in CHECKS}


def bench() -> Bench:
    return Bench(CPU, Timer(CPU, rounds=1, warm_up=0), tiny=True)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return json.loads(json.dumps(measure(PARTS, bench(), 100)))


def rows_of(result: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    (part,) = [part for part in result["parts"] if part["name"] == name]
    return {row["name"]: row["values"] for row in part["rows"]}


def test_every_part_runs(result: dict[str, Any]) -> None:
    assert [part["name"] for part in result["parts"]] == [part.name for part in PARTS]
    assert [part["problem"] for part in result["parts"]] == [None] * len(PARTS)
    assert result["versions"]["torch"] == torch.__version__
    held = {
        row["name"]: row["ok"] for part in result["parts"] for row in part["rows"] if row["ok"] is not None
    }
    assert held == dict.fromkeys(BY_NAME, True) and exit_code(result) == 0


def test_shares_are_of_this_runs_ceiling(result: dict[str, Any]) -> None:
    ceiling = rows_of(result, "ceilings")["largest bf16 product"]["TFLOP/s"]
    for part, name in (("layer", "tiny, zipf"), ("ceilings", "grouped_mm, tiny: down")):
        row = rows_of(result, part)[name]
        assert row["share of ceiling"] == pytest.approx(row["TFLOP/s"] / ceiling)
    step = rows_of(result, "model")["step"]
    assert step["MFU, of ceiling"] == pytest.approx(step["TFLOP/s"] / ceiling)
    assert step["tokens/s"] == pytest.approx(32e3 / step["ms"])


def test_layers_and_models_are_measured_in_parts(result: dict[str, Any]) -> None:
    layer = rows_of(result, "layer")
    assert (
        layer["tiny, balanced"]["busiest expert / mean"] == 1 < layer["tiny, zipf"]["busiest expert / mean"]
    )
    row, shape = layer["tiny, balanced"], TINY_SHAPES[0]
    flops = 3 * 6 * 32 * 16 * (24 * 2 + 24)  # forward and backward; a shared expert sees every token
    assert shape.forward_flops == flops / 3
    spent = 1e-3 * (row["forward ms"] + row["backward ms"])
    assert row["TFLOP/s"] == pytest.approx(1e-12 * flops / spent)
    model = rows_of(result, "model")
    phases = {name: values for name, values in model.items() if name.startswith("forward: ")}
    assert "forward: Router" in phases and "forward: Block._attend" in phases
    assert sum(values["share"] for values in phases.values()) == pytest.approx(1)
    assert {"step with recomputation", "telemetry: router signals"} <= set(model)
    # four microbatches, two layers, rows there and back, forward and backward: 32 tokens x 4 rows x 32 x bf16
    sent = 4 * 2 * 2 * 2 * 32 * 4 * 32 * 2
    sent += 4 * 2 * 2 * 32 * 4 * 4  # their weights in fp32 there, and their gradients back
    assert rows_of(result, "overlap")["tiny"]["exchange ms"] == pytest.approx(1e3 * sent / 1e8)


def test_a_page_says_what_was_not_measured(result: dict[str, Any], tmp_path: Path) -> None:
    page = write_page(tmp_path, result | {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-02"})
    assert page.name == "nvidia-h100-80gb-hbm3-2026-01-02.md"
    assert json.loads(page.with_suffix(".json").read_text())["parts"]
    text = page.read_text()
    assert (
        "| tiny, FP8, torch | not measured | not measured | not measured | not measured | skipped: " in text
    )
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables(text))
    made = {"device": "X", "date": "D", "versions": {"torch": "2.11"}}
    rows = [
        {"name": "a", "values": {"TFLOP/s": 1234.56, "share": None}, "ok": False, "note": "n"},
        {"name": "b", "values": {"TFLOP/s": 0.123456}, "ok": None, "note": ""},
    ]
    part = {"name": "p", "does": "It", "seconds": 2.0, "problem": "TypeError: no", "rows": rows}
    text = markdown(made | {"parts": [part, part | {"rows": []}]})
    assert "**TypeError: no**" in text and "\nnot measured.\n" in text
    assert "| a | **NO** | 1,235 |  | n |" in text and "| b |  | 0.1235 |  |  |" in text


def tables(text: str) -> Iterator[list[str]]:
    for block in text.split("\n\n"):
        if block.startswith("|"):
            yield block.splitlines()


def test_without_a_gpu_one_sentence_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "gpu"]) == 2
    assert "`bench gpu` needs an NVIDIA GPU" in capsys.readouterr().err
    assert main(["bench", "gpu", "--minutes", "0"]) == 2
    assert "`--minutes` must be above 0" in capsys.readouterr().err


def test_a_written_result_is_shown_again(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    assert main(["bench", "gpu", "--show", str(path)]) == 0
    assert capsys.readouterr().out.strip() == markdown(result).strip()


def test_nothing_is_imported_that_a_bare_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our modules are imported anew and given back; of the checks only kernels lack Triton."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("launch", "moe", "parallel", *NOT_NEEDED):
            monkeypatch.delitem(sys.modules, name)
    for name in NOT_NEEDED:
        monkeypatch.setitem(sys.modules, name, None)
    for part in PARTS:
        importlib.import_module(part.target.split(":")[0])
    checks = importlib.import_module("launch.bench.gpu.checks")
    found = {check.name: partial(checks.judge, check, CPU, 1) for check in checks.CHECKS}
    assert found["choice in groups"]().note.startswith("skipped: kernels need Triton (")
    assert found["nodes of two hops"]().ok


def part(function: str, share: float = 1.0) -> Part:
    return Part(name=function, does="it", target=f"{__name__}:{function}", share=share)


def breaks(bench: Bench) -> Iterator[Row]:
    yield Row(name="kept", values={"ms": 2.0})
    raise RuntimeError("first line\nlast line\n")


def lacks(bench: Bench) -> Iterator[Row]:
    yield from ()
    raise Missing("no such thing")


def counts_up(bench: Bench) -> Iterator[Row]:
    kept = bench.value("breaks", "kept", "ms")
    assert kept == 2.0 and bench.value("breaks", "kept", "GB/s") is None
    for number in range(3):
        yield Row(name=str(number))


def test_a_part_that_fails_leaves_its_rows_and_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    parts = [part("breaks"), part("lacks"), part("absent"), part("counts_up"), part("counts_up", 0.0)]
    given = run_parts(parts, bench(), 100.0, lambda line: None)
    assert [len(each["rows"]) for each in given] == [1, 0, 0, 3, 0]
    broken, lacking, absent, whole, late = [each["problem"] for each in given]
    assert broken == "RuntimeError: last line" and lacking == "skipped: no such thing" and whole is None
    assert absent.startswith("AttributeError") and late == "not run: the time was over"


def test_a_part_stops_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    clock = iter(
        [0.0, 0.0, 0.0, 1.0, 6.0, 6.0]
    )  # begin, part begins, its limit is ahead; first and second row
    monkeypatch.setattr("launch.bench.gpu.parts.time.monotonic", lambda: next(clock))
    made = bench()
    made.found["breaks"] = [Row(name="kept", values={"ms": 2.0})]
    (given,) = run_parts([part("counts_up", 0.5)], made, 10.0, lambda line: None)
    assert len(given["rows"]) == 2 and given["problem"] == "stopped after 2 rows: its time was over"


def test_a_check_that_fails_or_raises_gives_exit_code_1(result: dict[str, Any]) -> None:
    def found(error: float) -> Row:
        return judge(Check("c", 0.1, "why", lambda device, size: Found(error)), CPU, 1)

    def wanting(device: torch.device, size: int) -> Found:
        raise Missing("no kernel")

    assert [found(error).ok for error in (0.1, 0.11, float("inf"), float("nan"))] == [
        True,
        False,
        False,
        False,
    ]
    broken = judge(Check("c", 0.1, "why", lambda device, size: 1 // 0), CPU, 1)  # type: ignore[arg-type]
    assert broken.ok is False and broken.note.startswith("ZeroDivisionError")
    assert judge(Check("c", 0.1, "why", wanting), CPU, 1) == Row(name="c", note="skipped: no kernel")
    parts = result["parts"]
    for changed in ({"problem": "cut short"}, {"rows": [{"ok": False}]}):
        wrong = [each | (changed if each["name"] == command.CORRECTNESS else {}) for each in parts]
        assert exit_code(result | {"parts": wrong}) == 1
    failed = [each | ({"problem": "no"} if each["name"] == "fp8" else {}) for each in parts]
    assert exit_code(result | {"parts": failed}) == 0


def scaled_by(function: Any, factors: Iterator[float]) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs) * next(factors)


def test_checks_see_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    for where, name in (
        *((check_parts, each) for each in ("attend", "merge", "cross_entropy", "head_losses", "nodes_of")),
        *((check_kernels, each) for each in ("unpermute", "weighted_swiglu", "forward_by_kernel")),
        *((check_kernels, each) for each in ("top_k_in_groups", "gated_experts")),
        *((check_products, each) for each in ("linear", "grouped_mm")),
        *((SwiGLU, "forward"), (RMSNorm, "forward"), (GroupedLinear, "forward"), (Rotation, "apply")),
    ):
        monkeypatch.setattr(where, name, scaled_by(getattr(where, name), repeat(0.999)))
    add = check_kernels.add_weight_gradients
    monkeypatch.setattr(
        check_kernels,
        "add_weight_gradients",
        lambda target, grad, *rest: add(target, 0.999 * grad, *rest),
    )
    monkeypatch.setattr(check_model, "wide", nullcontext)
    monkeypatch.setattr(TorchAdam, "step", lambda self: self.param_groups[0]["params"][0].mul_(0.999))
    seen = {check.name for check in CHECKS if check.name.endswith("fp32") or "bf16" not in check.name}
    seen -= {"router, fp32", "products in FP8"}  # of their own below
    seen -= {"model, fp32"}  # the exact one is as wrong as the other
    for name in sorted(seen):
        assert judge(BY_NAME[name], CPU, 1).ok is False, name


def test_checks_see_wrong_choices_and_bits_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = Router.choose
    monkeypatch.setattr(Router, "choose", lambda self, scores: choose(self, scores.roll(1, 0)))
    assert judge(BY_NAME["router, fp32"], CPU, 1).ok is False
    monkeypatch.undo()
    drifting = (1 + step / 8 for step in count())
    monkeypatch.setattr(SwiGLU, "forward", scaled_by(SwiGLU.forward, drifting))
    for name in ("recomputation, bf16", "a pair in turn, bf16", "model, fp32"):
        assert judge(BY_NAME[name], CPU, 1).ok is False, name


def test_the_exact_model_is_computed_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checked model of fp64 narrows to fp32 on its way, which the exact one must not do."""
    monkeypatch.setattr(check_model, "with_buffers", lambda module: None)
    assert check_model.model(CPU, 1, torch.float64).error > 1e-9
    with wide():
        assert check_model.model(CPU, 1, torch.float64).error < 1e-12
    assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float32


def test_relative_errors() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative(torch.tensor([3.0, torch.nan]), exact) == float("inf")
    assert relative(torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.float64)) == 1.0


def test_medians_of_laps_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 0.0, 9.0, 0.0, 5.0, 6.0, 0.0, 7.0, 0.0, 2.0, 10.0, 0.0, 8.0])
    monkeypatch.setattr("launch.bench.gpu.timer.moment", lambda device: next(times))
    called: list[str] = []

    def first(lap: Any) -> None:
        called.append("first")
        lap()

    works = {"first": first, "second": lambda lap: called.append("second")}
    taken = Timer(CPU, rounds=3, warm_up=0).compare(works)
    assert taken == {"first": (2.0, 2.0), "second": (8.0,)} and called == ["first", "second"] * 3


def test_floors_make_the_layers_products_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[int] = []
    product = torch.mm

    def counted(left: Any, right: Any, out: Any) -> Any:
        spent.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    for shape in TINY_SHAPES:
        laps: list[int] = []
        counts = [shape.rows - 5, 0, 5]
        layers.Products(shape, counts, CPU).work(lambda laps=laps: laps.append(sum(spent)))
        assert laps == [shape.forward_flops] and sum(spent) == 3 * shape.forward_flops
        spent.clear()


def test_weight_gradients_are_made_in_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(self: Timer, works: dict[str, Any]) -> dict[str, tuple[float, ...]]:
        target = works["torch"](lambda: None)
        once = target.clone()
        works["kernel"](lambda: None)
        torch.testing.assert_close(target, 2 * once, rtol=1e-2, atol=1e-2)
        assert once.all()
        return {"kernel": (2.0,), "torch": (4.0,)}

    monkeypatch.setattr(Timer, "compare", compare)
    row = layers.weight_gradients(bench(), TINY_SHAPES[0])
    assert row.values["/ grouped_mm and add_"] == 0.5
    assert row.values["TFLOP/s"] == 2e-12 * 48 * 2 * 16 * 32 / 2


def test_choices_are_distinct_and_as_skewed_as_asked() -> None:
    for routing in ("balanced", "zipf"):
        experts_TK = choices(routing, 600, 6, 64)
        assert all(len(set(row)) == 6 for row in experts_TK.tolist())
        counts = torch.bincount(experts_TK.flatten(), minlength=64)
        assert counts.sum() == 3600
        if routing == "balanced":
            assert counts.max() - counts.min() <= 1
        else:
            assert counts[0] > 2 * counts[8] > 4 * counts[63] and counts[0] > 5 * counts.double().mean()


def test_shapes_are_the_released_ones() -> None:
    assert (V2_LITE.hidden_size, V2_LITE.num_experts, V2_LITE.num_shared_experts) == (2048, 64, 2)
    rows = {shape.name: (shape.experts, shape.rows, shape.hidden, shape.width) for shape in EXPERT_SHAPES}
    assert list(rows.values()) == [
        (64, 4096 * 6, 2048, 1408),
        (4, 4096 * 8, 7168, 2048),
        (32, 4096 * 8, 7168, 2048),
    ]


def test_names_of_cards_and_kernels() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == peak_tflops("NVIDIA H200") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0 and peak_tflops("NVIDIA A800-SXM4-80GB") == 312.0
    assert peak_tflops("NVIDIA B200") is None
    names = {
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT": "products",
        "void pytorch_flash::flash_fwd_kernel<...>": "attention",
        "void at::native::vectorized_elementwise_kernel<4, MulFunctor>": "elementwise",
        "void at::native::indexSelectLargeIndex<...>": "moving rows",
        "_add": "products",
        "_unpermute": "moving rows",
        "_backward": "elementwise",
        "void multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "something": "other",
    }
    assert {name: models.family(name) for name in names} == names


def test_an_emulated_link_takes_its_time_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("launch.bench.gpu.streams.time.sleep", slept.append)
    monkeypatch.setattr("launch.bench.gpu.streams.time.perf_counter", lambda: 5.0)
    link = streams.Link(CPU, 1e3, float("inf"))
    rows = torch.ones(5, 25)
    wire = link.start(rows, Splits((5,), (5,), None))
    assert wire.received is not rows and torch.equal(wire.wait(), rows)
    assert slept == [pytest.approx(0.5)] and link.seconds == pytest.approx(0.5)
    found = []
    for walk, wire_of in ((streams.serial, None), (streams.in_turn, link)):
        model = streams.in_group(Transformer(replace(streams.TINY, init_std=0.1)))
        torch.manual_seed(0)
        with streams.linked(wire_of):
            walk(model, [streams._batch(bench(), streams.TINY) for _ in range(3)])
        found.append(gradients(model))
    # microbatches, layers, rows and weights there and rows back, forward and backward
    assert len(slept) == 1 + 3 * 2 * 3 * 2
    assert all(torch.equal(found[0][name], found[1][name]) and found[0][name].any() for name in found[0])
    assert streams.hidden_share(4.0, 2.0, 4.5) == pytest.approx(1.0)  # 3/4 of what is shorter


class Off(Emulated):
    """Two hundredths too small."""

    def product_back(self, *facts: Any) -> Any:
        return 0.98 * super().product_back(*facts)


def test_who_multiplies_in_eight_bits(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(result, "fp8")
    assert 0.01 < rows["tiny, FP8, Switchyard"]["error"] < 0.06 and rows["tiny, layer"]["/ layer in bf16"] > 0
    monkeypatch.setattr(eighths, "backend_of", lambda device: Off())
    assert judge(BY_NAME["products in FP8"], CPU, 1).ok is False

    def lacks(device: torch.device) -> None:
        raise UserError("no engine")

    monkeypatch.setattr(eighths, "backend_of", lacks)
    assert judge(BY_NAME["products in FP8"], CPU, 1).note == "skipped: no engine"
    monkeypatch.setattr(eighths, "backend_of", lambda device: None)
    assert eighths._layer(bench(), TINY_SHAPES[0]).note == f"skipped: {eighths.NEEDS}"


def test_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales undo the cast block by block, and lie as cuBLAS wants them."""
    rows, weight = torch.randn(40, 384), torch.randn(256, 384)
    rows[3, 128:256] = 0.0
    rows[5, :128] *= 1e4
    small, scales = eighths.quantised(rows, 1)
    assert small.dtype == torch.float8_e4m3fn and scales.shape == (40, 3) and scales[3, 1] == 1.0
    back = small.float() * scales.repeat_interleave(128, 1)
    assert ((back - rows).abs() <= rows.abs() * 2**-4 + 1e-2 * scales.repeat_interleave(128, 1)).all()
    assert scales[5, 0].item() == pytest.approx(rows[5, :128].abs().max().item() / 448)

    def product(left: Any, right: Any, **given: Any) -> Any:
        assert given["scale_a"].shape == (40, 3) and given["scale_a"].stride() == (1, 40)
        assert given["scale_b"].shape == (4, 2) and given["scale_b"].stride() == (1, 4)  # padded from 3
        wide = left.float() * given["scale_a"].repeat_interleave(128, 1)
        blocks = given["scale_b"][:3].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return (wide @ (right.float() * blocks)).to(given["output_dtype"])

    monkeypatch.setattr(eighths, "_needs_hopper", lambda device: None)
    monkeypatch.setattr(F, "scaled_mm", product)
    out = eighths.scaled(rows, weight)()
    assert 1e-3 < relative(out, rows.double() @ weight.double().T) < 0.06
