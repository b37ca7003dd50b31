"""Checks of what is put together: the layer of experts, the whole model, recomputation and pairs.

The model of fp64 runs on the CPU through ordinary autograd; the one that is checked runs on the tape, as in
training. Experts are those that the checked model chose: a rounding that flips one would say nothing here.
Legend: T tokens, K chosen experts.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.bench.gpu.ceilings import float32_products
from launch.bench.gpu.exact import Found, gradients, leaf, normal, wide, with_buffers, worst
from launch.bench.gpu.shapes import choices
from moe.config import ModelConfig
from moe.model.layer import MoELayer
from moe.model.transformer import Microbatch, Outcome, Transformer
from parallel.pipeline.overlap import run_pair
from parallel.pipeline.tape import Direct, Tape, run

SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_layers=3,
    num_mtp_layers=1,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_experts=16,
    top_k=4,
    num_groups=4,
    top_groups=2,
    routed_scaling_factor=2.5,
    num_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    init_std=0.1,
)
RELEASED_HEADS = replace(
    SMALL,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)


def _shape(size: int) -> ModelConfig:
    return SMALL if size == 1 else RELEASED_HEADS


def layer(device: torch.device, size: int, dtype: torch.dtype, routing: str) -> Found:
    """Dispatch, experts, combine and shared experts, with padding; against a loop over experts in fp64."""
    config = replace(_shape(size), num_groups=1, top_groups=1)
    module = MoELayer(config, dtype=dtype)
    hidden = normal(2, 24 * size, config.hidden_size, dtype=dtype)
    grad = normal(*hidden.shape, dtype=dtype, seed=1)
    valid = torch.arange(24 * size) < torch.tensor([24 * size, 17 * size])[:, None]
    weights = {name: leaf(parameter) for name, parameter in module.named_parameters()}
    module.to(device)
    with_buffers(module)
    held, tape = hidden.to(device).requires_grad_(), Tape()
    chosen = choices(routing, valid.numel(), config.top_k, config.num_experts).to(device)
    with ExitStack() as stack:
        stack.enter_context(float32_products("highest"))
        if routing != "as routed":
            stack.enter_context(patch.object(module.router, "choose", lambda scores: chosen))
        out, load = run(module.phases(tape, held, valid.to(device)))
        tape.root(out, grad.to(device))
        run(tape.backward())
        tape.weights()
    exact_hidden = leaf(hidden)
    exact = _loop_over_experts(config, weights, exact_hidden, load.experts_TK.cpu())
    exact.backward(grad.double())
    assert held.grad is not None and exact_hidden.grad is not None
    pairs = {"output": (out, exact), "input gradient": (held.grad, exact_hidden.grad)}
    for name, found in gradients(module).items():
        true = weights[name].grad
        assert true is not None, name
        pairs[f"gradient of {name}"] = (found, true)
    return worst(pairs)


def _loop_over_experts(
    config: ModelConfig, weights: dict[str, Tensor], hidden: Tensor, experts_TK: Tensor
) -> Tensor:
    """The layer's output by its definition; `experts_TK` holds the number of experts on padding."""
    rows = hidden.flatten(0, 1)
    scores_TE = (rows @ weights["router.projection.weight"].T).sigmoid()
    gates_TK = scores_TE.gather(1, experts_TK.clamp_max(config.num_experts - 1))
    gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True) * config.routed_scaling_factor
    out = _swiglu(rows, weights["shared.gate_up.weight"], weights["shared.down.weight"])
    for expert in range(config.num_experts):
        tokens, slots = (experts_TK == expert).nonzero(as_tuple=True)
        gate_up, down = weights["experts.gate_up.weight"][expert], weights["experts.down.weight"][expert]
        made = _swiglu(rows[tokens], gate_up, down)
        out = out.index_add(0, tokens, made * gates_TK[tokens, slots, None])
    return out.view_as(hidden)


def _swiglu(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (rows @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def _batch(device: torch.device, size: int, seed: int = 0) -> Microbatch:
    """Two sequences of two documents each."""
    stream = torch.Generator().manual_seed(seed)
    text = torch.randint(SMALL.vocab_size, (2, 16 * size + 1), generator=stream)
    documents = (torch.arange(16 * size) // (10 * size)).expand(2, -1)
    tokens = text[:, :-1].to(device)
    return Microbatch(
        tokens=tokens,
        labels=text[:, 1:].to(device),
        valid=torch.ones_like(tokens, dtype=torch.bool),
        documents=documents.to(device),
        loss_weights=(1 / tokens.numel(), 0.3 / tokens.numel()),
    )


def _forward(model: Transformer, tape: Tape, batch: Microbatch) -> Outcome:
    outcome: Outcome = run(model.phases(tape, batch))[1]
    return outcome


class _Objective(Direct):
    """Ordinary autograd over the sum of the roots."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros((), dtype=torch.float64)

    def root(self, value: Tensor, gradient: float) -> None:
        self.total = self.total + gradient * value


def model(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """Losses and every gradient of a small model of V3's form, with MTP and documents."""
    checked = Transformer(_shape(size), dtype=dtype)
    exact = Transformer(_shape(size), dtype=torch.float64, seed=None)
    exact.load_state_dict({name: value.double() for name, value in checked.state_dict().items()})
    checked.to(device)
    with_buffers(checked)
    tape = Tape()
    with float32_products("highest"):
        outcome = _forward(checked, tape, _batch(device, size))
        run(tape.backward())
        tape.weights()
    objective = _Objective()
    with ExitStack() as stack:
        stack.enter_context(wide())
        for name, router in exact.routers():
            chosen = outcome.loads[name].experts_TK.cpu().clamp_max(SMALL.num_experts - 1)  # past the end
            stack.enter_context(patch.object(router, "choose", lambda scores, chosen=chosen: chosen))
        expected: Outcome = run(exact.phases(objective, _batch(torch.device("cpu"), size)))[1]
        objective.total.backward()
    assert outcome.losses is not None and expected.losses is not None
    pairs = {"losses": (outcome.losses, expected.losses)}
    pairs |= {"MTP losses": (outcome.mtp_losses[0], expected.mtp_losses[0])}
    found, true = gradients(checked), gradients(exact)
    return worst(pairs | {f"gradient of {name}": (found[name], true[name]) for name in true})


def recomputation(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """The share of parameters whose gradient is not bit-equal with and without recomputation."""
    batch = _batch(device, size)
    runs = []
    for recompute in (False, True):
        tape, checked = Tape(recompute=recompute), _model(device, size, dtype)
        with _deterministic(device):
            _forward(checked, tape, batch)
            run(tape.backward())
            tape.weights()
        runs.append(gradients(checked))
    return _differing(*runs)


def pair(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """The same of a backward that is stepped in turn with the next forward, beside one after the other."""
    batches, runs = [_batch(device, size, seed) for seed in (0, 1)], []
    for overlapped in (False, True):
        checked, tapes = _model(device, size, dtype), (Tape(), Tape())
        with _deterministic(device):
            _forward(checked, tapes[0], batches[0])
            if overlapped:
                run_pair(tapes[0].backward(), checked.phases(tapes[1], batches[1]))
            else:
                run(tapes[0].backward())
                _forward(checked, tapes[1], batches[1])
            tapes[0].weights()
            run(tapes[1].backward())
            tapes[1].weights()
        runs.append(gradients(checked))
    return _differing(*runs)


def _model(device: torch.device, size: int, dtype: torch.dtype) -> Transformer:
    made = Transformer(_shape(size), dtype=dtype).to(device)
    with_buffers(made)
    return made


def _differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> Found:
    names = [name for name in first if not torch.equal(first[name], second[name])]
    return Found(len(names) / len(first), f"differ: {', '.join(names[:3])}" if names else "all bits equal")


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """CUDA kernels that give the same bits again, where torch has them."""
    if device.type != "cuda":  # all kernels do, and asking would import torch's compiler
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
