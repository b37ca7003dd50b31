"""Small models that are still the same kind of model, and that every degree still divides."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.cases import sweep
from launch.shrink import changes, shrink
from moe.config import DataConfig, LayoutConfig, ModelConfig, RunConfig, TrainConfig
from moe.rules import validate
from tests.released import OLMOE, QWEN3_MOE, V2_LITE, V3

V2 = replace(V2_LITE, num_experts=160, num_groups=8, top_groups=3, q_lora_rank=1536, num_heads=128)
KEPT = (
    *("num_groups", "top_groups", "score_function", "group_score", "normalize_top_k", "rope", "rms_norm_eps"),
    *("routed_scaling_factor", "tie_embeddings", "num_shared_experts", "num_mtp_layers", "max_context"),
)


def run(model: ModelConfig, layout: LayoutConfig, batch: int = 4096) -> RunConfig:
    data = DataConfig(sequence_length=4096)
    return RunConfig(model=model, layout=layout, data=data, train=TrainConfig(batch_size=batch))


def num_weights(model: ModelConfig) -> int:
    """About as many as there are."""
    experts = (model.num_experts + model.num_shared_experts) * 3 * model.moe_intermediate_size
    return model.hidden_size * (2 * model.vocab_size + model.num_layers * experts)


@pytest.mark.parametrize("model", [V3, V2_LITE, V2], ids=["v3", "v2-lite", "v2"])
@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(),
        LayoutConfig(tp=8, pp=4, dp=2, ep=16, microbatches=32),
        LayoutConfig(tp=2, cp=4, dp=8, ep=32, etp=2, microbatches=2),
        LayoutConfig(tp=4, cp=16, etp=64),
        LayoutConfig(pp=16, dp=32, ep=32, microbatches=64),
    ],
    ids=["one rank", "tp and ep", "cp and etp", "more cp and etp", "pp"],
)
def test_structure_is_kept_and_the_layout_still_fits(model: ModelConfig, layout: LayoutConfig) -> None:
    before = run(model, layout)
    validate(before)
    after = shrink(before, layout)
    validate(after)
    small = after.model
    assert all(getattr(small, name) == getattr(model, name) for name in KEPT)
    assert 0 < small.num_dense_layers < small.num_layers
    assert (small.q_lora_rank is None) == (model.q_lora_rank is None)
    assert 2 * small.top_k <= small.num_experts // small.num_groups * small.top_groups  # it stays a choice
    assert num_weights(small) < 4.5e6
    tokens = after.train.batch_size * after.data.sequence_length
    assert tokens <= 4 * layout.pp * (layout.dp or 1) * max(64, 2 * layout.cp * layout.tp)
    assert layout.pp == 1 or after.layout.microbatches == 2 * layout.pp
    assert after.optim == before.optim and after.balance == before.balance


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_queries_share_heads_of_keys_as_before(tp: int) -> None:
    before = run(QWEN3_MOE, LayoutConfig(tp=tp))
    validate(before)
    after = shrink(before, LayoutConfig(tp=tp))
    validate(after)
    small = after.model
    assert (small.attention, small.qk_norm, small.head_dim) == ("gqa", "head", 16)
    assert (small.num_heads, small.num_kv_heads) == (4, 2 if tp < 4 else 4)
    assert num_weights(small) < 4.5e6
    whole = shrink(run(OLMOE, LayoutConfig()), LayoutConfig()).model
    assert whole.num_kv_heads == whole.num_heads == 4
    assert shrink(run(V3, LayoutConfig()), LayoutConfig()).model.head_dim is None


def test_scores_stay_as_far_apart() -> None:
    """A router's logits are sums over the hidden size of weights that are drawn with this deviation."""
    small = shrink(run(V3, LayoutConfig()), LayoutConfig()).model
    assert small.init_std**2 * small.hidden_size == pytest.approx(V3.init_std**2 * V3.hidden_size)


@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_a_sweep_leaves_no_layout_out_for_being_small(ranks: int) -> None:
    every = LayoutConfig(tp=ranks, pp=ranks, dp=ranks, ep=ranks, etp=ranks, schedule="dualpipev")
    model = replace(V3, num_heads=120, num_experts=240, moe_intermediate_size=1920, vocab_size=122880)
    base = run(model, LayoutConfig(microbatches=4), batch=96)
    base = replace(base, data=DataConfig(sequence_length=6144))
    before, after = (sweep(config, ranks, full=False) for config in (base, shrink(base, every)))
    assert len(after[0]) >= len(before[0]) > 20
    assert after[1] == {}


def test_what_is_small_stays() -> None:
    config = shrink(run(V3, LayoutConfig()), LayoutConfig())
    assert shrink(config, LayoutConfig()) == config
    assert changes(config, config) == ""


def test_a_batch_that_the_layouts_parts_exceed_stays() -> None:
    config = run(V3, LayoutConfig(microbatches=2), batch=6)
    assert shrink(config, LayoutConfig(tp=8, dp=8, pp=8)).train.batch_size == 6


def test_the_vocabulary_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    config = run(V3, LayoutConfig())
    named = replace(config, data=replace(config.data, tokenizer="tokenizer.json"))
    assert shrink(config, LayoutConfig()).model.vocab_size == 4096
    assert shrink(named, LayoutConfig()).model.vocab_size == V3.vocab_size


def test_a_model_of_dense_layers_keeps_to_them() -> None:
    dense = replace(V3, num_layers=12, num_dense_layers=12, num_mtp_layers=0)
    small = shrink(run(dense, LayoutConfig(pp=4)), LayoutConfig(pp=4)).model
    assert small.num_layers == small.num_dense_layers == 4


def test_changes_are_told_by_name() -> None:
    before = RunConfig()
    after = replace(
        before, model=replace(before.model, num_heads=2), train=replace(before.train, batch_size=4)
    )
    assert changes(before, after) == "model.num_heads 4 to 2, train.batch_size 16 to 4"


def test_a_placement_is_of_the_experts_that_are_kept() -> None:
    layout = LayoutConfig(ep=2, placement="p.json")
    small = shrink(run(V2_LITE, layout), layout)
    assert small.layout.placement is None
    assert shrink(small := replace(small, layout=layout), layout).layout.placement == "p.json"
