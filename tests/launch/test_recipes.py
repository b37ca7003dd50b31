"""What recipes say of themselves is so: models are the released ones, and memory is what the plan says."""

import json
import random
import re
from pathlib import Path

import pytest

from launch import compose
from launch.plan.estimate import estimate
from moe.rules import validate
from tests import released

MODELS = {
    "deepseek_v2_lite": released.V2_LITE,
    "deepseek_v3": released.V3,
    "moonlight": released.MOONLIGHT,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_released_ones(name: str) -> None:
    assert compose.from_recipe("deepseek_v2_lite_sft", [f"model={name}"]).model == MODELS[name]


@pytest.mark.parametrize(
    ("recipe", "cluster", "fits"),
    [
        ("deepseek_v2_lite_sft", "a800x8", True),
        ("deepseek_v2_lite_lora", "a800x8", True),
        ("deepseek_v2_lite_esft", "h800x8", True),
        ("deepseek_v2_lite_pretrain", "a800x8", True),
        ("moonlight_pretrain", "h800x8", True),
        ("deepseek_v3_pretrain", "h800x8", False),
    ],
)
def test_stated_memory_is_what_the_plan_says(recipe: str, cluster: str, fits: bool, tmp_path: Path) -> None:
    stream, experts = random.Random(0), tmp_path / "experts.json"
    chosen = {str(layer): stream.sample(range(64), 6 if layer < 24 else 5) for layer in range(1, 27)}
    assert sum(map(len, chosen.values())) == 153
    content = {"experts": chosen, "shared_experts": False, "non_expert_modules": False}
    experts.write_text(json.dumps(content))
    overrides = [f"cluster={cluster}"]
    if recipe.endswith("esft"):
        overrides.append(f"tune.selection={experts}")
    config = compose.from_recipe(recipe, overrides)
    validate(config)
    found = estimate(config, 1.5)
    stated = re.search(r"(\d+) GB(?:, of which|, so in bf16| in all)", _comment(recipe))
    assert stated is not None
    assert round(found.fullest.total_bytes / 1e9) == int(stated[1])
    assert found.fits == fits


def _comment(recipe: str) -> str:
    """The comment that a recipe begins with, as one line."""
    lines = (compose.RECIPES / f"{recipe}.yaml").read_text().split("defaults:")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines)
