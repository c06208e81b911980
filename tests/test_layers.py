"""The house rules, read from the source: who may import whom, and how large a room may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("rollout", "rewards", "alignment", "hybrid_engine", "recipes")
"""Each layer may import itself and what stands to its left."""

DOORS: dict[str, tuple[str, ...]] = {
    "vllm": ("rollout/vllm/",),
    "ray": ("hybrid_engine/",),
    "trl": ("alignment/sft.py",),
    "lm_eval": ("alignment/eval_model.py", "alignment/evals.py"),
    "accelerate": ("alignment/metrics.py", "hybrid_engine/loading.py"),
    "rollout.vllm": ("rollout/vllm/", "hybrid_engine/", "recipes/build.py"),
}
"""Module -> the only files (or folders, with a slash) that may import it."""

LIGHT_MODULES = ("rollout.config", "rewards.config", "alignment.config", "recipes.schema", "recipes.cli")
HEAVY = ("torch", "ray", "vllm")
MAX_FILE, MAX_FUNCTION, MAX_PRODUCT = 300, 80, 8000
REACHED = 10_912
"""Lines that the product has, above its bound: it may only lose some until the bound holds again."""
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b")


IMPORT_CALLS = ("importlib.import_module", "import_module", "__import__")


def python_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def nodes(path: Path) -> list[ast.AST]:
    """Every node of the file's syntax tree; the oldest supported Python must be able to read it."""
    return list(ast.walk(ast.parse(path.read_text(), str(path), feature_version=(3, 11))))


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, inside functions and by literal name as well."""
    package = path.relative_to(root).parent.parts
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORT_CALLS:
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def is_below(place: str, door: str) -> bool:
    return door.endswith("/") and place.startswith(door)


def product_lines(root: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in python_files(root, LAYERS))


def import_violations(root: Path) -> list[str]:
    found = []
    for path in python_files(root, LAYERS):
        place = path.relative_to(root).as_posix()
        layer = place.split("/")[0]
        for line, name in imports(path, root):
            target = name.split(".")[0]
            if target in LAYERS and LAYERS.index(target) > LAYERS.index(layer):
                found.append(f"{place}:{line}: {layer} imports {name}, a layer above it")
            for module, doors in DOORS.items():
                if is_inside(name, module) and not any(place == door or is_below(place, door) for door in doors):
                    found.append(f"{place}:{line}: imports {name}, which only {', '.join(doors)} may")
    return found


def swallows(handler: ast.ExceptHandler) -> bool:
    idle = (ast.Pass, ast.Continue)
    return all(
        isinstance(node, idle) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in handler.body
    )


def node_violation(node: ast.AST) -> str | None:
    """What is wrong with one node of the syntax tree, if anything."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION:
            return f"{node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines, more than {MAX_FUNCTION}"
        case ast.Call(func=ast.Name(id="getattr"), args=[_, _, _]):
            return "getattr with a default"
        case ast.ExceptHandler() if swallows(node):
            return "a swallowed exception"
        case ast.Call(func=ast.Name(id="suppress") | ast.Attribute(attr="suppress")) if any(
            ast.unparse(arg) in ("Exception", "BaseException") for arg in node.args
        ):
            return "a swallowed exception"
        case ast.Name(id="NotImplementedError"):
            return "NotImplementedError"
    return None


def style_violations(root: Path) -> list[str]:
    found = []
    for path in python_files(root, (*LAYERS, "benchmarks", "tests")):
        place, text = path.relative_to(root).as_posix(), path.read_text()
        lines = text.splitlines()
        if len(lines) > MAX_FILE:
            found.append(f"{place}:{len(lines)}: {len(lines)} lines, more than {MAX_FILE}")
        found += [f"{place}:{n}: unfinished work" for n, line in enumerate(lines, 1) if UNFINISHED.search(line)]
        for node in nodes(path):
            if (problem := node_violation(node)) is not None:
                found.append(f"{place}:{node.lineno}: {problem}")  # type: ignore[attr-defined]
    product = product_lines(root)
    if product > MAX_PRODUCT:
        found.append(f".:0: the product has {product} lines, more than {MAX_PRODUCT}")
    return found


def test_imports_point_one_way_and_each_framework_has_one_door():
    assert not (found := import_violations(ROOT)), "\n".join(found)


@pytest.mark.parametrize("module", ["trl", "accelerate", "lm_eval"])
def test_library_has_at_most_three_files_and_each_uses_it(module: str):
    assert len(DOORS[module]) <= 3
    for door in DOORS[module]:
        assert any(is_inside(name, module) for _, name in imports(ROOT / door, ROOT)), f"{door} does not need {module}"


def test_source_keeps_the_house_rules():
    found = [violation for violation in style_violations(ROOT) if not violation.startswith(".:0:")]
    assert not found, "\n".join(found)
    assert product_lines(ROOT) <= REACHED, "the product is above its bound, and has grown"


@pytest.mark.xfail(strict=True, reason="the product is above its bound of 8,000 lines (REACHED)")
def test_product_is_under_its_bound():
    assert product_lines(ROOT) <= MAX_PRODUCT


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_config_loads_without_heavy_libraries(module: str):
    code = f"import sys, {module}; print(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"{module} loads {done.stdout.strip()}"


def long_function(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


FAULTS = {
    "rollout/a.py": ("\nimport alignment.losses", "rollout/a.py:2: rollout imports alignment.losses"),
    "rewards/b.py": ("def f():\n    from hybrid_engine import engine", "rewards/b.py:2: rewards imports hybrid_engine"),
    "alignment/c.py": ("from rollout import vllm", "alignment/c.py:1: imports rollout.vllm"),
    "alignment/d.py": ("from ray.util import x", "alignment/d.py:1: imports ray.util.x"),
    "hybrid_engine/e.py": ("import vllm as v", "hybrid_engine/e.py:1: imports vllm"),
    "rewards/f.py": ("import importlib\nimportlib.import_module('trl.rewards')", "rewards/f.py:2: imports trl.rewards"),
    "recipes/stages.py": ("from rollout.vllm.engine import E", "recipes/stages.py:1: imports rollout.vllm.engine.E"),
    "rollout/vllm/g.py": ("from ...alignment import losses", "rollout/vllm/g.py:1: rollout imports alignment.losses"),
    "recipes/h.py": ("x = getattr(a, 'b', None)", "recipes/h.py:1: getattr with a default"),
    "recipes/i.py": ("try:\n    f()\nexcept ValueError:\n    pass", "recipes/i.py:3: a swallowed exception"),
    "recipes/j.py": ("with suppress(Exception):\n    f()", "recipes/j.py:1: a swallowed exception"),
    "recipes/k.py": ("def f():\n    raise NotImplementedError", "recipes/k.py:2: NotImplementedError"),
    "benchmarks/l.py": ("x = 1  # FIX" + "ME: later", "benchmarks/l.py:1: unfinished work"),
    "tests/m.py": ("x = 1\n" * 301, "tests/m.py:301: 301 lines"),
    "recipes/n.py": (long_function(81), "recipes/n.py:1: f has 81 lines"),
}


@pytest.mark.parametrize("place", FAULTS)
def test_planted_violation_is_caught(tmp_path: Path, place: str):
    source, expected = FAULTS[place]
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = import_violations(tmp_path) + style_violations(tmp_path)
    assert len(found) == 1 and found[0].startswith(expected), found


def test_too_many_product_lines_are_caught(tmp_path: Path):
    (tmp_path / "recipes").mkdir()
    for number in range(27):
        (tmp_path / "recipes" / f"f{number}.py").write_text("x = 1\n" * 300)
    assert style_violations(tmp_path) == [".:0: the product has 8100 lines, more than 8000"]


ALLOWED = {
    "rollout/vllm/a.py": "import vllm\nfrom . import engine\nfrom ..types import Prompt",
    "recipes/build.py": "from rollout.vllm.engine import E\nfrom hybrid_engine import engine",
    "alignment/evals.py": "from lm_eval.api import model\nimport rewards.pool",
    "recipes/b.py": "try:\n    f()\nexcept ValueError as e:\n    raise SystemExit(2) from e\nx = getattr(a, 'b')",
    "recipes/c.py": long_function(80),
    "recipes/d.py": "x = 1\n" * 300,
}


@pytest.mark.parametrize("place", ALLOWED)
def test_what_is_allowed_passes(tmp_path: Path, place: str):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(ALLOWED[place])
    assert import_violations(tmp_path) + style_violations(tmp_path) == []
