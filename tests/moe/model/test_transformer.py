"""The whole model: cut over ranks, overlapped and recomputed it gives one rank's losses and gradients."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import BalanceConfig, ModelConfig, RopeConfig
from moe.model.mtp import IGNORE
from moe.model.transformer import Microbatch, Outcome, Transformer
from parallel.gradients import GradientBuffers, parameter_sets
from parallel.groups import Groups, build_groups, single
from parallel.layout import Layout
from parallel.pipeline.overlap import forward_backward
from parallel.pipeline.tape import Direct, Tape, run
from parallel.shards import canonical
from tests.ranks import run_ranks
from tests.small import SMALL_MODEL

V3 = replace(
    SMALL_MODEL,
    hidden_size=16,
    intermediate_size=24,
    vocab_size=48,
    num_mtp_layers=1,
    q_lora_rank=8,
    num_groups=4,
    top_groups=2,
    top_k=3,
    routed_scaling_factor=2.5,
    init_std=0.2,
)
V2 = replace(
    V3,
    num_mtp_layers=0,
    q_lora_rank=None,
    score_function="softmax",
    group_score="max",
    normalize_top_k=False,
    routed_scaling_factor=1.0,
    tie_embeddings=True,
    capacity_factor=1.1,
    rope=RopeConfig(kind="yarn", factor=4, original_context=8, mscale=0.7, mscale_all_dim=0.7),
)
NUM_SEQUENCES, LENGTH = 8, 7  # of the global batch


class Case(NamedTuple):
    config: ModelConfig = V3
    balance: BalanceConfig = BalanceConfig()
    bias: tuple[float, ...] = tuple(0.1 - 0.02 * expert for expert in range(8))
    documents: bool = False


CASES = {
    "sigmoid": Case(balance=BalanceConfig(sequence_aux=0.2, global_aux=0.1)),
    "softmax, capacity, tied": Case(V2, BalanceConfig(bias="none", sequence_aux=0.2)),
    "a rank without rows": Case(replace(V3, num_groups=1, top_groups=1), bias=(0.0,) * 4 + (-9.0,) * 4),
    "documents": Case(documents=True),
    "every layer of experts": Case(replace(V3, num_dense_layers=0)),
    "no layer of experts": Case(replace(V3, num_dense_layers=3, num_mtp_layers=0)),
}


def build(case: Case, groups: Groups) -> Transformer:
    model = Transformer(case.config, case.balance, groups.ep)
    for _, router in model.routers():
        router.bias.copy_(torch.tensor(case.bias))
        router.last_counts.copy_(torch.arange(8))
    return model


def global_batch(case: Case) -> Microbatch:
    """Sequences of uneven length, each loss weighed by the labels of them all."""
    stream = torch.Generator().manual_seed(0)
    text = torch.randint(1, case.config.vocab_size, (NUM_SEQUENCES, LENGTH + 1), generator=stream)
    lengths = torch.tensor([7, 3, 5, 7, 1, 6, 7, 4])[:, None]
    valid = torch.arange(LENGTH) < lengths
    labels = text[:, 1:].masked_fill(torch.arange(LENGTH) >= lengths - 1, IGNORE)
    further = labels[:, 1:] != IGNORE
    weights = (1 / int((labels != IGNORE).sum()), 0.3 / int(further.sum()))
    return Microbatch(
        tokens=text[:, :-1],
        labels=labels,
        valid=valid,
        documents=(torch.arange(LENGTH) // 3).expand(NUM_SEQUENCES, -1) if case.documents else None,
        loss_weights=weights[: 1 + case.config.num_mtp_layers],
    )


def share_out(whole: Microbatch, parts: int) -> list[Microbatch]:
    """The global batch in equal parts, in order; rank r of P takes the r-th P-th of them."""
    size = NUM_SEQUENCES // parts
    slices = [slice(begin, begin + size) for begin in range(0, NUM_SEQUENCES, size)]
    return [
        replace(
            whole,
            tokens=whole.tokens[part],
            labels=whole.labels[part],
            valid=whole.valid[part],
            documents=None if whole.documents is None else whole.documents[part],
            auxiliary_share=1 / parts,
        )
        for part in slices
    ]


class Result(NamedTuple):
    losses: Tensor
    mtp_losses: list[Tensor]
    counts: dict[str, Tensor]
    rows: dict[str, Tensor]
    gradients: dict[str, Tensor]
    norm: float


def collect(model: Transformer, outcomes: list[Outcome], buffers: GradientBuffers) -> Result:
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        gradients |= dict(canonical(name, parameter, parameter.main_grad))
    layers = outcomes[0].loads
    return Result(
        torch.cat([outcome.losses.detach() for outcome in outcomes]),
        [torch.cat([o.mtp_losses[k].detach() for o in outcomes]) for k in range(len(model.mtp))],
        {layer: sum(o.loads[layer].counts_E for o in outcomes) for layer in layers},
        {layer: sum(o.loads[layer].rows_E for o in outcomes) for layer in layers},
        gradients,
        buffers.norm(),
    )


def train(case: Case, groups: Groups, parts: int, *, overlap: bool, recompute: bool) -> Result:
    """This rank's microbatches of the global batch in `parts`, forward, backward, and the reduction."""
    model = build(case, groups)
    buffers = GradientBuffers(parameter_sets(model.parameters(), groups))
    local = parts // groups.layout.dp
    microbatches = share_out(global_batch(case), parts)[groups.rank * local : (groups.rank + 1) * local]
    outcomes = list(forward_backward(model.phases, microbatches, overlap=overlap, recompute=recompute))
    buffers.reduce()
    return collect(model, outcomes, buffers)


def on_ranks(rank: int, world_size: int, case: Case, ep: int, parts: int, recompute: bool) -> Result:
    groups = build_groups(Layout(dp=world_size, ep=ep))
    return train(case, groups, parts, overlap=True, recompute=recompute)


class Objective(Direct):
    """Plain autograd over the sum of the roots."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def root(self, value: Tensor, gradient: float) -> None:
        self.total = self.total + gradient * value


def plainly(case: Case, parts: int) -> Result:
    """The same on one rank, one microbatch after the other, through ordinary autograd into `.grad`."""
    model, outcomes = build(case, single()), []
    for microbatch in share_out(global_batch(case), parts):
        recorder = Objective()
        outcomes.append(run(model.phases(recorder, microbatch)))
        recorder.total.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    buffers = GradientBuffers(parameter_sets(model.parameters(), single()))
    for name, parameter in model.named_parameters():
        parameter.main_grad.copy_(grads[name])
    return collect(model, outcomes, buffers)


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal to 5e-6 of the expected tensor's norm."""
    assert found.shape == expected.shape, what
    error, size = (found - expected).norm().item(), expected.norm().item()
    assert error <= 5e-6 * size, f"{what}: {error} of {size}"


@pytest.mark.parametrize(("world_size", "ep", "recompute"), [(2, 2, False), (4, 4, True), (4, 2, False)])
@pytest.mark.parametrize("name", CASES)
def test_every_layout_trains_alike(name: str, world_size: int, ep: int, recompute: bool) -> None:
    """Losses, counts, every gradient and the norm; dense gradients summed, experts by canonical name."""
    case, parts = CASES[name], 8 if world_size == 4 else 4  # two microbatches on each rank
    expected = plainly(case, parts)
    results = run_ranks(world_size, on_ranks, case, ep, parts, recompute)
    assert_same(torch.cat([result.losses for result in results]), expected.losses, "losses")
    for depth, losses in enumerate(expected.mtp_losses):
        assert_same(torch.cat([result.mtp_losses[depth] for result in results]), losses, "MTP losses")
    for layer, counts in expected.counts.items():
        assert torch.equal(sum(result.counts[layer] for result in results), counts)
        assert torch.equal(sum(result.rows[layer] for result in results), expected.rows[layer])
    for result in results:
        assert result.norm == pytest.approx(expected.norm, rel=1e-6)
        for parameter, gradient in result.gradients.items():
            assert_same(gradient, expected.gradients[parameter], parameter)
    assert set().union(*(result.gradients for result in results)) == set(expected.gradients)
    assert len({result.norm for result in results}) == 1


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_gradients_do_not_depend_on_how_the_batch_is_shared_out(parts: int) -> None:
    """One microbatch of eight sequences or eight of one, auxiliary loss by sequence included."""
    case = Case(balance=BalanceConfig(sequence_aux=0.2))
    whole, found = plainly(case, 4), train(case, single(), parts, overlap=True, recompute=False)
    assert found.norm == pytest.approx(whole.norm, rel=1e-5)
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, whole.gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    assert all(torch.equal(counts, whole.counts[layer]) for layer, counts in found.counts.items())


def test_the_loss_is_the_mean_over_the_global_batchs_labels() -> None:
    """Against cross entropy of the logits: two ranks of unequal token counts sum to one mean."""
    case = Case(replace(V3, num_mtp_layers=0))
    batch, model = global_batch(case), build(case, single())
    loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
    loss.backward()
    for result in run_ranks(2, on_ranks, case, 2, 4, False):
        for name, parameter in model.named_parameters():
            for full_name, gradient in canonical(name, parameter, parameter.grad):
                if full_name in result.gradients:
                    torch.testing.assert_close(
                        result.gradients[full_name], gradient, rtol=1e-4, atol=1e-6, msg=full_name
                    )


def test_losses_stand_where_labels_do() -> None:
    case = CASES["sigmoid"]
    model, batch = build(case, single()), global_batch(case)
    with torch.no_grad():
        outcome, logits = run(model.phases(Direct(), batch)), model(batch.tokens)
    assert not outcome.losses[batch.labels == IGNORE].any()
    for b, s in (batch.labels != IGNORE).nonzero().tolist():
        expected = -logits[b, s].log_softmax(-1)[batch.labels[b, s]]
        assert outcome.losses[b, s].item() == pytest.approx(expected.item(), rel=1e-4)


@torch.no_grad()
def test_a_later_token_and_another_document_change_nothing() -> None:
    model = Transformer(replace(V3, num_mtp_layers=0))
    tokens = torch.randint(48, (1, 7), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 4] += 1
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(
        before[:4], after[:4], rtol=1e-5, atol=1e-5
    )  # other rows in a product: a rounding
    assert ((before[4:] - after[4:]).abs().amax(-1) > 1e-2).all()
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
    losses = []
    for each in (tokens, changed):
        valid = torch.ones_like(each, dtype=torch.bool)
        batch = Microbatch(tokens=each, labels=tokens, valid=valid, documents=documents)
        losses.append(run(model.phases(Direct(), batch)).losses[0])
    differs = (losses[0] - losses[1]).abs() > 1e-4
    assert differs.tolist() == [False] * 4 + [True] + [False] * 2


@torch.no_grad()
def test_padding_changes_no_real_tokens_loss_or_count() -> None:
    case = CASES["sigmoid"]
    model, batch = build(case, single()), global_batch(case)
    other = replace(batch, tokens=batch.tokens.masked_fill(~batch.valid, 7))
    first, second = (run(model.phases(Direct(), each)) for each in (batch, other))
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-5, atol=1e-6)
    for layer, load in first.loads.items():
        assert torch.equal(load.counts_E, second.loads[layer].counts_E)
        expected = batch.valid if not layer.startswith("mtp") else batch.valid[:, 1:]
        assert load.counts_E.sum() == expected.sum() * case.config.top_k


def test_a_model_without_experts_has_no_loads_and_one_of_experts_alone_has_all() -> None:
    for num_dense, layers in ((3, []), (0, ["0", "1", "2"])):
        case = Case(replace(V3, num_dense_layers=num_dense, num_mtp_layers=0))
        model = build(case, single())
        outcome = run(model.phases(Tape(), global_batch(case)))
        assert list(outcome.loads) == [name for name, _ in model.routers()] == layers


def test_a_tied_head_is_the_embedding() -> None:
    model, tape = build(CASES["softmax, capacity, tied"], single()), Tape()
    names = [name for name, _ in model.named_parameters()]
    assert model.head is None and "head" not in names
    tokens = torch.tensor([[3, 5]])
    valid = torch.ones_like(tokens, dtype=torch.bool)
    run(model.phases(tape, Microbatch(tokens=tokens, labels=tokens + 1, valid=valid)))
    run(tape.backward())
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.any(-1).all()  # as a head every row, not only what was read


def test_bf16_model_keeps_losses_and_gradients_in_fp32() -> None:
    case = Case()
    model, wide = Transformer(V3, dtype=torch.bfloat16), Transformer(V3)
    GradientBuffers(parameter_sets(model.parameters(), single()))
    (outcome,) = forward_backward(model.phases, [global_batch(case)], overlap=True)
    assert outcome.losses.dtype == torch.float32
    for parameter in model.parameters():
        assert (
            parameter.grad is None
            and parameter.main_grad.dtype == torch.float32
            and parameter.main_grad.any()
        )
    with torch.no_grad():
        expected = run(wide.phases(Direct(), global_batch(case))).losses
    assert outcome.losses.sum().item() == pytest.approx(expected.sum().item(), rel=0.02)


def test_recomputed_losses_are_detached() -> None:
    case = Case()
    model = build(case, single())
    (outcome,) = forward_backward(model.phases, [global_batch(case)], overlap=True, recompute=True)
    assert not outcome.losses.requires_grad and not outcome.mtp_losses[0].requires_grad
