"""Ray, and its actors: how many threads and devices each gets, and where ranks meet."""

from __future__ import annotations

import os
from typing import Any

import ray
import torch


def start_ray(address: str | None) -> bool:
    """Join the cluster at `address`, or start a small local one; False where this process is connected already."""
    if ray.is_initialized():
        return False
    # Ray would run its workers at niceness 15: a step then waits for whatever else the machine has to do.
    os.environ |= {"RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if address is not None:
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init("local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    return True


def actor(cls: type, processes: int, variables: dict[str, str]) -> Any:
    """The actor class, one of `processes` that run at the same time, with its environment: thread counts must be there
    before torch is imported."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    environment_variables = {"OMP_NUM_THREADS": str(threads), "RAY_DEDUP_LOGS": "0"} | variables
    gpus = 0.5 if torch.cuda.is_available() else 0
    return ray.remote(cls).options(num_cpus=0, num_gpus=gpus, runtime_env={"env_vars": environment_variables})


def free_address() -> tuple[str, int]:
    """This host, and a port of it that nobody uses."""
    from torch.distributed.elastic.utils.distributed import get_free_port

    return ray.util.get_node_ip_address(), get_free_port()
