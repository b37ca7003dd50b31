"""A run follows a recording where only rounding would choose otherwise, and nowhere else."""

import torch
from torch import Tensor

from moe.config import BalanceConfig
from moe.model.transformer import Transformer
from moe.train.ties import Following, Recording, tap
from parallel.groups import single
from tests.small import SMALL_MODEL

LENGTH = 4


def recorded(num_microbatches: int) -> dict[str, Tensor]:
    """Scores of eight tokens and six experts, and the two best, under one layer."""
    recording = Recording()
    for number in range(num_microbatches):
        scores = torch.rand(8, 6, generator=torch.Generator().manual_seed(number))
        recording("1/choose", scores, scores.topk(2).indices)
    return recording.take()


def following(recording: dict[str, Tensor], microbatches: range, bound: float) -> Following:
    follower = Following(single(), microbatches, LENGTH)
    follower.begin(recording, bound)
    return follower


def test_a_recording_begins_anew_when_it_is_taken() -> None:
    recording = Recording()
    for _ in range(2):
        scores, experts = torch.rand(4, 3), torch.zeros(4, 1, dtype=torch.int64)
        assert recording("1/choose", scores, experts) is experts
        assert set(recording.take()) == {"1/choose/0/scores", "1/choose/0/experts"}


def test_rounding_is_followed_and_counted() -> None:
    before = recorded(1)
    scores, experts = before["1/choose/0/scores"] + 1e-7, before["1/choose/0/experts"].clone()
    experts[3, 0] = next(e for e in range(6) if e not in experts[3])
    follower = following(before, range(1), 1e-5)
    assert torch.equal(follower("1/choose", scores, experts), before["1/choose/0/experts"])
    assert follower.ties == 1


def test_the_same_choice_in_another_order_is_no_tie() -> None:
    before = recorded(1)
    follower = following(before, range(1), 1e-5)
    follower("1/choose", before["1/choose/0/scores"], before["1/choose/0/experts"].flip(1))
    assert follower.ties == 0


def test_other_scores_choose_for_themselves() -> None:
    """Even if a single expert's score is another: the token's choice is its own, and shows."""
    before = recorded(1)
    scores, experts = before["1/choose/0/scores"].clone(), before["1/choose/0/experts"].roll(1, 0)
    scores[:, 0] += 1e-4
    scores[5, 0] = torch.nan
    follower = following(before, range(1), 1e-5)
    assert torch.equal(follower("1/choose", scores, experts), experts)
    assert follower.ties == 0


def test_microbatches_are_told_by_their_scores_and_counted_once() -> None:
    """In any order, among this rank's only, and again when they are computed again."""
    before = recorded(4)
    follower = following(before, range(2, 4), 1e-5)
    for number in (3, 2, 3):
        own = before[f"1/choose/{number}/experts"].roll(1, 0)
        taken = follower("1/choose", before[f"1/choose/{number}/scores"], own)
        assert torch.equal(taken, before[f"1/choose/{number}/experts"])
    tied = [
        (own.roll(1, 0).sort(1).values != own.sort(1).values).any(1).sum()
        for own in (before["1/choose/2/experts"], before["1/choose/3/experts"])
    ]
    assert follower.ties == sum(tied) > 0
    elsewhere = before["1/choose/0/experts"].roll(1, 0)
    assert torch.equal(follower("1/choose", before["1/choose/0/scores"], elsewhere), elsewhere)


def test_a_tapped_model_takes_what_it_is_told() -> None:
    model = Transformer(SMALL_MODEL, BalanceConfig(sequence_aux=1e-2))
    (name, router), *_ = model.routers()
    hidden, valid = torch.randn(2, LENGTH, SMALL_MODEL.hidden_size), torch.ones(2, LENGTH, dtype=torch.bool)
    seen = {}

    def first_two(key: str, scores: Tensor, experts: Tensor) -> Tensor:
        seen[key] = scores.shape, experts.shape
        return torch.tensor([0, 1]).expand_as(experts)

    _, free_loss, _ = router(hidden, valid)
    tap(model, first_two)
    _, loss, routing = router(hidden, valid)
    assert routing.experts_TK.tolist() == [[0, 1]] * 8
    assert loss != free_loss  # its shares are of those two
    assert seen == {f"{name}/{method}": ((8, 8), (8, 2)) for method in ("choose", "unbiased_choice")}
