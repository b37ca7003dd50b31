"""The table of names is a bijection on everything that a model holds."""

import dataclasses

import pytest

from moe.config import ModelConfig
from moe.hf import names
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


@pytest.mark.parametrize("q_lora_rank", [None, 4])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_every_tensor_there_and_back(q_lora_rank: int | None, tie_embeddings: bool) -> None:
    config = dataclasses.replace(CONFIG, q_lora_rank=q_lora_rank, tie_embeddings=tie_embeddings)
    seen: set[str] = set()
    for name in complete(config):
        for place, released in enumerate(names.to_hf(name, config.num_layers)):
            assert names.from_hf(released, config.num_layers) == (name, place)
            assert not names.carries_nothing(released, config.num_layers)
            assert released not in seen
            seen.add(released)
    assert ("lm_head.weight" in seen) is not tie_embeddings


def test_released_spelling() -> None:
    assert names.to_hf("layers.7.moe.experts.17.gate_up.weight", 61) == (
        "model.layers.7.mlp.experts.17.gate_proj.weight",
        "model.layers.7.mlp.experts.17.up_proj.weight",
    )
    assert names.to_hf("mtp.0.projection.weight", 61) == ("model.layers.61.eh_proj.weight",)
    assert names.to_hf("mtp.0.block.moe.router.bias", 61) == (
        "model.layers.61.mlp.gate.e_score_correction_bias",
    )


def test_a_name_that_is_no_tensor_of_ours() -> None:
    assert names.from_hf("model.layers.0.self_attn.q_proj.bias", 3) is None
    assert names.from_hf("model.layers.0.eh_proj.weight", 3) is None  # no MTP module, but layer 0
    assert names.from_hf("vision.patch", 3) is None


def test_copies_in_mtp_modules() -> None:
    assert names.mtp_copies("embedding.weight", 3, 2, tied=False) == [
        "model.layers.3.embed_tokens.weight",
        "model.layers.4.embed_tokens.weight",
    ]
    assert names.mtp_copies("head", 3, 1, tied=False) == ["model.layers.3.shared_head.head.weight"]
    assert names.mtp_copies("embedding.weight", 3, 1, tied=True) == [
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight",
    ]
    assert names.mtp_copies("norm.weight", 3, 1, tied=True) == []
    assert names.carries_nothing("model.layers.3.shared_head.head.weight", 3)
    assert not names.carries_nothing("model.layers.3.shared_head.norm.weight", 3)
    assert names.carries_nothing("model.layers.1.self_attn.rotary_emb.inv_freq", 3)
