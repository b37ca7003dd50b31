"""Every family's table of names is a bijection on everything that a model holds."""

import dataclasses

import pytest

from moe.config import ModelConfig
from moe.hf import names
from moe.hf.families import FAMILIES, family
from moe.hf.inventory import complete

CONFIG = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    num_layers=3,
    num_mtp_layers=2,
    num_experts=4,
    top_k=2,
    intermediate_size=8,
    moe_intermediate_size=4,
    num_heads=1,
)
V3 = dataclasses.replace(CONFIG, num_layers=61)
ONE_MODULE = dataclasses.replace(CONFIG, num_mtp_layers=1)
TIED = dataclasses.replace(ONE_MODULE, tie_embeddings=True)


GROUPED = dataclasses.replace(
    CONFIG,
    attention="gqa",
    num_heads=2,
    num_dense_layers=0,
    num_mtp_layers=0,
    num_shared_experts=0,
    score_function="softmax",
)
MODELS = {
    "deepseek_v2": dataclasses.replace(CONFIG, score_function="softmax"),
    "deepseek_v3": dataclasses.replace(CONFIG, q_lora_rank=4),
    "mixtral": GROUPED,
    "qwen3_moe": dataclasses.replace(GROUPED, qk_norm="head"),
    "olmoe": dataclasses.replace(GROUPED, qk_norm="full"),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_every_tensor_there_and_back(name: str, tie_embeddings: bool) -> None:
    config = dataclasses.replace(MODELS[name], tie_embeddings=tie_embeddings)
    assert family(config) == name
    seen: set[str] = set()
    for ours in complete(config):
        for place, released in enumerate(names.to_hf(ours, config)):
            assert names.from_hf(released, config) == (ours, place)
            assert names.from_hf(f"{released}_scale_inv", config) == (ours, place)
            assert not names.carries_nothing(released, config)
            assert released not in seen
            seen.add(released)
    assert ("lm_head.weight" in seen) is not tie_embeddings


def test_released_spelling() -> None:
    def spelt(ours: str, config: ModelConfig) -> list[str]:
        return [name.removeprefix("model.layers.") for name in names.to_hf(ours, config)]

    v3, mixtral, olmoe = MODELS["deepseek_v3"], MODELS["mixtral"], MODELS["olmoe"]
    experts = "layers.1.moe.experts.17.gate_up.weight"
    assert spelt(experts, v3) == ["1.mlp.experts.17.gate_proj.weight", "1.mlp.experts.17.up_proj.weight"]
    assert spelt(experts, olmoe) == spelt(experts, v3)
    assert spelt(experts, mixtral) == [
        "1.block_sparse_moe.experts.17.w1.weight",
        "1.block_sparse_moe.experts.17.w3.weight",
    ]
    down = "layers.1.moe.experts.17.down.weight"
    assert spelt(down, mixtral) == ["1.block_sparse_moe.experts.17.w2.weight"]
    router = "layers.1.moe.router.projection.weight"
    assert spelt(router, mixtral) == ["1.block_sparse_moe.gate.weight"]
    assert spelt(router, olmoe) == ["1.mlp.gate.weight"]
    assert spelt("layers.1.attention.key_norm.weight", olmoe) == ["1.self_attn.k_norm.weight"]
    assert spelt("mtp.0.projection.weight", v3) == ["3.eh_proj.weight"]
    assert spelt("mtp.0.block.moe.router.bias", v3) == ["3.mlp.gate.e_score_correction_bias"]


def test_a_name_that_is_no_tensor_of_ours() -> None:
    assert names.from_hf("model.layers.0.self_attn.q_proj.bias", CONFIG) is None
    assert names.from_hf("model.layers.0.eh_proj.weight", CONFIG) is None  # no MTP module, but layer 0
    assert names.from_hf("vision.patch", CONFIG) is None
    assert names.from_hf("model.layers.0.mlp.experts.1.up_proj.weight", MODELS["mixtral"]) is None


def test_copies_in_mtp_modules() -> None:
    tied = dataclasses.replace(CONFIG, num_mtp_layers=1, tie_embeddings=True)
    assert names.mtp_copies("embedding.weight", CONFIG) == [
        "model.layers.3.embed_tokens.weight",
        "model.layers.4.embed_tokens.weight",
    ]
    one = dataclasses.replace(CONFIG, num_mtp_layers=1)
    assert names.mtp_copies("head", one) == ["model.layers.3.shared_head.head.weight"]
    assert names.mtp_copies("embedding.weight", tied) == [
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight",
    ]
    assert names.mtp_copies("norm.weight", tied) == []
    assert names.carries_nothing("model.layers.3.shared_head.head.weight", CONFIG)
    assert names.carries_nothing("model.layers.3.shared_head.head.weight_scale_inv", CONFIG)
    assert not names.carries_nothing("model.layers.3.shared_head.norm.weight", CONFIG)
    assert names.carries_nothing("model.layers.1.self_attn.rotary_emb.inv_freq", CONFIG)
