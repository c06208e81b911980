"""Configuration of data, sampling, memory and rollout engines. No torch, Ray or vLLM here."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Base of every recipe section: frozen, unknown keys refused. one_of: fields of which exactly one must be given."""

    one_of: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if self.one_of and sum(getattr(self, name) is not None for name in self.one_of) != 1:
            *others, last = (f"`{name.rstrip('_')}`" for name in self.one_of)
            raise ValueError(f"give exactly one of {', '.join(others)} and {last}")
        return self


class DataConfig(Config):
    """Where rows come from: exactly one of `path`, `function` and `from`."""

    one_of = ("path", "function", "from_")

    path: str | None = None
    """A .jsonl, .json or .parquet file, or a hub dataset name when no such file exists."""
    function: str | None = None
    """`module:function` or `file.py:function` that returns a list of row dicts."""
    from_: str | None = Field(None, alias="from")
    """Name of an earlier `sample` stage: its preference pairs, scored rows, or for SFT the best of each prompt."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for `function`, or for `datasets.load_dataset` with a hub dataset, e.g. {split: train}."""
    columns: dict[str, str] = Field(default_factory=dict)
    """New name -> column in the file, e.g. {prompt: question, completion: answer}."""
    limit: int | None = Field(None, gt=0)
    """Use only the first N rows."""


def memory_bytes(text: str) -> int:
    """Bytes of "70GiB". Raises ValueError."""
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])iB", text)) is None or not float(found[1]):
        raise ValueError(f"{text!r} is no amount of memory: write it as 70GiB (or MiB, TiB)")
    return int(float(found[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[found[2]])


def budget(memory: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Bytes of a device and of a host that `memory` names. Raises ValueError."""
    device, host = (memory_bytes(str(memory[key])) if key in memory else None for key in ("device", "host"))
    return device, host


def _check_memory(memory: dict[str, Any]) -> dict[str, Any]:
    budget(memory)
    if memory.get("offload", "auto") not in ("auto", "off", False):  # YAML reads a plain `off` as false
        raise ValueError("`offload` is `auto` or `off`")
    if not isinstance(memory.get("disk", ""), str):
        raise ValueError("`disk` is a folder")
    return memory


Memory = Annotated[dict[Literal["device", "host", "disk", "offload"], Any], AfterValidator(_check_memory)]


class RolloutConfig(Config):
    """The inference engines."""

    replicas: int = Field(1, ge=1)
    """Number of whole vLLM engines, each of tensor x data ranks."""
    tensor: int = Field(1, ge=1)
    """Ranks that split every matrix of an engine between them (tensor parallelism)."""
    data: int = Field(1, ge=1)
    """Such groups of ranks in an engine: each samples other prompts, the experts lie over all of them."""
    expert: bool = False
    """Lay the routed experts whole over all ranks of an engine (expert parallelism) instead of splitting each."""
    placement: Literal["colocated", "split"] = "colocated"
    """CUDA devices of the engines: those of the training ranks, which share them, or their own."""
    bucket_mb: int = Field(256, ge=1)
    """MiB of weights that a hand-over moves at a time; a single tensor may be larger."""
    max_num_seqs: int = Field(256, ge=1)
    """Most sequences that one engine runs at once."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of a sequence, prompt and completion together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the engine's weights and KV cache."""
    mla: bool = False
    """On the CPU: vLLM's MLA kernel instead of the materialised form (slower, no prefix cache); CUDA always has MLA."""
    memory: float = Field(1.0, gt=0)
    """KV cache: GiB on the CPU; on CUDA the share of device memory (below 1) for all that the engine holds."""
    eager: bool = True
    """Skip compilation: starts 16-40 s sooner, each step a little slower."""

    @property
    def world(self) -> int:
        """Ranks of one engine."""
        return self.tensor * self.data

    @model_validator(mode="after")
    def _several_ranks(self) -> Self:
        if self.expert and self.world == 1:
            raise ValueError("`expert` needs an engine of several ranks: set `tensor` or `data` above 1")
        if self.data > 1 and not self.expert:
            raise ValueError("`data` above 1 needs `expert: true`; whole copies of the model are `replicas`")
        return self


def routed_experts(model: Mapping[str, Any]) -> int:
    """How many routed experts a layer of a model has, by its configuration's values; 0 of a dense one."""
    return max(model.get(name) or 0 for name in ("n_routed_experts", "num_experts", "num_local_experts"))
