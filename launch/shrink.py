"""A recipe's model at a size that fits a laptop, with its structure kept. No torch.

Kept: dense layers before layers of experts, MTP modules, gates and their groups, shared experts, which
latents exist, whether queries share heads of keys, RoPE, and how far routers' scores lie apart, for
which `init_std` grows as rows shrink.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from moe.config import LayoutConfig, ModelConfig, RunConfig
from moe.selection import released_numbers
from parallel.pipeline.schedules import count_stages


def shrink(config: RunConfig, degrees: LayoutConfig) -> RunConfig:
    """The same run with a smaller model, sequence and batch, which these degrees still divide.

    What is small already stays. The vocabulary is that of `data.tokenizer` where there is one.
    """
    dp = degrees.dp or 1
    model = _shrink_model(config.model, degrees)
    if config.data.tokenizer is None:
        model = replace(model, vocab_size=_small(model.vocab_size, 4096, degrees.tp))
    length = _small(config.data.sequence_length, 64, 2 * degrees.cp * degrees.tp)
    microbatches = min(config.layout.microbatches, 2 * degrees.pp)
    parts, batch = dp * microbatches, config.train.batch_size
    same = released_numbers(model) == released_numbers(config.model)
    same = same and model.num_experts == config.model.num_experts
    placement = config.layout.placement if same else None  # which is of those layers and experts
    return replace(
        config,
        model=model,
        data=replace(config.data, sequence_length=length),
        layout=replace(config.layout, microbatches=microbatches, placement=placement),
        train=replace(config.train, batch_size=parts * min(2, batch // parts) or batch),
    )


def changes(before: RunConfig, after: RunConfig) -> str:
    """What differs, in words: ``model.num_heads 128 to 4, train.batch_size 512 to 8``."""
    pairs = zip(_leaves(asdict(before)), _leaves(asdict(after)), strict=True)
    return ", ".join(f"{name} {was} to {now}" for (name, was), (_, now) in pairs if was != now)


def _shrink_model(model: ModelConfig, degrees: LayoutConfig) -> ModelConfig:
    num_dense = min(model.num_dense_layers, 1)
    num_moe = min(model.num_layers - model.num_dense_layers, 2)
    stages = count_stages(degrees.schedule, degrees.pp, degrees.stages_per_rank)
    num_layers = min(model.num_layers, max(num_dense + num_moe, degrees.pp, stages - 1))
    hidden, num_heads = _small(model.hidden_size, 64, degrees.tp), _small(model.num_heads, 4, degrees.tp)
    num_kv_heads = _small(model.kv_heads, 2, degrees.tp) if model.kv_heads < model.num_heads else num_heads
    top_k = min(model.top_k, 4)
    # In the groups that are kept, twice as many experts as are chosen: it stays a choice.
    per_group = max(2, math.ceil(2 * top_k / model.top_groups))
    experts = max(16, model.num_groups * per_group)
    return replace(
        model,
        hidden_size=hidden,
        num_layers=num_layers,
        num_dense_layers=num_dense if num_moe else num_layers,
        num_mtp_layers=min(model.num_mtp_layers, 2),
        intermediate_size=_small(model.intermediate_size, 96, degrees.tp),
        moe_intermediate_size=_small(model.moe_intermediate_size, 32, math.lcm(degrees.tp, degrees.etp)),
        num_experts=_small(model.num_experts, experts, math.lcm(model.num_groups, degrees.ep)),
        num_shared_experts=min(model.num_shared_experts, 2),
        top_k=top_k,
        num_heads=num_heads,
        num_kv_heads=None if model.num_kv_heads is None else num_kv_heads,
        head_dim=min(model.qk_head_dim, 16) if model.attention == "gqa" else None,
        q_lora_rank=None if model.q_lora_rank is None else min(model.q_lora_rank, 24),
        kv_lora_rank=min(model.kv_lora_rank, 16),
        qk_nope_head_dim=min(model.qk_nope_head_dim, 16),
        qk_rope_head_dim=min(model.qk_rope_head_dim, 8),
        v_head_dim=min(model.v_head_dim, 12),
        init_std=model.init_std * math.sqrt(model.hidden_size / hidden),
    )


def _small(own: int, target: int, multiple: int) -> int:
    """The least multiple that reaches a target, unless the recipe's own number is less."""
    return min(own, math.ceil(target / multiple) * multiple)


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
