"""Which phase needs what, and how the scheduler's answer is followed, piece by piece. Pure arithmetic."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid_engine.offload import Place
from hybrid_engine.residency import GIB, Component, Move, ResidencyError, Schedule, Tier, best_schedule

NEEDED = {
    "parameters": ("handover", "train"),
    "optimizer": ("train",),
    "gradients": ("train",),
    "reference": ("reference",),
    "weights": ("handover", "generate"),
    "KV cache": ("generate",),
}
"""Component -> the phases that work on it; a reward model's is `score`. "handover" is the engine's own, before
"generate"."""
REMADE = {"gradients": "train", "weights": "handover", "KV cache": "generate"}
"""Component -> the phase that writes it from scratch: before it, it need not be anywhere."""
LATE, SHORT, SLACK = 0.25, 0.1, 0.02
"""The schedule is solved again where a phase took this share (and as many seconds) more or less than predicted, or its
work this share of the top tier."""
SPARE = 1.03
"""Of what was measured so much is planned for: no two steps are alike."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may use: bytes of each device and of each host's memory; None: what the machine has. disk: a folder
    for what is moved out of memory, if any. say: told the schedules."""

    device: int | None
    host: int | None
    disk: Path | None
    say: Callable[[str], None]


def component(
    name: str, nbytes: int, pieces: int = 1, phases: Iterable[str] = (), remade: float | None = None
) -> Component:
    """As a run treats it: an update changes all that it works on, and what can be made again is never copied. phases,
    remade (seconds, before each of them): where the tables above do not say it."""
    needed = frozenset(phases or NEEDED[name])
    again = {REMADE[name]: 0.0} if name in REMADE else dict.fromkeys(needed if remade is not None else (), remade)
    streamed = needed if name == "optimizer" else frozenset()
    return Component(name, nbytes, needed, needed & {"train"}, again, pieces, streamed, not (phases or again))


@dataclass(slots=True)
class Held:
    """A component and the tiers of its pieces. moves: there is something to move (activations come and go)."""

    component: Component
    tiers: list[frozenset[str]]
    moves: bool


class Residency:
    """The schedule in force, and where every piece lies. All ranks follow it alike.

    cycle: the phases of the stage's step, in their order; whoever sets it has called `begin`. predicted: phase -> peak
    of the top tier, in bytes, by the schedule in force."""

    def __init__(self, tiers: Sequence[Tier], say: Callable[[str], None]) -> None:
        self.tiers, self._say, self._top = tiers, say, frozenset({tiers[0].name})
        self._held: dict[str, Held] = {}
        self.begin()

    def begin(self) -> None:
        """Forget the stage before; the engines stay."""
        self._held = {name: held for name, held in self._held.items() if name in ("weights", "KV cache")}
        self.cycle: list[str] = []
        self.predicted: dict[str, int] = {}
        self._measured: dict[str, float] = {}  # seconds
        self._planned: dict[str, float] = {}
        self._schedule: Schedule | None = None

    def add(
        self, name: str, nbytes: int, pieces: int = 1, *, here: bool = True, moves: bool = True, **how: Any
    ) -> None:
        """As `component`. here: it lies in the top tier now. moves: there is something to move."""
        part = component(name, nbytes, pieces, **how)
        self._held[name] = Held(part, [self._top if here else frozenset()] * pieces, moves)

    def resident(self) -> int:
        """Bytes of what moves and lies in the top tier now."""
        held = [h for h in self._held.values() if h.moves]
        return sum(h.component.piece * sum(self._top <= tiers for tiers in h.tiers) for h in held)

    # -- phases ------------------------------------------------------------------------------------------------

    def enter(self, phase: str) -> list[list[Place]]:
        """What must move before the phase (first what goes out, then what comes in), and what during it.
        Raises ResidencyError."""
        if phase not in self.cycle:
            return self.only([name for name, held in self._held.items() if phase in held.component.needed_in], phase)
        if self._schedule is None or (phase == self.cycle[0] and self._differs()):
            self._solve()
        during: list[Place] = []
        used = {name: held for name, held in self._held.items() if name in self._solved}
        planned = [move for move in self._schedule.moves if (move.phase, move.when) == (phase, "during")]  # or staying
        chosen = {n: _assign(held.tiers, [m for m in planned if m.component == n]) for n, held in used.items()}
        idle = {n: [frozenset()] * len(h.tiers) for n, h in self._held.items() if n not in used and h.component.remake}
        before = self._go(idle | {name: [frozenset(m.before) for m in moves] for name, moves in chosen.items()})
        for name, moves in chosen.items():
            for piece, move in enumerate(moves):
                if move.streamed or move.after != move.before:
                    during += [Place(name, piece, frozenset(move.after), move.streamed)] * self._held[name].moves
            self._held[name].tiers[:] = [frozenset(move.after) for move in moves]
        return [*before, during]

    def only(
        self, names: Iterable[str], phase: str, changed: bool = False, visiting: str | None = None
    ) -> list[list[Place]]:
        """As `enter`, for what is not of the step (an eval, a checkpoint): these components in the top tier whole, all
        else out of it, in the highest of the others that has room. changed: their copies elsewhere become stale.
        visiting: a component whose pieces will visit one at a time. Raises ResidencyError where they do not fit."""
        names, wanted = set(names), {}
        used = dict.fromkeys((tier.name for tier in self.tiers), 0)
        used[self.tiers[0].name] = self._held[visiting].component.piece if visiting else 0
        for name, held in self._held.items():
            part, wanted[name] = held.component, []
            fixed = not held.moves and phase in part.needed_in
            stale = changed or phase in part.changed_in
            for tiers in held.tiers:
                if name in names or fixed or (part.copied and len(self.tiers) == 1):
                    there = self._top if stale else tiers | self._top
                elif part.copied:
                    fitting = [t.name for t in self.tiers[1:] if used[t.name] + part.piece <= t.capacity]
                    there = tiers - self._top or frozenset(fitting[:1] or [self.tiers[-1].name])
                else:
                    there = frozenset()
                wanted[name].append(there)
                for tier in there:
                    used[tier] += part.piece
        for tier in self.tiers:
            if used[tier.name] > tier.capacity:
                raise ResidencyError(phase, tier.name, used[tier.name] - tier.capacity, {tier.name: used[tier.name]})
        return self._go(wanted)

    def _go(self, wanted: Mapping[str, Sequence[frozenset[str]]]) -> list[list[Place]]:
        """The places that differ: what goes down or is given up, then what comes up."""
        order = {tier.name: number for number, tier in enumerate(self.tiers)}
        rounds: list[list[Place]] = [[], []]
        for name, targets in wanted.items():
            held = self._held[name]
            for piece, (now, then) in enumerate(zip(held.tiers, targets, strict=True)):
                highest = min((order[tier] for tier in now), default=len(order))
                rises = any(order[tier] < highest for tier in then)
                rounds[rises] += [Place(name, piece, then)] * (now != then and held.moves)
            held.tiers[:] = targets
        return rounds

    # -- the schedule ------------------------------------------------------------------------------------------

    def measured(self, phase: str, seconds: float, peak: int) -> None:
        """What a phase of the step took, and the peak of the top tier. What that is beyond the rest is the phase's own
        work from now on: first the prediction's place is taken, then the most of all steps counts."""
        work = self._held.get(f"work in {phase}")
        if work is not None:
            least = work.component.bytes if phase in self._measured else 0
            solved_for = self._solved.get(work.component.name, 0)
            found = max(least, int(SPARE * peak) - (self.predicted[phase] - solved_for))
            work.component = replace(work.component, bytes=found)
        self._measured[phase] = seconds

    def _differs(self) -> bool:
        return any(
            abs(seconds - self._planned[phase]) > max(LATE * self._planned[phase], SHORT)
            for phase, seconds in self._measured.items()
        ) or any(
            abs(held.component.bytes - self._solved.get(name, 0)) > SLACK * self.tiers[0].capacity
            for name, held in self._held.items()
            if held.component.needed_in & set(self.cycle)
        )

    def _solve(self) -> None:
        cycle = frozenset(self.cycle)
        used = {n: h.component for n, h in self._held.items() if h.component.bytes and h.component.needed_in & cycle}
        self._planned = {phase: self._measured.get(phase, 1.0) for phase in self.cycle}
        self._solved = {name: part.bytes for name, part in used.items()}
        before = self._schedule
        try:
            self._schedule = best_schedule([part.within(cycle) for part in used.values()], self._planned, self.tiers)
        except ResidencyError as error:
            if before is None:
                raise
            self._say(f"Memory: a step takes more than was predicted, and the schedule stays as it is: {error}")
        self.predicted = {phase: peaks[self.tiers[0].name] for phase, peaks in self._schedule.peaks.items()}
        if before is None or before.moves != self._schedule.moves:
            self._say("\n".join(["Memory, phase by phase (predicted):", *_described(self._schedule, self.tiers)]))


def _assign(now: Sequence[frozenset[str]], moves: Sequence[Move]) -> list[Move]:
    """A move for each piece, so that as few as can be must be brought to where it begins."""
    free = [move for move in moves for _ in range(move.pieces)]
    chosen: dict[int, Move] = {}
    for fits in (lambda old, new: old == new, lambda old, new: new <= old, lambda old, new: True):
        for piece, tiers in enumerate(now):
            if piece not in chosen and (found := [m for m in free if fits(tiers, frozenset(m.before))]):
                chosen[piece] = found[0]
                free.remove(found[0])
    return [chosen[piece] for piece in range(len(now))]


def _described(schedule: Schedule, tiers: Sequence[Tier]) -> Iterator[str]:
    for phase, peaks in schedule.peaks.items():
        used = ", ".join(f"{peaks[t.name] / GIB:.2f} of {t.capacity / GIB:.2f} GiB of {t.name}" for t in tiers)
        yield f"  {phase}: {used}; {schedule.lost[phase]:.2f} s lost to transfers"
    yield from (f"  {line}: {size / GIB:.2f} GiB" for line, size in schedule.copies().items())
