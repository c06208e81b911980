"""The recipe: the sections of those who read them, in one file that a person writes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import alignment.config as configs
from recipes.source import Key, RecipeError, Source, read_source, shorten
from rollout.config import Config, DataConfig, Memory, RolloutConfig
from rollout.data import load_rows
from rollout.functions import nearest

Rows = list[dict[str, Any]]
AUTO = {
    "train": ("shard", "replicate", "expert", "activation_checkpointing"),
    "rollout": ("replicas", "tensor", "data", "expert"),
}
"""Section -> the keys of its layout. `auto` in place of the section, or of the first key beside others, chooses all."""


class Stage(Config):
    """One stage of a recipe: exactly one of its keys, which is its kind."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    sft: configs.SFTConfig | None = Field(None, exclude_if=lambda value: value is None)
    """Supervised fine-tuning."""
    reward_model: configs.RewardModelConfig | None = Field(None, exclude_if=lambda value: value is None)
    """A reward model from preferences or judged completions."""
    sample: configs.SampleConfig | None = Field(None, exclude_if=lambda value: value is None)
    """Scored completions as data for later stages."""
    grpo: configs.GRPOConfig | None = Field(None, exclude_if=lambda value: value is None)
    """Online GRPO."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(section is not None for _, section in self) != 1:
            raise ValueError(f"a stage is exactly one of: {', '.join(Stage.model_fields)}")
        return self

    @property
    def kind(self) -> str:
        """`sft`, `reward_model`, `sample` or `grpo`."""
        return next(kind for kind, section in self if section is not None)

    @property
    def config(self) -> configs.SFTConfig | configs.RewardModelConfig | configs.SampleConfig | configs.GRPOConfig:
        """The stage's own section."""
        return self.sft or self.reward_model or self.sample or self.grpo

    @property
    def name(self) -> str:
        """The stage's name: its kind unless the recipe gives one."""
        return self.config.name or self.kind

    @property
    def is_policy(self) -> bool:
        """Whether its weights are those of a policy, which has evals and from which later stages may start."""
        return self.sft is not None or self.grpo is not None

    @property
    def rollout(self) -> configs.RolloutStageConfig | None:
        """Its section, if it samples."""
        return self.grpo or self.sample

    @property
    def data(self) -> DataConfig:
        """Where the stage's rows come from."""
        return self.rollout.prompts if self.rollout else self.config.data

    @property
    def data_key(self) -> Key:
        """Where in the stage its file or function is named."""
        section, name = "prompts" if self.rollout else "data", "function" if self.data.path is None else "path"
        return (self.kind, section, name)

    @property
    def source(self) -> str:
        """The name of its dataset in messages."""
        return str(self.data.path or self.data.function or f"stage {self.data.from_}")

    @property
    def columns(self) -> list[tuple[str, ...]]:
        """What its rows need: one of these sets of columns."""
        if self.rollout:
            return [("prompt",)]
        if self.sft:
            return [("prompt", "completion"), ("messages",), ("conversations",)]
        if self.config.loss == "pairwise":
            return [("chosen", "rejected")]
        return [("prompt", "completion", "label"), ("prompt", "completion", "score")]


class Recipe(Config):
    """What `align run` runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")
    """Name of the recipe and, by default, of its run folder."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of weights, data order and sampling."""
    base_dir: str = "."
    """Folder that relative paths are read from (default, and itself relative to: the recipe's own folder)."""
    data_dir: str | None = None
    """Folder that relative `path`s of data are read from (default: `base_dir`)."""
    model: configs.ModelConfig
    """The policy before the first stage."""
    train: configs.TrainConfig = Field(default_factory=configs.TrainConfig)
    """The training ranks."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """The inference engines."""
    memory: Memory = Field(default_factory=dict)
    """What the run may use, {device: 70GiB, host: 100GiB, disk: ./scratch, offload: auto}; {}: all is resident."""
    evals: configs.EvalConfig = Field(default_factory=configs.EvalConfig)
    """Benchmarks, measured before the first and after every policy stage."""
    trackers: tuple[configs.TrackerKind, ...] = ()
    """Where metrics go besides the run folder."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """The stages in their order, each `- kind: {...}`."""

    @property
    def folder(self) -> Path:
        """`base_dir`; absolute once the recipe was read by `load_recipe`."""
        return Path(self.base_dir)

    @property
    def data_folder(self) -> Path | None:
        """`data_dir`, read from `base_dir`."""
        return None if self.data_dir is None else self.folder / self.data_dir

    @property
    def offloads(self) -> bool:
        """Whether what a phase does not need is to be moved out of its way."""
        return bool(self.memory) and self.memory.get("offload") not in ("off", False)

    def start_of(self, stage: Stage) -> Stage | None:
        """The stage whose final weights `stage` starts from; None: the model of the recipe."""
        earlier = [other for other in self.stages[: self.stages.index(stage)] if other.is_policy]
        if stage.config.from_ is None:
            return earlier[-1] if earlier else None
        return self.named(stage.config.from_)

    def named(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def stage_rows(recipe: Recipe, stage: Stage, sampled: Path | None = None) -> Rows:
    """A stage's dataset. Raises ValueError (`load_rows`), also for a row that lacks the columns its stage needs.

    sampled: the folder that the stage wrote whose completions it reads, for one with `from`."""
    data = stage.data
    if data.from_ is not None:
        kind = "best" if stage.reward_model is None else "pairs" if stage.reward_model.loss == "pairwise" else "rows"
        data = DataConfig(path=str(sampled / f"{kind}.jsonl"), columns=data.columns, limit=data.limit)
    rows = load_rows(data, recipe.folder, recipe.data_folder)
    for index, row in enumerate(rows):
        if not any(row.keys() >= set(names) for names in stage.columns):
            wanted = ", or ".join(" and ".join(f"`{name}`" for name in names) for names in stage.columns)
            raise ValueError(
                f"{stage.source}, row {index}: needs {wanted}; there are: {', '.join(row)} "
                "(`columns: {prompt: NAME}` renames one)"
            )
    return rows


def _misfits(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Every rule that concerns more than one section."""
    longest, budget = recipe.rollout.max_length, recipe.train.tokens_per_rank
    no_room = f"leaves no room for a prompt: `rollout.max_length` is {longest} tokens, prompt and completion together"
    earlier: dict[str, Stage] = {}
    for index, stage in enumerate(recipe.stages):
        key, config = ("stages", index, stage.kind), stage.config
        if stage.name in earlier:
            yield (*key, "name"), f"two stages are called `{stage.name}`: give each its own `name`"
        for which, kind, named in _references(stage):
            fitting = [other.name for other in earlier.values() if kind in (other.kind, other.is_policy and "policy")]
            if named not in fitting:
                yield (*key, *which), f"no earlier {kind} stage is called `{named}`{nearest(named, fitting)}"
        if stage.rollout and stage.rollout.max_new_tokens >= longest:
            yield (*key, "max_new_tokens"), no_room
        most = longest if stage.rollout else config.max_length
        pairs = stage.columns == [("chosen", "rejected")]
        if (most := 2 * most if pairs else most) > budget:
            what = "a pair" if pairs else "a sequence"
            yield key, f"{what} of {most} tokens does not fit `train.tokens_per_rank` ({budget})"
        if stage.grpo and config.keep == "rollback" and recipe.evals.during and not stage.grpo.held_out:
            yield (*key, "keep"), "`rollback` chooses a checkpoint by the reward on held-out prompts: set `held_out`"
        if config.capacity is not None and "devices" not in recipe.train.balance:
            yield (*key, "capacity"), "needs `train.balance.devices`: it limits a device's share of the experts"
        earlier[stage.name] = stage
    if recipe.evals.max_new_tokens is not None and recipe.evals.max_new_tokens >= longest:
        yield ("evals", "max_new_tokens"), no_room
    if recipe.offloads and recipe.rollout.placement == "split":
        yield ("memory",), "is for ranks that take turns on a device, and `rollout.placement` is `split`: leave one out"


def _references(stage: Stage) -> Iterator[tuple[Key, str, str]]:
    """Where a stage names an earlier one: the key within its section, the kind it must be of, the name."""
    section = "prompts" if stage.rollout else "data"
    named = [(("from",), "policy", stage.config.from_), ((section, "from"), "sample", stage.data.from_)]
    if stage.grpo:
        named.append((("reference",), "policy", stage.grpo.reference))
    for i, reward in enumerate(stage.rollout.rewards if stage.rollout else ()):
        named.append((("rewards", i, "model"), "reward_model", reward.model))
    yield from ((key, kind, name) for key, kind, name in named if name is not None)


class LoadedRecipe(NamedTuple):
    """A valid recipe and the text it came from, for messages that name file, line and key. auto: the sections whose
    layouts are still the default ones, and to be chosen (`recipes.scale.settled`)."""

    recipe: Recipe
    source: Source
    auto: tuple[str, ...] = ()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override (`key.path=value`) and validate a recipe; its `base_dir` is made absolute.

    Raises RecipeError with every problem found, each with file, line and key."""
    source = read_source(path, overrides)
    values, auto = dict(source.values), []
    for section, (first, *others) in AUTO.items():
        given = {first: "auto"} if values.get(section) == "auto" else values.get(section)
        if isinstance(given, dict) and given.get(first) == "auto":
            auto.append(section)
            values[section] = {key: value for key, value in given.items() if key != first}
            for key in [key for key in others if key in given]:
                raise RecipeError([source.problem((section, key), f"`{first}: auto` chooses this, too: leave it out")])
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        # A list whose items are wrong is reported once more by pydantic, as too short.
        errors = [e for e in error.errors(include_url=False) if not (e["type"] == "too_short" and e["input"])]
        raise RecipeError([source.problem(found["loc"], _message(found)) for found in errors]) from None
    if problems := [source.problem(key, message) for key, message in _misfits(recipe)]:
        raise RecipeError(problems)
    base_dir = str((path.parent / recipe.base_dir).resolve())
    return LoadedRecipe(recipe.model_copy(update={"base_dir": base_dir}), source, tuple(auto))


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as plain values: written to YAML it can be run again from anywhere."""
    return recipe.model_dump(mode="json", by_alias=True)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old value -> new value` for every key in which two resolved recipes differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}" for key in changed]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    children = value.items() if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else ()
    if not children:
        yield key, repr(value)
    for name, child in children:
        yield from _leaves(child, f"{key}.{name}" if key else str(name))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    for section, (first, *_) in AUTO.items():
        own = schema["$defs"][Recipe.model_fields[section].annotation.__name__]["properties"]
        for keys, key in ((schema["properties"], section), (own, first)):
            keys[key] = {"anyOf": [{"const": "auto"}, keys[key]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _message(found: Mapping[str, Any]) -> str:
    """One error of pydantic's in the words of a recipe's author."""
    got = shorten(repr(found["input"]), lines=1, width=60)
    match found["type"]:
        case "extra_forbidden" if found["loc"][-2:-1] == ("grpo",) and found["loc"][-1] in ("top_p", "top_k"):
            return "GRPO samples from the full distribution: no likelihood of a cut one can be compared"
        case "extra_forbidden":
            return f"unknown key{nearest(str(found['loc'][-1]), _known_keys(found['loc'][:-1]))}"
        case "missing":
            return "this key is required"
        case "value_error":
            return str(found["ctx"]["error"])
        case "model_type":
            return f"should be a section of keys{' or `auto`' * (found['loc'][0] in AUTO)}, not {got}"
    return f"{found['msg'].removeprefix('Input ')}, not {got}"


def _known_keys(key: Key) -> list[str]:
    """The keys that the section at `key` may have."""
    section: type[BaseModel] = Recipe
    for part in key:
        if isinstance(part, str):  # an index stays in the section that the list is of
            annotation = section.model_fields[part].annotation  # `X`, `X | None` or `tuple[X, ...]`
            section = next(one for one in (annotation, *get_args(annotation)) if isinstance(one, type(BaseModel)))
    return [field.alias or name for name, field in section.model_fields.items()]
