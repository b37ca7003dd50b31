"""FLOPs per token are those that torch counts, and for released models those that were published."""

from collections.abc import Collection
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe.components import component_of
from moe.config import Component, ModelConfig
from moe.model import attention, attention_layer
from moe.model.costs import (
    active_weights,
    head_flops,
    layer_flops,
    mtp_flops,
    part_costs,
    train_flops_per_token,
)
from moe.model.transformer import Microbatch, Transformer
from parallel.pipeline.tape import Tape, run
from tests.released import MIXTRAL, MOONLIGHT, OLMOE, QWEN3_MOE, V2_LITE, V3
from tests.small import SMALL_MODEL

SEQUENCES, LENGTH = 2, 6
CASES = {
    "dense and experts": replace(SMALL_MODEL, num_layers=4, num_dense_layers=2, num_shared_experts=3),
    "query latent": replace(SMALL_MODEL, q_lora_rank=12, v_head_dim=20, num_heads=3),
    "no shared experts, tied": replace(SMALL_MODEL, num_shared_experts=0, tie_embeddings=True, top_k=5),
    "no experts": replace(SMALL_MODEL, num_dense_layers=3),
    "grouped queries": replace(
        SMALL_MODEL, attention="gqa", num_heads=6, num_kv_heads=2, head_dim=10, qk_norm="head"
    ),
    "MTP": replace(SMALL_MODEL, num_mtp_layers=1),
}


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attention that multiplies only what a query may see, with blocks of one query."""
    assert mask is None
    return attention.partial_attention(query, key, value, scale, causal=True)[0]


def counted(config: ModelConfig, frozen: Collection[Component] = ()) -> tuple[int, int]:
    """What torch counts in products: forward and backward of a microbatch."""
    model, tape = Transformer(config), Tape()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(component_of(name) not in frozen)
    tokens = torch.randint(config.vocab_size, (SEQUENCES, LENGTH))
    batch = Microbatch(
        tokens=tokens,
        labels=tokens,
        valid=torch.ones_like(tokens, dtype=torch.bool),
        loss_weights=(1.0,) * (1 + config.num_mtp_layers),
    )
    with FlopCounterMode(display=False) as forward:
        run(model.phases(tape, batch))
    with FlopCounterMode(display=False) as backward:
        run(tape.backward())
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_torch_counts_the_same(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last FLOP.

    Torch counts products alone, and causal attention in full: blocks of one query leave only what is seen.
    What differs has its reasons: embeddings copy rows without a product; the last token of a sequence has
    none ahead for an MTP module's experts; and attention's backward makes the scores again.
    """
    monkeypatch.setattr(attention_layer, "attend", causal)
    monkeypatch.setattr(attention, "BLOCK", 1)
    tokens, hidden, num_mtp = SEQUENCES * LENGTH, config.hidden_size, config.num_mtp_layers
    num_blocks = config.num_layers + num_mtp
    costs = tokens * sum(part_costs(config, LENGTH))
    assert tokens * train_flops_per_token(config, LENGTH) == 3 * costs
    copied = tokens * (1 + num_mtp) * hidden
    missing = SEQUENCES * num_mtp * config.top_k * 2 * 3 * hidden * config.moe_intermediate_size
    scores = tokens * num_blocks * (LENGTH + 1) * config.num_heads * config.qk_head_dim
    products = costs - copied - missing
    assert counted(config) == (products, 2 * products + scores)


@pytest.mark.parametrize("component", get_args(Component))
def test_frozen_weights_have_no_gradients(component: Component) -> None:
    """What torch counts less in a backward is what is taken off, one component at a time."""
    config = replace(CASES["MTP"], num_shared_experts=3)
    _, whole = counted(config)
    _, less = counted(config, {component})
    saved = train_flops_per_token(config, LENGTH) - train_flops_per_token(config, LENGTH, {component})
    missing = SEQUENCES * config.top_k * 2 * 3 * config.hidden_size * config.moe_intermediate_size
    assert whole - less == SEQUENCES * LENGTH * saved - (missing if component == "experts" else 0)


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (V2_LITE, 15.706),
        (V3, 671.03),
        (MOONLIGHT, 15.960),
        (MIXTRAL, 46.703),
        (QWEN3_MOE, 30.532),
        (OLMOE, 6.919),
    ],
    ids=["V2-Lite", "V3", "Moonlight", "Mixtral", "Qwen3-MoE", "OLMoE"],
)
def test_active_weights_are_the_models_own(config: ModelConfig, billions: float) -> None:
    """A model as big as the released one: all its matrices but the embedding, experts as far as chosen."""
    with torch.device("meta"):  # shapes without memory
        model = Transformer(replace(config, num_mtp_layers=0), seed=None)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-3)
    active = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("embedding"):
            share = config.top_k if ".experts." in name else config.num_experts
            active += parameter.numel() * share // config.num_experts
    layers = sum(sum(active_weights(config, layer).values()) for layer in range(config.num_layers))
    assert layers + head_flops(config) // 2 == active


@pytest.mark.parametrize(
    ("config", "length", "gigaflops", "rel"),
    [
        (V2_LITE, 4096, 16.41, 5e-4),
        (V2_LITE, 8192, 18.11, 5e-4),
        # Measured TFLOP/s over tokens/s, per GPU: Megatron-Bridge's DeepSeek-V3 on 1,024 H100,
        (V3, 4096, 338e3 / 1297, 2e-3),
        (V3, 4096, 276e3 / 1061, 3e-3),
        # and NeMo Automodel's, without MTP.
        (replace(V3, num_mtp_layers=0), 4096, 250e3 / 1002, 4e-3),
        (replace(V3, num_mtp_layers=0), 4096, 216e3 / 865, 4e-3),
    ],
)
def test_published_work_per_token(config: ModelConfig, length: int, gigaflops: float, rel: float) -> None:
    assert train_flops_per_token(config, length) / 1e9 == pytest.approx(gigaflops, rel=rel)


def test_parts_stand_in_order() -> None:
    config, length = replace(SMALL_MODEL, num_mtp_layers=2), 16
    embedding, dense, *experts, last = part_costs(config, length)
    assert embedding == config.hidden_size
    assert dense == layer_flops(config, 0, length)
    assert experts == [layer_flops(config, layer, length) for layer in (1, 2)]
    assert dense not in experts
    module = mtp_flops(config, length)
    assert module > experts[0] + head_flops(config)
    assert last == head_flops(config) + 2 * module


def test_a_tenth_of_v2_lite_is_attention() -> None:
    layers = range(V2_LITE.num_layers)
    weights = sum(sum(active_weights(V2_LITE, layer).values()) for layer in layers)
    assert weights + head_flops(V2_LITE) // 2 == pytest.approx(2.451e9, abs=5e5)
    attention = sum(layer_flops(V2_LITE, layer, 4096) for layer in layers) - 2 * weights
    assert 3 * attention / train_flops_per_token(V2_LITE, 4096) == pytest.approx(0.10, abs=5e-3)
