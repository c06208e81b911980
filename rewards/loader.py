"""What can be known of a reward function before it is called: its signature against what TRL's GRPOTrainer passes."""

import inspect
from collections.abc import Set
from pathlib import Path

from rewards.code import require_sandbox
from rewards.config import RewardConfig
from rollout.functions import load_function, nearest

PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What every call passes by keyword, besides the row's columns and the recipe's `args` (TRL 1.16's GRPOTrainer)."""
NOT_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})  # TRL does not hand them on


def check_reward(config: RewardConfig, base_dir: Path, columns: Set[str]) -> None:
    """See that the function imports, and that a call with the dataset's `columns` fits its signature.

    Raises ValueError: as `load_function`; an argument in `args` that is no named parameter, a parameter without default
    that nothing gives (the nearest name is offered); an argument that the function does not take (TRL's functions have
    `**kwargs` for what they do not use), or that two sides give; programs to run, and no sandbox for them.
    """
    reward, passed = f"reward {config.function!r}", columns - NOT_COLUMNS
    signature = inspect.signature(load_function(config.function, base_dir))
    if twice := sorted(passed & {*PASSED, *config.args}):
        raise ValueError(f"{reward} gets {twice[0]!r} in any case: the dataset's column needs another name")
    given = {*PASSED, *passed, *config.args}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: parameter for name, parameter in signature.parameters.items() if parameter.kind not in variadic}
    if unknown := sorted(config.args.keys() - named):
        raise ValueError(f"{reward}: `args` has {unknown[0]!r}, no parameter of it{nearest(unknown[0], named)}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in given:
            hint = nearest(name, passed)
            raise ValueError(f"{reward} needs {name!r}, neither a column of the dataset nor in `args`{hint}")
    try:
        signature.bind(**dict.fromkeys(sorted(given)))
    except TypeError as error:
        raise ValueError(f"{reward} {error}: add **kwargs for what it does not use, as TRL asks") from error
    if config.function.startswith("rewards.code:") and config.args.get("sandbox") != "none":
        require_sandbox()
