"""The contestants of `bench layer`: ours, a plain loop, and transformers; and what all of them share.

Each makes a layer with the case's weights and takes the case's hidden states; a test holds outputs and all
gradients of every one against the others. Libraries that need more words have files of their own.
Legend: T tokens, K chosen experts, E experts, D hidden size, F expert width, s shared experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.bench.case import PLAIN_GATE, Case, Weights
from launch.bench.memory import free_bytes
from moe.config import TrainConfig
from moe.hf.config import to_hf
from moe.model.layer import MoELayer
from moe.train import compiling
from parallel.shards import pieces

# A parameter, and the part of some `Weights` that it is.
Place = tuple[nn.Parameter, Callable[[Weights], Tensor]]


class Contestant(Protocol):
    """Whoever takes part. `clear` is called outside of what is timed."""

    name: str

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        ...

    def backward(self, output: Tensor, grad: Tensor) -> None:
        """Make all gradients."""
        ...

    def clear(self) -> None:
        """Forget the gradients of weights."""
        ...


class Layer:
    """A module whose parameters are, or are views of, the case's weights; gradients are in `.grad`."""

    def __init__(self, name: str, module: nn.Module, places: Sequence[Place], case: Case) -> None:
        self.name, self._module, self._places, self._like = name, module, places, case.weights
        assert {id(each) for each, _ in places} == {id(each) for each in module.parameters()}
        for parameter, part in places:
            assert parameter.shape == part(case.weights).shape, f"{name}: {parameter.shape}"
            parameter.data = part(case.weights).contiguous()

    def forward(self, hidden: Tensor) -> Tensor:
        """Through the module."""
        output: Tensor = self._module(hidden)
        return output

    def backward(self, output: Tensor, grad: Tensor) -> None:
        """By autograd."""
        output.backward(grad)

    def clear(self) -> None:
        """Gradients are None, and the next ones are written instead of added."""
        for parameter in self._module.parameters():
            parameter.grad = None

    def gradients(self) -> Weights:
        """Of the last backward, in fp32."""
        found = self._like.zeros()
        for parameter, part in self._places:
            if parameter.grad is not None:  # of an expert without rows there may be none
                part(found).copy_(parameter.grad)
        return found


class Ours:
    """Our layer, alone as in a notebook.

    `compiled` as with `train.compile`, with `buffers` in fp32 for every weight's gradient as in training.
    """

    def __init__(self, case: Case, *, compiled: bool = False, buffers: bool = False) -> None:
        kinds = ("ours", ", compiled" * compiled, ", fp32 gradient buffers" * buffers)
        self.name, self._like = "".join(kinds), case.weights
        self._layer = MoELayer(case.shape.model, PLAIN_GATE, dtype=case.dtype, seed=None).to(
            case.hidden.device
        )
        compiling.take_up(self._layer, TrainConfig(compile=compiled), case.hidden.device)
        for name, parameter in self._layer.named_parameters():
            for piece in pieces(name, parameter, parameter.detach().view(-1)):
                piece.tensor.copy_(_canonical(case.weights, piece.name))
            if buffers:
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
                parameter.register_post_accumulate_grad_hook(_add_to_buffer)

    def forward(self, hidden: Tensor) -> Tensor:
        """The layer as a module."""
        output: Tensor = self._layer(hidden)
        return output

    def backward(self, output: Tensor, grad: Tensor) -> None:
        """By autograd."""
        output.backward(grad)

    def clear(self) -> None:
        """Gradients are None, or their buffers 0."""
        for parameter in self._layer.parameters():
            parameter.grad = None
            if hasattr(parameter, "main_grad"):
                parameter.main_grad.zero_()

    def gradients(self) -> Weights:
        """Of the last backward, in fp32."""
        found = self._like.zeros()
        for name, parameter in self._layer.named_parameters():
            grad = getattr(parameter, "main_grad", parameter.grad)
            if grad is not None:
                for piece in pieces(name, parameter, grad.reshape(-1)):
                    _canonical(found, piece.name).copy_(piece.tensor)
        return found


def _add_to_buffer(parameter: Tensor) -> None:
    """What parallel/zero.py does with gradients that autograd makes itself."""
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None


def _canonical(weights: Weights, name: str) -> Tensor:
    """The weight of a canonical name such as `experts.3.gate_up.weight`."""
    match name.split("."):
        case "router", *_:
            return weights.router
        case "shared", which, _:
            return weights.shared_gate_up if which == "gate_up" else weights.shared_down
        case "experts", number, which, _:
            return (weights.gate_up if which == "gate_up" else weights.down)[int(number)]
    raise AssertionError(f"{name} is none of the layer's weights")


class _Loop(nn.Module):
    """The layer as a tutorial has it: an MLP of its own for every expert, and a loop over them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        shape = case.shape
        self.top_k = shape.top_k
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.experts = nn.ModuleList(_MLP(shape.hidden, shape.width) for _ in range(shape.experts))
        self.shared = _MLP(shape.hidden, shape.shared * shape.width)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        scores = F.linear(rows.float(), self.router.weight.float()).softmax(-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None].to(rows.dtype))
        return out.view_as(hidden) + self.shared(hidden)


class _MLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(rows)) * self.up(rows))
        return out


def plain_loop(case: Case) -> Layer:
    """Separate weights, `torch.where` and `index_add_`."""
    module: Any = unfilled(lambda: _Loop(case), case)
    places: list[Place] = [(module.router.weight, lambda w: w.router)]
    places += halves(module.shared.gate, module.shared.up, module.shared.down)
    for number, expert in enumerate(module.experts):
        places += halves(expert.gate, expert.up, expert.down, number)
    return Layer("plain loop", module, places, case)


def halves(gate: Any, up: Any, down: Any, number: int | None = None) -> list[Place]:
    """Places of an MLP with three weights: an expert's, or without a number the shared experts'."""

    def both(weights: Weights) -> Tensor:
        return weights.shared_gate_up if number is None else weights.gate_up[number]

    def last(weights: Weights) -> Tensor:
        return weights.shared_down if number is None else weights.down[number]

    return [
        (gate.weight, lambda w: both(w).chunk(2)[0]),
        (up.weight, lambda w: both(w).chunk(2)[1]),
        (down.weight, last),
    ]


def unfilled(make: Callable[[], nn.Module], case: Case) -> nn.Module:
    """A module whose weights are yet to be given: nothing is drawn for them."""
    with torch.device("meta"):
        module = make()
    return module.to(case.dtype).to_empty(device=case.hidden.device)


def transformers(case: Case, implementation: str) -> Layer:
    """DeepSeek-V2's layer with one of its `experts_implementation`s."""
    from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    _check_room(case, implementation)
    config = DeepseekV2Config(**to_hf(case.shape.model, PLAIN_GATE))
    config._experts_implementation = implementation
    module: Any = unfilled(lambda: DeepseekV2Moe(config), case)
    shared = module.shared_experts
    places: list[Place] = [
        (module.gate.weight, lambda w: w.router),
        (module.experts.gate_up_proj, lambda w: w.gate_up),
        (module.experts.down_proj, lambda w: w.down),
        *halves(shared.gate_proj, shared.up_proj, shared.down_proj),
    ]
    return Layer(f"transformers {implementation}", module, places, case)


def _check_room(case: Case, implementation: str) -> None:
    """`batched_mm` copies an expert's weights for every row, and in the backward their gradients."""
    shape = case.shape
    if implementation != "batched_mm":
        return
    rows = shape.tokens * shape.top_k
    needed = 2 * rows * 3 * shape.hidden * shape.width * case.dtype.itemsize
    if 4 * needed > (free := free_bytes(case.hidden.device)):  # the others want theirs
        raise MemoryError(f"takes {needed / 1e9:.0f} GB, more than a quarter of the {free / 1e9:.0f} GB free")
