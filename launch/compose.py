"""From a recipe, or the saved settings of a run, and overrides to one `RunConfig`.

Hydra composes and overrides, nothing more: the dataclasses' defaults are registered as `base`, a
recipe merges its differences into them, overrides come last, and the plain result is built into
frozen dataclasses. Nothing of Hydra or OmegaConf leaves this file, and whatever they reject leaves it
as a `UserError`. No torch.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config import ClusterConfig, RunConfig
from moe.rules import build, known_keys, unknown_key
from parallel.errors import UserError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"  # in a checkout and in an installed wheel


def take(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the command's own `name=value` words from the overrides that Hydra reads."""
    taken: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in names:
            overrides.append(argument)
        elif name in taken:
            raise UserError(f"`{name}=` is given twice, as {taken[name]!r} and {value!r}: keep one")
        elif not value:
            raise UserError(f"`{argument}` names nothing: write `{name}=NAME`")
        else:
            taken[name] = value
    return taken, overrides


def from_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a recipe (a name in `recipes/`, or a path to a YAML file) under overrides.

    `cluster=NAME` among these stands for all settings of `recipes/cluster/NAME.yaml`.
    """
    path = find_recipe(recipe)
    defaults = _load(path).get("defaults")
    if not isinstance(defaults, list) or "_self_" not in defaults:
        raise UserError(f"{path} does not name what it builds on: begin it with `defaults: [base, _self_]`")
    return _compose(RunConfig(), path.parent, path.stem, _name_machines(overrides))


def from_config(config: RunConfig, overrides: Sequence[str] = ()) -> RunConfig:
    """Settings under further overrides."""
    return _compose(config, RECIPES, "base", _name_machines(overrides))


def find_recipe(recipe: str) -> Path:
    """The YAML file of a recipe; an unknown one is a `UserError` that names the nearest."""
    if "/" in recipe or recipe.endswith((".yaml", ".yml")):
        path = Path(recipe).expanduser().resolve()
        if path.suffix != ".yaml":
            raise UserError(f"a recipe file must end in `.yaml`, but `recipe={recipe}` does not: rename it")
        if not path.is_file():
            raise UserError(f"there is no recipe file `{recipe}`: give an existing path or a name")
        return path
    return _find(RECIPES, "recipe", recipe)


def _find(folder: Path, kind: str, name: str) -> Path:
    path = folder / f"{name}.yaml"
    if path.is_file():
        return path
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f"did you mean `{near[0]}`, of {', '.join(names)}?" if near else f"{folder} holds none"
    raise UserError(f"there is no {kind} `{name}`: {hint}")


def _name_machines(overrides: Sequence[str]) -> list[str]:
    """`cluster=NAME` written out: all settings of those machines, before the other overrides."""
    named, others = take(overrides, ("cluster",))
    if not named:
        return others
    machines = build(
        ClusterConfig, _load(_find(RECIPES / "cluster", "cluster", named["cluster"])), "cluster."
    )
    return [*(f"cluster.{key}={json.dumps(value)}" for key, value in asdict(machines).items()), *others]


def write_yaml(config: RunConfig) -> str:
    """Every setting of a run as YAML text; `read_yaml` gives back an equal config."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> RunConfig:
    """The complete config that a file holds, as `write_yaml` wrote it."""
    values = _load(path)
    missing = sorted(set(known_keys(RunConfig)) - set(_dotted(values)))
    if missing:
        raise UserError(
            f"{path} must hold every setting of its run, but lacks `{missing[0]}`: restore the file or begin "
            "another run"
        )
    return build(RunConfig, values)


def _dotted(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{path}{key}.")


def parse_yaml(text: str) -> RunConfig:
    """The complete config that a text holds, as `write_yaml` wrote it."""
    return build(RunConfig, _parse(text, "the text"))


def _load(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({_first_line(error)}): give a YAML file of settings") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    """The mapping that a YAML text holds, with its interpolations as they stand."""
    try:
        values = OmegaConf.to_container(OmegaConf.create(text))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{source}, line {line} is not YAML ({error.problem}): mend that line") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{source} is not YAML ({_first_line(error)}): write `KEY: VALUE` lines") from None
    if not isinstance(values, dict):
        raise UserError(f"{source} must hold `KEY: VALUE` lines, but holds a list: name its settings")
    return {str(key): value for key, value in values.items()}


def _compose(base: RunConfig, folder: Path, name: str, overrides: Sequence[str]) -> RunConfig:
    _check_overrides(overrides)
    ConfigStore.instance().store("base", asdict(base))
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            # A recipe anywhere may build on the models of ours.
            search = f"hydra.searchpath=[file://{RECIPES}]"
            values = OmegaConf.to_container(compose(name, [search, *overrides]), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"cannot compose `{name}` ({_first_line(error)}): mend the recipe or override"
        ) from None
    assert isinstance(values, dict)
    return build(RunConfig, {str(key): value for key, value in values.items()})


def _check_overrides(overrides: Sequence[str]) -> None:
    """Reject what Hydra would misread or explain in its own terms."""
    known = list(known_keys(RunConfig))
    for text in overrides:
        if text.startswith("-"):
            raise UserError(f"there is no option `{text}`: settings are written `KEY=VALUE`")
        try:
            override = OverridesParser.create().parse_override(text)
        except (OverrideParseException, HydraException):
            raise UserError(
                f"cannot read `{text}`: write `KEY=VALUE`, with odd characters in quotes"
            ) from None
        if not override.key_or_group:
            raise UserError(f"`{text}` names no setting: write `KEY=VALUE`")
        if override.key_or_group not in known:
            raise unknown_key(override.key_or_group, known)
        if override.is_sweep_override():
            raise UserError(
                f"`{text}` names several values, but a run takes one: start a run for each, or write a "
                f"list as `{override.key_or_group}=[A,B]`"
            )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
