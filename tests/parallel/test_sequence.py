"""Every position is held once, comes back to its place, and sees exactly what is before it."""

import pytest
import torch

from parallel.sequence import Positions, assemble, length_multiple

DEGREES = [(1, 1), (1, 3), (2, 1), (2, 2), (4, 1), (3, 2)]


def test_two_ranks_by_hand() -> None:
    whole = torch.arange(8)[None]
    ranks = [Positions(length=8, cp=2, cp_rank=rank, tp=2, tp_rank=1) for rank in range(2)]
    assert [rank.context(whole).tolist() for rank in ranks] == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]
    assert [rank.sequence(whole).tolist() for rank in ranks] == [[[6, 7]], [[4, 5]]]
    assert [rank.numbers().tolist() for rank in ranks] == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize(("cp", "tp"), DEGREES)
def test_round_trip_over_all_ranks(cp: int, tp: int) -> None:
    length = 3 * length_multiple(cp, tp)
    whole = torch.randn(2, length, 5)
    contexts = []
    for cp_rank in range(cp):
        ranks = [
            Positions(length=length, cp=cp, cp_rank=cp_rank, tp=tp, tp_rank=tp_rank) for tp_rank in range(tp)
        ]
        parts = [rank.sequence(whole) for rank in ranks]
        assert {part.shape for part in parts} == {(2, length // (cp * tp), 5)}
        contexts.append(torch.cat(parts, 1))
        for rank in ranks:
            assert torch.equal(rank.context(whole), contexts[-1])
            assert torch.equal(whole[:, rank.numbers()], contexts[-1])
    assert torch.equal(assemble(contexts), whole)


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_sights_are_what_is_before_a_query(cp: int) -> None:
    length = 4 * length_multiple(cp, 1)
    ranks = [Positions(length=length, cp=cp, cp_rank=rank) for rank in range(cp)]
    for here in ranks:
        for there in ranks:
            sight = here.sight(there.cp_rank)
            seen = torch.zeros(length // cp, length // cp, dtype=torch.bool)
            seen[sight.queries, sight.keys] = True
            if sight.causal:
                seen = seen.tril()
            assert torch.equal(seen, here.numbers()[:, None] >= there.numbers()[None, :])


@pytest.mark.parametrize(
    ("cp", "tp", "multiple", "wrong"),
    [(1, 1, 1, []), (1, 4, 4, [2, 6]), (2, 1, 4, [2, 7]), (2, 2, 8, [4, 20]), (3, 1, 6, [3, 8])],
)
def test_lengths_that_do_not_cut_evenly_are_refused(
    cp: int, tp: int, multiple: int, wrong: list[int]
) -> None:
    assert length_multiple(cp, tp) == multiple
    for length in (multiple, 3 * multiple):
        assert Positions(length=length, cp=cp, tp=tp).numbers().shape == (length // cp,)
    for length in wrong:
        with pytest.raises(AssertionError):
            Positions(length=length, cp=cp, tp=tp)


def test_what_does_not_fit_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError):
        Positions(length=8, cp=2, cp_rank=2)
    with pytest.raises(AssertionError):
        Positions(length=8, tp=2, tp_rank=-1)
    with pytest.raises(AssertionError):
        Positions(length=8, cp=2).context(torch.zeros(1, 4))  # already cut
