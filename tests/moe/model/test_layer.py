"""The layer of experts: a loop over tokens, and the same to 5e-6 however the experts are cut."""

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
from parallel.collectives import Group, Splits, Wire, start_all_to_all
from parallel.gradients import GradientBuffers, parameter_sets
from parallel.groups import build_groups
from parallel.layout import Layout
from parallel.pipeline import tape as tape_module
from parallel.pipeline.tape import Direct, Recorder, Tape, run
from parallel.shards import canonical
from tests.ranks import run_ranks

SIGMOID = ModelConfig(
    hidden_size=12,
    num_experts=8,
    top_k=3,
    moe_intermediate_size=10,
    num_shared_experts=2,
    routed_scaling_factor=2.5,
)
SOFTMAX = replace(SIGMOID, score_function="softmax", normalize_top_k=False, group_score="max")
AUX = BalanceConfig(sequence_aux=0.3, microbatch_aux=0.2, global_aux=0.1)
UNEVEN = tuple(0.2 - 0.04 * expert for expert in range(8))
LAST_RANK_EMPTY = (0.0,) * 4 + (-9.0,) * 4


class Case(NamedTuple):
    config: ModelConfig = SIGMOID
    balance: BalanceConfig = BalanceConfig()
    bias: tuple[float, ...] = UNEVEN
    padding: bool = False  # rank r has padding, rank 1 nothing else


CASES = {
    "sigmoid": Case(),
    "softmax": Case(SOFTMAX),
    "groups": Case(replace(SIGMOID, num_groups=4, top_groups=2)),
    "softmax groups": Case(replace(SOFTMAX, num_groups=4, top_groups=2), BalanceConfig(bias="none")),
    "a rank without rows": Case(bias=LAST_RANK_EMPTY),
    "padding": Case(padding=True),
    "capacity": Case(replace(SIGMOID, capacity_factor=1.0)),
    "capacity and padding": Case(replace(SOFTMAX, capacity_factor=0.7), padding=True),
    "no shared experts": Case(replace(SIGMOID, num_shared_experts=0)),
    "auxiliary losses": Case(balance=AUX, padding=True),
}


class Result(NamedTuple):
    output: Tensor
    grad_hidden: Tensor
    load: LayerLoad
    bare: list[tuple[str, Tensor]]  # gradients by canonical name


def build(case: Case, group: Group = None) -> nn.ModuleDict:
    """The layer under a name, as in a model."""
    model = nn.ModuleDict({"moe": MoELayer(case.config, case.balance, group)})
    init_weights(model, 0.4, seed=0)
    router = model["moe"].router
    router.bias.copy_(torch.tensor(case.bias))
    router.last_counts.copy_(torch.arange(8))
    return model


def data(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, S, D], the gradient of the output, and what is valid, of one rank."""
    stream = torch.Generator().manual_seed(rank)
    hidden, upstream = torch.randn(2, 2, 7, case.config.hidden_size, generator=stream)
    valid = torch.ones(2, 7, dtype=torch.bool)
    if case.padding:
        valid[0, 4:] = False
        valid[1] = rank != 1
        valid[0] &= rank != 1
    return hidden.requires_grad_(), upstream, valid


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


def plain(case: Case, world_size: int) -> tuple[list[tuple[Tensor, Tensor, LayerLoad]], dict[str, Tensor]]:
    """Every rank's microbatch on one rank, through ordinary autograd into `.grad`."""
    model, results = build(case), []
    for rank in range(world_size):
        recorder, inputs = Objective(), data(case, rank)
        output, load = step(model["moe"], recorder, inputs, 1 / world_size)
        recorder.total.backward()
        assert inputs[0].grad is not None
        results.append((output, inputs[0].grad, load))
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients |= dict(canonical(name, parameter, grad))
    return results, gradients


def cut(rank: int, world_size: int, case: Case, ep: int, recompute: bool) -> Result:
    groups = build_groups(Layout(dp=world_size, ep=ep))
    model = build(case, groups.ep)
    buffers = GradientBuffers(parameter_sets(model.parameters(), groups))
    tape, inputs = Tape(recompute=recompute), data(case, rank)
    output, load = step(model["moe"], tape, inputs, 1 / world_size)
    run(tape.backward())
    buffers.reduce()
    gradients = [
        pair
        for name, parameter in model.named_parameters()
        for pair in canonical(name, parameter, parameter.main_grad)
    ]
    assert inputs[0].grad is not None
    return Result(output, inputs[0].grad, load, gradients)


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal to 5e-6 of the expected tensor's norm."""
    assert found.shape == expected.shape, what
    error, size = (found - expected).norm().item(), expected.norm().item()
    assert error <= 5e-6 * size, f"{what}: {error} of {size}"


def assert_same_load(found: LayerLoad, expected: LayerLoad) -> None:
    for name in ("experts_TK", "counts_E", "rows_E"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.auxiliary_loss.item() == pytest.approx(expected.auxiliary_loss.item(), rel=1e-6)


@pytest.mark.parametrize(("world_size", "ep"), [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("name", CASES)
def test_cut_experts_give_the_same_layer(name: str, world_size: int, ep: int) -> None:
    """Output, input gradient, every parameter's gradient and the counts; experts in copies too (4, 2)."""
    case = CASES[name]
    expected, gradients = plain(case, world_size)
    seen = set()
    for rank, result in enumerate(run_ranks(world_size, cut, case, ep, name == "padding")):
        output, grad_hidden, load = expected[rank]
        assert_same(result.output, output, "output")
        assert_same(result.grad_hidden, grad_hidden, "input gradient")
        assert_same_load(result.load, load)
        for parameter, gradient in result.bare:
            assert_same(gradient, gradients[parameter], parameter)
            seen.add(parameter)
    assert seen == set(gradients)
    idle = {parameter for parameter, gradient in gradients.items() if not gradient.any()}
    if name == "a rank without rows":
        weights = ("gate_up.weight", "down.weight")
        assert idle == {f"moe.experts.{expert}.{weight}" for expert in range(4, 8) for weight in weights}
    assert len(idle) <= 8 and all(".experts." in parameter for parameter in idle)


@pytest.mark.parametrize("name", CASES)
def test_counts_are_conserved(name: str) -> None:
    case = CASES[name]
    for rank, (_, _, load) in enumerate(plain(case, 2)[0]):
        valid = data(case, rank)[2]
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
    assert_same_load(again, load)
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
    layer, log = build(CASES["sigmoid"], groups.ep)["moe"], list[str]()
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
    forward = ["start", "shared", "wait", "experts", "start", "wait"]
    backward = ["start", "shared backward", "wait", "experts backward", "start", "wait"]
    assert run_ranks(2, listen) == [forward + backward] * 2


def test_the_layer_yields_whenever_its_rows_are_on_the_wire() -> None:
    """Before the counts, the dispatched and the returned rows are waited for: a schedule's openings."""
    case = CASES["sigmoid"]
    hidden, _, valid = data(case, 0)
    assert sum(1 for _ in build(case)["moe"].phases(Tape(), hidden, valid)) >= 2


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
