"""Learning-rate schedules at their corners, and AdamW on owned shards against torch's on whole tensors."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.config import OptimConfig
from moe.train import optim
from moe.train.adam import Adam, fused_adam
from moe.train.optim import Optimizer, learning_rate
from parallel.errors import UserError
from parallel.zero import ParameterSet, Zero
from tests.parallel.replicas import (
    SPECS,
    Flat,
    add_gradients,
    assembled,
    assert_equal,
    build,
    canonical,
    gradient,
    owned,
    start,
    travelling,
)
from tests.ranks import run_ranks

RATE = 0.01
CONFIG = OptimConfig(weight_decay=0.5)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.1),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.55),
        ("cosine", 100, 0.1),
        ("wsd", 0, 0.1),
        ("wsd", 79, 1.0),
        ("wsd", 90, 0.55),
        ("wsd", 100, 0.1),
        ("multistep", 9, 1.0),
        ("multistep", 79, 1.0),
        ("multistep", 80, 0.316),
        ("multistep", 90, 0.316**2),
    ],
)
def test_learning_rate(schedule: str, step: int, expected: float) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1, schedule=schedule, decay_fraction=0.2)  # type: ignore[arg-type]
    assert learning_rate(config, step, 100) == pytest.approx(expected)
    if schedule == "wsd":  # at its ends and in the middle a cosine is where the line is
        assert learning_rate(replace(config, decay="cosine"), step, 100) == pytest.approx(expected)
        quarter = learning_rate(replace(config, decay="cosine"), 85, 100)
        assert quarter == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * 0.5**0.5))
    later = replace(config, begin_step=40)  # the same schedule after a run of 40 steps
    assert learning_rate(later, step + 40, 140) == pytest.approx(expected)


def train(
    rank: int,
    world_size: int,
    config: OptimConfig,
    dtype: torch.dtype,
    steps: range,
    saved: dict[str, Tensor],
) -> list[Flat]:
    """What this rank owns after some steps, which go on from the saved state where there is one."""
    parameters, zero = build(rank, world_size, dtype)
    optimizer = Optimizer(zero.segments(), config)
    held = [*optimizer.state(), *owned(zero, "weight")]
    if saved:
        for piece in held:
            piece.tensor.copy_(saved[piece.name][piece.place])
        optimizer.set_steps(steps.start)
    for step in steps:
        zero.clear()
        add_gradients(parameters, rank, world_size, step)
        zero.finish_reduce()
        optimizer.step(RATE)
        zero.start_gather()
    zero.arrive_all()
    return travelling(held)


def reference(steps: int, moments: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same of torch's AdamW on whole fp32 tensors: matrices decay, gains do not."""
    dtypes = {name: torch.float32 if name == "wide.gain" else dtype for name in SPECS}
    whole = {name: nn.Parameter(start(name).to(dtypes[name]).float()) for name in SPECS}
    matrices = [parameter for parameter in whole.values() if parameter.dim() > 1]
    groups = [
        {"params": matrices, "weight_decay": CONFIG.weight_decay},
        {"params": [whole["wide.gain"]], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(steps):
        for name, parameter in whole.items():
            parameter.grad = gradient(name, step)
        adam.step()
        for state in adam.state.values():
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = state[kind].to(optim.DTYPES[moments]).float()
    result = canonical("weight", {name: whole[name].detach().to(dtypes[name]) for name in SPECS})
    for kind in ("exp_avg", "exp_avg_sq"):
        kept = {name: adam.state[whole[name]][kind].to(optim.DTYPES[moments]) for name in SPECS}
        result |= canonical(kind, kept)
    narrow = {name: whole[name].detach() for name in SPECS if dtypes[name] != torch.float32}
    return result | canonical("master", narrow)


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], moments: str) -> None:
    """Torch's kernel rounds the last few elements of a tensor otherwise, and shards end elsewhere."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        one_place = 2.0**-7 if tensor.dtype == torch.bfloat16 else 1e-6
        slack = 1e-6 if moments == "fp32" else 1e-4  # where a moment was rounded up instead of down
        torch.testing.assert_close(found[name], tensor, rtol=one_place, atol=slack, msg=name)


@pytest.mark.parametrize(("moments", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_alone_it_is_torch_adamw_to_the_bit(moments: str, dtype: torch.dtype) -> None:
    config = replace(CONFIG, moments=moments)  # type: ignore[arg-type]
    assert_equal(assembled([train(0, 1, config, dtype, range(3), {})]), reference(3, moments, dtype))


@pytest.mark.parametrize(
    ("world_size", "moments", "dtype"),
    [
        (2, "fp32", torch.float32),
        (4, "fp32", torch.float32),
        (4, "bf16", torch.float32),
        (4, "fp32", torch.bfloat16),
        (2, "bf16", torch.bfloat16),
    ],
)
def test_shards_move_as_torch_adamw_moves_the_whole(
    world_size: int, moments: str, dtype: torch.dtype
) -> None:
    config = replace(CONFIG, moments=moments)  # type: ignore[arg-type]
    found = assembled(run_ranks(world_size, train, config, dtype, range(3), {}))
    assert_near(found, reference(3, moments, dtype), moments)


@pytest.mark.parametrize(("moments", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_state_survives_another_number_of_replicas(moments: str, dtype: torch.dtype) -> None:
    config = replace(CONFIG, moments=moments)  # type: ignore[arg-type]
    saved = assembled(run_ranks(4, train, config, dtype, range(2), {}))
    found = assembled(run_ranks(2, train, config, dtype, range(2, 4), saved))
    assert_near(found, reference(4, moments, dtype), moments)


def test_bf16_moments_stay_within_rounding_of_fp32() -> None:
    rounded, exact = (reference(3, moments, torch.float32) for moments in ("bf16", "fp32"))
    for name, tensor in exact.items():
        torch.testing.assert_close(rounded[name].float(), tensor, rtol=0.02, atol=0.02)


def bytes_of_state(rank: int, world_size: int, moments: str) -> tuple[int, int]:
    """(allocated, used) bytes of the state of 1024 bf16 weights with copies on every rank."""
    parameter = nn.Parameter(torch.zeros(32, 32, dtype=torch.bfloat16))
    world = torch.distributed.group.WORLD if world_size > 1 else None
    zero = Zero([("all", [ParameterSet((("weight", parameter),), world)])], world)
    state = list(Optimizer(zero.segments(), replace(CONFIG, moments=moments)).state())  # type: ignore[arg-type]
    torch.distributed.barrier()  # nobody leaves while others still connect
    allocated = {p.tensor.untyped_storage().data_ptr(): p.tensor.untyped_storage().nbytes() for p in state}
    return sum(allocated.values()), sum(piece.tensor.nbytes for piece in state)


@pytest.mark.parametrize(("moments", "each"), [("fp32", 4 + 4 + 4), ("bf16", 4 + 2 + 2)])
def test_every_replica_keeps_its_share_of_the_state(moments: str, each: int) -> None:
    assert run_ranks(1, bytes_of_state, moments) == [(1024 * each, 1024 * each)]
    assert run_ranks(4, bytes_of_state, moments) == [(256 * each, 256 * each)] * 4


def test_chunks_do_not_change_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def recorded(fused: str, device: torch.device) -> Callable[..., Adam]:
        def make(masters: list[Tensor], **settings: Any) -> Adam:
            sizes.append(sum(master.numel() for master in masters))
            return fused_adam(fused, device)(masters, **settings)

        return make

    monkeypatch.setattr(optim, "_CHUNK", 300)
    monkeypatch.setattr(optim, "fused_adam", recorded)
    found = assembled([train(0, 1, CONFIG, torch.float32, range(3), {})])
    assert sizes == [6, 221, 264, 300, 120 + 45]
    assert_equal(found, reference(3, "fp32", torch.float32))


def test_an_optimizer_without_segments_does_nothing() -> None:
    optimizer = Optimizer([], CONFIG)  # a rank may own none
    optimizer.step(RATE)
    optimizer.set_steps(3)
    assert list(optimizer.state()) == []


class FusedAdam(torch.optim.AdamW):
    """What apex and Transformer Engine share: steps are counted in the group, `adam_w_mode` is asked for."""

    def __init__(self, params: list[Tensor], *, adam_w_mode: bool, **settings: float) -> None:
        assert adam_w_mode
        super().__init__(params, **settings, fused=True)

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
            for tensor in group["params"]:
                self.state[tensor]["step"].fill_(group["step"] - 1)
        super().step()


MODULES = {
    "apex": ["amp_C", "apex", "apex.optimizers"],
    "te": ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"],
}


@pytest.mark.parametrize("fused", ["apex", "te"])
def test_other_kernels_count_steps_and_keep_moments_where_the_checkpoint_finds_them(
    fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in MODULES[fused]:
        module = ModuleType(name)
        module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(optim, "fused_adam", lambda fused, device: fused_adam(fused, torch.device("cuda")))
    config = replace(CONFIG, fused=fused)  # type: ignore[arg-type]
    saved = assembled([train(0, 1, config, torch.float32, range(2), {})])
    found = assembled([train(0, 1, config, torch.float32, range(2, 4), saved)])
    assert_equal(found, reference(4, "fp32", torch.float32))


@pytest.mark.parametrize(
    ("fused", "device", "message"),
    [
        (
            "te",
            "cpu",
            "`optim.fused` must be torch where there is no GPU, but is te: set `optim.fused=torch`",
        ),
        ("apex", "cuda", "is apex, which cannot be imported .*amp_C.*: install NVIDIA apex .* or set"),
        ("te", "cuda", "is te, which cannot be imported .*: install transformer-engine.* or set"),
    ],
)
def test_a_kernel_that_is_not_there(
    fused: str, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", None)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(UserError, match=message):
        fused_adam(fused, torch.device(device))
