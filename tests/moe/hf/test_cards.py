"""A card for each family: how far the model is from transformers', and that its files come back bit for bit.

With SWITCHYARD_CARDS the cards are kept in that folder.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from moe.hf.config import from_hf
from moe.hf.families import family
from moe.hf.inventory import model_tensors
from moe.hf.load import open_model
from moe.hf.save import save
from tests.moe.hf.tiny import (
    KINDS,
    oracle,
    relative_error,
    saved,
    token_ids,
    worst_gradient,
)

TOKENS, LABELS = token_ids(1), token_ids(2)
SIZES = ("vocab_size", "hidden_size", "num_layers", "num_experts", "top_k", "num_heads", "num_kv_heads")


def same_bits(ours: Path, theirs: Path) -> bool:
    written, read = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    same = written.keys() == read.keys()
    return same and all(t.dtype == read[n].dtype and torch.equal(t, read[n]) for n, t in written.items())


def loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), LABELS.flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_card(kind: str, tmp_path: Path) -> None:
    """Logits within 1e-5, every gradient within 1e-4 of the tensor's largest, files bit-equal."""
    reference = oracle(kind)
    theirs, ours = saved(reference, tmp_path / "theirs"), tmp_path / "ours"
    model = open_model(theirs)
    save(ours, model.config, from_hf(reference.config.to_dict())[1], model_tensors(model))
    logits, expected = model(TOKENS), reference(TOKENS).logits
    loss(logits).backward()
    loss(expected).backward()
    gradient, where = worst_gradient(model, reference)
    card = {
        "kind": kind,
        "family": family(model.config),
        "sizes": {name: getattr(model.config, name) for name in SIZES},
        "worst_logit_difference": relative_error(logits, expected),
        "worst_gradient_difference": gradient,
        "worst_gradient": where,
        "round_trip_bit_equal": same_bits(ours, theirs),
    }
    folder = Path(os.environ.get("SWITCHYARD_CARDS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"card-{kind}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    assert card["family"] == reference.config.model_type
    assert card["worst_logit_difference"] < 1e-5
    assert gradient < 1e-4, where
    assert card["round_trip_bit_equal"]
