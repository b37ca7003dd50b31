"""The model computes what transformers computes, through the tape and where the two depart on purpose.

Logits and gradients of every family are compared in test_cards.py.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe.config import BalanceConfig, RopeConfig
from moe.hf.config import from_hf
from moe.hf.load import load, open_model
from moe.model.rope import frequencies, rotation_scale
from moe.model.transformer import Microbatch, Transformer
from parallel.pipeline.overlap import run_pair
from parallel.pipeline.tape import Tape, run
from tests.moe.hf.tiny import oracle, relative_error, saved, token_ids, worst_gradient

TOKENS, LABELS = token_ids(1), token_ids(2)


def assert_gradients_agree(model: Transformer, reference: nn.Module) -> None:
    error, name = worst_gradient(model, reference)
    assert error < 1e-4, f"{name}: {error:.2e}"


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def through_the_tape(model: Transformer, overlap: bool) -> None:
    """The two sequences as two microbatches, each with its share of the mean."""
    first, second = (
        Microbatch(
            tokens=TOKENS[row : row + 1],
            labels=LABELS[row : row + 1],
            valid=torch.ones(1, TOKENS.shape[1], dtype=torch.bool),
            loss_weights=(1 / TOKENS.numel(),),
            auxiliary_share=1 / len(TOKENS),
        )
        for row in range(len(TOKENS))
    )
    tape, other = Tape(), Tape()
    run(model.phases(tape, first))
    if overlap:
        run_pair(model.phases(other, second), tape.backward())
    else:
        run(tape.backward())
        run(model.phases(other, second))
    run(other.backward())


@pytest.mark.parametrize("kind", ["v2", "v3", "qwen3-moe"])
@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_through_the_tape(kind: str, overlap: bool, tmp_path: Path) -> None:
    reference = oracle(kind)
    model = open_model(saved(reference, tmp_path / "model"))
    through_the_tape(model, overlap)
    mean_loss(reference(TOKENS).logits, LABELS).backward()
    assert_gradients_agree(model, reference)


def test_the_bias_decides_in_the_oracle(tmp_path: Path) -> None:
    """Without this the comparison above would not see a bias that is ignored."""
    model = open_model(saved(oracle("v3"), tmp_path / "model"))
    with_bias = model(TOKENS)
    for _, router in model.routers():
        assert router.bias.max() < 0
        router.bias.zero_()
    assert relative_error(model(TOKENS), with_bias) > 1e-2


def test_tied_embeddings(tmp_path: Path) -> None:
    reference = oracle("v2-lite", tie_word_embeddings=True)
    model = open_model(saved(reference, tmp_path / "model"))
    assert model.head is None
    assert relative_error(model(TOKENS), reference(TOKENS).logits) < 1e-5


def normalised_and_not_scaled(module: nn.Module, _: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple:
    """V2's released gate with `norm_topk_prob`; transformers' gate has scaled and not normalised."""
    logits, weights, chosen = output
    return logits, weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen


def test_departure_v2_normalises_as_released(tmp_path: Path) -> None:
    """transformers ignores `norm_topk_prob` for V2; the release normalises, and then does not scale."""
    reference = oracle("v2", norm_topk_prob=True)
    logits = open_model(saved(reference, tmp_path / "model"))(TOKENS)
    assert relative_error(logits, reference(TOKENS).logits) > 1e-2
    for layer in reference.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(normalised_and_not_scaled)
    assert relative_error(logits, reference(TOKENS).logits) < 1e-5


def released_auxiliary_loss(
    logits_TE: Tensor, top_k: int, alpha: float, rows: int, by_sequence: bool
) -> Tensor:
    """V2's gate as released: the selection's counts times the mean softmax scores."""
    scores_BSE = logits_TE.softmax(-1).unflatten(0, (rows, -1))
    _, length, num_experts = scores_BSE.shape
    chosen = scores_BSE.topk(top_k).indices.flatten(1)
    if by_sequence:
        counts_BE = torch.stack([torch.bincount(row, minlength=num_experts) for row in chosen])
        ce_BE = counts_BE / (length * top_k / num_experts)
        return alpha * (ce_BE * scores_BSE.mean(1)).sum(1).mean()
    share_E = torch.bincount(chosen.flatten(), minlength=num_experts) / chosen.numel()
    return alpha * (share_E * num_experts * scores_BSE.mean((0, 1))).sum()


@pytest.mark.parametrize("by_sequence", [True, False])
def test_departure_auxiliary_loss_as_released(by_sequence: bool, tmp_path: Path) -> None:
    """transformers has no auxiliary loss: it is added to the oracle here, from its own gates' logits."""
    alpha = 0.3
    reference = oracle("v2-lite", aux_loss_alpha=alpha, seq_aux=by_sequence)
    model = open_model(saved(reference, tmp_path / "model"))
    batch = Microbatch(
        tokens=TOKENS,
        labels=LABELS,
        valid=torch.ones_like(TOKENS, dtype=torch.bool),
        loss_weights=(1 / TOKENS.numel(),),
    )
    tape = Tape()
    _, outcome = run(model.phases(tape, batch))
    run(tape.backward())
    output = reference(TOKENS, output_router_logits=True)
    assert len(output.router_logits) == 2
    auxiliary = [
        released_auxiliary_loss(logits, 3, alpha, len(TOKENS), by_sequence) for logits in output.router_logits
    ]
    for load_of_layer, expected in zip(outcome.loads.values(), auxiliary, strict=True):
        assert load_of_layer.auxiliary_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (mean_loss(output.logits, LABELS) + sum(auxiliary)).backward()
    assert_gradients_agree(model, reference)


def test_microbatches_share_the_sequence_loss(tmp_path: Path) -> None:
    """Sequence by sequence through the tape gives the same gradients as both sequences at once."""
    reference = oracle("v2-lite", aux_loss_alpha=0.3, seq_aux=True)
    model = open_model(saved(reference, tmp_path / "model"))
    through_the_tape(model, overlap=True)
    output = reference(TOKENS, output_router_logits=True)
    auxiliary = sum(released_auxiliary_loss(logits, 3, 0.3, 2, True) for logits in output.router_logits)
    (mean_loss(output.logits, LABELS) + auxiliary).backward()
    assert_gradients_agree(model, reference)


def test_a_new_bias_leaves_v2_as_it_was(tmp_path: Path) -> None:
    """Fine-tuning V2 with the selection bias begins from the released choice, whatever stood there."""
    reference = oracle("v2-lite")
    folder = saved(reference, tmp_path / "model")
    config, _ = from_hf(reference.config.to_dict())
    model = Transformer(config, BalanceConfig(bias="update"), seed=None)
    for _, router in model.routers():
        router.bias.fill_(torch.nan)
    load(model, folder)
    assert relative_error(model(TOKENS), reference(TOKENS).logits) < 1e-5


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "factor"), [(0.707, 0.707, 40.0), (1.0, 1.0, 40.0), (1.0, 0.5, 8.0)]
)
def test_yarn_frequencies(mscale: float, mscale_all_dim: float, factor: float) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }
    config = oracle("v2-lite", qk_rope_head_dim=64, rope_parameters=rope).config
    theirs, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    ours = RopeConfig(kind="yarn", factor=factor, mscale=mscale, mscale_all_dim=mscale_all_dim)
    torch.testing.assert_close(frequencies(ours, 64), theirs, rtol=1e-6, atol=0)
    assert math.isclose(rotation_scale(ours), scale)
    plain = frequencies(RopeConfig(), 64)
    assert torch.equal(theirs[:10], plain[:10])  # fast pairs keep their frequency
    torch.testing.assert_close(theirs[-8:], plain[-8:] / factor)  # slow ones are stretched
