"""The experts of each token by one kernel: the best groups, then the best experts in them.

In place of a chain of top-k, sum, scatter and fill. Of equal scores the lowest number wins, every time.
Legend: T tokens, E experts, G groups, K chosen experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels import plain
from parallel.kernels.where import block, by_kernel


def top_k_in_groups(choice_TE: Tensor, top_k: int, num_groups: int, top_groups: int, best: int) -> Tensor:
    """The experts [T, K], int64, with the greatest scores, the greatest first.

    Of the `num_groups` groups that E falls into, only the `top_groups` with the greatest sum of their
    `best` (1 or 2) scores take part. A score that is no number comes last.
    """
    if not by_kernel(choice_TE):
        return plain.top_k_in_groups(choice_TE, top_k, num_groups, top_groups, best)
    num_tokens, num_experts = choice_TE.shape
    width = num_experts // num_groups
    places = triton.next_power_of_2(num_groups) * triton.next_power_of_2(width)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int64, device=choice_TE.device)
    tokens = block(num_tokens, max(1, 1024 // places))
    _choose[(triton.cdiv(num_tokens, tokens),)](
        choice_TE.contiguous(),
        experts,
        num_tokens,
        num_groups,
        width,
        top_k,
        top_groups,
        best,
        tokens,
        triton.next_power_of_2(num_groups),
        triton.next_power_of_2(width),
    )
    return experts


@triton.jit
def _choose(
    choice: tl.tensor,
    experts: tl.tensor,
    num_tokens: int,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST: tl.constexpr,
    TOKENS: tl.constexpr,
    ROOM_GROUPS: tl.constexpr,
    ROOM_WIDTH: tl.constexpr,
) -> None:
    lowest = float("-inf")
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    group, place = tl.arange(0, ROOM_GROUPS), tl.arange(0, ROOM_WIDTH)
    there = (group < GROUPS)[None, :, None] & (place < WIDTH)[None, None, :]
    at = token[:, None, None] * GROUPS * WIDTH + group[None, :, None] * WIDTH + place[None, None, :]
    mask = (token < num_tokens)[:, None, None] & there
    scores = tl.load(choice + at, mask=mask, other=lowest).to(tl.float32)
    scores = tl.where(scores == scores, scores, -1e30)
    if TOP_GROUPS < GROUPS:
        ranked = tl.max(scores, 2)
        if BEST == 2:
            first = tl.argmax(scores, 2)
            ranked += tl.max(tl.where(place[None, None, :] == first[:, :, None], lowest, scores), 2)
        kept = tl.zeros([TOKENS, ROOM_GROUPS], tl.int1)
        for _ in tl.static_range(TOP_GROUPS):
            found = group[None, :] == tl.argmax(ranked, 1)[:, None]
            kept = kept | found
            ranked = tl.where(found, lowest, ranked)
        scores = tl.where(kept[:, :, None], scores, lowest)
    scores = tl.reshape(scores, [TOKENS, ROOM_GROUPS * ROOM_WIDTH])
    column = tl.arange(0, ROOM_GROUPS * ROOM_WIDTH)
    for k in tl.static_range(TOP_K):
        first = tl.argmax(scores, 1)
        scores = tl.where(column[None, :] == first[:, None], lowest, scores)
        expert = first // ROOM_WIDTH * WIDTH + first % ROOM_WIDTH
        tl.store(experts + token * TOP_K + k, expert.to(tl.int64), mask=token < num_tokens)
