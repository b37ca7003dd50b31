"""One two-way table between our canonical tensor names and those of the released DeepSeek files. No torch.

Ours fuse the gate and up rows of a SwiGLU, gate first; the files hold two tensors. The files number an
MTP module as one more layer and repeat the embedding and the head in it; those copies carry nothing.
"""

import re

_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head": "lm_head.weight",
}
_BLOCK = {  # # stands for an expert's number
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.query.weight": ("self_attn.q_proj.weight",),
    "attention.query.down.weight": ("self_attn.q_a_proj.weight",),
    "attention.query.norm.weight": ("self_attn.q_a_layernorm.weight",),
    "attention.query.up.weight": ("self_attn.q_b_proj.weight",),
    "attention.kv_down.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attention.kv_norm.weight": ("self_attn.kv_a_layernorm.weight",),
    "attention.kv_up.weight": ("self_attn.kv_b_proj.weight",),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
    "moe.router.projection.weight": ("mlp.gate.weight",),
    "moe.router.bias": ("mlp.gate.e_score_correction_bias",),
    "moe.shared.gate_up.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "moe.shared.down.weight": ("mlp.shared_experts.down_proj.weight",),
    "moe.experts.#.gate_up.weight": ("mlp.experts.#.gate_proj.weight", "mlp.experts.#.up_proj.weight"),
    "moe.experts.#.down.weight": ("mlp.experts.#.down_proj.weight",),
}
_MTP = {
    "embedding_norm.weight": ("enorm.weight",),
    "hidden_norm.weight": ("hnorm.weight",),
    "projection.weight": ("eh_proj.weight",),
    "norm.weight": ("shared_head.norm.weight",),
    **{f"block.{ours}": theirs for ours, theirs in _BLOCK.items()},
}
_MTP_COPIES = {"embedding.weight": "embed_tokens.weight", "head": "shared_head.head.weight"}

_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_BLOCK_BACK = {part: (ours, place) for ours, theirs in _BLOCK.items() for place, part in enumerate(theirs)}
_MTP_BACK = {part: (ours, place) for ours, theirs in _MTP.items() for place, part in enumerate(theirs)}

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def to_hf(name: str, num_layers: int) -> tuple[str, ...]:
    """The tensors of a released file that, stacked by rows in this order, are ours of this name."""
    if name in _TOP:
        return (_TOP[name],)
    kind, number, inside = name.split(".", 2)
    assert kind in ("layers", "mtp"), f"{name} is no canonical name"
    table, layer = (_BLOCK, int(number)) if kind == "layers" else (_MTP, int(number) + num_layers)
    pattern, expert = _without_expert(inside)
    return tuple(f"model.layers.{layer}.{part.replace('#', expert)}" for part in table[pattern])


def from_hf(name: str, num_layers: int) -> tuple[str, int] | None:
    """Our name of a released tensor and its place among the parts of ours; None where there is none."""
    if name in _TOP_BACK:
        return _TOP_BACK[name], 0
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, (pattern, expert) = int(match[1]), _without_expert(match[2])
    is_mtp = layer >= num_layers
    found = (_MTP_BACK if is_mtp else _BLOCK_BACK).get(pattern)
    if found is None:
        return None
    head = f"mtp.{layer - num_layers}" if is_mtp else f"layers.{layer}"
    return f"{head}.{found[0].replace('#', expert)}", found[1]


def mtp_copies(name: str, num_layers: int, num_mtp_layers: int, tied: bool) -> list[str]:
    """Under which further names the files repeat our tensor in their MTP modules."""
    sources = (
        {"embedding.weight": [*_MTP_COPIES.values()]} if tied else {k: [v] for k, v in _MTP_COPIES.items()}
    )
    return [
        f"model.layers.{num_layers + module}.{tail}"
        for module in range(num_mtp_layers)
        for tail in sources.get(name, [])
    ]


def carries_nothing(name: str, num_layers: int) -> bool:
    """Whether a released tensor is a copy of another or computed from the configuration."""
    match = _LAYER.fullmatch(name)
    is_copy = match is not None and int(match[1]) >= num_layers and match[2] in _MTP_COPIES.values()
    return is_copy or name.endswith("rotary_emb.inv_freq")


def _without_expert(name: str) -> tuple[str, str]:
    """A name with # for its expert's number, and the number, if it has one."""
    match = _EXPERT.search(name)
    return (_EXPERT.sub("#", name), match[0]) if match else (name, "")
