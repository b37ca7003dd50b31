"""DeepSpeed as the engine, for a model that must fit on fewer GPUs: ZeRO-1, 2 and 3 and offload, pp=1.

Model, groups, losses, balance and checkpoints stay ours; DeepSpeed holds the weights, sums gradients, clips
and moves. It was made for parameters that all ranks hold whole, and is told here what is otherwise:

* A parameter whose copies live on some ranks only (experts, what is cut over tp) names their group. Such
  names are read only where there is a layer of DeepSpeed's own kind: one that does nothing stands for it.
  Unnamed, what rank 0 holds would be broadcast over the parts of all others, without a word.
* It averages over all ranks what we sum, so the objective is multiplied by their number.
* A gradient that arrives is complete to it. So a microbatch's backward is one walk through ordinary
  autograd, not phase by phase: under MTP, say, the embedding is used twice.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import OptimConfig, RunConfig
from moe.model.transformer import Microbatch, Outcome, Transformer
from parallel.collectives import Group, group_size
from parallel.errors import UserError
from parallel.groups import Groups
from parallel.pipeline.tape import Direct, run
from parallel.shards import Piece, is_cut, is_expert, pieces

MOMENTS = ("exp_avg", "exp_avg_sq")
KEPT_WHOLE = 100_000  # elements: under ZeRO-3 a smaller parameter stays whole on every rank


class DeepSpeed:
    """One rank's model under DeepSpeed. Weights are in place before, on any device: masters are made here.

    In bf16 the gradient of one microbatch is rounded to bf16; it is added to those before in fp32.
    """

    def __init__(self, model: Transformer, config: RunConfig, groups: Groups, device: torch.device) -> None:
        assert groups.pp is None
        library = _library(device)
        self.model, self.groups, self.device = model, groups, device
        self._outlines = {name: _outline(parameter) for name, parameter in model.named_parameters()}
        objective = _Objective(model, groups.layout.world_size, config.train.recompute == "full")
        if _tell_sharing(library, model, groups):
            objective.add_module("experts", _expert_layer(library))
        settings = _settings(config)
        self._partitions_weights = config.optim.zero_stage == 3
        if self._partitions_weights:  # parameter by parameter: all of them may not fit on the device
            library.zero.Init(module=objective, config_dict_or_path=settings)
        self._adam = torch.optim.AdamW(_parameter_groups(model, config.optim), fused=True)
        self._engine, self._zero, _, _ = library.initialize(
            model=objective.to(device), optimizer=self._adam, config=settings
        )
        for flat in self._masters():
            self._adam.state[flat] = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        self._set_steps(0)

    def train(self, microbatches: Sequence[Microbatch], *, timed: bool = False) -> list[Outcome]:
        """Forward and backward of this rank's microbatches of a step, one after the other."""
        outcomes = []
        for number, microbatch in enumerate(microbatches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(microbatches))
            total, outcome = self._engine(microbatch)
            self._engine.backward(total, scale_wrt_gas=False)
            outcomes.append(outcome)
        return outcomes

    def timeline(self) -> None:
        """There is no schedule here whose slots could be timed."""

    @torch.no_grad()
    def forward(self, microbatches: Sequence[Microbatch]) -> list[Outcome]:
        """Losses or logits of microbatches, without gradients."""
        return [self._engine.module(microbatch)[1] for microbatch in microbatches]

    def update(self, rate: float) -> float:
        """Clip the gradients and move the weights at this rate; the whole gradient's norm before that."""
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def owned(self) -> Iterator[Piece]:
        """This rank's part of weights, moments and, where weights are not fp32, masters.

        All but those weights are views that can be written.
        """
        for name, parameter in self.model.named_parameters():
            outline, (flat, place, begin) = self._outlines[name], self._segment(parameter)
            master = flat.detach()[place]
            tensors = {moment: self._adam.state[flat][moment][place] for moment in MOMENTS}
            if outline.dtype == master.dtype:
                tensors["model"] = master
            else:
                tensors |= {"master": master, "model": master.to(outline.dtype)}  # rounded as the weight is
            for kind, tensor in tensors.items():
                yield from pieces(f"{kind}/{name}", outline, tensor, begin)

    def written(self, steps: int) -> None:
        """Take up what was written into the pieces: the state after so many steps."""
        self._set_steps(steps)
        if not self._partitions_weights:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()
        for index in range(len(self._masters())):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        self._zero.checkpoint_event_epilogue()

    def _masters(self) -> list[Tensor]:
        if self._partitions_weights:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _segment(self, parameter: Any) -> tuple[Tensor, slice, int]:
        """The flat master that holds this rank's part of a parameter, where, and from which element on."""
        if self._partitions_weights:
            index, first, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            begin = size * parameter.ds_zero_partition_rank
            size = max(0, min(size, parameter.ds_numel - begin))  # behind the last element is padding
            return self._masters()[index], slice(first, first + size), begin
        mapping = parameter._hp_mapping
        if mapping is None:
            return self._masters()[0], slice(0, 0), 0
        held, begin = mapping.hp_fragment_address, mapping.lp_fragment_address.start
        return self._masters()[mapping.param_group_index], slice(held.start, held.start + held.numel), begin

    def _set_steps(self, steps: int) -> None:
        for flat in self._masters():
            self._adam.state[flat]["step"] = torch.tensor(float(steps), device=flat.device)


class _Objective(nn.Module):
    """What DeepSpeed calls and differentiates: a microbatch in, its part of the global objective out."""

    def __init__(self, model: Transformer, num_ranks: int, recompute: bool) -> None:
        super().__init__()
        self.model, self.num_ranks, self.recompute = model, num_ranks, recompute

    def forward(self, microbatch: Microbatch) -> tuple[Tensor, Outcome]:
        roots = _Roots(self.recompute and torch.is_grad_enabled())
        _, outcome = run(self.model.phases(roots, microbatch))
        return self.num_ranks * roots.total, outcome


class _Roots(Direct):
    """Ordinary autograd that adds up the roots and, where told to, recomputes phases in the backward."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.total: Any = 0.0
        self._recompute = recompute

    def compute(self, function: Callable[..., Any], *inputs: Any) -> Any:
        if not self._recompute:
            return function(*inputs)
        return checkpoint(
            _recomputed_at_once, function, *inputs, use_reentrant=False, preserve_rng_state=False
        )

    def root(self, value: Tensor, gradient: float) -> None:
        self.total = self.total + gradient * value


def _recomputed_at_once(function: Callable[..., Any], *inputs: Any) -> Any:
    """A phase whose backward begins by recomputing it.

    ZeRO-3 gathers weights when a module's backward begins and releases them when a forward of it ends:
    one that recomputes amid its backward would lose them.
    """
    returned = function(*inputs)
    values = list(returned) if isinstance(returned, tuple) else [returned]
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    if places:
        for place, value in zip(places, _Recall.apply(*(values[i] for i in places)), strict=True):
            values[place] = value
    return tuple(values) if isinstance(returned, tuple) else values[0]


class _Recall(torch.autograd.Function):
    """Identity; its backward asks for a saved tensor, which makes the checkpoint around it recompute all."""

    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(values[0])
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        assert ctx.saved_tensors
        return grads


def _library(device: torch.device) -> ModuleType:
    """DeepSpeed, ready to start on this device."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
        import deepspeed.module_inject.auto_ep_layer
    except ImportError as error:
        raise UserError(
            f"`optim.engine` is deepspeed, which cannot be imported ({error}): install switchyard[deepspeed] "
            "or set `optim.engine=switchyard`"
        ) from error
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)  # it calls by old names
    if device.type == "cpu":  # nothing to compile: it would take a minute and is for inference
        deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():  # one rank
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return deepspeed


def _settings(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    optim = config.optim
    zero: dict[str, Any] = {"stage": optim.zero_stage, "stage3_param_persistence_threshold": KEPT_WHOLE}
    if optim.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # must be said, and is not used
        "gradient_accumulation_steps": config.layout.microbatches,
        "gradient_clipping": optim.clip_norm,
        "communication_data_type": optim.grad_reduce,
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, on the host too: nothing to compile
        "zero_force_ds_cpu_optimizer": False,
    }


class _Sharing(NamedTuple):
    """Which ranks hold the parts of a parameter, and which the copies of this rank's part."""

    parts: Group
    copies: Group


def _sharing(parameter: nn.Parameter, groups: Groups) -> _Sharing | None:
    """None for a parameter that all ranks hold whole."""
    if is_expert(parameter):
        return _Sharing(groups.ep_etp, groups.expert_dp) if groups.ep_etp is not None else None
    return _Sharing(groups.tp, groups.dp_cp) if is_cut(parameter) else None


def _tell_sharing(library: ModuleType, model: Transformer, groups: Groups) -> bool:
    """Name the groups of parameters that not all ranks hold whole; whether there are any."""
    named: dict[str, _Sharing] = {}
    for parameter in model.parameters():
        if sharing := _sharing(parameter, groups):
            # As parts lie on neighbours, their number says which ranks these are. Groups of the same
            # ranks must have one name, or DeepSpeed refuses to send their gradients together.
            name = f"ep_size_{group_size(sharing.parts)}"
            alone = sharing.copies is None and name not in named
            copies = (
                dist.new_group([groups.rank], use_local_synchronization=True) if alone else sharing.copies
            )
            named.setdefault(name, _Sharing(sharing.parts, copies))
            parameter.__dict__.update(allreduce=False, group_name=name)
            parameter.__dict__.update(  # the same in the words of ZeRO-3
                ds_zero_placement_family="autoep_expert",
                ds_zero_partition_group_name=name,
                ds_zero_partition_process_group=named[name].copies,
            )
    for name, sharing in named.items():
        library.utils.groups._EXPERT_PARALLEL_GROUP[name] = sharing.parts
        library.utils.groups._EXPERT_DATA_PARALLEL_GROUP[name] = sharing.copies
    return bool(named)


def _expert_layer(library: ModuleType) -> nn.Module:
    """A layer without parameters that DeepSpeed takes for one of its own."""

    class Stand(library.module_inject.auto_ep_layer.AutoEPMoELayer):  # type: ignore[name-defined]
        num_experts = 1

        def __init__(self) -> None:
            nn.Module.__init__(self)

        def set_deepspeed_parallelism(self, *arguments: Any, **named: Any) -> None:
            """The groups are known."""

    return Stand()


def _parameter_groups(model: Transformer, optim: OptimConfig) -> list[dict[str, Any]]:
    """What AdamW is given: matrices decay, gains do not; apart by who holds the copies."""
    found: dict[tuple[bool, str], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        kind = len(getattr(parameter, "ds_shape", parameter.shape)) > 1, getattr(parameter, "group_name", "")
        found.setdefault(kind, []).append(parameter)
    shared = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    return [
        {
            **shared,
            "params": parameters,
            "weight_decay": optim.weight_decay if is_matrix else 0.0,
            **({"moe": True, "name": name} if name else {}),
        }
        for (is_matrix, name), parameters in found.items()
    ]


def _outline(parameter: nn.Parameter) -> Tensor:
    """Shape, type and marks of a parameter whose memory DeepSpeed takes."""
    outline = torch.empty_like(parameter, device="meta")
    outline.__dict__.update(parameter.__dict__)
    return outline
