"""The whole model: cut over ranks, overlapped and recomputed it gives one rank's losses and gradients."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import BalanceConfig, LayoutConfig, ModelConfig, RopeConfig, RunConfig, TrainConfig
from moe.model.mtp import IGNORE
from moe.model.stages import split
from moe.model.transformer import Microbatch, Outcome, Transformer
from moe.rules import validate
from moe.train.runner import Runner, make_schedule
from moe.train.units import parameter_units
from parallel.groups import Groups, build_groups, single
from parallel.pipeline.tape import Direct, Tape, run
from parallel.shards import Piece, pieces
from parallel.zero import Zero
from tests.ranks import run_ranks
from tests.reduced import canonical, norm_of, owned_gradients, ranks_of
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
GROUPED = replace(
    V2,
    num_dense_layers=0,
    num_shared_experts=0,
    normalize_top_k=True,
    num_groups=1,
    top_groups=1,
    tie_embeddings=False,
    capacity_factor=None,
    attention="gqa",
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qk_norm="head",
    rope=RopeConfig(pairs="halves"),
)
NUM_SEQUENCES, LENGTH = 8, 8  # of the global batch


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


def build(
    case: Case,
    groups: Groups,
    dtype: torch.dtype = torch.float32,
    layout: LayoutConfig = LayoutConfig(),  # noqa: B008 (frozen)
) -> Transformer:
    schedule = make_schedule(layout, layout.microbatches)
    stages = split(case.config, schedule.num_stages, LENGTH)
    parts = [stages[stage] for stage in sorted(schedule.stages[groups.index("pp")])]
    model = Transformer(case.config, case.balance, groups, dtype, parts=parts)
    for _, router in model.routers():
        router.bias.copy_(torch.tensor(case.bias))
        router.last_counts.copy_(torch.arange(8))
    return model


def global_batch(case: Case) -> Microbatch:
    """Sequences of uneven length, each loss weighed by the labels of them all."""
    stream = torch.Generator().manual_seed(0)
    text = torch.randint(1, case.config.vocab_size, (NUM_SEQUENCES, LENGTH + 1), generator=stream)
    lengths = torch.tensor([8, 3, 5, 8, 1, 6, 7, 4])[:, None]
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
    losses: list[Tensor]  # the losses of the next token and of MTP, by microbatch, all [B, S] of this rank
    counts: dict[str, Tensor]
    rows: dict[str, Tensor]
    gradients: list[Piece]
    norm: float


def collect(outcomes: list[Outcome], gradients: list[Piece], norm: float) -> Result:
    loads = [(layer, load) for outcome in outcomes for layer, load in outcome.loads.items()]
    layers = {layer for layer, _ in loads}
    return Result(
        [torch.stack((o.losses, *o.mtp_losses)) for o in outcomes if o.losses is not None],
        {layer: sum(load.counts_E for each, load in loads if each == layer) for layer in layers},
        {layer: sum(load.rows_E for each, load in loads if each == layer) for layer in layers},
        gradients,
        norm,
    )


def train(case: Case, groups: Groups, layout: LayoutConfig, recompute: bool) -> Result:
    """This rank's microbatches of the global batch, forward, backward, and the reduction."""
    config = RunConfig(
        model=case.config, layout=layout, train=TrainConfig(recompute="full" if recompute else "none")
    )
    model = build(case, groups, layout=layout)
    zero = Zero(parameter_units(model, groups), groups.world)
    parts, local = groups.layout.dp * layout.microbatches, layout.microbatches
    first = groups.index("dp") * local
    microbatches = share_out(global_batch(case), parts)[first : first + local]
    outcomes = Runner(model, config, groups, zero).train(microbatches)
    return collect(outcomes, owned_gradients(zero), norm_of(zero))


def on_ranks(rank: int, world_size: int, case: Case, layout: LayoutConfig, recompute: bool) -> Result:
    config = RunConfig(model=case.config, layout=layout)
    groups = build_groups(validate(replace(config, data=replace(config.data, sequence_length=LENGTH))))
    return train(case, groups, layout, recompute)


class Objective(Direct):
    """Plain autograd over the sum of the roots."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())

    def root(self, value: Tensor, gradient: float) -> None:
        self.total = self.total + gradient * value


def plainly(case: Case, parts: int) -> Result:
    """The same on one rank, one microbatch after the other, through ordinary autograd into `.grad`."""
    model, outcomes = build(case, single()), []
    for microbatch in share_out(global_batch(case), parts):
        recorder = Objective()
        outcomes.append(run(model.phases(recorder, microbatch))[1])
        recorder.total.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    gradients = [p for n, q in model.named_parameters() for p in pieces(n, q, grads[n].view(-1))]
    norm = torch.cat([grad.double().flatten() for grad in grads.values()]).norm().item()
    return collect(outcomes, gradients, norm)


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal to 5e-6 of the expected tensor's norm."""
    assert found.shape == expected.shape, what
    error, size = (found - expected).norm().item(), expected.norm().item()
    assert error <= 5e-6 * size, f"{what}: {error} of {size}"


LAYOUTS = [
    (LayoutConfig(dp=2, ep=2, microbatches=2), False),
    (LayoutConfig(dp=4, ep=4, microbatches=2), True),
    (LayoutConfig(dp=4, ep=2, microbatches=2), False),
    (LayoutConfig(tp=2, dp=2, ep=4, microbatches=2), False),
    (LayoutConfig(tp=2, cp=2, ep=2, etp=2, microbatches=4), True),
    (LayoutConfig(cp=2, pp=2, ep=2, microbatches=4), False),
    (LayoutConfig(tp=2, pp=2, etp=2, microbatches=4, overlap=False), True),
    (LayoutConfig(dp=2, pp=2, ep=2, microbatches=2, schedule="gpipe"), False),
    (LayoutConfig(pp=4, microbatches=2), False),  # fewer microbatches than stages; the last has no layer
    (LayoutConfig(dp=2, pp=2, ep=2, microbatches=4, schedule="dualpipe"), False),
    (LayoutConfig(tp=2, pp=2, ep=2, microbatches=4, schedule="dualpipe", overlap=False), True),
    (LayoutConfig(dp=2, pp=2, ep=2, microbatches=4, schedule="dualpipev"), True),
    (LayoutConfig(pp=2, microbatches=4, schedule="interleaved"), False),
    (LayoutConfig(tp=2, pp=2, microbatches=4, schedule="zb-h1"), False),
]


@pytest.mark.parametrize(("layout", "recompute"), LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_layout_trains_alike(name: str, layout: LayoutConfig, recompute: bool) -> None:
    """Losses, counts, every gradient and the norm, whoever owns what."""
    case = CASES[name]
    if case.config.capacity_factor is not None and layout.tp * layout.cp > 1:
        pytest.skip("what is dropped depends on who holds which tokens")
    assert_trains_alike(case, layout, recompute)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [(LayoutConfig(tp=2, ep=2, microbatches=2), True), (LayoutConfig(cp=2, ep=2, microbatches=2), False)],
    ids=str,
)
def test_grouped_queries_train_alike(layout: LayoutConfig, recompute: bool) -> None:
    """A model without latents, shared experts or dense layers, such as Qwen3's."""
    assert_trains_alike(Case(GROUPED, BalanceConfig(bias="none", microbatch_aux=0.2)), layout, recompute)


def assert_trains_alike(case: Case, layout: LayoutConfig, recompute: bool) -> None:
    """What the layout's ranks find together is what one rank finds."""
    parts = (layout.dp or 1) * layout.microbatches
    expected = plainly(case, parts)
    results = run_ranks(ranks_of(layout), on_ranks, case, layout, recompute)
    whole = {piece.name: piece.tensor for piece in expected.gradients}
    found = {each: torch.full_like(gradient, torch.nan) for each, gradient in whole.items()}
    for result in results:
        assert result.norm == pytest.approx(expected.norm, rel=1e-6)
        for piece in result.gradients:
            assert found[piece.name][piece.place].isnan().all(), f"{piece.name} is owned twice"
            found[piece.name][piece.place] = piece.tensor
    for each, gradient in whole.items():
        assert_same(found[each], gradient, each)
    assert len({result.norm for result in results}) == 1
    for layer, counts in expected.counts.items():
        holders = [result for result in results if layer in result.counts]
        assert torch.equal(sum(result.counts[layer] for result in holders), counts)
        assert torch.equal(sum(result.rows[layer] for result in holders), expected.rows[layer])
    sums = [sum(each.sum((1, 2)) for each in result.losses) for result in results if result.losses]
    assert_same(sum(sums) / layout.tp, sum(each.sum((1, 2)) for each in expected.losses), "losses")


def test_a_rank_has_the_losses_of_its_positions() -> None:
    case, layout = CASES["documents"], LayoutConfig(tp=2, cp=2, microbatches=4)
    expected = plainly(case, 4).losses
    for rank, result in enumerate(run_ranks(4, on_ranks, case, layout, False)):
        cp_rank = rank // 2
        places = [cp_rank * 2, cp_rank * 2 + 1]  # its first stretch, and the mirrored one
        places += [6 - cp_rank * 2, 7 - cp_rank * 2]
        for found, whole in zip(result.losses, expected, strict=True):
            torch.testing.assert_close(found, whole[:, :, places], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_gradients_do_not_depend_on_how_the_batch_is_shared_out(parts: int) -> None:
    """One microbatch of eight sequences or eight of one, auxiliary loss by sequence included."""
    case = Case(balance=BalanceConfig(sequence_aux=0.2))
    whole, found = plainly(case, 4), train(case, single(), LayoutConfig(microbatches=parts), False)
    assert found.norm == pytest.approx(whole.norm, rel=1e-5)
    expected = {piece.name: piece.tensor for piece in whole.gradients}
    for piece in found.gradients:
        torch.testing.assert_close(piece.tensor, expected[piece.name], rtol=1e-4, atol=1e-5, msg=piece.name)
    assert all(torch.equal(counts, whole.counts[layer]) for layer, counts in found.counts.items())


def test_the_loss_is_the_mean_over_the_global_batchs_labels() -> None:
    """Against cross entropy of the logits: two ranks of unequal token counts sum to one mean."""
    case = Case(replace(V3, num_mtp_layers=0))
    batch, model = global_batch(case), build(case, single())
    assert batch.labels is not None
    loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
    loss.backward()
    expected = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected |= dict(canonical(name, parameter, parameter.grad))
    for result in run_ranks(2, on_ranks, case, LayoutConfig(dp=2, ep=2, microbatches=2), False):
        for piece in result.gradients:
            torch.testing.assert_close(
                piece.tensor, expected[piece.name][piece.place], rtol=1e-4, atol=1e-6, msg=piece.name
            )


def test_losses_stand_where_labels_do() -> None:
    case = CASES["sigmoid"]
    model, batch = build(case, single()), global_batch(case)
    with torch.no_grad():
        outcome, logits = run(model.phases(Direct(), batch))[1], model(batch.tokens)
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
        losses.append(run(model.phases(Direct(), batch))[1].losses[0])
    differs = (losses[0] - losses[1]).abs() > 1e-4
    assert differs.tolist() == [False] * 4 + [True] + [False] * 2


@torch.no_grad()
def test_padding_changes_no_real_tokens_loss_or_count() -> None:
    case = CASES["sigmoid"]
    model, batch = build(case, single()), global_batch(case)
    other = replace(batch, tokens=batch.tokens.masked_fill(~batch.valid, 7))
    first, second = (run(model.phases(Direct(), each))[1] for each in (batch, other))
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-5, atol=1e-6)
    for layer, load in first.loads.items():
        assert torch.equal(load.counts_E, second.loads[layer].counts_E)
        expected = batch.valid if not layer.startswith("mtp") else batch.valid[:, 1:]
        assert load.counts_E.sum() == expected.sum() * case.config.top_k


def test_a_model_without_experts_has_no_loads_and_one_of_experts_alone_has_all() -> None:
    for num_dense, layers in ((3, []), (0, ["0", "1", "2"])):
        case = Case(replace(V3, num_dense_layers=num_dense, num_mtp_layers=0))
        model = build(case, single())
        outcome = run(model.phases(Tape(), global_batch(case)))[1]
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
    model, wide, tape = build(case, single(), torch.bfloat16), build(case, single()), Tape()
    zero = Zero(parameter_units(model, single()), None)
    outcome = run(model.phases(tape, global_batch(case)))[1]
    run(tape.backward())
    assert outcome.losses.dtype == torch.float32
    assert all(segment.grad.dtype == torch.float32 for segment in zero.segments())
    assert all(parameter.main_grad.any() and parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        expected = run(wide.phases(Direct(), global_batch(case)))[1].losses
    assert outcome.losses.sum().item() == pytest.approx(expected.sum().item(), rel=0.02)


def test_recomputed_losses_are_detached() -> None:
    tape = Tape(recompute=True)
    outcome = run(build(Case(), single()).phases(tape, global_batch(Case())))[1]
    assert not outcome.losses.requires_grad and not outcome.mtp_losses[0].requires_grad


def test_units_are_named_as_they_are_entered_and_left() -> None:
    """Every parameter belongs to a unit that the tape hears of, in order and in reverse."""
    model, entered, left = build(Case(), single()), list[str](), list[str]()
    tape = Tape(on_enter=entered.append, on_leave=left.append)
    run(model.phases(tape, global_batch(Case())))
    run(tape.backward())
    tape.weights()
    assert list(model.units(model.parts[0])) == entered
    units = [name for name, _ in parameter_units(model, single())]
    assert (
        entered == units == left[::-1] == ["embedding", "layers.0", "layers.1", "layers.2", "head", "mtp.0"]
    )
