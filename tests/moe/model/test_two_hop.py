"""Two hops: whom a token reaches by node, what crosses the network, and the gradient of what travels along.

That a layer of two hops is the layer of one rank is proven with every other layout, in test_layer.py.
"""

from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.model import two_hop
from moe.model.two_hop import nodes_of
from parallel.collectives import Splits, Wire, start_all_to_all
from parallel.fp8 import Packed
from parallel.groups import build_groups
from parallel.layout import Layout
from parallel.pipeline import tape as tape_module
from parallel.pipeline.tape import Tape, run
from tests.moe.model.test_layer import CASES, build, data, step
from tests.ranks import run_ranks

NODE = 2


def test_each_node_is_named_once_and_in_order() -> None:
    stream = torch.Generator().manual_seed(0)
    for num_nodes, each, top_k in product((2, 3, 8), (1, 4), (1, 3, 6)):
        seats = torch.randint(num_nodes * each + 1, (50, top_k), generator=stream)
        found = nodes_of(seats, num_nodes * each, each)
        assert found.shape == (50, min(top_k, num_nodes))
        for chosen, nodes in zip(seats.tolist(), found.tolist(), strict=True):
            reached = sorted({seat // each for seat in chosen if seat < num_nodes * each})
            assert nodes == reached + [num_nodes] * (len(nodes) - len(reached))


class Traffic(NamedTuple):
    """Of one rank: hidden rows that it sent over the network, in all; tokens' nodes and seats elsewhere."""

    sent: int
    packed: int  # of these
    nodes: int
    seats: int


def listen(rank: int, world_size: int, layout: Layout) -> Traffic:
    """A layer's forward and backward, counted on the wire."""
    case, groups, sent, packed = CASES["padding"], build_groups(layout), [0], [0]
    layer, inputs = build(case, groups)["moe"], data(case, rank)
    layer.packing = Packed()
    width = case.config.hidden_size

    def start(rows: Tensor, splits: Splits) -> Wire:
        if rows.shape[1:] == (width,) and splits.group is not None:
            peers = dist.get_process_group_ranks(splits.group)
            far = [n for peer, n in zip(peers, splits.send, strict=True) if peer // NODE != rank // NODE]
            sent[0] += sum(far)
            packed[0] += sum(far) if splits.packing else 0
        return start_all_to_all(rows, splits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tape_module, "start_all_to_all", start)
        patch.setattr(two_hop, "start_all_to_all", start)
        tape = Tape()
        _, load = step(layer, tape, inputs, 1.0)
        run(tape.backward())
    each = case.config.num_experts // world_size * NODE
    real = load.experts_TK[load.experts_TK[:, 0] < case.config.num_experts]
    nodes = [{expert // each for expert in chosen} - {rank // NODE} for chosen in real.tolist()]
    seats = int((real // each != rank // NODE).sum())
    assert layout.node is None or load.rows_M.tolist() == [
        sum(node in {expert // each for expert in chosen} for chosen in real.tolist())
        for node in range(world_size // NODE)
    ]
    return Traffic(sent[0], packed[0], sum(map(len, nodes)), seats)


def test_a_token_crosses_the_network_once_to_each_node() -> None:
    """And once back, and the same for gradients; straight, it crosses once to each expert. Padding stays.

    On its way to its experts alone it is packed, if rows are.
    """
    straight = run_ranks(8, listen, Layout(dp=8, ep=8))
    hops = run_ranks(8, listen, Layout(dp=8, ep=8, node=NODE))
    assert sum(each.sent for each in straight) == 4 * sum(each.seats for each in straight)
    assert sum(each.sent for each in hops) == 4 * sum(each.nodes for each in hops)
    for found in (straight, hops):
        assert 4 * sum(each.packed for each in found) == sum(each.sent for each in found)
    assert sum(each.nodes for each in hops) < 0.9 * sum(each.seats for each in hops)
