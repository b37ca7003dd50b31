"""A model, a corpus and settings small enough for tests, for the packages above the model."""

import json
import random
from dataclasses import replace
from pathlib import Path

from moe.config import (
    BalanceConfig,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

WORDS = ["expert", "router", "token", "layer", "rank", "gate", "bias", "load"]
WORDS += ["shard", "stage", "batch", "norm", "head", "rope", "mesh", "plan"]


def write_corpus(path: Path, num_documents: int = 60) -> Path:
    """A JSONL file of made-up sentences in three domains with words of their own."""
    stream = random.Random(0)
    rows = []
    for number in range(num_documents):
        domain = number % 3
        vocabulary = WORDS[domain * 4 : domain * 4 + 8]
        text = " ".join(stream.choice(vocabulary) for _ in range(stream.randint(20, 120)))
        rows.append(json.dumps({"text": text, "domain": f"d{domain}"}))
    path.write_text("\n".join(rows) + "\n")
    return path


SMALL_MODEL = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=3,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_experts=8,
    top_k=2,
    num_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)


def small_run(folder: Path, **model: object) -> RunConfig:
    """Settings of a run on the made-up corpus, kept with its cache under a folder."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    return RunConfig(
        model=replace(SMALL_MODEL, **model),  # type: ignore[arg-type]
        data=DataConfig(
            paths=(str(corpus),), cache=str(folder / "cache"), sequence_length=32, validation_fraction=0.2
        ),
        layout=LayoutConfig(microbatches=2),
        optim=OptimConfig(warmup_steps=2, lr=3e-3),
        train=TrainConfig(steps=6, batch_size=8, save_every=2, eval_every=3, eval_sequences=10),
        balance=BalanceConfig(bias_rate=1e-2, sequence_aux=1e-3),
    )
