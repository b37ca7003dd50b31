"""The rules of the house, proven on the syntax tree: imports, sizes, docstrings, and what recipes hold."""

import ast
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch.compose import from_recipe
from moe.config import RunConfig
from moe.rules import build

ROOT = Path(__file__).resolve().parent.parent
STOREYS = ("parallel", "moe", "launch")
FILES = sorted(path for storey in STOREYS for path in (ROOT / storey).rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GROUPS = sorted((ROOT / "recipes").glob("*/*.yaml"))  # settings of one group, named by their folder

# (who, whom): no module under the first imports one under the second, itself excepted.
FORBIDDEN = (
    ("parallel", "moe"),
    ("parallel", "launch"),
    ("moe", "launch"),
    ("moe.telemetry", "moe"),
    ("moe.telemetry", "parallel"),
    ("moe.model", "moe.train"),
    ("moe.model", "moe.data"),
    ("moe.model", "moe.telemetry"),
    *((storey, "tests") for storey in STOREYS),
)
ONLY_IN = {
    "hydra": ("launch/compose.py",),
    "omegaconf": ("launch/compose.py",),
    "megatron": (
        *("parallel/groups.py", "parallel/megatron.py", "moe/megatron.py", "moe/megatron_config.py"),
        "launch/bench/peer_megatron.py",
    ),
    "torchtitan": ("launch/bench/peer_torchtitan.py",),
    "deepspeed": ("moe/train/deepspeed.py",),
    "transformer_engine": ("parallel/transformer_engine.py", "moe/train/adam.py"),
    "transformer_engine_torch": ("parallel/transformer_engine.py",),  # its C++
    "triton": tuple(
        f"parallel/kernels/{name}.py" for name in ("rows", "swiglu", "top_k", "weight_gradient", "where")
    ),
}
# Imported inside functions: what not every machine has, or what is slow and needed late.
LATE = {
    "": ("matplotlib", "tqdm", "transformers", "transformer_engine", "deep_ep", "apex", "deepspeed"),
    "parallel": ("transformer_engine_torch", "parallel.kernels"),
    "moe.model": ("parallel.kernels", "parallel.grouped_cuda"),  # Triton's, which only CUDA needs
    "moe.telemetry": ("pyarrow", "tensorboardX", "wandb", "mlflow", "prometheus_client"),
    "launch": ("torch", "launch", "moe", "parallel"),  # the command line answers before torch is loaded
}

Import = tuple[str, int, bool]  # module, line, whether inside a function


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, module: str) -> Iterator[Import]:
    """Every import of a source text, `from a import b` as both `a` and `a.b`."""

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = ".".join(module.split(".")[: -child.level]) if child.level else ""
                base = ".".join(part for part in (package, child.module) if part)
                yield base, child.lineno, inside
                yield from ((f"{base}.{alias.name}", child.lineno, inside) for alias in child.names)
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, inside or function)

    yield from visit(ast.parse(source), False)


def under(module: str, package: str) -> bool:
    return package == "" or module == package or module.startswith(f"{package}.")


def upward(source: str, module: str) -> list[str]:
    return [
        f"{module}:{line} imports {name}"
        for name, line, _ in imports(source, module)
        for who, whom in FORBIDDEN
        if under(module, who) and under(name, whom) and not under(name, who)
    ]


def misplaced(source: str, module: str, file: str) -> list[str]:
    return [
        f"{file}:{line} imports {name}"
        for name, line, _ in imports(source, module)
        if file not in ONLY_IN.get(name.split(".")[0], (file,))
    ]


def late(source: str, module: str) -> list[str]:
    allowed = [name for where, names in LATE.items() if under(module, where) for name in names]
    return [
        f"{module}:{line} imports {name} inside a function"
        for name, line, inside in imports(source, module)
        if inside and not any(under(name, package) for package in allowed)
    ]


def long_functions(source: str, module: str) -> list[str]:
    return [
        f"{module}.{node.name} has {length} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    ]


def in_fresh_python(code: str) -> Any:
    """What a fresh interpreter prints as JSON."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_imports_run_only_downward() -> None:
    assert [found for path in FILES for found in upward(path.read_text(), module_name(path))] == []


def test_hydra_megatron_and_deepspeed_have_their_doors() -> None:
    found = []
    for path in FILES:
        found += misplaced(path.read_text(), module_name(path), path.relative_to(ROOT).as_posix())
    assert found == []


def test_imports_stand_at_the_top() -> None:
    assert [found for path in FILES for found in late(path.read_text(), module_name(path))] == []


def test_files_and_functions_are_small() -> None:
    lengths = {module_name(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    assert statistics.median(length for length in lengths.values() if length) < 150
    assert [found for path in FILES for found in long_functions(path.read_text(), module_name(path))] == []


def test_every_module_says_what_it_is() -> None:
    silent = [module_name(p) for p in FILES if p.read_text().strip() and not ast.get_docstring(_tree(p))]
    assert silent == []


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_the_checks_see_what_they_forbid() -> None:
    assert upward("from moe import config", "parallel.zero")
    assert upward("def f():\n    import moe.train.loop", "moe.model.layer")
    assert upward("from ..config import ModelConfig", "moe.telemetry.load")
    assert not upward("from moe.telemetry.load import dead", "moe.telemetry.report")
    assert not upward("from parallel.errors import UserError", "moe.rules")
    assert misplaced("import hydra.core", "moe.rules", "moe/rules.py")
    assert not misplaced("import hydra.core", "launch.compose", "launch/compose.py")
    assert late("class A:\n    def f(self):\n        import numpy", "moe.rules")
    assert late("def f():\n    import torch", "moe.rules")
    assert not late("def f():\n    from tqdm import tqdm\nimport numpy", "moe.rules")
    assert not late("def f():\n    import torch", "launch.train")
    assert long_functions("def f():\n" + "    pass\n" * 60, "moe.rules")
    assert not long_functions("def f():\n" + "    pass\n" * 59, "moe.rules")


def test_modules_marked_no_torch_import_without_it() -> None:
    marked = [
        module_name(p) for p in FILES if re.search(r"\bNo\s+torch\b", ast.get_docstring(_tree(p)) or "")
    ]
    assert "moe.config" in marked
    code = f"""
import importlib, json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, Blocker())
failed = {{}}
for name in {[*marked, "torch"]}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""
    assert in_fresh_python(code) == {"torch": "torch is blocked"}


def test_the_layer_stands_on_few_modules() -> None:
    code = f"""
import json, os, sys
import moe.model.layer
ours = [m for m in sys.modules.values() if m.__name__.split(".")[0] in {STOREYS}]
print(json.dumps([m.__name__ for m in ours if os.path.getsize(m.__file__)]))
"""
    loaded = in_fresh_python(code)  # empty __init__.py files are not counted
    assert "moe.model.layer" in loaded
    assert len(loaded) <= 16, loaded


def test_no_tracked_file_names_a_place_on_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    place = re.compile(rb"(?<![\w.])/" + rb"(work|root)/")  # in two parts: this file is tracked too
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert files and place.search(b'cd "/' + b'work/here"') and not place.search(b"team/" + b"work/here")
    assert [str(path.relative_to(ROOT)) for path in files if place.search(path.read_bytes())] == []


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of nested settings and its value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def repeated(values: dict[str, Any], base: RunConfig | None = None) -> list[str]:
    """The settings that are written although they would be the same without."""
    built = dict(leaves(asdict(build(RunConfig, values))))
    before = dict(leaves(asdict(base or RunConfig())))
    return [key for key, _ in leaves(values) if built[key] == before[key]]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_strict_and_hold_only_differences(path: Path, tmp_path: Path) -> None:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    (tmp_path / path.name).write_text(json.dumps({"defaults": values.pop("defaults")}))
    base = from_recipe(str(tmp_path / path.name))  # what the recipe builds on
    assert repeated({str(key): value for key, value in values.items()}, base) == []


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_groups_are_strict_and_hold_only_differences(path: Path) -> None:
    assert repeated({path.parent.name: OmegaConf.to_container(OmegaConf.load(path))}) == []


def test_a_repeated_default_would_be_seen() -> None:
    values = {"model": {"rope": {"theta": 10000}, "top_k": 2}, "data": {"paths": ["python-stdlib"]}}
    assert repeated(values) == ["model.rope.theta", "data.paths"]
    base = build(RunConfig, {"model": {"top_k": 2}})
    assert repeated({"model": {"top_k": 2, "num_experts": 16}}, base) == ["model.top_k", "model.num_experts"]
    assert RECIPES
