"""The work of a model's parts in FLOPs per token of a forward, a multiply-add being two. No torch.

A product with a weight [O, I] is 2 x O x I per token, so a layer's FLOPs are twice the weights that a token
meets; to these attention adds its scores and its sums of values (arXiv 2001.08361, section 2.1), causal
and so over (S + 1) / 2 keys in the mean over S positions. The backward of a product is two of its size.

This is the model's own work, the numerator of MFU (arXiv 2204.02311, appendix B): without what recomputation
or a layout does again, and without what is no product with a weight or of attention: norms, rotation,
softmax, activations, the mixing of experts' outputs.
"""

from collections import Counter
from collections.abc import Collection

from moe.config import Component, ModelConfig


def active_weights(config: ModelConfig, layer: int) -> dict[Component, int]:
    """How many weights one token is multiplied with in a layer (0-based), by component.

    All choices count, whether a capacity lets them in or not. From `num_layers` on the layers are the
    blocks of MTP modules.
    """
    hidden, expert = config.hidden_size, 3 * config.hidden_size * config.moe_intermediate_size
    if not config.is_moe(layer):
        return {"attention": _attention_weights(config), "dense": 3 * hidden * config.intermediate_size}
    return {
        "attention": _attention_weights(config),
        "router": hidden * config.num_experts,
        "experts": config.top_k * expert,
        "shared": config.num_shared_experts * expert,
    }


def _attention_weights(config: ModelConfig) -> int:
    """Query, keys and values, output; or with a latent between (2405.04434, section 2.1)."""
    hidden, heads, latent = config.hidden_size, config.num_heads, config.kv_lora_rank
    query, rank = heads * config.qk_head_dim, config.q_lora_rank
    if config.attention == "gqa":
        return 2 * hidden * (query + config.kv_heads * config.qk_head_dim)
    return (
        (hidden * query if rank is None else rank * (hidden + query))
        + hidden * (latent + config.qk_rope_head_dim)
        + latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )


def layer_flops(config: ModelConfig, layer: int, sequence_length: int) -> int:
    """A layer's forward, in FLOPs per token of sequences that attend to themselves as a whole."""
    attention = (sequence_length + 1) * config.num_heads * (config.qk_head_dim + config.value_head_dim)
    return 2 * sum(active_weights(config, layer).values()) + attention


def head_flops(config: ModelConfig) -> int:
    """The product with the vocabulary, in FLOPs per token."""
    return 2 * config.hidden_size * config.vocab_size


def mtp_flops(config: ModelConfig, sequence_length: int) -> int:
    """One MTP module's forward, in FLOPs per token (2412.19437, section 2.2).

    It embeds, projects embedding and hidden state to the width of one, runs a block and the head again.
    """
    projection = 2 * 2 * config.hidden_size**2
    block = layer_flops(config, config.num_layers, sequence_length)
    return config.hidden_size + projection + block + head_flops(config)


def part_costs(config: ModelConfig, sequence_length: int) -> tuple[int, ...]:
    """Forward FLOPs per token of what no stage boundary divides, `num_layers` + 2 numbers in order.

    First the embedding, whose copied row counts as one FLOP per element; then every layer; last the head
    with all MTP modules.
    """
    layers = [layer_flops(config, layer, sequence_length) for layer in range(config.num_layers)]
    last = head_flops(config) + config.num_mtp_layers * mtp_flops(config, sequence_length)
    return config.hidden_size, *layers, last


def train_flops_per_token(
    config: ModelConfig, sequence_length: int, frozen: Collection[Component] = ()
) -> int:
    """Forward and backward of the whole model, in FLOPs per token.

    Three forwards, less the products that would be the gradients of `frozen` weights: two FLOPs each.
    """
    heads, modules = 1 + config.num_mtp_layers, config.num_mtp_layers
    tied = "embedding" if config.tie_embeddings else "head"
    weights = Counter({tied: heads * head_flops(config) // 2, "mtp": modules * 2 * config.hidden_size**2})
    for layer in range(config.num_layers + modules):
        weights.update(active_weights(config, layer))
    return 3 * sum(part_costs(config, sequence_length)) - 2 * sum(weights[name] for name in frozen)
