"""What every rank of `switchyard select-experts` does; the first one writes and shows what was chosen."""

import math
from pathlib import Path

from launch.chosen import choose, count, describe, write_selection
from launch.select import Plan
from launch.using import reading
from moe.data.corpus import prepare
from moe.hf.inventory import complete, is_bias
from moe.selection import Selection
from moe.train.evaluate import rounds
from moe.train.scoring import score
from moe.train.step import local_batch_size, open_loader


def select(plan: Plan) -> int:
    """Score, choose, and write. Every rank calls."""
    config = plan.config
    with reading(config) as engine:
        loader = open_loader(prepare(config.data, config.model.vocab_size).train, config)
        batches = rounds(loader, engine.groups, plan.sequences, local_batch_size(config, engine.groups))
        scores = score(engine, batches, separate_documents=config.data.separate_documents)
    if engine.groups.rank == 0:
        chosen = choose(scores, plan.score, plan.threshold)
        write_selection(Path(plan.out), config.model, chosen, scores)
        print(describe(config.model, chosen, scores, plan.score, plan.threshold))
        print(f"\n{_share(plan, chosen)}: {plan.out}", flush=True)
    return 0


def _share(plan: Plan, chosen: Selection) -> str:
    """How many experts were chosen, and what share of the model's parameters they are."""
    model = plan.config.model
    sizes = {name: math.prod(shape) for name, shape in complete(model).items() if not is_bias(name)}
    trained, every = sum(size for name, size in sizes.items() if chosen.trains(name)), sum(sizes.values())
    return f"{count(model, chosen)}, {trained:,} of {every:,} parameters ({trained / every:.1%})"
