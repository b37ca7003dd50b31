"""What a rank of `switchyard evaluate` or `switchyard generate` does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer

from launch.output import write_json
from launch.use import EvaluatePlan, GeneratePlan
from moe.config import RunConfig
from moe.data.corpus import prepare
from moe.data.template import BadChat, ChatTemplate, read_template
from moe.data.tokenizer import begin_of_text, check_tokenizer, end_of_document, open_tokenizer
from moe.rules import validate
from moe.train.choices import Grade, Question, grade, read_questions
from moe.train.engine import Engine, Switchyard
from moe.train.evaluate import evaluate as losses_of
from moe.train.evaluate import perplexity, rounds
from moe.train.sample import sample
from moe.train.step import local_batch_size, make_reader, open_loader
from moe.train.world import world
from parallel.errors import UserError
from parallel.groups import build_groups


@contextmanager
def reading(config: RunConfig) -> Iterator[Switchyard]:
    """The model of the settings on these ranks, to be run forward."""
    with world(deterministic=config.train.deterministic) as device:
        groups = build_groups(validate(config, dist.get_world_size() if dist.is_initialized() else 1))
        engine = make_reader(config, groups, device)
        yield engine
        engine.close()


def evaluate(plan: EvaluatePlan) -> int:
    """Print losses and grades as tables, and write them if asked; 0."""
    config, found = plan.config, dict[str, Any]()
    questions = read_questions(Path(plan.choices)) if plan.choices else []
    with reading(config) as engine:
        speaks = engine.groups.rank == 0
        if plan.text:
            losses = _losses(engine, plan)
            found["losses"] = {d: {"loss": x, "perplexity": perplexity(x)} for d, x in losses.items()}
            if speaks:
                print(_loss_table(losses), flush=True)
        if questions:
            grades = _grades(engine, config, questions)
            found["choices"] = {domain: asdict(each) for domain, each in grades.items()}
            if speaks:
                print(_grade_table(grades), flush=True)
        if speaks and plan.json:
            write_json(Path(plan.json), found)
    return 0


def generate(plan: GeneratePlan) -> int:
    """Print the prompt's continuation, or with `chat` the answer to it; 0."""
    config = plan.config
    tokenizer = _tokenizer(config)
    if plan.chat:
        prompt, stop = _question(config, tokenizer, plan.prompt)
    else:
        stop = end_of_document(tokenizer)
        prompt = _start(config, tokenizer) + tokenizer.encode(plan.prompt, add_special_tokens=False).ids or [
            stop
        ]
    with reading(config) as engine:
        tokens = sample(
            engine,
            prompt,
            plan.tokens,
            context=config.model.max_context,
            seed=config.train.seed,
            temperature=plan.temperature,
            stop=stop,
        )
        if engine.groups.rank == 0:
            begin = len(prompt) if plan.chat else len(_start(config, tokenizer))
            print(tokenizer.decode(tokens[begin:]), flush=True)
    return 0


def _question(config: RunConfig, tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
    """A user's message in the chat template, and what ends the answer."""
    template = ChatTemplate(read_template(config.data.template, config.data.tokenizer), tokenizer)
    try:
        return template.prompt([{"role": "user", "content": text}]), template.eos
    except BadChat as error:
        raise UserError(
            f"`data.template` must take a user's message, but does not ({error}): name another template"
        ) from None


def _losses(engine: Engine, plan: EvaluatePlan) -> dict[str, float]:
    config = plan.config
    corpus = prepare(config.data, config.model.vocab_size)
    splits = [corpus.validation, corpus.train] if plan.everything else [corpus.validation]
    loaders = [open_loader(shards, config) for shards in splits if shards.num_tokens]
    if not loaders:
        raise UserError(
            "`data.paths` must hold documents for validation, but none is held out: set `--all` or a larger "
            "`data.validation_fraction`"
        )
    size = local_batch_size(config, engine.groups)
    batches = chain.from_iterable(rounds(loader, engine.groups, None, size) for loader in loaders)
    return losses_of(engine, batches, corpus.domains, mask_documents=config.data.separate_documents)


def _grades(engine: Engine, config: RunConfig, questions: Sequence[Question]) -> dict[str, Grade]:
    tokenizer = _tokenizer(config)
    return grade(
        engine,
        tokenizer,
        questions,
        context=config.model.max_context,
        batch_size=local_batch_size(config, engine.groups),
        start=_start(config, tokenizer),
    )


def _start(config: RunConfig, tokenizer: Tokenizer) -> list[int]:
    """What stands before every text that the model sees."""
    assert config.data.tokenizer is not None
    first = begin_of_text(config.data.tokenizer, tokenizer)
    return [] if first is None else [first]


def _tokenizer(config: RunConfig) -> Tokenizer:
    assert config.data.tokenizer is not None, "weights come with their tokenizer"
    tokenizer = open_tokenizer(config.data.tokenizer)
    check_tokenizer(tokenizer, config.model.vocab_size)
    return tokenizer


def _loss_table(losses: dict[str, float]) -> str:
    width = max(map(len, losses))
    rows = (f"  {name:<{width}}  {loss:8.4f}  {perplexity(loss):10.2f}" for name, loss in losses.items())
    return "\n".join([f"  {'domain':<{width}}  {'loss':>8}  {'perplexity':>10}", *rows])


def _grade_table(grades: dict[str, Grade]) -> str:
    width = max(len("domain"), *map(len, grades))
    rows = (
        f"  {name:<{width}}  {each.questions:9d}  {each.accuracy:8.1%}  {each.standard_error:8.1%}  "
        f"{each.per_byte:8.1%}"
        for name, each in grades.items()
    )
    titles = f"  {'domain':<{width}}  questions  accuracy  +- error  per byte"
    return "\n".join([titles, *rows])
