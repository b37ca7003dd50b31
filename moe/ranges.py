"""The range of every number in the settings, whatever the others are. No torch."""

import functools
import math
from typing import Any

from moe.config import RunConfig
from parallel.errors import UserError

_POSITIVE = (
    *("model.vocab_size", "model.hidden_size", "model.num_layers", "model.num_heads", "model.num_experts"),
    *("model.intermediate_size", "model.moe_intermediate_size", "model.num_groups", "model.capacity_factor"),
    *("model.q_lora_rank", "model.kv_lora_rank", "model.qk_nope_head_dim", "model.qk_rope_head_dim"),
    *("model.v_head_dim", "model.num_kv_heads", "model.head_dim", "model.rms_norm_eps"),
    *("model.rope.factor", "model.rope.original_context"),
    *("model.rope.beta_fast", "model.rope.beta_slow"),
    *("data.sequence_length", "layout.tp", "layout.cp", "layout.pp", "layout.dp", "layout.ep", "layout.etp"),
    *("layout.microbatches", "layout.stages_per_rank", "cluster.gpus_per_node"),
    *("cluster.memory_gb", "cluster.peak_tflops"),
    *("optim.lr", "optim.eps", "train.steps", "train.batch_size", "train.keep_checkpoints"),
    *("telemetry.window", "telemetry.log_every", "launch.threads", "tune.lora_rank", "tune.lora_alpha"),
    *("telemetry.full_steps", "telemetry.thin_steps"),
    *("telemetry.alarms.dead_steps", "telemetry.alarms.max_vio"),
    *("telemetry.alarms.bias", "telemetry.alarms.loss_spike", "telemetry.alarms.fp8_error"),
)
_NOT_NEGATIVE = (
    *("model.num_dense_layers", "model.num_mtp_layers", "model.num_shared_experts", "model.init_std"),
    *("balance.bias_rate", "balance.bias_freeze_step", "balance.bias_clamp", "balance.sequence_aux"),
    *("balance.microbatch_aux", "balance.global_aux", "optim.warmup_steps", "optim.clip_norm"),
    "optim.begin_step",
    *("optim.weight_decay", "train.mtp_weight", "train.save_every", "train.eval_every", "train.keep_every"),
    *("train.eval_sequences", "train.sample_tokens", "train.seed", "telemetry.domains_every"),
    *("telemetry.pairs_every", "telemetry.times_every", "telemetry.routing_every"),
    "train.fp8.guard_every",
)
_SHARE = ("data.max_bad", "optim.min_lr_ratio", "optim.decay_fraction")
_BELOW_ONE = ("data.validation_fraction", "optim.beta1", "optim.beta2", "telemetry.alarms.domain")
_ABOVE_ONE = ("model.rope.theta", "telemetry.alarms.rank_share")
_PORT = ("telemetry.port",)


def validate_ranges(config: RunConfig) -> None:
    """Every number on its own; a null field is left to its meaning."""
    rules = (
        (_POSITIVE, lambda value: value > 0, "be greater than 0", "use a positive number"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "not be negative", "use 0 or more"),
        (_SHARE, lambda value: 0 <= value <= 1, "lie between 0 and 1", "use a share such as 0.1"),
        (_BELOW_ONE, lambda value: 0 <= value < 1, "lie between 0 and 1 (exclusive)", "use less than 1"),
        (_ABOVE_ONE, lambda value: value > 1, "be greater than 1", "use the default or more"),
        (_PORT, lambda value: 0 < value < 65536, "lie between 1 and 65535", "use 9464"),
    )
    for names, holds, rule, remedy in rules:
        for name in names:
            value: Any = functools.reduce(getattr, name.split("."), config)
            if value is not None and not math.isfinite(value):
                raise UserError(f"`{name}` must be finite, but is {value}: {remedy}")
            if value is not None and not holds(value):
                raise UserError(f"`{name}` must {rule}, but is {value}: {remedy}")
