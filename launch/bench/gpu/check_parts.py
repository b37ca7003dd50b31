"""Checks of what lies between products: attention, norms, rotation, the router, cross entropy, AdamW.

Legend: B sequences, S positions, H heads, T tokens, E experts, K chosen experts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.bench.gpu.ceilings import float32_products
from launch.bench.gpu.exact import Found, leaf, normal, share_differing, worst
from launch.bench.gpu.shapes import choices
from moe.config import BalanceConfig, ModelConfig, RopeConfig
from moe.model.attention import attend, document_mask, merge, partial_attention
from moe.model.norm import RMSNorm
from moe.model.rope import frequencies, rotation
from moe.model.router import Router
from moe.model.two_hop import nodes_of
from moe.train.adam import TorchAdam
from parallel.head import head_losses
from parallel.vocab import cross_entropy

IGNORE = -100
TIE = 1e-5  # scores nearer than this may be put in either order
WIDTHS = (192, 192, 128)  # of MLA's queries, keys and values


def attention(device: torch.device, size: int, dtype: torch.dtype, *, documents: bool) -> Found:
    """`attend` and its gradients, causal or inside documents; the note names the kernels that ran."""
    length = 40 * size
    inputs = [normal(2, length, 2, width, dtype=dtype, seed=seed) for seed, width in enumerate(WIDTHS)]
    grad = normal(2, length, 2, WIDTHS[-1], dtype=dtype, seed=3)
    numbers = (torch.arange(length) // max(1, length // 3)).expand(2, -1)
    mask = document_mask(numbers if documents else torch.zeros_like(numbers))
    scale = WIDTHS[0] ** -0.5
    exact_inputs = [leaf(each) for each in inputs]
    exact = _plain_attention(exact_inputs, scale, mask)
    exact.backward(grad.double())
    held = [each.to(device).requires_grad_() for each in inputs]
    with float32_products("highest"):
        out = attend(held[0], held[1], held[2], scale, mask.to(device) if documents else None)
        kernel = _kernel_behind(out)
        out.backward(grad.to(device))
    pairs = {"output": (out, exact)} | _gradient_pairs(held, exact_inputs)
    return worst(pairs, f"ran: {kernel}")


def _kernel_behind(out: Tensor) -> str:
    """Which of torch's attention kernels made this: its node in the graph of gradients is named after it."""
    prefix, waiting = "ScaledDotProduct", [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node.name().startswith(prefix):
            return str(node.name().removeprefix(prefix).removesuffix("Backward0"))
        waiting += [] if node is None else [each for each, _ in node.next_functions]
    return "plain products"


def attention_in_parts(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """Two partial attentions over halves of the keys, merged, and their gradients."""
    half, length = 20 * size, 40 * size
    inputs = [normal(2, length, 2, width, dtype=dtype, seed=seed) for seed, width in enumerate(WIDTHS)]
    grad = normal(2, length, 2, WIDTHS[-1], dtype=dtype, seed=3)
    exact_inputs, scale = [leaf(each) for each in inputs], WIDTHS[0] ** -0.5
    exact = _plain_attention(exact_inputs, scale, document_mask(torch.zeros(2, length)))
    exact.backward(grad.double())
    query, key, value = held = [each.to(device).requires_grad_() for each in inputs]
    with float32_products("highest"):
        first = [
            partial_attention(query[:, begin:end], key[:, begin:end], value[:, begin:end], scale, causal=True)
            for begin, end in ((0, half), (half, length))
        ]
        own = [torch.cat(parts, 1) for parts in zip(*first, strict=True)]
        past = partial_attention(query[:, half:], key[:, :half], value[:, :half], scale, causal=False)
        out = merge(*own, *past)
        out.backward(grad.to(device))
    return worst({"output": (out, exact)} | _gradient_pairs(held, exact_inputs))


def _plain_attention(inputs: Sequence[Tensor], scale: float, mask: Tensor) -> Tensor:
    query, key, value = inputs
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    chances = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhv->bqhv", chances, value)


def _gradient_pairs(held: list[Tensor], exact: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {}
    for name, found, true in zip(("query", "key", "value"), held, exact, strict=True):
        assert found.grad is not None and true.grad is not None
        pairs[f"{name} gradient"] = (found.grad, true.grad)
    return pairs


def norm(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """RMSNorm with its gradients."""
    hidden, grad = (normal(12, 64 * size, dtype=dtype, seed=seed) for seed in (0, 1))
    gain = normal(64 * size, dtype=dtype, seed=2)
    exact_hidden, exact_gain = leaf(hidden), leaf(gain)
    exact = exact_hidden * (exact_hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact_gain
    exact.backward(grad.double())
    module = RMSNorm(64 * size, 1e-6, dtype).to(device)
    with torch.no_grad():
        module.weight.copy_(gain)
    held = hidden.to(device).requires_grad_()
    out = module(held)
    out.backward(grad.to(device))
    assert held.grad is not None and exact_hidden.grad is not None
    assert module.weight.grad is not None and exact_gain.grad is not None
    return worst(
        {
            "output": (out, exact),
            "input gradient": (held.grad, exact_hidden.grad),
            "gain gradient": (module.weight.grad, exact_gain.grad),
        }
    )


def rope(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """Rotation of positions 0 to 64 `size`, with YaRN's frequencies."""
    settings = RopeConfig(kind="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707)
    heads, positions = normal(2, 64 * size, 2, 64, dtype=dtype), torch.arange(64 * size)
    turns = torch.polar(
        torch.ones(64 * size, 32, dtype=torch.float64),
        torch.outer(positions.double(), frequencies(settings, 64).double()),
    )
    pairs = torch.view_as_complex(heads.double().unflatten(-1, (-1, 2)))
    exact = torch.view_as_real(pairs * turns[:, None]).flatten(-2)
    turned = rotation(settings, 64, positions, device)
    return worst({"heads": (turned.apply(heads.to(device)), exact)})


ROUTED = ModelConfig(
    hidden_size=64,
    num_experts=64,
    top_k=6,
    num_groups=8,
    top_groups=4,
    routed_scaling_factor=2.5,
)


def router(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """V3's gate: the share of tokens that choose other experts than in fp64, where no scores tie."""
    module = Router(replace(ROUTED, hidden_size=32 * size), BalanceConfig(), dtype)
    weight = normal(*module.projection.weight.shape, dtype=dtype, seed=1, std=(32 * size) ** -0.5)
    hidden, bias = normal(2, 32 * size, 32 * size, dtype=dtype), normal(64, seed=2, std=0.05)
    with torch.no_grad():
        module.projection.weight.copy_(weight)
        module.bias.copy_(bias)
    valid = torch.ones(2, 32 * size, dtype=torch.bool, device=device)
    with float32_products("highest"), torch.no_grad():
        weights_TK, _, routing = module.to(device)(hidden.to(device), valid)
    scores_TE = (hidden.flatten(0, 1).double() @ weight.double().T).sigmoid()
    experts_TK, clear_T = _exact_choice(scores_TE + bias.double())
    found_TK, order = routing.experts_TK.cpu().sort(-1)
    wrong_T = (found_TK != experts_TK.sort(-1).values).any(-1) & clear_T
    gates_TK = scores_TE.gather(1, found_TK)
    exact_TK = gates_TK / gates_TK.sum(-1, keepdim=True) * ROUTED.routed_scaling_factor
    off = worst({"weights": (weights_TK.cpu().gather(1, order), exact_TK)}).error
    note = f"{int((~clear_T).sum())} of {len(clear_T)} tokens are ties; error of weights {off:.1e}"
    return Found(max(wrong_T.double().mean().item(), off), note)


def nodes(device: torch.device, size: int) -> Found:
    """Tokens for which the nodes of their seats, of which some are none, are not what Python's sets say."""
    num_seats, each = 64, 8
    seats_TK = choices("zipf", 48 * size, 6, num_seats + 1)
    reached = [sorted({seat // each for seat in seats} - {num_seats // each}) for seats in seats_TK.tolist()]
    padded = [(found + [num_seats // each] * 6)[:6] for found in reached]
    return Found(share_differing(nodes_of(seats_TK.to(device), num_seats, each), torch.tensor(padded)))


def _exact_choice(choice_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen experts [T, K], and the tokens [T] for which no tie is in the way."""
    by_group = choice_TE.unflatten(1, (ROUTED.num_groups, -1))
    groups = by_group.topk(2, -1).values.sum(-1).sort(-1, descending=True)
    kept = groups.indices[:, : ROUTED.top_groups]
    outside = torch.ones_like(groups.values, dtype=torch.bool).scatter_(1, kept, False)
    limited = by_group.masked_fill(outside[..., None], -torch.inf).flatten(1).sort(-1, descending=True)
    clear_T = _leads(groups.values, ROUTED.top_groups) & _leads(limited.values, ROUTED.top_k)
    return limited.indices[:, : ROUTED.top_k], clear_T


def _leads(ordered: Tensor, count: int) -> Tensor:
    return ordered[:, count - 1] - ordered[:, count] > TIE


def entropy(device: torch.device, size: int) -> Found:
    """Losses and gradients of logits in fp32, of which some have no label."""
    logits = normal(2, 8 * size, 200 * size, std=3.0)
    labels = torch.arange(16 * size).view(2, -1) % (200 * size)
    labels[:, ::5] = IGNORE
    exact_logits = leaf(logits)
    exact = F.cross_entropy(
        exact_logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    exact.sum().backward()
    held = logits.to(device).requires_grad_()
    losses = cross_entropy(held, labels.to(device), IGNORE, None)
    losses.sum().backward()
    assert held.grad is not None and exact_logits.grad is not None
    return worst({"losses": (losses, exact.view_as(labels)), "gradient": (held.grad, exact_logits.grad)})


def head(device: torch.device, size: int, dtype: torch.dtype) -> Found:
    """The head's losses over chunks, of which the last is shorter, and both gradients."""
    hidden, num_words = normal(2, 8 * size, 32 * size, dtype=dtype), 200 * size
    weight = normal(num_words, 32 * size, dtype=dtype, seed=1, std=(32 * size) ** -0.5)
    shares, labels = normal(2, 8 * size, seed=2), torch.arange(16 * size).view(2, -1) % num_words
    labels[:, ::5] = IGNORE
    exact_hidden, exact_weight = leaf(hidden), leaf(weight)
    logits = (exact_hidden @ exact_weight.T).flatten(0, 1)
    exact = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none").view_as(labels)
    exact.backward(shares.double())
    held, words = hidden.to(device).requires_grad_(), nn.Parameter(weight.to(device))
    words.main_grad = torch.zeros_like(words, dtype=torch.float32)  # type: ignore[attr-defined]
    with float32_products("highest"):
        losses = head_losses(held, words, labels.to(device), IGNORE, None, 64 * size)
        losses.backward(shares.to(device))
    assert held.grad is not None and exact_hidden.grad is not None and exact_weight.grad is not None
    return worst(
        {
            "losses": (losses, exact),
            "hidden gradient": (held.grad, exact_hidden.grad),
            "weight gradient": (words.main_grad, exact_weight.grad),  # type: ignore[attr-defined]
        }
    )


def adamw(device: torch.device, size: int) -> Found:
    """How far three steps of the fused kernel move a weight, beside the plain formula (1711.05101)."""
    rate, betas, eps, decay = 1e-2, (0.9, 0.95), 1e-8, 0.1
    weight = normal(64 * size, 16)
    held = weight.clone().to(device)
    adam = TorchAdam([held], lr=rate, betas=betas, eps=eps, weight_decay=decay)
    adam.state[held] = {
        "step": torch.zeros((), device=device),
        "exp_avg": torch.zeros_like(held),
        "exp_avg_sq": torch.zeros_like(held),
    }
    exact = weight.double()
    mean, square = torch.zeros_like(exact), torch.zeros_like(exact)
    for step in (1, 2, 3):
        grad = normal(64 * size, 16, seed=step)
        held.grad = grad.to(device)
        adam.step()
        mean = betas[0] * mean + (1 - betas[0]) * grad.double()
        square = betas[1] * square + (1 - betas[1]) * grad.double().square()
        root = (square / (1 - betas[1] ** step)).sqrt() + eps
        exact = exact * (1 - rate * decay) - rate * mean / (1 - betas[0] ** step) / root
    return worst({"movement": (held.cpu().double() - weight, exact - weight)})
