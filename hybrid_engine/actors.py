"""Ray, and its actors: which device and how many threads each gets, where ranks meet, and waiting for them so that a
failure ends the run with its first cause, and soon."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed.elastic.utils.distributed import get_free_port

from alignment.config import TrainConfig
from hybrid_engine.cluster import FIGURES, GIB
from rollout.config import RolloutConfig
from rollout.vllm.environment import installed

LOOK = 10.0  # seconds without an answer after which the actors that should be idle are looked for
GRACE = 5.0  # seconds to look for the death that made the others fail, once one call has failed


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


class WorkerError(RuntimeError):
    """An actor died or raised. The message names the actor and says what happened first."""


def wait_all(calls: Mapping[str, ray.ObjectRef], idle: Mapping[str, Any] = {}) -> list[Any]:
    """The results of calls running at once, in order. calls: a name for messages -> the call's reference. idle: actors
    that have nothing to do meanwhile, by name: their death is noticed too.
    Raises WorkerError as soon as one fails, naming the one that died where a death made others fail too."""
    names = {ref: name for name, ref in calls.items()}
    pending = list(names)
    while pending:
        done = wait_any(pending, idle)
        pending.remove(done)
        if (failure := _failure(done)) is not None:
            failed, failure = _first_cause(done, failure, pending)
            raise WorkerError(f"{names[failed]}: {describe(failure)}") from failure
    return ray.get(list(names))


def wait_any(pending: Iterable[Any], idle: Mapping[str, Any]) -> Any:
    """The first of `pending` (references or streams) that is ready. Raises WorkerError when an idle actor has died."""
    while True:
        done, _ = ray.wait(list(pending), num_returns=1, timeout=LOOK)
        if done:
            return done[0]
        if idle:  # an idle actor answers at once, a dead one with an error
            wait_all({name: actor.pid.remote() for name, actor in idle.items()})


def _failure(ref: ray.ObjectRef) -> RayError | None:
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def _first_cause(failed: ray.ObjectRef, failure: RayError, pending: list[ray.ObjectRef]) -> tuple[Any, RayError]:
    """A dead rank makes the living ones fail in their collectives: a death outranks an exception."""
    if isinstance(failure, RayTaskError) and pending:
        for ref in ray.wait(pending, num_returns=len(pending), timeout=GRACE)[0]:
            if isinstance(other := _failure(ref), RayActorError):
                failed, failure = ref, other
    return failed, failure


def describe(error: RayError) -> str:
    """What happened, without Ray's own frames."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, RayActorError) and error.actor_init_failed:
        lines = [line for line in str(error).strip().splitlines() if line.strip(" ^~")]
        frames = [number for number, line in enumerate(lines) if line.lstrip().startswith('File "')]
        own = lines[frames[-1] + 2 :] if frames else lines[-1:]  # the exception's, after its traceback
        return "it could not start: " + "\n".join(own)
    if isinstance(error, RayActorError):
        return f"the process died ({str(error).strip().splitlines()[-1].strip()})"
    return f"{type(error).__name__}: {error}"
