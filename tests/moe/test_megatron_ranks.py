"""Megatron trains the same model with our layer under every layout, and its checkpoints pass between them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from moe.megatron import moe_layer_spec
from parallel.shards import parameter_pieces
from tests.megatron_cpu import LENGTH, batches, gpt_model, layer_spec, megatron_on_cpu, transformer_config
from tests.ranks import run_ranks

MICROBATCHES, STEPS, RATE = 4, 2, 0.01


class Way(NamedTuple):
    """A layout of two ranks, and what of Megatron's data parallelism is switched on."""

    tp: int = 1
    ep: int = 1
    etp: int = 1
    distributed: bool = False  # optimizer, with gradients and parameters on the wire during compute
    by_token: bool = False


WAYS = {
    "dp2": Way(),
    "dp2·ep2": Way(ep=2),
    "dp2, distributed optimizer": Way(distributed=True),
    "dp2·ep2, loss by token": Way(ep=2, by_token=True),
    "tp2": Way(tp=2),
    "tp2·ep2": Way(tp=2, ep=2),
    "tp2·etp2": Way(tp=2, etp=2),
    "tp2·ep2, loss by token": Way(tp=2, ep=2, by_token=True),
}


class Held(NamedTuple):
    """What a rank holds of a canonical weight of one of our layers."""

    name: str
    place: tuple[slice, ...]
    tensor: Tensor


class Trained(NamedTuple):
    losses: list[list[float]]  # [step][microbatch of this rank]
    norms: list[float]
    biases: list[list[float]]  # after the first step, by layer
    pieces: list[Held]


@contextmanager
def megatron(way: Way) -> Iterator[None]:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=way.tp,
        expert_model_parallel_size=way.ep,
        expert_tensor_parallel_size=way.etp,
        create_gloo_process_groups=False,
    )
    try:
        with megatron_on_cpu():
            yield
    finally:
        parallel_state.destroy_model_parallel()
        MoEAuxLossAutoScaler.main_loss_backward_scale = None


def build(way: Way, seed: int = 0, **options: Any) -> GPTModel:
    torch.manual_seed(seed)
    config = transformer_config(
        tensor_model_parallel_size=way.tp,
        sequence_parallel=way.tp > 1,
        expert_model_parallel_size=way.ep,
        expert_tensor_parallel_size=way.etp,
        calculate_per_token_loss=way.by_token,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=RATE,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=0.1,
        finalize_model_grads_func=finalize_model_grads,
    )
    return gpt_model(config, moe_layer_spec(layer_spec(), **options))


def held(model: GPTModel) -> list[Held]:
    return [
        Held(f"{number}.{piece.name}", piece.place, piece.tensor.clone())
        for number, layer in enumerate(model.decoder.layers)
        for piece in parameter_pieces(layer.mlp.layer)
    ]


def forward_step(data: Iterator[tuple[Tensor, ...]], model: DistributedDataParallel) -> Any:
    tokens, positions, mask, labels = next(data)

    def objective(losses: Tensor) -> tuple[Any, ...]:
        mean = losses.mean()
        if model.config.calculate_per_token_loss:
            return losses.sum(), torch.tensor(losses.numel()), {"loss": mean.item()}
        return mean, {"loss": mean.item()}

    return model(tokens, positions, mask, labels=labels), objective


def train(rank: int, world_size: int, way: Way) -> Trained:
    with megatron(way):
        model = build(way)
        switches = {"use_distributed_optimizer": way.distributed, "overlap_param_gather": way.distributed}
        ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=way.distributed, **switches)
        ddp = DistributedDataParallel(model.config, ddp_config, model)
        # With so large an epsilon a step is nearly proportional to the gradient.
        settings = OptimizerConfig(optimizer="adam", lr=0.5, adam_eps=1.0, weight_decay=0.0, **switches)
        optimizer = get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=False)
        replicas = world_size // way.tp
        mine = batches(MICROBATCHES)[parallel_state.get_data_parallel_rank() :: replicas]
        losses, norms, biases = [], [], []
        for _ in range(STEPS):
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(mine),
                model=[ddp],
                num_microbatches=len(mine),
                seq_length=LENGTH,
                micro_batch_size=2,
                forward_only=False,
            )
            losses.append([float(result["loss"]) for result in results])
            norms.append(float(optimizer.step()[1]))
            biases.append([layer.mlp.expert_bias.tolist() for layer in model.decoder.layers])
        if way.distributed:
            ddp.start_param_sync(force_sync=True)
        return Trained(losses, norms, biases[0], held(model))


def train_every_way(rank: int, world_size: int) -> dict[str, Trained]:
    return {name: train(rank, world_size, way) for name, way in WAYS.items()}


class Plain(NamedTuple):
    """The first step's losses, gradient norm and biases after it, without any of Megatron's machinery."""

    losses: list[float]
    norm: float
    biases: list[list[float]]


def train_plainly(rank: int, world_size: int) -> Plain:
    with megatron(Way()):
        counts = torch.zeros(2, 8, dtype=torch.int64)
        model = build(Way(), on_load=lambda number, load: counts[number - 1].add_(load.counts_E))
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / MICROBATCHES))
        losses = []
        for tokens, positions, mask, labels in batches(MICROBATCHES):
            loss = model(tokens, positions, mask, labels=labels).mean()
            (loss / MICROBATCHES).backward()
            losses.append(loss.item())
        square = sum(p.grad.double().square().sum().item() for p in model.parameters())
        assert counts.sum(1).tolist() == [MICROBATCHES * 2 * LENGTH * 2] * 2
        biases = -RATE * (counts * 8 - counts.sum(1, keepdim=True)).sign().float()
        return Plain(losses, math.sqrt(square), biases.tolist())


def in_order(ranks: list[Trained], step: int) -> list[float]:
    """The losses of a step's microbatches, which data-parallel ranks take in turn."""
    return [loss for each in zip(*(rank.losses[step] for rank in ranks), strict=True) for loss in each]


def test_every_layout_trains_alike() -> None:
    (plain,) = run_ranks(1, train_plainly)
    found = run_ranks(2, train_every_way)
    first = found[0]["dp2"]
    weights = {piece.name: piece.tensor for piece in first.pieces}
    second_losses = in_order([each["dp2"] for each in found], 1)
    assert len(weights) == 2 * (1 + 2 * 8 + 2)
    for name, way in WAYS.items():
        ranks = [each[name] for each in found]
        replicas = ranks[:1] if way.tp == 2 else ranks
        close(in_order(replicas, 0), plain.losses, name)
        close(in_order(replicas, 1), second_losses, name)
        for rank in ranks:
            close(rank.norms, [plain.norm, first.norms[1]], name)
            close(rank.biases, plain.biases, name)
            for piece in rank.pieces:
                close(piece.tensor, weights[piece.name][piece.place], f"{name}: {piece.name}")


def close(found: Any, wanted: Any, what: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")


BIAS = torch.arange(8) / 8
SAVED = (Way(ep=2), Way(tp=2, etp=2))
READ = (Way(), Way(ep=2), Way(tp=2, etp=2))


def pass_checkpoints(rank: int, world_size: int, folder: str) -> None:
    with megatron(Way()):
        wanted = {piece.name: piece.tensor for piece in held(build(Way()))}
    for index, saved in enumerate(SAVED):
        path = Path(folder) / str(index)
        with megatron(saved):
            model = build(saved)
            for layer in model.decoder.layers:
                layer.mlp.expert_bias.copy_(BIAS)
            if rank == 0:
                path.mkdir()
            dist.barrier()
            dist_checkpointing.save(model.sharded_state_dict(), str(path))
        for way in READ:
            with megatron(way):
                model = build(way, seed=1)
                model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(path)))
            for piece in held(model):
                assert torch.equal(piece.tensor, wanted[piece.name][piece.place]), (saved, way, piece.name)
            assert all(torch.equal(layer.mlp.expert_bias, BIAS) for layer in model.decoder.layers)


def test_a_checkpoint_of_one_layout_is_read_under_another(tmp_path: Path) -> None:
    run_ranks(2, pass_checkpoints, str(tmp_path))
