"""Our layer in a Megatron-Core GPT: equal to itself outside of one and to Megatron's own layer.

The local spec's attention is not ours, so the whole models are compared with Megatron's attention in
both: once as Megatron runs them, once written out here around our plain layer.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from moe.megatron import SwitchyardMoE, moe_layer_spec
from moe.megatron_config import balance_config, model_config
from moe.model.layer import LayerLoad, MoELayer
from parallel.errors import UserError
from parallel.pipeline.tape import Direct, run
from tests.megatron_cpu import LENGTH, batches, gpt_model, layer_spec, megatron_on_cpu, transformer_config

SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
SEQUENCE_AUX = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}
MICROBATCH_AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
NONE = {"moe_router_load_balancing_type": "none"}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Megatron with the groups of a run of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    with megatron_on_cpu():
        yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def loss_scale(monkeypatch: pytest.MonkeyPatch) -> float:
    """What Megatron's schedule sets for auxiliary losses; and an empty log."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(0.5))
    monkeypatch.setattr(moe_utils, "_MOE_LAYER_WISE_LOGGING_TRACKER", {})
    return 0.5


def logged() -> dict[str, Tensor]:
    """Auxiliary losses by name and layer."""
    return {name: entry["values"] for name, entry in moe_utils.get_moe_layer_wise_logging_tracker().items()}


def layers_of(model: GPTModel) -> list[SwitchyardMoE]:
    return [layer.mlp for layer in model.decoder.layers]


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item()), what


class Objective(Direct):
    """Ordinary autograd over the sum of the roots."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def root(self, value: Tensor, gradient: float) -> None:
        self.total = self.total + gradient * value


def written_out(
    model: GPTModel, twins: list[MoELayer], batch: tuple[Tensor, ...], padding: Tensor
) -> tuple[Tensor, Tensor, list[LayerLoad]]:
    """A model's loss [B, S] with our plain layers in its residual stream, their auxiliary loss and loads."""
    tokens, positions, mask, labels = batch
    objective, loads = Objective(), []
    hidden, rotary = model.embedding(tokens, positions), model.rotary_pos_emb(tokens.shape[1])
    for layer, twin in zip(model.decoder.layers, twins, strict=True):
        normed = layer.input_layernorm(hidden)
        hidden = hidden + layer.self_attention(normed, mask, rotary_pos_emb=rotary)[0]
        normed = layer.pre_mlp_layernorm(hidden).transpose(0, 1)
        output, load = run(twin.phases(objective, normed, ~padding))
        hidden = hidden + output.transpose(0, 1)
        loads.append(load)
    logits = model.output_layer(model.decoder.final_layernorm(hidden))[0]
    return F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none"), objective.total, loads


@pytest.mark.parametrize(
    ("settings", "score_function"),
    [
        (SIGMOID | SEQUENCE_AUX | {"moe_router_topk_scaling_factor": 2.5}, None),
        (SIGMOID | MICROBATCH_AUX | {"calculate_per_token_loss": True}, "softmax"),
        ({"moe_router_pre_softmax": True, "moe_expert_capacity_factor": 0.8} | MICROBATCH_AUX, None),
    ],
    ids=["sigmoid", "softmax with bias, loss by token", "softmax with capacity"],
)
def test_a_gpt_model_equals_its_layers_written_out(
    settings: dict[str, Any], score_function: Any, loss_scale: float
) -> None:
    torch.manual_seed(0)
    config = transformer_config(**settings)
    loads: dict[int, LayerLoad] = {}
    spec = moe_layer_spec(layer_spec(), score_function=score_function, on_load=loads.__setitem__)
    model = gpt_model(config, spec)
    twins = [MoELayer(model_config(config, score_function), balance_config(config)) for _ in range(2)]
    for layer, twin in zip(layers_of(model), twins, strict=True):
        layer.expert_bias.copy_(torch.randn(8) * 0.1)
        twin.load_state_dict(layer.layer.state_dict())
    (batch,) = batches(1)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 5:] = True

    tokens, positions, mask, labels = batch
    loss = model(tokens, positions, mask, labels=labels, padding_mask=padding)
    loss.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    wanted_loss, auxiliary, wanted_loads = written_out(model, twins, batch, padding)
    scale = loss_scale * (13 if config.calculate_per_token_loss else 1)
    (wanted_loss.mean() + scale * auxiliary).backward()

    close(loss, wanted_loss, "loss")
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for number, twin in enumerate(twins):
        wanted |= {f"decoder.layers.{number}.mlp.layer.{n}": p.grad for n, p in twin.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        close(gradient, wanted[name], name)
    for number, load in enumerate(wanted_loads, 1):
        assert loads[number].counts_E.tolist() == load.counts_E.tolist()
        assert loads[number].rows_E.tolist() == load.rows_E.tolist()
        assert loads[number].counts_E.sum() == 13 * 2


@pytest.mark.parametrize(
    "settings",
    [
        MICROBATCH_AUX,
        {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 3.0} | SEQUENCE_AUX,
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2} | NONE,
        SIGMOID | SEQUENCE_AUX | {"moe_router_topk_scaling_factor": 2.5},
        SIGMOID | MICROBATCH_AUX | {"calculate_per_token_loss": True},
        SIGMOID | NONE | {"moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_router_score_function": "sigmoid", "moe_router_topk": 1} | NONE,
        {"moe_expert_capacity_factor": 0.8, "moe_shared_expert_intermediate_size": None} | MICROBATCH_AUX,
    ],
    ids=["softmax", "pre-softmax", "groups", "sigmoid", "by token", "sigmoid groups", "top-1", "capacity"],
)
def test_the_layer_equals_megatrons_own(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = transformer_config(**settings)
    ours = SwitchyardMoE(config)
    theirs = build_module(get_gpt_layer_local_spec(num_experts=8).submodules.mlp, config=config)
    for layer in (ours, theirs):
        layer.set_layer_number(1)
    if config.moe_router_enable_expert_bias:
        ours.expert_bias.copy_(torch.randn(8) * 0.1)
        theirs.router.expert_bias.copy_(ours.expert_bias)
    pairs = weight_pairs(ours, theirs)
    with torch.no_grad():
        for _, own, other in pairs:
            other.copy_(own)

    hidden, upstream = torch.randn(2, 8, 2, 16)
    results = []
    for layer in (ours, theirs):
        given = hidden.clone().requires_grad_()
        output, bias = layer(given)
        output.backward(upstream)
        assert bias is None
        results.append((output, given.grad, logged()))
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
    close(results[0][0], results[1][0], "output")
    close(results[0][1], results[1][1], "gradient of the input")
    for name, own, other in weight_pairs(ours, theirs, gradients=True):
        close(own, other, name)
    assert results[0][2].keys() == results[1][2].keys()
    for name, values in results[0][2].items():
        close(values, results[1][2][name], name)
    if config.moe_router_enable_expert_bias:
        assert ours.local_tokens_per_expert.dtype == torch.int64
        assert ours.local_tokens_per_expert.tolist() == theirs.router.local_tokens_per_expert.tolist()


def weight_pairs(
    ours: SwitchyardMoE, theirs: Any, gradients: bool = False
) -> list[tuple[str, Tensor, Tensor]]:
    """Each of Megatron's weights, or their gradients, beside ours."""
    own, other = dict(ours.layer.named_parameters()), dict(theirs.named_parameters())
    chosen = (lambda parameter: parameter.grad) if gradients else (lambda parameter: parameter)
    pairs = [("router.weight", chosen(own["router.projection.weight"]))]
    for name, linear in (("gate_up", "linear_fc1"), ("down", "linear_fc2")):
        stack = chosen(own[f"experts.{name}.weight"])
        pairs += [
            (f"experts.local_experts.{index}.{linear}.weight", each) for index, each in enumerate(stack)
        ]
        if ours.layer.shared is not None:
            pairs.append((f"shared_experts.{linear}.weight", chosen(own[f"shared.{name}.weight"])))
    assert len(pairs) == len(other)
    return [(name, each, chosen(other[name])) for name, each in pairs]


class Counted(NamedTuple):
    """What two microbatches and an evaluation leave behind."""

    forwards: int  # of the first layer's router
    calls: list[tuple[int, list[int]]]
    totals: list[list[int]]
    gradients: list[Tensor | None]
    losses: Tensor


def count(**settings: Any) -> Counted:
    torch.manual_seed(0)
    calls: list[tuple[int, list[int]]] = []
    spec = moe_layer_spec(layer_spec(), on_load=lambda n, load: calls.append((n, load.counts_E.tolist())))
    model = gpt_model(transformer_config(**SIGMOID, **SEQUENCE_AUX, **settings), spec)
    forwards: list[Any] = []
    layers_of(model)[0].layer.router.register_forward_hook(lambda *arguments: forwards.append(arguments))
    for tokens, positions, mask, labels in batches(2):
        model(tokens, positions, mask, labels=labels).mean().backward()
    with torch.no_grad():
        model(*batches(1)[0][:3])
    totals = [layer.local_tokens_per_expert.tolist() for layer in layers_of(model)]
    losses = moe_utils.get_moe_layer_wise_logging_tracker().pop("seq_load_balancing_loss")["values"]
    return Counted(len(forwards), calls, totals, [p.grad for p in model.parameters()], losses)


def test_a_microbatch_counts_once_however_often_it_is_computed() -> None:
    once = count()
    assert [number for number, _ in once.calls] == [2, 1, 2, 1]
    assert all(sum(counts) == 2 * LENGTH * 2 for _, counts in once.calls)
    assert once.totals[0] == [a + b for a, b in zip(once.calls[1][1], once.calls[3][1], strict=True)]
    for settings in (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    ):
        twice = count(**settings)
        assert (once.forwards, twice.forwards) == (3, 5)
        assert twice.calls == once.calls
        assert twice.totals == once.totals
        torch.testing.assert_close(twice.gradients, once.gradients)
        torch.testing.assert_close(twice.losses, once.losses)


def test_the_global_loss_takes_the_counts_of_the_step_before() -> None:
    config = transformer_config(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.1)
    layer = SwitchyardMoE(config)
    layer.set_layer_number(2)
    for _ in range(2):
        layer(torch.randn(LENGTH, 2, 16))[0].sum().backward()
    counts = layer.global_tokens_per_expert.clone()
    assert counts.sum() == 2 * 2 * LENGTH * 2
    reset_model_temporary_tensors(config, [layer])
    assert layer.layer.router.last_counts.tolist() == counts.tolist()
    assert layer.global_tokens_per_expert.sum() == 0
    assert logged()["global_load_balancing_loss"][1] > 0


def test_groups_that_are_handed_in_need_no_global() -> None:
    collection = ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    try:
        layer = SwitchyardMoE(transformer_config(**SEQUENCE_AUX), pg_collection=collection)
        layer(torch.randn(LENGTH, 2, 16))[0].sum().backward()
        assert layer.sharded_state_dict("mlp.")["mlp.layer.experts.down.weight"].global_shape == (8, 16, 12)
        with pytest.raises(AssertionError, match="not initialized"):
            SwitchyardMoE(transformer_config())
    finally:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def test_a_cast_keeps_bias_and_counts_exact() -> None:
    layer = SwitchyardMoE(transformer_config(**SIGMOID))
    layer.expert_bias.fill_(1 / 3)
    layer.bfloat16()
    assert layer.expert_bias.tolist() == torch.full((8,), 1 / 3).tolist()
    assert layer.local_tokens_per_expert.dtype == torch.int64


def test_a_spec_whose_mlp_holds_its_norm_is_refused() -> None:
    spec = layer_spec()
    spec.submodules.pre_mlp_layernorm = IdentityOp
    with pytest.raises(UserError, match="pre_mlp_layernorm` must be a norm, but is IdentityOp"):
        moe_layer_spec(spec)
