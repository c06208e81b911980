"""Ray, and its actors: which device and how many threads each gets, and where ranks meet."""

import os
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed.elastic.utils.distributed import get_free_port

from alignment.config import TrainConfig
from hybrid_engine.cluster import FIGURES, GIB
from rollout.config import RolloutConfig
from rollout.vllm.environment import installed


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


def at_hand(address: str | None) -> str | None:
    """The CUDA devices of the Ray cluster at `address`, or of this host, as `hybrid_engine.cluster.cluster` takes them;
    None where vLLM is built for the CPU. Raises ValueError where `hardware.yaml` has no figures of them."""
    if installed().device == "cpu":
        return None
    started = start_ray(address)
    hosts = [node["Resources"] for node in ray.nodes() if node["Resources"].get("GPU")]
    name = ray.get(ray.remote(torch.cuda.get_device_name).options(num_gpus=1).remote()) if hosts else "no CUDA device"
    if started:
        ray.shutdown()
    if (kind := FIGURES["names"].get(name)) is None:
        known = ", ".join(FIGURES["names"])
        raise ValueError(f"{name}: hybrid_engine/hardware.yaml has figures of {known}; for others write the layout")
    count, memory = (int(min(host[what] for host in hosts)) for what in ("GPU", "memory"))
    return f"{len(hosts)}x{count}x{kind}+{memory // GIB}GiB"


def devices(train: TrainConfig, rollout: RolloutConfig) -> tuple[range, range]:
    """The device of every training and of every rollout rank: the same ones for both, or with `split` each its own."""
    first = train.world if rollout.placement == "split" else 0
    return range(train.world), range(first, first + rollout.world * rollout.replicas)


def reserve(count: int) -> PlacementGroup:
    """`count` CUDA devices of the cluster, on as few hosts as can be. Raises ValueError where it has fewer."""
    available = int(ray.cluster_resources().get("GPU", 0))
    if count > available:
        raise ValueError(
            f"train and rollout need {count} CUDA devices, the cluster has {available}: fewer ranks, or"
            " `rollout.placement: colocated`"
        )
    group = ray.util.placement_group([{"GPU": 1}] * count, strategy="PACK")
    ray.get(group.ready())
    return group


def launch(
    cls: type, arguments: Sequence[Any], processes: int, variables: dict[str, str],
    group: PlacementGroup | None, device: int, share: float,
) -> Any:  # fmt: skip
    """Start an actor, one of `processes` that run at the same time, with its environment: thread counts must be there
    before torch is imported. It gets a `share` of a device of the group; without a group there are none."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0}
    if group is not None:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=device)
        options |= {"num_gpus": share, "scheduling_strategy": strategy}
    environment = {"OMP_NUM_THREADS": str(threads), "RAY_DEDUP_LOGS": "0"} | variables
    return ray.remote(cls).options(**options, runtime_env={"env_vars": environment}).remote(*arguments)


class Worker:
    """What every actor answers."""

    def pid(self) -> int:
        """Process id, for those who watch or kill it."""
        return os.getpid()

    def address(self) -> tuple[str, int]:
        """This host, and a port of it that nobody uses: where this actor and others can meet."""
        return ray.util.get_node_ip_address(), get_free_port()
