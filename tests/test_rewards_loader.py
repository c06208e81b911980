"""Finding reward and data functions, and what is said when they cannot be found or do not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rewards.config import RewardConfig, check_reward
from rollout.functions import load_function

REWARD = "def {name}({signature}):\n    return [1.0] * len(completions)\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_is_read_from_the_base_dir_and_may_import_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "neighbour_of_rules.py", "VALUE = 7\n")
    write(tmp_path, "rules.py", "import neighbour_of_rules\ndef f():\n    return neighbour_of_rules.VALUE\n")
    assert load_function("./rules.py:f", tmp_path)() == 7
    assert load_function(f"{tmp_path}/rules.py:f", Path("/")) is load_function("rules.py:f", tmp_path)


def test_a_file_named_like_a_standard_module_does_not_replace_it(tmp_path: Path) -> None:
    write(tmp_path, "math.py", "def f():\n    return 1\n")
    load_function("math.py:f", tmp_path)
    import math

    assert math.sqrt(4) == 2.0


def test_two_specs_of_one_file_share_one_module(tmp_path: Path) -> None:
    write(tmp_path, "shared.py", "seen = []\ndef put():\n    seen.append(1)\ndef count():\n    return len(seen)\n")
    load_function("shared.py:put", tmp_path)()
    assert load_function("shared.py:count", tmp_path)() == 1


def test_a_module_is_found_by_its_dotted_name() -> None:
    from rewards.exact_match import exact_match

    assert load_function("rewards.exact_match:exact_match", Path(".")) is exact_match


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_colon", "write `module:function` or `file.py:function`"),
        ("rules.py:", "write `module:function`"),
        ("rules.py:no_boilerplat", "did you mean 'no_boilerplate'"),
        ("ruls.py:no_boilerplate", "did you mean 'rules.py'"),
        ("rules.py:LIMIT", "'LIMIT' of rules.py is a int, not a function"),
        ("no_such_module_of_ours:f", "No module named 'no_such_module_of_ours'"),
        ("rewards.no_such_room:f", "No module named 'rewards.no_such_room'"),
        ("rewards.exact_match:exact_mach", "did you mean 'exact_match'"),
        ("syntax.py:f", r"SyntaxError: .*syntax.py, line 2"),
        ("raises.py:f", r"KeyError: 'gone' \(raises.py, line 3: x\['gone'\]\)"),
        ("imports.py:f", r"ModuleNotFoundError: No module named 'absent_library' \(imports.py, line 1: "),
        ("exits.py:f", r"SystemExit: 3 \(exits.py, line 2: "),
    ],
)
def test_what_cannot_be_loaded_is_named_with_file_line_and_cause(tmp_path: Path, spec: str, said: str) -> None:
    write(tmp_path, "rules.py", "LIMIT = 3\ndef no_boilerplate():\n    pass\n")
    write(tmp_path, "syntax.py", "x = 1\ndef f(:\n")
    write(tmp_path, "raises.py", "x = {}\n\nx['gone']\n")
    write(tmp_path, "imports.py", "import absent_library\n")
    write(tmp_path, "exits.py", "import sys\nsys.exit(3)\n")
    with pytest.raises(ValueError, match=said) as caught:
        load_function(spec, tmp_path)
    assert spec in str(caught.value)


def test_a_file_that_failed_is_read_again_once_it_is_mended(tmp_path: Path) -> None:
    path = write(tmp_path, "mended.py", "1 / 0\n")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_function("mended.py:f", tmp_path)
    path.write_text("def f():\n    return 5\n")
    assert load_function("mended.py:f", tmp_path)() == 5


@pytest.mark.parametrize(
    "signature",
    [
        "completions, **kwargs",
        "prompts, completions, answer, **kwargs",
        "prompts, completions, completion_ids, answer, level, trainer_state, log_extra, log_metric",
        "*, completions, answer, level='easy', weight=1, **kwargs",
    ],
)
def test_signatures_that_trl_can_call_pass(tmp_path: Path, signature: str) -> None:
    write(tmp_path, "good.py", REWARD.format(name="good", signature=signature))
    check_reward(RewardConfig(function="good.py:good"), tmp_path, {"prompt", "answer", "level"})


@pytest.mark.parametrize(
    ("signature", "args", "said"),
    [
        ("completions, solution, **kwargs", {}, "needs 'solution', .*nor in `args`"),
        ("completions, anwser, **kwargs", {}, "did you mean 'answer'"),
        ("prompts, completions, answer, level", {}, r"unexpected keyword argument 'completion_ids'.*add \*\*kwargs"),
        (
            "prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric",
            {},
            "unexpected keyword argument 'level'",
        ),
        ("completions, ignore_case=False, **kwargs", {"ignore_cas": True}, "did you mean 'ignore_case'"),
        ("completions, answer, **kwargs", {"answer": "x"}, "gets 'answer' in any case"),
        ("completions, /, **kwargs", {}, "'completions' parameter is positional"),
        ("prompt, completions, **kwargs", {}, "needs 'prompt'"),
    ],
)
def test_signatures_that_trl_could_not_call_are_refused(
    tmp_path: Path, signature: str, args: dict[str, object], said: str
) -> None:
    write(tmp_path, "bad.py", REWARD.format(name="bad", signature=signature))
    with pytest.raises(ValueError, match=said):
        check_reward(RewardConfig(function="bad.py:bad", args=args), tmp_path, {"prompt", "answer", "level"})


def test_a_column_may_not_take_the_name_of_what_is_passed_anyway(tmp_path: Path) -> None:
    write(tmp_path, "good.py", REWARD.format(name="good", signature="completions, **kwargs"))
    with pytest.raises(ValueError, match="gets 'trainer_state' in any case"):
        check_reward(RewardConfig(function="good.py:good"), tmp_path, {"prompt", "trainer_state"})


def test_a_parameter_given_in_args_need_not_be_a_column() -> None:
    config = RewardConfig(function="rewards.format:matches", args={"pattern": ".*"})
    check_reward(config, Path("."), {"prompt", "answer"})
    with pytest.raises(ValueError, match="needs 'pattern'"):
        check_reward(RewardConfig(function="rewards.format:matches"), Path("."), {"prompt", "answer"})


def test_a_class_is_refused_and_an_instance_is_accepted(tmp_path: Path) -> None:
    method = "    def __call__(self, completions, **kwargs):\n        return [1.0] * len(completions)\n"
    write(tmp_path, "classes.py", f"class Rule:\n{method}rule = Rule()\n")
    with pytest.raises(ValueError, match="got an unexpected keyword argument"):
        check_reward(RewardConfig(function="classes.py:Rule"), tmp_path, {"prompt"})
    check_reward(RewardConfig(function="classes.py:rule"), tmp_path, {"prompt"})


def test_a_worker_imports_nothing_heavy() -> None:
    script = "import sys, rewards.worker; print({'numpy', 'pydantic', 'torch', 'ray'} & set(sys.modules))"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
