"""Our MoE layer inside a Megatron-Core `TransformerLayer`, on Megatron's groups.

    spec = moe_layer_spec(get_gpt_layer_local_spec(normalization="RMSNorm"), on_load=record)
    model = GPTModel(config, spec, vocab_size=..., max_sequence_length=...)

Attention, data parallelism, optimizer and checkpoints stay Megatron's. Its `TransformerConfig` decides
the layer's shape and balancing; what our layer cannot honour is refused. What must happen once for a
microbatch (counting its tokens, logging its auxiliary loss) happens in the backward of the layer's
output, which runs once however often recomputation runs the forward.
Legend: B sequences, S positions of this rank, D hidden size, E experts.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, save_to_aux_losses_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.megatron_config import ScoreFunction, auxiliary_loss, balance_config, model_config
from moe.model.layer import LayerLoad, MoELayer
from parallel.collectives import all_reduce, group_rank, group_size
from parallel.errors import UserError
from parallel.linear import WHOLE
from parallel.megatron import model_groups
from parallel.pipeline.tape import Direct, run
from parallel.shards import Cut, is_cut, is_expert, parameter_pieces

OnLoad = Callable[[int, LayerLoad], None]


def moe_layer_spec(
    layer_spec: ModuleSpec,
    *,
    pg_collection: ProcessGroupCollection | None = None,
    score_function: ScoreFunction | None = None,
    on_load: OnLoad | None = None,
) -> ModuleSpec:
    """A transformer layer's spec with `SwitchyardMoE` for its MLP; the rest of the layer is kept.

    Raises `UserError` where the layer's MLP holds the norm before it, which would go with the MLP.
    """
    if layer_spec.submodules.pre_mlp_layernorm is IdentityOp:
        raise UserError(
            "`layer_spec.submodules.pre_mlp_layernorm` must be a norm, but is IdentityOp, the MLP having its "
            "own: make the spec with `num_experts` set, or set the norm"
        )
    params = {"pg_collection": pg_collection, "score_function": score_function, "on_load": on_load}
    mlp = ModuleSpec(module=SwitchyardMoE, params=params)
    return dataclasses.replace(layer_spec, submodules=dataclasses.replace(layer_spec.submodules, mlp=mlp))


class SwitchyardMoE(MegatronModule):
    """Our `MoELayer` under the contract of an MLP of Megatron's transformer layer.

    Megatron finds `expert_bias` and `local_tokens_per_expert` at the end of a step and moves the bias
    by the counts, which are integers up to its comparison with their mean.
    """

    local_tokens_per_expert: Tensor
    global_tokens_per_expert: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        score_function: ScoreFunction | None = None,
        on_load: OnLoad | None = None,
    ) -> None:
        """Groups are `pg_collection`'s, else those of `parallel_state`.

        `score_function` stands over the config's, which cannot have the bias with "softmax".
        `on_load(layer_number, load)` is called in the backward of each microbatch, for each layer in
        the order of its microbatches.
        """
        super().__init__(config)
        collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.groups, self._collection = model_groups(collection), collection
        model, balance = model_config(config, score_function), balance_config(config)
        self._loss = auxiliary_loss(config)
        self._on_load = on_load
        self._recompute = config.recompute_granularity == "selective" and "moe" in config.recompute_modules
        self.layer_number: int | None = None
        with torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device()):
            self.layer = _LoadedLayer(model, balance, self.groups, config.params_dtype, seed=None)
            for name in ("local_tokens_per_expert", "global_tokens_per_expert"):
                counts = torch.zeros(model.num_experts, dtype=torch.int64)
                self.register_buffer(name, counts, persistent=False)
        if config.perform_initialization:
            _init_weights(self.layer, config)
        for parameter in self.layer.parameters():
            _mark(parameter, config)

    @property
    def expert_bias(self) -> Tensor:
        """The selection bias [E], fp32, which Megatron updates in place."""
        return self.layer.router.bias

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer with its 1-based number in the whole model."""
        self.layer_number = layer_number

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Every parameter, even without `recurse`.

        Megatron's DDP waits before a module's forward for the weights that are its own; the inner
        modules' forwards see only views of theirs.
        """
        return super().parameters(recurse=True)

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """[S, B, D] -> ([S, B, D], no bias). `padding_mask` [B, S] is true on padding, which goes nowhere."""
        hidden = hidden_states.transpose(0, 1).contiguous()
        if padding_mask is None:
            valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        else:
            valid = ~padding_mask.bool()
        if self._recompute and self.training:
            output = checkpoint(self._run, hidden, valid, use_reentrant=False, preserve_rng_state=False)
        else:
            output = self._run(hidden, valid)
        return output.transpose(0, 1).contiguous(), None

    def _run(self, hidden: Tensor, valid: Tensor) -> Tensor:
        # Views: our products would add to a weight's `main_grad` themselves, without telling DDP's hooks.
        views = {name: weight.view_as(weight) for name, weight in self.layer.named_parameters()}
        output, auxiliary, load = torch.func.functional_call(self.layer, views, (hidden, valid))
        if not output.requires_grad:
            return output
        if self._loss is not None and self.training:
            if self.config.calculate_per_token_loss:  # gradients are divided by all tokens later
                auxiliary = auxiliary * all_reduce(valid.sum(), self.groups.tp_cp)
            output = MoEAuxLossAutoScaler.apply(output, auxiliary)
        output.register_hook(lambda _: self._note(load))
        return output

    def _note(self, load: LayerLoad) -> None:
        """Count a microbatch: called once for each."""
        self.local_tokens_per_expert += load.counts_E
        self.global_tokens_per_expert += load.counts_E
        if self._loss is not None and self.training:
            save_to_aux_losses_tracker(
                self._loss.logged_as,
                load.auxiliary_loss / self._loss.coefficient,
                self.layer_number,
                self.config.num_layers + (self.config.mtp_num_layers or 0),
                reduce_group=self._collection.tp_cp,
            )
        if self._on_load is not None and self.layer_number is not None:
            self._on_load(self.layer_number, load)

    def reset_global_aux_loss_tracker(self) -> None:
        """Called by Megatron after a step with a global loss, which takes this step's counts in the next."""
        counts = all_reduce(self.global_tokens_per_expert, self._collection.tp_dp_cp)
        self.layer.router.last_counts.copy_(counts)
        self.global_tokens_per_expert.zero_()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor | ShardedTensorFactory]:
        """Weights, bias and last counts for Megatron's checkpoints, which any EP, ETP and TP can read."""
        state, num_outer = {}, len(sharded_offsets)
        for name, tensor in self.state_dict(keep_vars=True).items():
            offsets, copies = list(sharded_offsets), self._collection.tp_dp_cp
            if is_expert(tensor):
                offsets.append((num_outer, group_rank(self.groups.ep), group_size(self.groups.ep)))
                copies = self._collection.expt_dp
            elif is_cut(tensor):
                copies = self._collection.dp_cp
            replica = (0, 0, group_rank(copies))  # all 0: the one that is saved
            state[prefix + name] = _sharded(prefix + name, tensor, offsets, num_outer, replica)
        return state


class _Beginning(Direct):
    """Ordinary autograd that keeps what a backward would begin at beside the output."""

    auxiliary: Tensor

    def root(self, value: Tensor, gradient: float) -> None:
        self.auxiliary = value * gradient


class _LoadedLayer(MoELayer):
    """The layer whose forward gives its auxiliary loss and its load beside the output."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, LayerLoad]:
        beginning = _Beginning()
        output, load = run(self.phases(beginning, hidden, valid))
        return output, beginning.auxiliary, load


@torch.no_grad()
def _init_weights(layer: MoELayer, config: TransformerConfig) -> None:
    """Megatron's init methods, each canonical tensor from a stream named after it.

    The seed comes from the default generator, which Megatron seeds alike on all ranks of a stage: a
    layer begins with the same weights under every layout.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    drawn: tuple[str, Tensor] = ("", torch.empty(0))
    for piece in parameter_pieces(layer):
        if drawn[0] != piece.name:  # the pieces of one canonical tensor follow each other
            method = config.output_layer_init_method if ".down." in piece.name else config.init_method
            digest = hashlib.sha256(f"{seed}/{piece.name}".encode()).digest()
            whole = torch.empty(piece.shape, device="cpu")
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
                method(whole)
            drawn = piece.name, whole
        piece.tensor.copy_(drawn[1][piece.place])


def _mark(parameter: nn.Parameter, config: TransformerConfig) -> None:
    """Say what Megatron's DDP, norm and sequence parallelism look for.

    Experts are marked whatever EP is: their copies are `expt_dp`, which differs from `dp_cp` with TP
    alone. `tensor_model_parallel` says that no other TP rank counts this parameter in the norm.
    """
    expert, cut = is_expert(parameter), _cut(parameter)
    if expert:
        parameter.allreduce = False  # type: ignore[attr-defined]
    if expert or is_cut(parameter):
        set_tensor_model_parallel_attributes(parameter, True, cut.dim + expert, cut.sections)
    else:
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _cut(tensor: Tensor) -> Cut:
    return getattr(tensor, "cut", WHOLE)


def _sharded(
    key: str, tensor: Tensor, offsets: list[tuple[int, int, int]], num_outer: int, replica: tuple[int, ...]
) -> ShardedTensor | ShardedTensorFactory:
    """A tensor with its place in the whole; one cut in sections is saved section by section."""
    cut = _cut(tensor)
    dim = cut.dim + is_expert(tensor)

    def section(key: str, part: Tensor, replica: tuple[int, ...], index: int) -> ShardedTensor:
        place = (num_outer + dim, index * cut.count + cut.index, cut.sections * cut.count)
        return ShardedTensor.from_rank_offsets(
            key, part, *offsets, place, replica_id=replica, prepend_axis_num=num_outer
        )

    def build(key: str, whole: Tensor, replica: tuple[int, ...], flat: None) -> list[ShardedTensor]:
        assert flat is None, "Megatron's flat optimizer formats are built from the whole parameter"
        parts = whole.chunk(cut.sections, dim)
        return [section(key, part.contiguous(), replica, index) for index, part in enumerate(parts)]

    if cut.sections == 1:
        return section(key, tensor, replica, 0)
    return ShardedTensorFactory(key, tensor, build, lambda parts: torch.cat(parts, dim), replica)
