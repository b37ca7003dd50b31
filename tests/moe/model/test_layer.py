"""The layer of experts: a loop over tokens, and the same to 5e-6 however experts and sequences are cut."""

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import BalanceConfig, ModelConfig
from moe.model.init import init_weights
from moe.model.layer import LayerLoad, MoELayer
from parallel.collectives import ALONE, ModelGroups, Splits, Wire, start_all_to_all
from parallel.groups import Groups, build_groups
from parallel.layout import Layout
from parallel.pipeline import tape as tape_module
from parallel.pipeline.tape import Direct, Recorder, Tape, run
from parallel.sequence import Positions
from parallel.shards import Piece
from tests.ranks import run_ranks
from tests.reduced import assemble, assert_same, buffers, canonical, norm_of, owned_gradients

LENGTH = 8
SIGMOID = ModelConfig(
    hidden_size=12,
    num_experts=8,
    top_k=3,
    moe_intermediate_size=8,
    num_shared_experts=2,
    routed_scaling_factor=2.5,
)
SOFTMAX = replace(SIGMOID, score_function="softmax", normalize_top_k=False, group_score="max")
AUX = BalanceConfig(sequence_aux=3.0, microbatch_aux=2.0, global_aux=1.0)
UNEVEN = tuple(0.2 - 0.04 * expert for expert in range(8))
SECOND_HALF_UNSEEN = (0.0,) * 4 + (-9.0,) * 4


class Case(NamedTuple):
    config: ModelConfig = SIGMOID
    balance: BalanceConfig = BalanceConfig()
    bias: tuple[float, ...] = UNEVEN
    real: tuple[int, int] | None = None  # tokens of batch 0's two sequences; batch 1 has none at all


CASES = {
    "sigmoid": Case(),
    "softmax": Case(SOFTMAX),
    "groups": Case(replace(SIGMOID, num_groups=4, top_groups=2)),
    "softmax groups": Case(replace(SOFTMAX, num_groups=4, top_groups=2), BalanceConfig(bias="none")),
    "a rank without rows": Case(bias=SECOND_HALF_UNSEEN),
    "padding": Case(real=(4, 3)),  # with the sequence cut in two, one half has nothing else
    "capacity": Case(replace(SIGMOID, capacity_factor=1.0)),
    "capacity and padding": Case(replace(SOFTMAX, capacity_factor=0.7), real=(8, 4)),
    "no shared experts": Case(replace(SIGMOID, num_shared_experts=0)),
    "auxiliary losses": Case(balance=AUX, real=(7, 6)),
}
LAYOUTS = [
    Layout(dp=2, ep=2),
    Layout(dp=4, ep=4),
    Layout(dp=4, ep=2),
    Layout(dp=4, etp=4),
    Layout(dp=4, ep=2, etp=2),
    Layout(tp=2),
    Layout(tp=2, ep=2),
    Layout(tp=2, dp=2, ep=2, etp=2),
    Layout(cp=2),
    Layout(tp=2, cp=2, ep=4),
    Layout(dp=4, ep=4, node=2),
    Layout(tp=2, cp=2, ep=4, node=1),
    Layout(dp=4, ep=2, etp=2, node=2),
]
WHOLE_SEQUENCES = [layout for layout in LAYOUTS if layout.tp * layout.cp == 1]
CUT_SEQUENCES = [layout for layout in LAYOUTS if layout.tp * layout.cp > 1]


class Result(NamedTuple):
    output: Tensor
    grad_hidden: Tensor
    load: LayerLoad


class RankResult(NamedTuple):
    """Of one rank: its stretch, and what it owns of the summed gradients."""

    stretch: Result
    owned: list[Piece]
    norm: float


def build(case: Case, groups: ModelGroups = ALONE) -> nn.ModuleDict:
    """The layer under a name, as in a model."""
    model = nn.ModuleDict({"moe": MoELayer(case.config, case.balance, groups)})
    init_weights(model, 0.4, seed=0)
    router = model["moe"].router
    router.bias.copy_(torch.tensor(case.bias))
    router.last_counts.copy_(torch.arange(8))
    return model


def data(case: Case, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, S, D], the gradient of the output, and what is valid, of one microbatch."""
    stream = torch.Generator().manual_seed(batch)
    hidden, upstream = torch.randn(2, 2, LENGTH, case.config.hidden_size, generator=stream)
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    if case.real is not None:
        valid &= torch.arange(LENGTH) < torch.tensor(case.real)[:, None]
        valid &= batch != 1
    return hidden.requires_grad_(), upstream, valid


def place(layout: Layout, rank: int) -> tuple[int, Positions]:
    """Which microbatch a rank works on, and what it holds of it."""
    at = layout.coordinates(rank)
    return at["dp"], Positions(length=LENGTH, cp=layout.cp, cp_rank=at["cp"], tp=layout.tp, tp_rank=at["tp"])


def step(layer: MoELayer, recorder: Recorder, inputs: tuple[Tensor, Tensor, Tensor], share: float) -> Any:
    hidden, upstream, valid = inputs
    output, load = run(layer.phases(recorder, hidden, valid, share))
    recorder.root(recorder.compute(lambda value: (value * upstream).sum(), output), 1.0)
    return output.detach(), load


class Objective(Direct):
    """Plain autograd over the sum of the roots."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def root(self, value: Tensor, gradient: float) -> None:
        self.total = self.total + gradient * value


def plain(case: Case, num_batches: int) -> tuple[list[Result], dict[str, Tensor]]:
    """Every microbatch whole on one rank, through ordinary autograd into `.grad`."""
    model, results = build(case), []
    for batch in range(num_batches):
        recorder, inputs = Objective(), data(case, batch)
        output, load = step(model["moe"], recorder, inputs, 1 / num_batches)
        recorder.total.backward()
        assert inputs[0].grad is not None
        results.append(Result(output, inputs[0].grad, load))
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients |= dict(canonical(name, parameter, grad))
    return results, gradients


def cut(case: Case, groups: Groups) -> RankResult:
    batch, positions = place(groups.layout, groups.rank)
    hidden, upstream, valid = data(case, batch)
    hidden = positions.sequence(hidden.detach()).requires_grad_()
    inputs = hidden, positions.sequence(upstream), positions.sequence(valid)
    model = build(case, groups)
    zero, tape = buffers(model, groups), Tape(recompute=case.real is not None)
    output, load = step(model["moe"], tape, inputs, 1 / groups.layout.dp)
    run(tape.backward())
    tape.weights()
    owned = owned_gradients(zero)
    assert hidden.grad is not None
    return RankResult(Result(output, hidden.grad, load), owned, norm_of(zero))


def cut_cases(rank: int, world_size: int, layout: Layout, cases: dict[str, Case]) -> dict[str, RankResult]:
    groups = build_groups(layout)
    return {name: cut(case, groups) for name, case in cases.items()}


def cases_of(layout: Layout) -> dict[str, Case]:
    """A capacity is of the rows that a rank sends, so it drops others where sequences are cut."""
    whole = layout in WHOLE_SEQUENCES
    return {name: case for name, case in CASES.items() if whole or case.config.capacity_factor is None}


@functools.cache
def ranks_of(layout: Layout) -> list[dict[str, RankResult]]:
    """By rank, every case under a layout: computed once for all tests."""
    return run_ranks(layout.world_size, cut_cases, layout, cases_of(layout))


def results_of(layout: Layout, name: str) -> list[RankResult]:
    return [results[name] for results in ranks_of(layout)]


def gradients_of(layout: Layout, name: str) -> dict[str, Tensor]:
    """The whole layer's gradient, each element from the one rank that owns it."""
    return assemble(piece for result in results_of(layout, name) for piece in result.owned)


def total_norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))


def assert_same_stretch(found: Result, whole: Result, positions: Positions) -> None:
    """Of every token: output, input gradient, and whom it chose."""
    assert_same(found.output, positions.sequence(whole.output), "output")
    assert_same(found.grad_hidden, positions.sequence(whole.grad_hidden), "input gradient")
    chosen = whole.load.experts_TK.unflatten(0, whole.output.shape[:2])
    assert torch.equal(
        found.load.experts_TK.sort(-1).values, positions.sequence(chosen).flatten(0, 1).sort(-1).values
    )


def assert_same_sums(loads: list[LayerLoad], whole: LayerLoad) -> None:
    """Counts, rows and the auxiliary loss of ranks that share a microbatch add up to the whole's."""
    for name in ("counts_E", "rows_E"):
        assert torch.equal(sum(getattr(load, name) for load in loads), getattr(whole, name)), name
    torch.testing.assert_close(sum(load.gates_E for load in loads), whole.gates_E)
    auxiliary = sum(load.auxiliary_loss.item() for load in loads)
    assert auxiliary == pytest.approx(whole.auxiliary_loss.item(), rel=1e-6)


def label(value: object) -> object:
    if not isinstance(value, Layout):
        return value
    return value.describe() + (f"·nodes of {value.node}" if value.node else "")


EVERYWHERE = [(layout, name) for layout in LAYOUTS for name in cases_of(layout)]


@pytest.mark.parametrize(("layout", "name"), EVERYWHERE, ids=label)
def test_a_cut_layer_is_the_same_layer(layout: Layout, name: str) -> None:
    """Output, input gradient, every parameter's gradient, the counts and the losses."""
    wholes, gradients = plain(CASES[name], layout.dp)
    results = results_of(layout, name)
    for rank, result in enumerate(results):
        batch, positions = place(layout, rank)
        assert_same_stretch(result.stretch, wholes[batch], positions)
    for batch, whole in enumerate(wholes):
        sharing = [rank for rank in range(len(results)) if place(layout, rank)[0] == batch]
        assert_same_sums([results[rank].stretch.load for rank in sharing], whole.load)
    found = gradients_of(layout, name)
    assert found.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert_same(found[parameter], gradient, parameter)


@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
def test_no_degree_scales_an_experts_gradient_or_the_norm(layout: Layout) -> None:
    """Field class 2.3: gradients doubled at EP 2 (pytorch #160285), a norm too big by sqrt(EP) (SpecForge
    #882) or short of the EP+TP part, gradients wrong where ETP is not TP (Megatron #5916)."""
    _, expected = plain(CASES["sigmoid"], layout.dp)
    found = gradients_of(layout, "sigmoid")
    for name, gradient in expected.items():
        factor = (found[name] * gradient).sum() / gradient.square().sum()
        assert factor.item() == pytest.approx(1, rel=1e-5), f"{name} is {factor:.3f} times what it must be"
    norm, *others = (result.norm for result in results_of(layout, "sigmoid"))
    assert norm == pytest.approx(total_norm(expected), rel=1e-6)
    assert set(others) == {norm}  # to the bit: clipping must not part the copies


@pytest.mark.parametrize("layout", CUT_SEQUENCES, ids=label)
def test_the_routers_gradient_is_of_every_rank_that_shares_the_sequence(layout: Layout) -> None:
    """Field class 2.3: the router, whole on every TP rank, had the gradient of one stretch (torchtitan
    #2387), or none through a detached gather (Automodel PR #2995)."""
    name = "moe.router.projection.weight"
    for case in ("sigmoid", "softmax"):
        gradient = plain(CASES[case], layout.dp)[1][name]
        assert gradient.norm() > 0.1
        assert_same(gradients_of(layout, case)[name], gradient, name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
def test_experts_without_a_token_have_zeros_for_a_gradient(layout: Layout) -> None:
    """Field class 2.3: an expert without a token had gradient None, and its rank missed a collective
    (Automodel PR #2995): here all take part, and what is not asked stays exactly 0."""
    found = gradients_of(layout, "a rank without rows")
    idle = {parameter for parameter, gradient in found.items() if not gradient.any()}
    weights = ("gate_up.weight", "down.weight")
    assert idle == {f"moe.experts.{expert}.{weight}" for expert in range(4, 8) for weight in weights}
    counts = sum(result.stretch.load.counts_E for result in results_of(layout, "a rank without rows"))
    assert not counts[4:].any() and counts[:4].all()


@pytest.mark.parametrize("layout", CUT_SEQUENCES, ids=label)
def test_the_auxiliary_loss_is_counted_once_over_a_cut_sequence(layout: Layout) -> None:
    """Field classes 2.3 and 2.4: the loss of local counts, or doubled by an all-reduce of counts in place
    (Megatron #7452). Its ranks' losses are summands, and no rank's alone is the whole."""
    (whole, *_), gradients = plain(CASES["auxiliary losses"], layout.dp)
    results = results_of(layout, "auxiliary losses")
    sharing = [results[rank] for rank in range(len(results)) if place(layout, rank)[0] == 0]
    parts = [result.stretch.load.auxiliary_loss.item() for result in sharing]
    loss = whole.load.auxiliary_loss.item()
    assert sum(parts) == pytest.approx(loss, rel=1e-6) and all(0 < part < 0.9 * loss for part in parts)
    router = "moe.router.projection.weight"
    without = plain(CASES["auxiliary losses"]._replace(balance=BalanceConfig()), layout.dp)[1][router]
    assert (gradients[router] - without).norm() > 0.01 * without.norm()  # it is seen in what follows
    assert_same(gradients_of(layout, "auxiliary losses")[router], gradients[router], router)


@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
def test_padding_is_neither_routed_nor_counted_on_any_rank(layout: Layout) -> None:
    """Field class 2.5: padding was routed, counted and moved the bias (Megatron #1984, #4776, torchtitan
    PR #4594). Here also where a rank's whole stretch is padding."""
    for name in ("padding", "auxiliary losses"):
        config = CASES[name].config
        for rank, result in enumerate(results_of(layout, name)):
            batch, positions = place(layout, rank)
            valid = positions.sequence(data(CASES[name], batch)[2]).flatten()
            load = result.stretch.load
            assert (load.experts_TK[~valid] == config.num_experts).all()
            assert load.counts_E.sum() == load.rows_E.sum() == valid.sum() * config.top_k


@pytest.mark.parametrize("name", CASES)
def test_counts_are_conserved(name: str) -> None:
    case = CASES[name]
    for batch, (_, _, load) in enumerate(plain(case, 2)[0]):
        valid = data(case, batch)[2]
        assert load.counts_E.sum() == valid.sum() * case.config.top_k
        dropped = load.counts_E - load.rows_E
        assert (dropped >= 0).all()
        assert bool(dropped.any()) == (case.config.capacity_factor is not None and bool(valid.any()))


def token_loop(layer: MoELayer, hidden: Tensor, valid: Tensor) -> Tensor:
    """Shared experts plus each chosen expert's SwiGLU by its weight, a token at a time; the gate is given."""
    config = layer.config
    weights, _, routing = layer.router(hidden, valid)

    def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (gate_up @ x).split(down.shape[1])
        return down @ (F.silu(gate) * up)

    room = [len(hidden.flatten(0, 1))] * config.num_experts
    if config.capacity_factor is not None:
        assigned = int(valid.sum()) * config.top_k
        room = [math.ceil(config.capacity_factor * assigned / config.num_experts)] * config.num_experts
    tokens = list(hidden.flatten(0, 1))
    out = [torch.zeros_like(x) for x in tokens]
    order = sorted((-weights[t, k].item(), t, k) for t in range(len(tokens)) for k in range(config.top_k))
    for _, t, k in order:  # the heaviest first: only they find room under a capacity
        expert = int(routing.experts_TK[t, k])
        if expert < config.num_experts and room[expert] > 0:
            room[expert] -= 1
            gate_up, down = layer.experts.gate_up.weight[expert], layer.experts.down.weight[expert]
            out[t] = out[t] + weights[t, k] * swiglu(tokens[t], gate_up, down)
    if layer.shared is not None:
        shared = layer.shared
        out = [
            y + swiglu(x, shared.gate_up.weight, shared.down.weight) for x, y in zip(tokens, out, strict=True)
        ]
    return torch.stack(out).view_as(hidden)


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_a_loop_over_tokens(name: str) -> None:
    """Output, input gradient and every parameter's gradient."""
    case = CASES[name]
    layer, (hidden, upstream, valid) = build(case)["moe"], data(case, 0)
    output, expected = layer(hidden, valid), token_loop(layer, hidden, valid)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    inputs = (hidden, *layer.parameters())
    ours = torch.autograd.grad(output, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for found, gradient in zip(ours, theirs, strict=True):
        assert gradient.any()
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4)


def test_padding_reaches_no_expert_and_no_gate() -> None:
    case = CASES["padding"]
    model, (hidden, _, valid) = build(case), data(case, 0)
    other = torch.where(valid[..., None], hidden, 50.0)
    outputs = [model["moe"](x, valid) for x in (hidden, other)]
    assert torch.equal(outputs[0][valid], outputs[1][valid])
    shared = model["moe"].shared
    torch.testing.assert_close(outputs[0][~valid], shared(hidden)[~valid])


def test_recomputation_counts_once_and_changes_no_bit() -> None:
    case = CASES["auxiliary losses"]
    results = []
    for recompute in (False, True):
        model, inputs, tape = build(case), data(case, 0), Tape(recompute=recompute)
        before = {name: value.clone() for name, value in model.named_buffers()}
        _, load = step(model["moe"], tape, inputs, 1.0)
        run(tape.backward())
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
        results.append((load, [inputs[0].grad, *(parameter.grad for parameter in model.parameters())]))
    (load, gradients), (again, recomputed) = results
    assert torch.equal(again.experts_TK, load.experts_TK)
    assert_same_sums([again], load)
    assert load.counts_E.sum() == data(case, 0)[2].sum() * case.config.top_k
    assert not again.auxiliary_loss.requires_grad
    for mine, other in zip(gradients, recomputed, strict=True):
        assert mine is not None and other is not None and torch.equal(mine, other)


def test_the_auxiliary_loss_pulls_by_this_microbatchs_share() -> None:
    """The layer's one gradient, where the output asks for none, is that of share x loss."""
    case = CASES["auxiliary losses"]
    layer, (hidden, _, valid), tape = build(case)["moe"], data(case, 0), Tape()
    load = run(layer.phases(tape, hidden, valid, 0.25))[1]
    run(tape.backward())
    again = hidden.detach().requires_grad_()
    loss = layer.router(again, valid)[1]
    assert load.auxiliary_loss.item() == loss.item() > 0
    expected = torch.autograd.grad(0.25 * loss, (again, layer.router.projection.weight))
    for found, gradient in zip((hidden.grad, layer.router.projection.weight.grad), expected, strict=True):
        assert found is not None and gradient.any()
        torch.testing.assert_close(found, gradient)


class Told(torch.autograd.Function):
    """Identity that writes a line when its backward runs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, log: list[str], name: str) -> Tensor:
        ctx.log, ctx.name = log, name
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append(f"{ctx.name} backward")
        return grads[0], None, None


class Telling(nn.Module):
    """A module that writes down when it runs forward and backward."""

    def __init__(self, module: nn.Module, name: str, log: list[str]) -> None:
        super().__init__()
        self.module, self.name, self.log = module, name, log

    def forward(self, *inputs: Any) -> Tensor:
        self.log.append(self.name)
        return Told.apply(self.module(*inputs), self.log, self.name)


class TellingWire:
    def __init__(self, wire: Wire, log: list[str]) -> None:
        self.wire, self.log = wire, log

    def wait(self) -> Tensor:
        self.log.append("wait")
        return self.wire.wait()


def listen(rank: int, world_size: int) -> list[str]:
    groups = build_groups(Layout(dp=world_size, ep=world_size))
    layer, log = build(CASES["sigmoid"], groups)["moe"], list[str]()
    layer.shared, layer.experts = (
        Telling(m, n, log) for m, n in ((layer.shared, "shared"), (layer.experts, "experts"))
    )

    def start(rows: Tensor, splits: Splits) -> TellingWire:
        log.append("start")
        return TellingWire(start_all_to_all(rows, splits), log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tape_module, "start_all_to_all", start)
        tape = Tape()
        step(layer, tape, data(CASES["sigmoid"], rank), 1.0)
        run(tape.backward())
    return log


def test_shared_experts_run_while_rows_travel_forward_and_backward() -> None:
    forward = ["start", "start", "shared", "wait", "wait", "experts", "start", "wait"]  # rows and weights
    backward = ["start", "shared backward", "wait", "experts backward", "start", "start", "wait", "wait"]
    assert run_ranks(2, listen) == [forward + backward] * 2


def count_yields(rank: int, world_size: int) -> int:
    groups = build_groups(Layout(dp=world_size, ep=world_size)) if world_size > 1 else ALONE
    hidden, _, valid = data(CASES["sigmoid"], rank)
    return sum(1 for _ in build(CASES["sigmoid"], groups)["moe"].phases(Tape(), hidden, valid))


def test_the_layer_yields_whenever_its_rows_are_on_the_wire() -> None:
    """While the dispatched and the returned rows travel: a schedule's openings. Alone there are none."""
    assert run_ranks(2, count_yields) == [2, 2]
    assert count_yields(0, 1) == 0


def test_bf16_layer_routes_in_fp32_and_returns_bf16() -> None:
    case = CASES["sigmoid"]
    narrow, (hidden, _, valid) = build(case).to(torch.bfloat16)["moe"], data(case, 0)
    output = narrow(hidden.bfloat16(), valid)
    assert output.dtype == torch.bfloat16
    wide = build(case)
    for mine, theirs in zip(wide.parameters(), narrow.parameters(), strict=True):
        mine.data.copy_(theirs)
    expected = wide["moe"](hidden.bfloat16().float(), valid)
    assert (output - expected).norm() < 0.02 * expected.norm()


def test_the_layer_alone_is_usable() -> None:
    """As its docstring shows: 64 times 64 weights of a trained scale, not what memory held."""
    torch.empty(4_000_000).fill_(float("nan"))  # what memory may hold
    layer = MoELayer(SIGMOID)
    assert all(0 < parameter.std() < 1 for parameter in layer.parameters())
