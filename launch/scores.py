"""What every rank of `switchyard select-experts` does; the first one writes and shows what was chosen."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.select import Plan
from launch.using import reading
from moe.data.corpus import prepare
from moe.hf.inventory import complete, is_bias
from moe.model.transformer import expert_layers
from moe.selection import Selection, as_json, released_numbers, shortest_prefix
from moe.telemetry.rows import replace_file
from moe.train.evaluate import rounds
from moe.train.scoring import Scores, score
from moe.train.step import local_batch_size, open_loader


def select(plan: Plan) -> int:
    """Score, choose, and write. Every rank calls."""
    config = plan.config
    with reading(config) as engine:
        loader = open_loader(prepare(config.data, config.model.vocab_size).train, config)
        batches = rounds(loader, engine.groups, plan.sequences, local_batch_size(config, engine.groups))
        scores = score(engine, batches, separate_documents=config.data.separate_documents)
    if engine.groups.rank == 0:
        layers = scores.token if plan.score == "token" else scores.gate
        chosen = {layer: shortest_prefix(values, plan.threshold) for layer, values in layers.items()}
        _write(plan, Selection(experts=chosen), scores)
        print(describe(plan, Selection(experts=chosen), scores.tokens), flush=True)
    return 0


def _write(plan: Plan, selection: Selection, scores: Scores) -> None:
    """The selection, and beside it the scores as ESFT's own scripts lay them out."""
    out, numbers = Path(plan.out), released_numbers(plan.config.model)
    content: dict[str, Any] = {"tokens": scores.tokens}
    for kind, layers in (("token_scores", scores.token), ("gate_scores", scores.gate)):
        content[kind] = {number: _numbered(layers[name]) for number, name in numbers.items()}
    replace_file(scores_file(out), json.dumps(content).encode())
    replace_file(out, json.dumps(as_json(selection, plan.config.model)).encode())


def _numbered(values: Sequence[float]) -> dict[str, float]:
    return {str(expert): value for expert, value in enumerate(values)}


def scores_file(out: Path) -> Path:
    """Where the scores of a selection go: `law.scores.json` beside `law.json`."""
    return out.with_name(f"{out.stem}.scores{out.suffix}")


def describe(plan: Plan, selection: Selection, tokens: int) -> str:
    """A table of what was chosen, and its share of the model."""
    model = plan.config.model
    sizes = {name: math.prod(shape) for name, shape in complete(model).items() if not is_bias(name)}
    trained = sum(size for name, size in sizes.items() if selection.trains(name))
    rows = [
        f"  {layer:>5}  {len(selection.experts[layer]):>7}  {' '.join(map(str, selection.experts[layer]))}"
        for layer in expert_layers(model)
    ]
    number = sum(map(len, selection.experts.values()))
    return "\n".join(
        (
            f"{plan.score} scores of {tokens:,} tokens, threshold {plan.threshold:g}\n",
            "  layer  experts  numbers, the greatest score first",
            *rows,
            f"\n{number} of {model.num_experts * len(rows)} experts, {trained:,} of {sum(sizes.values()):,} "
            f"parameters ({trained / sum(sizes.values()):.1%}): {plan.out}",
        )
    )
