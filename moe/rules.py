"""From a plain mapping to a checked `RunConfig`: strict building, then the rules across fields. No torch."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from moe.components import ADAPTABLE, components
from moe.config import DataConfig, ModelConfig, RunConfig
from moe.data.sources import DOCSTRINGS, STANDARD_LIBRARY
from moe.ranges import validate_ranges
from parallel.errors import UserError
from parallel.layout import Layout, alternatives, length_multiple
from parallel.pipeline.schedules import FORMS, count_stages, require_numbers

Config = TypeVar("Config")


def build(cls: type[Config], values: Mapping[str, Any], path: str = "") -> Config:
    """A frozen config from a mapping; an unknown key or a wrong type is a `UserError`."""
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise unknown_key(f"{path}{key}", known_keys(cls, path))
    return cls(**{key: _convert(hints[key], value, f"{path}{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"`{path}` must be a group of settings, but is {value!r}: set `{path}.KEY`")
        return build(typing.cast(type, hint), value, f"{path}.")
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(h for h in get_args(hint) if h is not type(None)), value, path)
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        choices = " or ".join(repr(c) for c in get_args(hint))
        raise UserError(f"`{path}` must be {choices}, but is {value!r}{_nearest(value, get_args(hint))}")
    if get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(get_args(hint)[0], item, path) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[hint]
    raise UserError(f"`{path}` must be {name}, but is {value!r}: write `{path}={_example(hint)}`")


def _example(hint: type) -> str:
    return {int: "8", float: "0.001", bool: "true", str: "name"}[hint]


def _nearest(word: object, choices: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ": choose one of these"


def known_keys(cls: type, path: str = "") -> Iterator[str]:
    """Every dotted key of a config, groups included."""
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{path}{name}"
        if dataclasses.is_dataclass(hint):
            yield from known_keys(typing.cast(type, hint), f"{path}{name}.")


def unknown_key(key: str, known: typing.Iterable[str]) -> UserError:
    """The error for a key that does not exist, with the nearest one that does."""
    choices = list(known)
    near = difflib.get_close_matches(key, choices, n=1, cutoff=0.0)
    same_leaf = [c for c in choices if c.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return UserError(f"there is no setting `{key}`: did you mean `{(same_leaf or near)[0]}`?")


def validate(config: RunConfig, world_size: int | None = None) -> Layout:
    """Check the rules between fields and return the layout. `world_size`: ranks that were started."""
    validate_ranges(config)
    _validate_model(config.model)
    _validate_data(config.data)
    layout = _layout(config, world_size)
    model, batch = config.model, config.train.batch_size
    _validate_cuts(config, layout)
    _validate_schedule(config, layout)
    _validate_engine(config, layout)
    _validate_fp8(config)
    _validate_tuning(config)
    parts = layout.dp * config.layout.microbatches
    if batch % parts:
        near = sorted({max(parts, batch // parts * parts), (batch // parts + 1) * parts})
        raise UserError(
            f"`train.batch_size` must be a multiple of `layout.dp` x `layout.microbatches`, but {batch} "
            f"is not a multiple of {parts}: use {' or '.join(str(size) for size in near)}"
        )
    if config.optim.begin_step >= config.train.steps:
        raise UserError(
            f"`optim.begin_step` must lie before `train.steps`, but {config.optim.begin_step} >= "
            f"{config.train.steps}: raise `train.steps` by the steps that are to come"
        )
    if config.data.sequence_length > model.max_context:
        raise UserError(
            f"`data.sequence_length` must not exceed `model.max_context`, but {config.data.sequence_length} "
            f"> {model.max_context}: shorten the sequences or raise the context"
        )
    if config.telemetry.full_steps < config.telemetry.window:
        raise UserError(
            "`telemetry.full_steps` must be at least `telemetry.window`, but "
            f"{config.telemetry.full_steps} < {config.telemetry.window}: raise it or shorten the window"
        )
    return layout


def _layout(config: RunConfig, world_size: int | None) -> Layout:
    wanted = config.layout
    attention, experts = wanted.tp * wanted.cp, wanted.ep * wanted.etp
    dp = wanted.dp
    if dp is None and world_size is not None:
        dp = max(1, world_size // (attention * wanted.pp))
    elif dp is None:  # the fewest ranks that hold all experts
        dp = experts // math.gcd(experts, attention)
    layout = Layout(
        tp=wanted.tp,
        cp=wanted.cp,
        dp=dp,
        pp=wanted.pp,
        ep=wanted.ep,
        etp=wanted.etp,
        both_ways=FORMS[wanted.schedule].both_ways,
        node=_node(config),
    )
    if world_size is not None and world_size != layout.world_size:
        raise UserError(
            "`layout.tp` x `layout.cp` x `layout.dp` x `layout.pp` must equal the number of ranks, but the "
            f"layout needs {layout.world_size} and {world_size} were started: start {layout.world_size} or "
            "change one of them"
        )
    return layout


def _node(config: RunConfig) -> int | None:
    """Ranks of a node, where rows make two hops over the nodes of an expert group."""
    wanted, node = config.layout, config.cluster.gpus_per_node
    if wanted.dispatch == "direct":
        return None
    ranks = wanted.ep * wanted.etp
    if ranks <= node or ranks % node:
        raise UserError(
            "`layout.ep` x `layout.etp` must be twice `cluster.gpus_per_node`, or another multiple, with "
            f"`layout.dispatch=two_hop`, but {ranks} ranks do not fill several nodes of {node}: use "
            f"{2 * node} or `layout.dispatch=direct`"
        )
    if node % wanted.etp:
        raise UserError(
            "`layout.etp` must divide `cluster.gpus_per_node` with `layout.dispatch=two_hop`, but "
            f"{wanted.etp} does not divide {node}: use {alternatives(node, wanted.etp)} or "
            "`layout.dispatch=direct`"
        )
    return node


def _validate_cuts(config: RunConfig, layout: Layout) -> None:
    """What a layout cuts must divide evenly."""
    model = config.model
    shared = model.num_shared_experts * model.moe_intermediate_size
    cuts = (
        ("ep", "model.num_experts", model.num_experts),
        ("etp", "model.moe_intermediate_size", model.moe_intermediate_size),
        ("tp", "model.num_heads", model.num_heads),
        ("tp", "model.num_kv_heads", model.kv_heads),
        ("tp", "model.vocab_size", model.vocab_size),
        ("tp", "model.intermediate_size", model.intermediate_size),
        ("tp", "model.num_shared_experts` x `model.moe_intermediate_size", shared),
    )
    for axis, field, number in cuts:
        degree = getattr(layout, axis)
        if number % degree:  # 0 is divided by anything: no shared experts
            raise UserError(
                f"`layout.{axis}` must divide `{field}`, but {degree} does not divide {number}: "
                f"use {alternatives(number, degree)}"
            )
    if layout.tp > 1 and model.qk_norm == "full":
        raise UserError(
            "`layout.tp` must be 1 with `model.qk_norm=full`, which normalises all heads together, but is "
            f"{layout.tp}: cut something else, or train with `model.qk_norm=head`"
        )
    length, multiple = config.data.sequence_length, length_multiple(layout.cp, layout.tp)
    if length % multiple:
        rule = "`layout.tp`" if layout.cp == 1 else "2 x `layout.cp` x `layout.tp`"
        near = sorted({max(multiple, length // multiple * multiple), (length // multiple + 1) * multiple})
        raise UserError(
            f"`data.sequence_length` must be a multiple of {rule}, but {length} is not a multiple of "
            f"{multiple}: use {' or '.join(str(each) for each in near)}"
        )


def _validate_schedule(config: RunConfig, layout: Layout) -> None:
    """What a schedule asks of ranks, microbatches and layers."""
    wanted, model = config.layout, config.model
    require_numbers(wanted.schedule, layout.pp, wanted.microbatches, wanted.stages_per_rank)
    stages = count_stages(wanted.schedule, layout.pp, wanted.stages_per_rank)
    most = model.num_layers + 1
    if stages > most:
        each = stages // layout.pp
        rule = "`layout.pp`" if each == 1 else f"`layout.pp` x {each} stages of `{wanted.schedule}`"
        raise UserError(
            f"{rule} must not exceed `model.num_layers` + 1 (the head may stand alone), but "
            f"{stages} > {most}: use at most {most // each} ranks"
        )


def _validate_engine(config: RunConfig, layout: Layout) -> None:
    """What only one of the engines can do."""
    optim = config.optim
    rules = (
        ("switchyard", "optim.zero_stage", optim.zero_stage, 1),
        ("switchyard", "optim.offload", optim.offload, False),
        ("deepspeed", "layout.pp", layout.pp, 1),
        ("deepspeed", "layout.schedule", config.layout.schedule, "1f1b"),
        ("deepspeed", "optim.moments", optim.moments, "fp32"),
        ("deepspeed", "optim.fused", optim.fused, "torch"),
        ("deepspeed", "optim.clip", optim.clip, "model"),
        ("deepspeed", "tune.method", config.tune.method, "full"),
        ("deepspeed", "tune.frozen", _listed(config.tune.frozen), "[]"),
    )
    for engine, field, value, only in rules:
        if optim.engine == engine and value != only:
            shown, other = str(only).lower(), "deepspeed" if engine == "switchyard" else "switchyard"
            raise UserError(
                f"`{field}` must be {shown} with `optim.engine={engine}`, but is {str(value).lower()}: "
                f"set `{field}={shown}` or `optim.engine={other}`"
            )


def _validate_fp8(config: RunConfig) -> None:
    """Who computes in FP8. Frozen weights do too, below adapters and beside chosen experts."""
    train = config.train
    if train.precision == "fp8" and config.optim.engine == "deepspeed":
        raise UserError(
            "`train.precision` must be fp32 or bf16 with `optim.engine=deepspeed`, but is fp8: set "
            "`train.precision=bf16` or `optim.engine=switchyard`"
        )
    if train.fp8.dispatch and train.precision != "fp8":
        raise UserError(
            f"`train.fp8.dispatch` must be false with `train.precision={train.precision}`, but is true: set "
            "`train.precision=fp8` or `train.fp8.dispatch=false`"
        )


def _validate_tuning(config: RunConfig) -> None:
    """What is trained must exist, and what is frozen must not drift."""
    tune, present = config.tune, components(config.model)
    targets = tune.lora_targets
    if tune.method == "lora":
        if wrong := [name for name in targets if name not in ADAPTABLE]:
            raise UserError(
                f"`tune.lora_targets` may name {', '.join(ADAPTABLE)}, but names {wrong[0]}: leave it out"
            )
        if not present.intersection(targets):
            raise UserError(
                "`tune.lora_targets` must name a component that the model has, but is "
                f"{_listed(targets)}: name some of {', '.join(c for c in ADAPTABLE if c in present)}"
            )
    if tune.method == "esft" and tune.selection is None:
        raise UserError(
            "`tune.selection` must name a file of chosen experts with `tune.method=esft`, but is null: make "
            "one with `switchyard select-experts`"
        )
    if tune.frozen and tune.method != "full":
        raise UserError(
            f"`tune.frozen` must be [] with `tune.method={tune.method}`, which freezes by itself, but is "
            f"{_listed(tune.frozen)}: set `tune.frozen=[]` or `tune.method=full`"
        )
    if not present.difference(tune.frozen):
        raise UserError(
            f"`tune.frozen` must leave something to train, but is {_listed(tune.frozen)}: leave one out"
        )
    if config.model.tie_embeddings and "head" in (*tune.frozen, *(targets if tune.method == "lora" else ())):
        raise UserError(
            "`tune.frozen` and `tune.lora_targets` may name head only where it is a weight of its own, but "
            "`model.tie_embeddings` is true: leave head out"
        )
    for field, value, method in (("adapter", tune.adapter, "lora"), ("selection", tune.selection, "esft")):
        if value is not None and tune.method != method:
            raise UserError(
                f"`tune.{field}` must be null with `tune.method={tune.method}`, but is {value}: "
                f"set `tune.method={method}`"
            )
    if _choices_must_stay(config) and config.balance.bias == "update":
        raise UserError(
            "`balance.bias` must be frozen or none where routers are frozen or only some experts trained, or "
            "their choices would drift, but is update: set `balance.bias=frozen`"
        )


def _choices_must_stay(config: RunConfig) -> bool:
    """Whether routers are frozen, or at least experts that no longer fit what would be chosen instead."""
    return config.tune.method != "full" or "router" in config.tune.frozen


def tuning_notes(config: RunConfig) -> Iterator[str]:
    """A sentence for each setting that is allowed, but may not do what its user wants of what is trained."""
    frozen = "routers that are frozen"
    if config.tune.method == "esft":  # its file is not read here
        frozen += " (unless `non_expert_modules` of the selection trains them)"
    for field in ("sequence_aux", "microbatch_aux", "global_aux"):
        if _choices_must_stay(config) and getattr(config.balance, field):
            yield (
                f"`balance.{field}` cannot move {frozen}, only the hidden states before them: "
                f"set `balance.{field}=0` unless that is what you want"
            )


def _listed(names: tuple[str, ...]) -> str:
    return f"[{','.join(names)}]"


def _validate_data(data: DataConfig) -> None:
    """What a format asks of packing and paths."""
    allowed = {"text": ("stream",), "chat": ("whole", "bucket")}[data.format]
    if data.packing not in allowed:
        raise UserError(
            f"`data.packing` must be {' or '.join(allowed)} with `data.format={data.format}`, but is "
            f"{data.packing}: set `data.packing={allowed[0]}`"
        )
    wrong, right = (STANDARD_LIBRARY, DOCSTRINGS) if data.format == "chat" else (DOCSTRINGS, STANDARD_LIBRARY)
    if wrong in data.paths:
        raise UserError(
            f"`data.paths` must name sources of `data.format={data.format}`, but {wrong!r} is none: "
            f"use {right!r} or files of your own"
        )


def _validate_model(model: ModelConfig) -> None:
    if model.num_experts % model.num_groups:
        raise UserError(
            f"`model.num_groups` must divide `model.num_experts`, but {model.num_groups} does not divide "
            f"{model.num_experts}: use {alternatives(model.num_experts, model.num_groups)}"
        )
    if not 1 <= model.top_groups <= model.num_groups:
        raise UserError(
            f"`model.top_groups` must lie between 1 and `model.num_groups`, but is {model.top_groups} of "
            f"{model.num_groups}: use at most {model.num_groups}"
        )
    selectable = model.num_experts // model.num_groups * model.top_groups
    if not 1 <= model.top_k <= selectable:
        raise UserError(
            "`model.top_k` must lie between 1 and the experts that the group limit leaves, but is "
            f"{model.top_k} of {selectable}: use at most {selectable} or raise `model.top_groups`"
        )
    if model.group_score == "top2_sum" and model.num_groups > 1 and model.num_experts < 2 * model.num_groups:
        raise UserError(
            "`model.group_score=top2_sum` needs two experts in a group, but there are "
            f"{model.num_experts} in {model.num_groups} groups: use `model.group_score=max` or fewer groups"
        )
    if model.num_dense_layers > model.num_layers:
        raise UserError(
            f"`model.num_dense_layers` must not exceed `model.num_layers`, but {model.num_dense_layers} > "
            f"{model.num_layers}: use at most {model.num_layers}"
        )
    _validate_attention(model)


def _validate_attention(model: ModelConfig) -> None:
    only_gqa = (("num_kv_heads", None), ("head_dim", None), ("qk_norm", "none"))
    for name, default in only_gqa:
        value = getattr(model, name)
        if model.attention == "mla" and value != default:
            shown = "null" if default is None else default
            raise UserError(
                f"`model.{name}` must be {shown} with `model.attention=mla`, which has no such heads, but is "
                f"{value}: leave it out or set `model.attention=gqa`"
            )
    if model.num_heads % model.kv_heads:
        raise UserError(
            f"`model.num_kv_heads` must divide `model.num_heads`, but {model.kv_heads} does not divide "
            f"{model.num_heads}: use {alternatives(model.num_heads, model.kv_heads)}"
        )
    if model.attention == "gqa" and model.head_dim is None and model.hidden_size % model.num_heads:
        raise UserError(
            "`model.num_heads` must divide `model.hidden_size` where `model.head_dim` is null, but "
            f"{model.num_heads} does not divide {model.hidden_size}: set `model.head_dim`"
        )
    name, turned = "head_dim" if model.attention == "gqa" else "qk_rope_head_dim", model.rotated_dims
    if turned % 2:
        raise UserError(f"`model.{name}` must be even (rotated pairs), but is {turned}: use {turned + 1}")
    if model.rope.kind == "ntk" and turned < 4:
        raise UserError(
            f"`model.{name}` must be at least 4 with `model.rope.kind=ntk`, but is "
            f"{turned}: use 4 or more, or plain RoPE"
        )
