"""Multi-token prediction: what is joined, what is predicted, who is counted, and where gradients go."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import BalanceConfig
from moe.model.attention import document_mask
from moe.model.mtp import IGNORE, MTPModule, ahead
from moe.model.rope import rotation
from moe.model.transformer import Microbatch, Transformer
from parallel.pipeline.tape import Direct, Tape, run
from tests.small import SMALL_MODEL

CONFIG = replace(SMALL_MODEL, num_mtp_layers=2, init_std=0.2)
TEXT = torch.randint(1, CONFIG.vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))
NUM_REAL = (11, 6)  # tokens of each row's text; the rest is padding


def batch(loss_weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Microbatch:
    """Inputs and next tokens; the second row ends in padding."""
    real = torch.arange(11) < torch.tensor(NUM_REAL)[:, None]
    valid, labels = real[:, :-1], TEXT.masked_fill(~real, IGNORE)[:, 1:]
    tokens = TEXT.masked_fill(~real, 0)[:, :-1]
    return Microbatch(tokens=tokens, labels=labels, valid=valid, loss_weights=loss_weights)


def test_ahead() -> None:
    values = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert ahead(values, 0, 0).tolist() == values.tolist()
    assert ahead(values, 1, IGNORE).tolist() == [[2, 3, 4, IGNORE], [6, 7, 8, IGNORE]]
    assert ahead(values, 3, 0).tolist() == [[4, 0, 0, 0], [8, 0, 0, 0]]
    assert ahead(values > 3, 2, False).tolist() == [[False, True, False, False], [True, True, False, False]]


def plain_block(module: MTPModule, hidden: Tensor) -> Tensor:
    """The module's block, called piece by piece."""
    block, config = module.block, CONFIG
    turn = rotation(config.rope, config.qk_rope_head_dim, torch.arange(hidden.shape[1]), hidden.device)
    hidden = hidden + block.attention(block.attention_norm(hidden), turn)
    assert block.moe is not None
    return hidden + block.moe(block.mlp_norm(hidden))


@torch.no_grad()
def test_module_k_predicts_the_token_k_plus_one_ahead() -> None:
    """Section 2.2 of DeepSeek-V3 by plain indexing of the text, one position at a time."""
    model, read = Transformer(CONFIG), batch()
    normed: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, inputs, output: normed.append(output))
    _, outcome = run(model.phases(Direct(), read))
    (hidden,) = normed
    for depth, module in enumerate(model.mtp, start=1):
        assert isinstance(module, MTPModule)
        tokens = torch.cat((read.tokens[:, depth:], torch.zeros(2, depth, dtype=torch.int64)), 1)
        embedded = module.embedding_norm(model.embedding(tokens))
        hidden = plain_block(module, module.projection(torch.cat((embedded, module.hidden_norm(hidden)), -1)))
        assert model.head is not None
        logits = module.norm(hidden) @ model.head.t()
        for b in range(2):
            for i in range(10):
                target, found = i + depth + 1, outcome.mtp_losses[depth - 1][b, i].item()
                if target < NUM_REAL[b]:
                    assert found == pytest.approx(
                        F.cross_entropy(logits[b, i], TEXT[b, target]).item(), rel=1e-4
                    )
                else:
                    assert found == 0.0


def test_every_module_has_its_own_router_counted_without_padding() -> None:
    model = Transformer(CONFIG, BalanceConfig(sequence_aux=0.1))
    _, outcome = run(model.phases(Tape(), batch()))
    names = [name for name, _ in model.routers()]
    assert names == list(outcome.loads) == ["1", "2", "mtp0", "mtp1"]
    assert len({id(router) for _, router in model.routers()}) == 4
    for name, ahead_by in (("1", 0), ("2", 0), ("mtp0", 1), ("mtp1", 2)):
        real = (10 - ahead_by) + (6 - ahead_by)  # positions whose token ahead is among the inputs and real
        assert outcome.loads[name].counts_E.sum() == real * CONFIG.top_k
        assert outcome.loads[name].auxiliary_loss > 0


def gradients(loss_weights: tuple[float, ...]) -> dict[str, Tensor | None]:
    model, tape = Transformer(CONFIG), Tape()
    run(model.phases(tape, batch(loss_weights)))
    run(tape.backward())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_reaches_the_shared_embedding_and_head() -> None:
    first = gradients((0.0, 1.0, 0.0))
    for name in ("embedding.weight", "head", "layers.0.mlp.down.weight", "mtp.0.projection.weight"):
        grad = first[name]
        assert grad is not None and grad.any(), name
    seen = first["embedding.weight"]
    assert seen is not None
    assert not seen[0].any()  # what stands in for the missing tokens ahead gets none
    assert all(first[name] is None or not first[name].any() for name in first if name.startswith("mtp.1"))
    second = gradients((0.0, 0.0, 1.0))
    through = second["mtp.0.projection.weight"]  # module 2 stands on module 1
    assert through is not None and through.any()


def test_losses_weigh_as_the_batch_says() -> None:
    parts = [gradients(weights) for weights in ((0.5, 0, 0), (0, 0.25, 0), (0, 0, 0.125))]
    whole = gradients((0.5, 0.25, 0.125))
    for name, grad in whole.items():
        assert grad is not None, name
        total = sum(part[name] for part in parts if part[name] is not None)
        torch.testing.assert_close(grad, total, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_modules_see_no_token_beyond_the_one_ahead() -> None:
    model, read = Transformer(CONFIG), batch()
    tokens = read.tokens.clone()
    tokens[0, 6] += 1
    changed = replace(read, tokens=tokens)
    before, after = (run(model.phases(Direct(), each))[1] for each in (read, changed))
    for depth in (1, 2):
        same = torch.isclose(before.mtp_losses[depth - 1][0], after.mtp_losses[depth - 1][0], rtol=1e-6)
        assert same.tolist() == [True] * (6 - depth) + [False] * (4) + [True] * depth


@torch.no_grad()
def test_nothing_is_predicted_across_documents() -> None:
    """Position 3 ends a document: with documents masked, no module may join it to the next one's tokens."""
    documents = torch.tensor([[0] * 4 + [1] * 6] * 2)
    read = batch()
    labels = read.labels.clone()
    labels[:, 3] = IGNORE  # as the loader marks it
    read = replace(read, labels=labels, documents=documents)
    assert document_mask(documents)[0, 0, 4, 3].item() is False
    losses = run(Transformer(CONFIG).phases(Direct(), read))[1].mtp_losses
    assert losses[0][0, 2] == 0  # its label would stand at position 3
    assert losses[0][0, 3] == 0 and losses[1][0, 2] == 0 and losses[1][0, 3] == 0
