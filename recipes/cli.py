"""The command `align`: run, check and plan recipes, write reports."""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recipes.resume import GateError
from recipes.schema import LoadedRecipe, Rows, json_schema, load_recipe
from recipes.source import RecipeError, shorten

DONE, FAILED, WRONG, GATE, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `--help` says what each means."""
    args = _parser().parse_args(argv)
    try:
        match args.command:
            case "run":
                return _run(args, load_recipe(args.recipe, args.overrides))
            case "check":
                _check(_settled(load_recipe(args.recipe, args.overrides)))
            case "plan":
                from recipes.scale import scale

                for section in scale(load_recipe(args.recipe, args.overrides), args.cluster):
                    Console().print(section)
            case "report":
                from recipes.report import write_report

                print(write_report(args.folder))
            case "schema":
                print(json.dumps(json_schema(), indent=2))
    except (ValueError, GateError) as error:
        print(f"align: {error}", file=sys.stderr)
        return GATE if isinstance(error, GateError) else WRONG
    except KeyboardInterrupt:
        again = "; the same command continues the run" if args.command == "run" else ""
        print(f"align: interrupted{again}", file=sys.stderr)
        return INTERRUPTED
    return DONE


def _run(args: argparse.Namespace, loaded: LoadedRecipe) -> int:
    output = args.output or Path("runs") / loaded.recipe.name
    try:
        loaded = _settled(loaded, output / "recipe.yaml", args.ray)
        found = _check(loaded)
        from recipes.stages import run

        print(run(loaded.recipe, output, accept_changes=args.accept_changes, ray_address=args.ray, contaminated=found))
    except (RecipeError, GateError):
        raise
    except Exception as error:
        output.mkdir(parents=True, exist_ok=True)
        log = output / "align.log"
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
        print(f"align: {describe(error)}\nThe traceback is in {log}", file=sys.stderr)
        return FAILED
    return DONE


def _settled(loaded: LoadedRecipe, begun: Path | None = None, ray_address: str | None = None) -> LoadedRecipe:
    """With a layout in place of each `auto`, which is printed."""
    if loaded.auto:
        from recipes.scale import settled

        loaded, said = settled(loaded, begun, ray_address)
        print(said)
    return loaded


def _check(loaded: LoadedRecipe) -> Rows:
    """Print the check; the contaminated evals that it finds."""
    from recipes.check import check

    contaminated: Rows = []
    for section in check(loaded, contaminated):
        Console().print(section)
    return contaminated


def describe(error: BaseException) -> str:
    """The error that came first, and what it led to: at most a screen.

    `raise X from Y` is a translation: X says what happened. An X that came up while Y was being handled is a symptom of
    Y, which is named first."""
    chain = [error]
    while error.__cause__ is None and not error.__suppress_context__ and error.__context__ is not None:
        error = error.__context__
        chain.append(error)
    first, *later = [shorten(f"{type(e).__name__}: {e}", lines=15) for e in reversed(chain)]
    return "\n".join([first, *(f"  and then {shorten(text, lines=1)}" for text in later[-3:])])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="align",
        description="Align a Mixture-of-Experts language model: SFT and online GRPO, with evals between the stages.",
        epilog="Exit codes: 0 done; 1 the run failed; 2 the recipe or the command line is wrong; "
        "3 a stage broke a limit of `evals.keep`; 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument("recipe", type=Path, metavar="RECIPE", help="the recipe's YAML file")
    what = "replace keys of the recipe; values are YAML: rollout.max_length=256 stages.1.grpo.steps=20"
    recipe.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=what
    )
    run = commands.add_parser("run", parents=[recipe], help="run a recipe, or go on where its run stopped")
    run.add_argument("--output", type=Path, metavar="DIR", help="run folder (default: ./runs/NAME)")
    run.add_argument("--accept-changes", action="store_true", help="go on although the recipe differs from the run's")
    run.add_argument("--ray", metavar="ADDRESS", help="Ray cluster to run on (default: a local one)")

    commands.add_parser("check", parents=[recipe], help="everything that can be known before a model is loaded")
    plan = commands.add_parser("plan", parents=[recipe], help="memory, time and the best layouts, without a device")
    plan.add_argument("--cluster", metavar="HOSTSxDEVICESxKIND", help="as 16x8xH100-80GB (default: this machine)")
    report = commands.add_parser("report", help="write a run's report.html again")
    report.add_argument("folder", type=Path, metavar="DIR", help="the run folder")
    commands.add_parser("schema", help="print the JSON Schema of a recipe, for editors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
