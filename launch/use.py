"""`switchyard evaluate` and `switchyard generate`: what a model knows, and what it writes.

Both take a run, a checkpoint, a converted or a Hugging Face folder, on one rank or under any layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch import compose
from launch.inherit import begin_from
from launch.options import Parser
from launch.output import check_json
from launch.together import Together
from moe.config import BalanceConfig, LayoutConfig, OptimConfig, RunConfig, TrainConfig, TuneConfig
from moe.data.corpus import prepare
from moe.hf.places import SETTINGS, find
from moe.rules import validate
from parallel.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluatePlan:
    """What is to be measured: the loss on text, or multiple-choice questions, or both."""

    config: RunConfig
    ranks: int
    text: bool
    everything: bool  # the training documents too
    choices: str | None
    json: str | None


@dataclass(frozen=True, kw_only=True)
class GeneratePlan:
    """What is to be continued, and how."""

    config: RunConfig
    ranks: int
    prompt: str
    tokens: int
    temperature: float
    chat: bool


def evaluate(arguments: Sequence[str]) -> int:
    """`switchyard evaluate`; the exit code."""
    return Together(
        command="evaluate", plan=EvaluatePlan, make_plan=_evaluate_plan, prepare=_prepare, run=_evaluate
    ).main(arguments)


def generate(arguments: Sequence[str]) -> int:
    """`switchyard generate`; the exit code."""
    return Together(
        command="generate",
        plan=GeneratePlan,
        make_plan=_generate_plan,
        prepare=lambda plan: None,
        run=_generate,
    ).main(arguments)


def settings(model: str, overrides: Sequence[str], world_size: int | None) -> tuple[RunConfig, int]:
    """The settings under which a model is used, and the ranks that takes; one unless `layout` says more.

    Data and precision of a run, or of a checkpoint of one, are its own; a folder's precision is that of the
    stored weights.
    """
    path = Path(model).expanduser()
    place = find(path)
    saved = compose.read_yaml(place.folder / SETTINGS) if place.is_run else _as_stored(path)
    base = replace(
        saved,
        layout=LayoutConfig(),
        optim=OptimConfig(),
        train=replace(saved.train, init=str(path)),
        balance=BalanceConfig(bias="none" if saved.balance.bias == "none" else "frozen"),
        tune=TuneConfig(),
    )
    config, _ = begin_from(compose.from_config(base, overrides), overrides)
    return config, validate(config, world_size).world_size


def _as_stored(path: Path) -> RunConfig:
    """The defaults, with weights held as they lie in a folder."""
    import torch

    from moe.hf.weights import open_weights

    is_wide = open_weights(path).weights.dtype("embedding.weight") == torch.float32
    return RunConfig(train=TrainConfig(precision="fp32" if is_wide else "bf16"))


def _evaluate_plan(arguments: Sequence[str], world_size: int | None) -> EvaluatePlan:
    parser = Parser("evaluate")
    parser.add_argument("model")
    parser.add_argument("--choices", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args(arguments)
    check_json(options.json)
    if options.choices and not options.choices.is_file():
        raise UserError(f"`--choices` must be a JSONL file, but {options.choices} does not exist: name one")
    config, ranks = settings(options.model, overrides, world_size)
    asks_for_text = options.all or any(word.startswith("data.paths=") for word in overrides)
    return EvaluatePlan(
        config=config,
        ranks=ranks,
        text=asks_for_text or options.choices is None,
        everything=options.all,
        choices=str(options.choices.resolve()) if options.choices else None,
        json=str(options.json.resolve()) if options.json else None,
    )


def _generate_plan(arguments: Sequence[str], world_size: int | None) -> GeneratePlan:
    parser = Parser("generate")
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--chat", action="store_true")
    options, overrides = parser.parse_known_args(arguments)
    for name, least in (("tokens", 1), ("temperature", 0)):
        if not getattr(options, name) >= least:  # nor is `nan`
            raise UserError(f"`--{name}` must be at least {least}, but is {getattr(options, name)}: raise it")
    config, ranks = settings(options.model, overrides, world_size)
    return GeneratePlan(
        config=config,
        ranks=ranks,
        prompt=options.prompt,
        tokens=options.tokens,
        temperature=options.temperature,
        chat=options.chat,
    )


def _prepare(plan: EvaluatePlan) -> None:
    if plan.text:
        prepare(plan.config.data, plan.config.model.vocab_size, print)


def _evaluate(plan: EvaluatePlan, folder: Path) -> int:
    from launch.using import evaluate

    return evaluate(plan)


def _generate(plan: GeneratePlan, folder: Path) -> int:
    from launch.using import generate

    return generate(plan)
