"""Strict building and the rules between fields: each mistake gets one sentence with a remedy."""

from dataclasses import asdict, replace
from typing import Any, get_args

import pytest

from moe.config import (
    BalanceConfig,
    Component,
    LayoutConfig,
    ModelConfig,
    RopeConfig,
    RunConfig,
    ScheduleName,
    TuneConfig,
)
from moe.rules import build, known_keys, tuning_notes, validate
from parallel.errors import UserError
from parallel.layout import Layout
from parallel.pipeline.schedules import FORMS
from tests.released import MIXTRAL, MOONLIGHT, OLMOE, QWEN3_MOE


def nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as a nested mapping."""
    head, _, tail = key.partition(".")
    return {head: nested(tail, value) if tail else value}


def merged(*settings: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for setting in settings:
        for key, value in setting.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def sentence(settings: dict[str, Any], world_size: int | None = None) -> str:
    """What the user reads."""
    with pytest.raises(UserError) as caught:
        validate(build(RunConfig, merged(*(nested(k, v) for k, v in settings.items()))), world_size)
    return str(caught.value)


def test_defaults_build_and_hold() -> None:
    assert build(RunConfig, {}) == RunConfig()
    assert build(RunConfig, asdict(RunConfig())) == RunConfig()
    assert validate(RunConfig()) == Layout(dp=1, ep=1)


@pytest.mark.parametrize(
    ("key", "value", "built"),
    [
        ("model.hidden_size", 64, 64),
        ("model.q_lora_rank", None, None),
        ("model.q_lora_rank", 8, 8),
        ("model.capacity_factor", 2, 2.0),
        ("model.rope.kind", "yarn", "yarn"),
        ("optim.lr", 1, 1.0),
        ("layout.overlap", False, False),
        ("data.paths", ["a", "b"], ("a", "b")),
        ("data.paths", "a", ("a",)),
        ("data.tokenizer", "t.json", "t.json"),
    ],
)
def test_values_are_converted(key: str, value: Any, built: Any) -> None:
    config: Any = build(RunConfig, nested(key, value))
    for part in key.split("."):
        config = getattr(config, part)
    assert config == built and type(config) is type(built)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.hiden_size", 64, "there is no setting `model.hiden_size`: did you mean `model.hidden_size`?"),
        ("hidden_size", 64, "there is no setting `hidden_size`: did you mean `model.hidden_size`?"),
        ("model.lr", 0.1, "there is no setting `model.lr`: did you mean "),
        ("modle", {}, "there is no setting `modle`: did you mean `model`?"),
        ("model.rope.fator", 2, "there is no setting `model.rope.fator`: did you mean `model.rope.factor`?"),
        ("model", 3, "`model` must be a group of settings, but is 3: set `model.KEY`"),
        ("model.top_k", "4", "`model.top_k` must be an integer, but is '4': write `model.top_k="),
        ("model.top_k", 4.0, "`model.top_k` must be an integer, but is 4.0: "),
        ("model.top_k", True, "`model.top_k` must be an integer, but is True: "),
        ("optim.lr", "fast", "`optim.lr` must be a number, but is 'fast': "),
        ("optim.lr", True, "`optim.lr` must be a number, but is True: "),
        ("layout.overlap", 1, "`layout.overlap` must be true or false, but is 1: "),
        ("data.cache", 1, "`data.cache` must be text, but is 1: "),
        ("data.paths", [1], "`data.paths` must be text, but is 1: "),
        ("model.q_lora_rank", "no", "`model.q_lora_rank` must be an integer, but is 'no': "),
        (
            "model.score_function",
            "sigmoyd",
            "`model.score_function` must be 'softmax' or 'sigmoid', but is 'sigmoyd': did you mean 'sigmoid'",
        ),
        ("optim.schedule", 7, "`optim.schedule` must be 'cosine' or 'wsd' or 'multistep', but is 7: "),
    ],
)
def test_what_cannot_be_built(key: str, value: Any, expected: str) -> None:
    assert sentence({key: value}).startswith(expected)


def test_known_keys_reach_into_groups() -> None:
    keys = set(known_keys(RunConfig))
    assert {"model", "model.rope.kind", "layout.ep", "train.steps"} <= keys


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"layout.ep": 8, "model.num_experts": 60},
            "`layout.ep` must divide `model.num_experts`, but 8 does not divide 60: use 5, 6 or 10",
        ),
        (
            {"layout.dp": 6, "layout.ep": 4},
            "`layout.ep` must divide `layout.tp` x `layout.cp` x `layout.dp` / `layout.etp`, but 4 does not "
            "divide 6: use 2, 3 or 6",
        ),
        (
            {"layout.tp": 8},
            "`layout.tp` must divide `model.num_heads`, but 8 does not divide 4: use 1, 2 or 4",
        ),
        (
            {"layout.tp": 4, "model.vocab_size": 4098},
            "`layout.tp` must divide `model.vocab_size`, but 4 does not divide 4098: use 2, 3 or 6",
        ),
        (
            {"layout.tp": 4, "model.intermediate_size": 770},
            "`layout.tp` must divide `model.intermediate_size`, but 4 does not divide 770: use ",
        ),
        (
            {"layout.tp": 4, "model.moe_intermediate_size": 126},
            "`layout.tp` must divide `model.num_shared_experts` x `model.moe_intermediate_size`, but 4 ",
        ),
        (
            {"layout.etp": 4, "model.moe_intermediate_size": 126},
            "`layout.etp` must divide `model.moe_intermediate_size`, but 4 does not divide 126: use ",
        ),
        (
            {"layout.tp": 4, "data.sequence_length": 130},
            "`data.sequence_length` must be a multiple of `layout.tp`, but 130 is not a multiple of 4: "
            "use 128 or 132",
        ),
        (
            {"layout.cp": 2, "layout.tp": 2, "data.sequence_length": 60},
            "`data.sequence_length` must be a multiple of 2 x `layout.cp` x `layout.tp`, but 60 is not a "
            "multiple of 8: use 56 or 64",
        ),
        (
            {"layout.pp": 6},
            "`layout.pp` must not exceed `model.num_layers` + 1 (the head may stand alone), but 6 > 5: ",
        ),
        (
            {"model.num_groups": 3},
            "`model.num_groups` must divide `model.num_experts`, but 3 does not divide 16: use 1, 2 or 4",
        ),
        (
            {"model.num_groups": 4, "model.top_groups": 5},
            "`model.top_groups` must lie between 1 and `model.num_groups`, but is 5 of 4: use at most 4",
        ),
        (
            {"model.top_groups": 0},
            "`model.top_groups` must lie between 1 and `model.num_groups`, but is 0 of 1",
        ),
        (
            {"model.num_groups": 8, "model.top_groups": 2, "model.top_k": 6},
            "`model.top_k` must lie between 1 and the experts that the group limit leaves, but is 6 of 4: ",
        ),
        ({"model.top_k": 17}, "`model.top_k` must lie between 1 and the experts that the group limit leaves"),
        ({"model.top_k": 0}, "`model.top_k` must lie between 1 and the experts that the group limit leaves"),
        (
            {"model.num_groups": 16, "model.top_groups": 8},
            "`model.group_score=top2_sum` needs two experts in a group, but there are 16 in 16 groups: ",
        ),
        (
            {"model.num_dense_layers": 5},
            "`model.num_dense_layers` must not exceed `model.num_layers`, but 5 > 4: use at most 4",
        ),
        (
            {"tune.method": "lora"},
            "`balance.bias` must be frozen or none where routers are frozen or only some experts trained, or "
            "their choices would drift, but is update: set `balance.bias=frozen`",
        ),
        ({"tune.frozen": ["router"]}, "`balance.bias` must be frozen or none where routers are frozen"),
        (
            {"tune.method": "lora", "tune.lora_targets": ["attention", "router"]},
            "`tune.lora_targets` may name attention, dense, shared, experts, head, but names router: ",
        ),
        (
            {"tune.method": "lora", "tune.lora_targets": ["dense"], "model.num_dense_layers": 0},
            "`tune.lora_targets` must name a component that the model has, but is [dense]: name some of "
            "attention, shared, experts, head",
        ),
        ({"tune.method": "lora", "tune.lora_targets": []}, "`tune.lora_targets` must name a component that"),
        (
            {"tune.method": "lora", "tune.frozen": ["norm"]},
            "`tune.frozen` must be [] with `tune.method=lora`, which freezes by itself, but is [norm]: ",
        ),
        (
            {"tune.frozen": [*get_args(Component)], "balance.bias": "none"},
            "`tune.frozen` must leave something to train, but is [embedding,",
        ),
        (
            {"tune.frozen": ["head"], "model.tie_embeddings": True},
            "`tune.frozen` and `tune.lora_targets` may name head only where it is a weight of its own, but ",
        ),
        (
            {"tune.adapter": "some/where"},
            "`tune.adapter` must be null with `tune.method=full`, but is some/where: set `tune.method=lora`",
        ),
        (
            {"tune.frozen": ["norm", "head"], "optim.engine": "deepspeed"},
            "`tune.frozen` must be [] with `optim.engine=deepspeed`, but is [norm,head]: set ",
        ),
        ({"tune.lora_rank": 0}, "`tune.lora_rank` must be greater than 0, but is 0: "),
        (
            {"model.qk_rope_head_dim": 15},
            "`model.qk_rope_head_dim` must be even (rotated pairs), but is 15: use 16",
        ),
        (
            {"model.num_kv_heads": 2},
            "`model.num_kv_heads` must be null with `model.attention=mla`, which has no such heads, but is 2",
        ),
        ({"model.head_dim": 64}, "`model.head_dim` must be null with `model.attention=mla`"),
        ({"model.qk_norm": "head"}, "`model.qk_norm` must be none with `model.attention=mla`"),
        (
            {"model.attention": "gqa", "model.num_kv_heads": 3},
            "`model.num_kv_heads` must divide `model.num_heads`, but 3 does not divide 4: use 1, 2 or 4",
        ),
        (
            {"model.attention": "gqa", "model.num_heads": 6},
            "`model.num_heads` must divide `model.hidden_size` where `model.head_dim` is null, but 6 does "
            "not divide 256: set `model.head_dim`",
        ),
        (
            {"model.attention": "gqa", "model.head_dim": 15},
            "`model.head_dim` must be even (rotated pairs), but is 15: use 16",
        ),
        (
            {"model.attention": "gqa", "model.num_kv_heads": 2, "layout.tp": 4},
            "`layout.tp` must divide `model.num_kv_heads`, but 4 does not divide 2: use 1 or 2",
        ),
        (
            {"model.attention": "gqa", "model.qk_norm": "full", "layout.tp": 2},
            "`layout.tp` must be 1 with `model.qk_norm=full`, which normalises all heads together, but is 2",
        ),
        (
            {"layout.dp": 4, "layout.microbatches": 3, "train.batch_size": 16},
            "`train.batch_size` must be a multiple of `layout.dp` x `layout.microbatches`, but 16 is not a "
            "multiple of 12: use 12 or 24",
        ),
        (
            {"layout.microbatches": 4, "train.batch_size": 2},
            "`train.batch_size` must be a multiple of `layout.dp` x `layout.microbatches`, but 2 is not a "
            "multiple of 4: use 4",
        ),
        (
            {"data.sequence_length": 32, "model.max_context": 16},
            "`data.sequence_length` must not exceed `model.max_context`, but 32 > 16: ",
        ),
        (
            {"data.validation_fraction": 1.5},
            "`data.validation_fraction` must lie between 0 and 1 (exclusive), but is 1.5: ",
        ),
        (
            {"data.format": "chat", "data.paths": ["chats.jsonl"]},
            "`data.packing` must be whole or bucket with `data.format=chat`, but is stream: set "
            "`data.packing=whole`",
        ),
        (
            {"data.packing": "bucket"},
            "`data.packing` must be stream with `data.format=text`, but is bucket: set `data.packing=stream`",
        ),
        (
            {"data.format": "chat", "data.packing": "whole"},
            "`data.paths` must name sources of `data.format=chat`, but 'python-stdlib' is none: use "
            "'python-stdlib-docstrings' or files of your own",
        ),
        (
            {"data.paths": ["python-stdlib-docstrings"]},
            "`data.paths` must name sources of `data.format=text`, but 'python-stdlib-docstrings' is none: ",
        ),
        ({"data.max_bad": 1.5}, "`data.max_bad` must lie between 0 and 1, but is 1.5: "),
        (
            {"telemetry.full_steps": 20},
            "`telemetry.full_steps` must be at least `telemetry.window`, but 20 < 50: ",
        ),
        ({"telemetry.port": 70000}, "`telemetry.port` must lie between 1 and 65535, but is 70000: "),
        (
            {"telemetry.alarms.rank_share": 0.5},
            "`telemetry.alarms.rank_share` must be greater than 1, but is 0.5: ",
        ),
        ({"train.keep_checkpoints": 0}, "`train.keep_checkpoints` must be greater than 0, but is 0: "),
        *(
            ({key: 0}, f"`{key}` must be greater than 0, but is 0")
            for key in (
                "model.vocab_size",
                "model.hidden_size",
                "model.num_heads",
                "model.num_kv_heads",
                "model.head_dim",
                "model.intermediate_size",
                "model.moe_intermediate_size",
                "data.sequence_length",
                "train.steps",
                "optim.lr",
                "telemetry.window",
            )
        ),
        *(
            ({key: -1}, f"`{key}` must not be negative, but is -1")
            for key in (
                "model.num_mtp_layers",
                "model.num_shared_experts",
                "balance.bias_rate",
                "optim.warmup_steps",
                "train.save_every",
                "telemetry.domains_every",
            )
        ),
    ],
)
def test_rules_between_fields(settings: dict[str, Any], expected: str) -> None:
    assert sentence(settings).startswith(expected)


@pytest.mark.parametrize(
    ("layout", "world_size", "expected"),
    [
        (LayoutConfig(), None, Layout(dp=1, ep=1)),
        (LayoutConfig(), 4, Layout(dp=4, ep=1)),
        (LayoutConfig(ep=4), None, Layout(dp=4, ep=4)),
        (LayoutConfig(ep=2), 4, Layout(dp=4, ep=2)),
        (LayoutConfig(dp=4, ep=2), 4, Layout(dp=4, ep=2)),
        (LayoutConfig(tp=2, pp=2, ep=2), None, Layout(tp=2, pp=2, ep=2)),
        (LayoutConfig(tp=2, ep=8), None, Layout(tp=2, dp=4, ep=8)),
        (LayoutConfig(cp=2, ep=8, etp=2), None, Layout(cp=2, dp=8, ep=8, etp=2)),
        (LayoutConfig(tp=2, pp=2), 8, Layout(tp=2, pp=2, dp=2)),
    ],
)
def test_the_layout_follows_from_what_was_started(
    layout: LayoutConfig, world_size: int | None, expected: Layout
) -> None:
    assert validate(RunConfig(layout=layout), world_size) == expected


def hops(node: int, **layout: int) -> dict[str, Any]:
    degrees = {f"layout.{axis}": degree for axis, degree in layout.items()}
    return {"layout.dispatch": "two_hop", "cluster.gpus_per_node": node, **degrees}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (hops(4, ep=4), "4 ranks do not fill several nodes of 4: use 8"),
        (hops(8), "1 ranks do not fill several nodes of 8: use 16"),
        (hops(3, ep=4), "4 ranks do not fill several nodes of 3: use 6"),
        (hops(4, ep=1, etp=8), "8 does not divide 4: use 1, 2 or 4"),
    ],
)
def test_two_hops_want_several_whole_nodes(settings: dict[str, Any], why: str) -> None:
    said = sentence(settings)
    assert said.startswith("`layout.e") and "`cluster.gpus_per_node`" in said
    assert said.endswith(f"`layout.dispatch=two_hop`, but {why} or `layout.dispatch=direct`")


def test_nodes_count_only_for_two_hops() -> None:
    built = [
        validate(build(RunConfig, merged(*(nested(k, v) for k, v in settings.items()))))
        for settings in (hops(2, ep=4), hops(4, ep=4, etp=2), hops(2, ep=4) | {"layout.dispatch": "direct"})
    ]
    assert [(each.node, each.ep_node, each.ep_rail) for each in built] == [(2, 2, 2), (4, 2, 2), (None, 4, 1)]
    assert list(built[0].across_nodes(2)) == [] and len(list(built[2].across_nodes(2))) == 1


def test_the_layout_must_fit_what_was_started() -> None:
    for settings, world_size in (({"layout.dp": 4}, 2), ({"layout.tp": 2, "layout.cp": 2}, 2)):
        assert sentence(settings, world_size=world_size) == (
            "`layout.tp` x `layout.cp` x `layout.dp` x `layout.pp` must equal the number of ranks, but the "
            "layout needs 4 and 2 were started: start 4 or change one of them"
        )


def test_released_shapes_hold() -> None:
    """DeepSeek-V3's and V2's gates (5.4 of the field's definitions), and the other families."""
    yarn = RopeConfig(kind="yarn", factor=40)
    v3 = ModelConfig(num_experts=256, num_groups=8, top_groups=4, top_k=8, rope=yarn)
    v2 = replace(v3, num_experts=160, top_groups=3, top_k=6, group_score="max", score_function="softmax")
    for model in (v3, v2, replace(v2, num_experts=64, num_groups=1, top_groups=1)):
        validate(RunConfig(model=model))
    for model in (MOONLIGHT, MIXTRAL, QWEN3_MOE, OLMOE):
        validate(RunConfig(model=model))


@pytest.mark.parametrize("key", ["model.num_groups", "model.num_experts", "layout.microbatches", "layout.ep"])
def test_zero_is_a_mistake_of_the_user(key: str) -> None:
    assert sentence({key: 0}).startswith(f"`{key}` must ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.capacity_factor", -1.0),
        ("model.kv_lora_rank", 0),
        ("model.q_lora_rank", 0),
        ("model.v_head_dim", 0),
        ("model.qk_rope_head_dim", -2),
        ("model.rope.factor", 0.0),
        ("balance.bias_clamp", -1.0),
        ("train.mtp_weight", -1.0),
        ("optim.lr", float("nan")),
    ],
)
def test_ranges_of_lesser_fields(key: str, value: Any) -> None:
    assert sentence({key: value}).startswith(f"`{key}` must ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.beta1", 1.0),
        ("optim.beta2", 1.0),
        ("data.validation_fraction", 1.0),
        ("model.rope.original_context", 0),
        ("model.rope.beta_fast", 0.0),
        ("model.rope.theta", 1.0),
    ],
)
def test_open_ends_and_the_rotation(key: str, value: Any) -> None:
    assert sentence({key: value}).startswith(f"`{key}` must ")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "`tune.selection` must name a file"),
        ({"tune.selection": "law.json"}, "`balance.bias` must be frozen or none"),
        (
            {"tune.selection": "law.json", "balance.bias": "none", "optim.engine": "deepspeed"},
            "`tune.method` must be full with `optim.engine=deepspeed`",
        ),
    ],
)
def test_training_some_experts_leaves_the_rest_alone(settings: dict[str, Any], said: str) -> None:
    assert sentence({"tune.method": "esft", **settings}).startswith(said)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_selection_is_for_esft(method: str) -> None:
    settings = {"tune.method": method, "tune.selection": "law.json", "balance.bias": "frozen"}
    assert sentence(settings) == (
        f"`tune.selection` must be null with `tune.method={method}`, but is law.json: set `tune.method=esft`"
    )


def test_an_auxiliary_loss_on_frozen_routers_is_noted() -> None:
    """A selection may train routers, which no rule knows that reads no file."""
    balance = BalanceConfig(bias="frozen", sequence_aux=1e-3)
    lora, esft = (RunConfig(balance=balance, tune=TuneConfig(method=each)) for each in ("lora", "esft"))
    (plain,), (careful,) = tuning_notes(lora), tuning_notes(esft)
    assert plain.startswith("`balance.sequence_aux` cannot move routers that are frozen, only")
    assert "frozen (unless `non_expert_modules` of the selection trains them), only" in careful
    assert not list(tuning_notes(RunConfig(balance=balance)))


def test_every_schedule_that_can_be_set_is_known() -> None:
    """`layout.overlap` says whether 1f1b has pairs; only where there is no such setting has that a name."""
    assert set(get_args(ScheduleName)) == FORMS.keys() - {"1f1b-overlap"}
