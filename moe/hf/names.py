"""A two-way table for each family between our canonical tensor names and those of its files. No torch.

Ours fuse the gate and up rows of a SwiGLU, gate first; the files hold two tensors. DeepSeek's files number
an MTP module as one more layer and repeat the embedding and the head in it; those copies carry nothing.
Block-scaled fp8 weights have their scales beside them, under the weight's name and a suffix.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from moe.config import ModelConfig
from moe.hf.families import FAMILIES, family

SCALES = "_scale_inv"  # what follows a weight's name in that of its scales

_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head": "lm_head.weight",
}
_ATTENTION = {
    "query.weight": "q_proj.weight",
    "query.down.weight": "q_a_proj.weight",
    "query.norm.weight": "q_a_layernorm.weight",
    "query.up.weight": "q_b_proj.weight",
    "kv_down.weight": "kv_a_proj_with_mqa.weight",
    "kv_norm.weight": "kv_a_layernorm.weight",
    "kv_up.weight": "kv_b_proj.weight",
    "key.weight": "k_proj.weight",
    "value.weight": "v_proj.weight",
    "query_norm.weight": "q_norm.weight",
    "key_norm.weight": "k_norm.weight",
    "out.weight": "o_proj.weight",
}
_MTP = {
    "embedding_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "projection.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
_MTP_COPIES = {"embedding.weight": "embed_tokens.weight", "head": "shared_head.head.weight"}


class _Table(NamedTuple):
    """What is inside a layer and inside an MTP module; # stands for an expert's number."""

    block: Mapping[str, tuple[str, ...]]
    mtp: Mapping[str, tuple[str, ...]]
    block_back: Mapping[str, tuple[str, int]]
    mtp_back: Mapping[str, tuple[str, int]]


def _table(
    experts: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> _Table:
    """The names of a family that keeps its experts under `experts`, with these names for the parts of one."""
    block: dict[str, tuple[str, ...]] = {
        "attention_norm.weight": ("input_layernorm.weight",),
        "mlp_norm.weight": ("post_attention_layernorm.weight",),
        "moe.router.projection.weight": (f"{experts}.gate.weight",),
        "moe.router.bias": (f"{experts}.gate.e_score_correction_bias",),
    }
    block |= {f"attention.{ours}": (f"self_attn.{theirs}",) for ours, theirs in _ATTENTION.items()}
    dense = ("gate_proj", "up_proj", "down_proj")
    for ours, theirs, parts in (
        ("mlp", "mlp", dense),
        ("moe.shared", f"{experts}.shared_experts", dense),
        ("moe.experts.#", f"{experts}.experts.#", (gate, up, down)),
    ):
        block[f"{ours}.gate_up.weight"] = tuple(f"{theirs}.{part}.weight" for part in parts[:2])
        block[f"{ours}.down.weight"] = (f"{theirs}.{parts[2]}.weight",)
    mtp: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _MTP.items()}
    mtp |= {f"block.{ours}": theirs for ours, theirs in block.items()}
    return _Table(block, mtp, _backwards(block), _backwards(mtp))


def _backwards(table: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, int]]:
    """Released name: ours, and its place among the parts of ours."""
    return {part: (ours, place) for ours, theirs in table.items() for place, part in enumerate(theirs)}


_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_USUAL = _table()
_TABLES = {name: _USUAL for name in FAMILIES} | {"mixtral": _table("block_sparse_moe", "w1", "w3", "w2")}

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def to_hf(name: str, config: ModelConfig) -> tuple[str, ...]:
    """The tensors of a released file that, stacked by rows in this order, are ours of this name."""
    if name in _TOP:
        return (_TOP[name],)
    kind, number, inside = name.split(".", 2)
    assert kind in ("layers", "mtp"), f"{name} is no canonical name"
    table, is_mtp = _TABLES[family(config)], kind == "mtp"
    layer = int(number) + config.num_layers * is_mtp
    pattern, expert = _without_expert(inside)
    parts = (table.mtp if is_mtp else table.block)[pattern]
    return tuple(f"model.layers.{layer}.{part.replace('#', expert)}" for part in parts)


def from_hf(name: str, config: ModelConfig) -> tuple[str, int] | None:
    """Our name of a released tensor and its place among the parts of ours; None where there is none.

    The scales of a weight are read with it: they have its name of ours.
    """
    name = name.removesuffix(SCALES)
    if name in _TOP_BACK:
        return _TOP_BACK[name], 0
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, (pattern, expert) = int(match[1]), _without_expert(match[2])
    table, is_mtp = _TABLES[family(config)], layer >= config.num_layers
    found = (table.mtp_back if is_mtp else table.block_back).get(pattern)
    if found is None:
        return None
    head = f"mtp.{layer - config.num_layers}" if is_mtp else f"layers.{layer}"
    return f"{head}.{found[0].replace('#', expert)}", found[1]


def mtp_copies(name: str, config: ModelConfig) -> list[str]:
    """Under which further names the files repeat our tensor in their MTP modules."""
    sources = {ours: [theirs] for ours, theirs in _MTP_COPIES.items()}
    if config.tie_embeddings:
        sources = {"embedding.weight": [*_MTP_COPIES.values()]}
    return [
        f"model.layers.{config.num_layers + module}.{tail}"
        for module in range(config.num_mtp_layers)
        for tail in sources.get(name, [])
    ]


def carries_nothing(name: str, config: ModelConfig) -> bool:
    """Whether a released tensor is a copy of another or computed from the configuration."""
    match = _LAYER.fullmatch(name.removesuffix(SCALES))
    is_copy = match is not None and int(match[1]) >= config.num_layers and match[2] in _MTP_COPIES.values()
    return is_copy or name.endswith("rotary_emb.inv_freq")


def _without_expert(name: str) -> tuple[str, str]:
    """A name with # for its expert's number, and the number, if it has one."""
    match = _EXPERT.search(name)
    return (_EXPERT.sub("#", name), match[0]) if match else (name, "")
