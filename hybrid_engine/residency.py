"""What lies where in which phase, and what moves when: solved as a mixed integer linear program. Pure arithmetic.

Tier 0 is the device, where the work is done; every lower tier has one link to the tier above. A component is a number
of equal pieces. The state S of a piece is the set of tiers that hold a fresh copy of it (none: dropped). A step is a
cycle of phases, and each phase is three windows:

    out     before the phase   copies to lower tiers
    in      before the phase   copies to higher tiers; pieces made anew on the device
    during  its compute        copies between any tiers: prefetch, or writing out what stays; streaming

In a window a piece gets at most one more copy, from a tier that holds one. Copies are given up, at no cost, before or
after `out` and `in`. A phase works on what it needs on the device; while it changes a piece, nothing copies it, and
other copies are stale. Where the phase allows it, a piece may be streamed instead: it visits the device from its
highest copy, which takes changed contents back. `docs/scale.md` has the program, and where it approximates."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from math import ceil, inf
from typing import Literal, NamedTuple, Self

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

GIB = 2**30
State = frozenset[int]
When = Literal["out", "in", "during"]
WINDOWS: tuple[When, ...] = ("out", "in", "during")
BUSY, HOLD, GAP, NODES = 1e-3, 1e-9, 1e-3, 5000


@dataclass(frozen=True, slots=True)
class Component:
    """Something that takes memory. bytes: of the whole, on one device. needed_in: phases that work on it. changed_in:
    those of them that change its contents. remake: phase -> seconds to make the whole anew before it (0 where the phase
    writes it from scratch, as a KV cache). pieces: equal parts that may lie in different tiers. streamed_in: phases of
    needed_in that work on one piece after another: two at once on the device are enough. copied: whether a lower tier
    can have it."""

    name: str
    bytes: int
    needed_in: frozenset[str]
    changed_in: frozenset[str] = frozenset()
    remake: Mapping[str, float] = field(default_factory=dict)
    pieces: int = 1
    streamed_in: frozenset[str] = frozenset()
    copied: bool = True

    @property
    def piece(self) -> int:
        """Bytes of one piece."""
        return -(-self.bytes // self.pieces)

    def within(self, phases: frozenset[str]) -> Self:
        """As a step of these phases alone sees it."""
        needed, changed, streamed = (each & phases for each in (self.needed_in, self.changed_in, self.streamed_in))
        remake = {phase: seconds for phase, seconds in self.remake.items() if phase in phases}
        return replace(self, needed_in=needed, changed_in=changed, streamed_in=streamed, remake=remake)


@dataclass(frozen=True, slots=True)
class Tier:
    """A kind of memory. capacity: bytes. down, up: bytes/s from and to the tier above (unused on the device).
    overlaps: whether its link is free while a phase computes."""

    name: str
    capacity: int
    down: float = inf
    up: float = inf
    overlaps: bool = True


@dataclass(frozen=True, slots=True)
class Move:
    """`pieces` pieces (`bytes` in all) of a component, of those that the tiers in `before` hold; those in `after` hold
    them at the window's end. source -> target is copied; no target: nothing is; no source: made anew; a target that
    is not in `after`: streamed. when: "during" `phase`'s compute, or before it: first every "out", then every "in"."""

    component: str
    pieces: int
    bytes: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    source: str | None
    target: str | None
    phase: str
    when: When

    @property
    def streamed(self) -> bool:
        """Whether the pieces visit the device and go back."""
        return self.target is not None and self.target not in self.after


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step, which the next repeats. moves: in order; those `during` a phase include what stays, and so say what
    lies where in it. peaks: phase -> tier -> bytes, the transfers before it included. lost: phase -> seconds before and
    in it that nothing hides. gap: how far from optimal it may be, as a share of the objective."""

    moves: tuple[Move, ...]
    peaks: Mapping[str, Mapping[str, int]]
    lost: Mapping[str, float]
    gap: float

    def copies(self) -> Mapping[str, int]:
        """What is copied, when and from where to where, for a person -> bytes."""
        found: Counter[str] = Counter()
        for move in self.moves:
            if move.source is not None and move.target is not None:
                when, back = "during" if move.when == "during" else "before", " and back" * move.streamed
                found[f"{when} {move.phase}: {move.component}, {move.source} -> {move.target}{back}"] += move.bytes
        return found


class ResidencyError(ValueError):
    """No schedule fits. missing: bytes that `phase` lacks in `tier`, where the least is missing. enough: tier ->
    capacity in bytes that would do if the others stay as they are."""

    def __init__(self, phase: str, tier: str, missing: int, enough: Mapping[str, int]) -> None:
        self.phase, self.tier, self.missing, self.enough = phase, tier, missing, enough
        remedies = ", ".join(f"{name} {ceil(size / GIB * 100) / 100:.2f} GiB" for name, size in enough.items())
        super().__init__(f"{phase}: {missing / GIB:.2f} GiB of {tier} are missing; any of these would do: {remedies}")


class _Arc(NamedTuple):
    """One x of the model; components, windows (three a phase) and tiers by number."""

    part: int
    window: int
    before: State
    after: State
    source: int | None
    target: int | None


def _ways(part: Component, phase: str, when: When, old: State, new: State) -> Iterator[tuple[int | None, int | None]]:
    """Every (source, target) by which a piece goes from one state to the other; (None, None): nothing is copied."""
    added, needed, changed = new - old, phase in part.needed_in, phase in part.changed_in
    if not part.copied and (old | new) - {0}:
        return
    if when == "during" and needed and 0 not in old:
        if old and part.pieces > 1 and phase in part.streamed_in and new == ({min(old)} if changed else old):
            yield min(old), 0
    elif when == "during" and (changed or not old <= new):
        yield from [(None, None)] * (changed and new == {0})
    elif not added:
        yield None, None
    elif len(added) == 1:
        yield from ((a, b) for a, b in product(old, added) if when == "during" or (a < b) == (when == "out"))
        yield from [(None, 0)] * (when == "in" and new == {0} and not old and phase in part.remake)


def _seconds(arc: _Arc, part: Component, phase: str, tier: int, speeds: Tier) -> float:
    """How long one piece of the arc keeps the link of a tier busy."""
    if arc.source is None or arc.target is None:
        return 0.0 if arc.target is None else part.remake[phase] / part.pieces
    if not min(arc.source, arc.target) < tier <= max(arc.source, arc.target):
        return 0.0
    up = arc.target < arc.source
    down = not up or (arc.target not in arc.after and phase in part.changed_in)
    return part.piece * (up / speeds.up + down / speeds.down)


class _Model:
    """The program's matrices. Columns: the arcs, then the z. Rows of `room` (bytes) and `load` (seconds): a tier of a
    window each, the tier varying fastest."""

    def __init__(self, parts: Sequence[Component], phases: Mapping[str, float], tiers: Sequence[Tier]) -> None:
        self.parts, self.phases, self.tiers = parts, list(phases), tiers
        states = [frozenset(s) for n in range(len(tiers) + 1) for s in combinations(range(len(tiers)), n)]
        windows = list(product(phases, WINDOWS))
        self.arcs = [
            _Arc(number, window, before, after, *way)
            for (window, (phase, when)), (number, part) in product(enumerate(windows), enumerate(parts))
            for before, after in product(states, states)
            for way in _ways(part, phase, when, before, after)
        ]
        nodes = {node: row for row, node in enumerate(product(range(len(parts)), range(len(windows)), states))}
        self.hidden = np.array([[phases[p] * (w == "during" and t.overlaps) for t in tiers] for p, w in windows])
        self.total = np.array([0] * len(nodes) + [part.pieces for part in parts])
        self.most = np.array([parts[arc.part].pieces for arc in self.arcs] + [1] * len(parts) * len(phases))
        rows = len(self.total), self.hidden.size, self.hidden.size, len(parts) * len(phases)
        self.flow, self.room, self.load, self.stream = (sparse.lil_array((n, len(self.most))) for n in rows)
        for column, arc in enumerate(self.arcs):
            part, phase, row = parts[arc.part], arc.window // 3, arc.window * len(tiers)
            self.flow[nodes[arc.part, arc.window, arc.before], column] = 1
            self.flow[nodes[arc.part, (arc.window + 1) % len(windows), arc.after], column] = -1
            self.flow[len(nodes) + arc.part, column] = arc.window == 0
            for number, tier in enumerate(tiers):
                self.room[row + number, column] = part.piece * (number in arc.after | {arc.source})
                self.load[row + number, column] = _seconds(arc, part, self.phases[phase], number, tier)
            if arc.target is not None and arc.target not in arc.after:
                number = arc.part * len(phases) + phase
                self.stream[number, [column, len(self.arcs) + number]] = 1, -part.pieces
                self.room[row, len(self.arcs) + number] = 2 * part.piece
        self.unit = np.tile([1 << max(0, tier.capacity.bit_length() - 20) for tier in tiers], len(windows))
        self.rounded = (sparse.diags_array(1 / self.unit) @ self.room).ceil()

    def solve(self, grow: int | None = None) -> tuple[np.ndarray, float] | None:
        """The columns and the gap; None where nothing fits. grow: the number of a tier that gets as much capacity as it
        must, which is then what is minimised."""
        (count, width), windows = self.hidden.shape, sparse.eye_array(len(self.hidden))
        capacity = np.tile([tier.capacity for tier in self.tiers], count) // self.unit
        rows = [
            [self.flow, None, None, None],
            [self.stream, None, None, None],
            [self.rounded, None, sparse.kron(windows, -1.0 * (np.arange(width)[:, None] == grow)), None],
            [self.load, sparse.kron(windows, -np.ones((width, 1))), None, None],
            [None, None, windows, -np.ones((count, 1))],
        ]
        high = [self.total, np.zeros(self.stream.shape[0]), capacity, self.hidden.ravel(), np.zeros(count)]
        low = [self.total, *(np.full(len(each), -inf) for each in high[1:])]
        lost = BUSY * self.load.sum(axis=0) + HOLD * self.rounded.sum(axis=0), np.ones(count), np.zeros(count + 1)
        lacks = np.zeros(len(self.most) + count), np.ones(count), [1e3 * count]
        result = milp(
            np.concatenate(lost if grow is None else lacks),
            integrality=np.repeat([1, 0], [len(self.most), 2 * count + 1]),
            bounds=Bounds(0, np.concatenate([self.most, [inf] * count, [0 if grow is None else inf] * (count + 1)])),
            constraints=LinearConstraint(sparse.block_array(rows), np.concatenate(low), np.concatenate(high)),
            options={"mip_rel_gap": GAP if grow is None else 0, "node_limit": NODES},
        )
        if result.x is None and result.status != 2:
            raise RuntimeError(f"the solver found no schedule: {result.message}")
        return None if result.x is None else (np.rint(result.x[: len(self.most)]), result.mip_gap)

    def schedule(self, x: np.ndarray, gap: float) -> Schedule:
        """What the columns mean."""
        names, phases, moves = [tier.name for tier in self.tiers], self.phases, []
        for arc, pieces in zip(self.arcs, map(int, x), strict=False):
            part, (phase, when) = self.parts[arc.part], divmod(arc.window, 3)
            if pieces and (arc.before != arc.after or when == 2):
                held = [tuple(names[tier] for tier in sorted(state)) for state in (arc.before, arc.after)]
                ends = [None if end is None else names[end] for end in (arc.source, arc.target)]
                moves.append(Move(part.name, pieces, pieces * part.piece, *held, *ends, phases[phase], WINDOWS[when]))
        late = (self.load @ x).reshape(self.hidden.shape) - self.hidden
        lost = np.maximum(late.max(axis=1), 0).reshape(-1, 3).sum(axis=1).tolist()
        used = (self.room @ x).astype(int).reshape(len(phases), 3, -1).max(axis=1).tolist()
        peaks = [dict(zip(names, peak, strict=True)) for peak in used]
        return Schedule(tuple(moves), dict(zip(phases, peaks, strict=True)), dict(zip(phases, lost, strict=True)), gap)

    def lacking(self) -> ResidencyError:
        """Why nothing fits."""
        found, enough = [], {}
        for number, tier in enumerate(self.tiers):
            if (solved := self.solve(grow=number)) is not None:
                used = (self.rounded @ solved[0] * self.unit).reshape(len(self.phases), 3, -1)[:, ::-1, number].T
                enough[tier.name] = int(used.max())
                phase = self.phases[used.argmax() % len(self.phases)]
                found.append((enough[tier.name] - tier.capacity, phase, tier.name))
        missing, phase, name = min(found)
        return ResidencyError(phase, name, missing, enough)


def best_schedule(components: Sequence[Component], phases: Mapping[str, float], tiers: Sequence[Tier]) -> Schedule:
    """The schedule of a step that loses the least time. phases: in the order of a step, with the seconds of each one's
    compute, in which copies can hide. tiers: the device first. ValueError where a component names what is not there;
    ResidencyError where nothing fits."""
    for part in components:
        idle = (part.changed_in | part.streamed_in) - part.needed_in
        if strange := idle | ({*part.needed_in, *part.remake} - phases.keys()):
            raise ValueError(f"{part.name}: {', '.join(sorted(strange))}: not phases of the step that need it")
    model = _Model(components, phases, tiers)
    if (solved := model.solve()) is None:
        raise model.lacking()
    return model.schedule(*solved)
