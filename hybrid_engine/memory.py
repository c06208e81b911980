"""Residency as it is carried out: the engine's actors told what to move, and memory measured."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import psutil
from transformers import PreTrainedConfig

from alignment.config import DatasetStageConfig, GRPOConfig, RolloutStageConfig, StageConfig, TrainConfig
from hybrid_engine.actors import wait_all
from hybrid_engine.footprint import SIZE, Model, activations, gathered, logits, model_of
from hybrid_engine.offload import ALIGNED, Place
from hybrid_engine.phases import GIB, SPARE, Budget, Residency
from hybrid_engine.residency import ResidencyError, Tier
from hybrid_engine.reward_worker import ModelReward
from rollout.config import RolloutConfig

LOOK = 0.05
"""Seconds between two looks at the processes' memory."""
TRAINER, ENGINE = ("parameters", "optimizer", "reference"), ("weights", "KV cache")
"""Components that training ranks and rollout ranks move."""
PHASES = ("handover", "generate", "score", "reference", "train", "checkpoint")
READ = 5e8
"""Bytes/s at which a reward model is read from its files, roughly."""


class Memory:
    """Says what is resident where, for one engine; without a budget all is. On the CPU all processes share the host, a
    component is what all ranks hold of it; on CUDA each device has a rank and a replica, and all are used alike."""

    def __init__(self, budget: Budget | None) -> None:
        self._budget, self.on = budget, budget is not None
        self.env = ALIGNED if self.on else {}
        self._judges: dict[str, ModelReward] = {}
        self._metrics: dict[str, float] = {}
        self._phase, self._started, self._watch = "", False, None

    def start(self, device: str, ranks: Mapping[str, Any], replicas: Mapping[str, Any]) -> None:
        """Begin to keep to the budget. ranks, replicas: the engine's actors by name. Raises WorkerError for a disk that
        cannot be used; `enter` and `bring` raise ResidencyError for a budget that cannot work."""
        if not self.on:
            return
        self._ranks, self._replicas, self._cuda, budget = ranks, replicas, device == "cuda", self._budget
        below = {process.pid for process in psutil.Process().children(recursive=True)}
        if not self._cuda and not below.issuperset(self._each(lambda rank: rank.pid.remote())):
            raise ValueError("memory: on processors a run watches its own processes alone; run it without --ray")
        sizes = wait_all({name: replica.give_up.remote() for name, replica in replicas.items()})
        found = wait_all({name: rank.offload.remote(budget.disk) for name, rank in ranks.items()})
        self.residency = Residency(self._tiers(budget, found), budget.say)
        for name in ENGINE:
            self.residency.add(name, self._all([size[name] for size in sizes]), here=False)
        # Ray keeps what its store has held: in the end the weights of a hand-over, most of the time less.
        self._store = 0 if self._cuda else max(size["weights"] for size in sizes)
        self._watch = None if self._cuda else Watch()

    def _tiers(self, budget: Budget, found: Sequence[tuple[int, Mapping[str, tuple[float, float]]]]) -> list[Tier]:
        """found: each rank's free bytes of the disk, and speeds. On the CPU the ranks have measured them together."""
        memory, whole, share = psutil.virtual_memory().total, 0, 1.0
        if self._cuda:
            whole = min(size for _, size in self._each(lambda rank: rank.device_memory.remote()))
            share = len({host for host, _ in self._each(lambda rank: rank.address.remote())}) / len(self._ranks)
        for key, given, there in (("device", budget.device, whole), ("host", budget.host, memory)):
            if given is not None and given > there:
                raise ValueError(f"memory.{key}: {given / GIB:.2f} GiB are more than there are, {there / GIB:.2f} GiB")
        many = len(self._ranks) if self._cuda else 1
        links = {tier: [sum(s[tier][way] for _, s in found) / many for way in (0, 1)] for tier in found[0][1]}
        tiers = [Tier("host", budget.host or memory)]
        if self._cuda:
            host = int((budget.host or memory // 2) * share)
            tiers = [Tier("device", budget.device or whole), Tier("host", host, *links["host"])]
        if budget.disk is not None:
            tiers.append(Tier("disk", int(min(free for free, _ in found) * share), *links["disk"]))
        return tiers

    def _each(self, call: Callable[[Any], Any]) -> list[Any]:
        return wait_all({name: call(rank) for name, rank in self._ranks.items()}, self._replicas)

    def _all(self, sizes: Sequence[int]) -> int:
        return max(sizes) if self._cuda else sum(sizes)

    # -- a stage -----------------------------------------------------------------------------------------------

    def before_load(self) -> None:
        """Forget the stage before, and make room for the models of the next."""
        if not self.on:
            return
        self._judges, self._phase, self._started = {}, "", False
        self.residency.begin()
        self._tell(self.residency.only((), "load"))

    def loaded(self, stage: StageConfig, train: TrainConfig, rollout: RolloutConfig, config: PreTrainedConfig) -> None:
        """The ranks hold the stage's models. config: the policy's."""
        if not self.on:
            return
        held, sizes = self.residency, self._each(lambda rank: rank.components.remote())
        for name, (_, pieces) in sizes[0].items():
            here = name in ("parameters", "reference")  # the optimiser's states come to be in the first step
            held.add(name, self._all([size[name][0] for size in sizes]), pieces, moves=name in TRAINER, here=here)
        for phase, nbytes in predicted_work(stage, train, rollout, model_of(config), not self._cuda).items():
            held.add(f"work in {phase}", nbytes, moves=False, here=False, phases=(phase,), remade=0.0)
        held.cycle = ["handover", "generate"] * isinstance(stage, RolloutStageConfig)
        held.cycle += ["reference"] * ("reference" in sizes[0])
        held.cycle += ["train"] * isinstance(stage, GRPOConfig | DatasetStageConfig)

    def judge(self, label: str, judge: ModelReward) -> None:
        """A reward model of the stage, not loaded yet: it is read from its own files whenever it was given up."""
        if not self.on:
            return
        nbytes = judge.nbytes()
        self._judges[name := f"reward model {label}"] = judge
        self.residency.add(name, nbytes, here=False, phases=("score",), remade=nbytes / READ)
        if "score" not in self.residency.cycle:
            self.residency.cycle.insert(2, "score")
            self.residency.add("work in score", 0, moves=False, here=False, phases=("score",), remade=0.0)

    # -- a phase -----------------------------------------------------------------------------------------------

    def enter(self, phase: str) -> bool:
        """Make resident what a phase needs. Whether the engines need a hand-over before they sample again."""
        same = phase == self._phase and self.residency.cycle != [phase]
        if same or (phase == "score" and not self._judges):
            return False
        if self._phase == "handover":
            self.left("handover")
            self._store = 0  # the next stage's baseline has it
        return self.bring(phase)

    def checkpoint(self, *, changed: bool = False) -> bool:
        """Parameters, and where there is room the optimiser's states; else a piece of these at a time can come."""
        try:
            return self.bring("checkpoint", ("parameters", "optimizer"), changed=changed)
        except ResidencyError:
            return self.bring("checkpoint", ("parameters",), changed=changed, visiting="optimizer")

    def bring(self, phase: str, names: Sequence[str] | None = None, **how: Any) -> bool:
        """As `Residency.enter`, or for `names` as `Residency.only`, carried out. What it returns is as of `enter`."""
        held = self.residency
        if not self._started:  # what is in use beyond what can move is the processes' own
            held.add("baseline", int(SPARE * max(0, self._used() - held.resident())), moves=False, phases=PHASES)
            held.add("object store", self._store, moves=False, phases=PHASES)
            self._started = True
        lost = self._tell(held.enter(phase) if names is None else held.only(names, phase, **how))
        if self._watch is not None:
            self._note("memory/measured", self._watch.take())
        self._phase, self._entered = phase, time.perf_counter()
        return lost

    def left(self, phase: str) -> None:
        """The phase that was entered is over: measure it."""
        if self.on and phase == self._phase and phase in self.residency.predicted:
            peak = self._used() if self._watch is None else self._watch.take()
            for kind, value in (("measured", peak), ("predicted", self.residency.predicted[phase])):
                self._note(f"memory/{phase}/{kind}", value)
                self._note(f"memory/{kind}", value)
            self.residency.measured(phase, time.perf_counter() - self._entered, peak)

    def _note(self, name: str, nbytes: int) -> None:
        self._metrics[name] = max(self._metrics.get(name, 0.0), nbytes / GIB)

    def take_metrics(self) -> dict[str, float]:
        """GiB of the device, or on the CPU of the host, at most in use since the last call, and predicted: the whole
        time (`memory/measured`, `memory/predicted`) and in each phase (`memory/PHASE/measured`)."""
        taken, self._metrics = self._metrics, {}
        return taken

    def close(self) -> None:
        """Look at the processes no more."""
        if self._watch is not None:
            self._watch.ended.set()

    def _used(self) -> int:
        """Bytes in use now, of the host or of the fullest device: contexts and communicators count as well."""
        if self._watch is not None:
            return used_by_processes()
        return max(used for used, _ in self._each(lambda rank: rank.device_memory.remote()))

    def _tell(self, rounds: Sequence[Sequence[Place]]) -> bool:
        """Have places taken, round by round; the third begins only, and the ranks wait for it before the next. Whether
        an engine lost anything."""
        lost = False
        for number, places in enumerate(rounds):
            mine, theirs = ([p for p in places if p.component in kind] for kind in (TRAINER, ENGINE))
            if mine or number != 1:
                self._each(lambda rank, places=mine, during=number == 2: rank.place.remote(places, during))
            for place in places:
                if place.component in self._judges and not place.tiers:
                    self._judges[place.component].release()
            # After the ranks: vLLM takes a device that fills up while it falls asleep for a fault.
            if theirs:
                lost |= any(not place.tiers for place in theirs)
                wait_all({name: replica.place.remote(theirs) for name, replica in self._replicas.items()}, self._ranks)
        return lost


class Watch:
    """The most memory that this process and all its descendants have used together, looked at now and then."""

    def __init__(self) -> None:
        self._peak, self.ended, self._lock = 0, threading.Event(), threading.Lock()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        spent = 0.0
        while not self.ended.wait(max(LOOK, 9 * spent)):  # it costs no more than a tenth of a core
            begun = time.perf_counter()
            with self._lock:
                self._peak = max(self._peak, used_by_processes())
            spent = time.perf_counter() - begun

    def take(self) -> int:
        """The peak since the last call, in bytes."""
        with self._lock:
            used = used_by_processes()
            peak, self._peak = max(self._peak, used), used
        return peak


def used_by_processes() -> int:
    """Proportional set size of this process and its descendants, in bytes: what they share counts once."""
    total, root = 0, psutil.Process()
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            total += 0  # it has just ended
    return total


def predicted_work(
    stage: StageConfig, train: TrainConfig, rollout: RolloutConfig, model: Model, on_cpu: bool
) -> dict[str, int]:
    """Bytes that a phase takes beside what moves, until they have been measured: activations, logits, what is gathered,
    the buffers of a hand-over; on the CPU of all ranks together."""
    tokens, spoken, length = train.tokens_per_rank, 1.0, rollout.max_length
    if isinstance(stage, RolloutStageConfig):
        spoken = stage.max_new_tokens / length
        tokens = min(tokens, ceil(stage.prompts_per_step / train.world) * stage.completions * length)
    elif isinstance(stage, DatasetStageConfig):
        length = stage.max_length
    ranks = train.world if on_cpu else 1
    forward = ranks * (logits(model, train, ceil(tokens * spoken)) + gathered(model, train, micro_batches=2))
    return {
        "handover": 4 * min(rollout.bucket_mb * 2**20, SIZE[rollout.dtype] * (model.dense + model.routed)),
        "generate": 16 * rollout.max_num_seqs * model.values["vocab_size"],
        "reference": forward,
        "train": forward + ranks * activations(model, train, tokens, length, on_cpu),
    }
