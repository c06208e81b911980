"""The residency scheduler against enumeration, a replay of its schedules, and schedules worked out by hand."""

from __future__ import annotations

import random
import time
from collections import Counter, namedtuple
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_engine.residency import Component, Move, ResidencyError, Schedule, Tier, best_schedule

GB, GIB = 10**9, 2**30
NAMES = ("device", "host", "disk")
Phase = namedtuple("Phase", "name seconds")
Instance = tuple[list[Component], list[Phase], list[Tier]]


def only(*phases: str) -> frozenset[str]:
    return frozenset(phases)


# -- a replay that knows pieces and versions, not states --------------------------------------------------------------


def link_seconds(part: Component, move: Move, phase: Phase, tiers: list[Tier]) -> list[float]:
    """Seconds of each tier's link, as the module's docstring counts them."""
    if move.target is None:
        return [0.0] * len(tiers)
    if move.source is None:
        return [part.remake[phase.name] * move.pieces / part.pieces] * len(tiers)
    source, target = NAMES.index(move.source), NAMES.index(move.target)
    busy = [0.0] * len(tiers)
    for link in range(1, len(tiers)):
        if target < link <= source:
            busy[link] += move.bytes / tiers[link].up
        returns = move.target not in move.after and phase.name in part.changed_in
        if source < link <= target or (returns and target < link <= source):
            busy[link] += move.bytes / tiers[link].down
    return busy


def replay(schedule: Schedule, parts: list[Component], phases: list[Phase], tiers: list[Tier]) -> None:
    """Carry a schedule out, piece by piece: every copy is of the newest version, what is needed is there, nothing is
    ever over a capacity, the step ends as it began, and peaks and times are those predicted."""
    held: dict[str, list[dict[str, int]]] = {part.name: [] for part in parts}
    for move in schedule.moves:
        if (move.phase, move.when) == (phases[-1].name, "during"):
            held[move.component] += [dict.fromkeys(move.after, 0) for _ in range(move.pieces)]
    start = {name: Counter(frozenset(piece) for piece in pieces) for name, pieces in held.items()}
    assert all(len(held[part.name]) == part.pieces for part in parts)
    for version, phase in enumerate(phases, 1):
        peak, lost = Counter(dict.fromkeys((tier.name for tier in tiers), 0)), 0.0
        for when in ("out", "in", "during"):
            room, busy = Counter(), np.zeros(len(tiers))
            for part in parts:
                moves = [m for m in schedule.moves if (m.component, m.phase, m.when) == (part.name, phase.name, when)]
                staying, arrived, streamed = held[part.name], [], False
                for move in moves:
                    busy += link_seconds(part, move, phase, tiers)
                    for _ in range(move.pieces):
                        piece = staying.pop([set(piece) for piece in staying].index({*move.before}))
                        room.update(dict.fromkeys({*move.after} | ({move.source} - {None}), part.piece))
                        if move.source and move.target:
                            piece[move.target] = piece[move.source]
                        elif move.target:
                            piece["device"] = version
                        visits, works = move.target is not None and move.target not in move.after, when == "during"
                        streamed |= visits
                        if works and phase.name in part.needed_in:
                            assert "device" in piece, (part.name, phase.name)
                            assert visits == ("device" not in move.after)
                            if phase.name in part.changed_in:
                                assert visits or move.target is None
                                piece["device"] = version
                                piece |= {move.source: version} if visits else {}
                        arrived.append({tier: piece[tier] for tier in move.after})
                        assert {*arrived[-1].values()} <= {max(piece.values(), default=0)}, "a stale copy"
                assert when != "during" or not staying, "what a phase holds is all said"
                for piece in staying:
                    room.update(dict.fromkeys(piece, part.piece))
                room["device"] += 2 * part.piece * streamed
                held[part.name] = staying + arrived
            for tier in tiers:
                assert room[tier.name] <= tier.capacity
                peak[tier.name] = max(peak[tier.name], room[tier.name])
            hidden = [phase.seconds if when == "during" and tier.overlaps else 0.0 for tier in tiers]
            lost += max(0.0, *(busy - hidden))
        assert schedule.peaks[phase.name] == peak
        assert schedule.lost[phase.name] == pytest.approx(lost, abs=1e-6)
    assert start == {name: Counter(frozenset(piece) for piece in pieces) for name, pieces in held.items()}


# -- every schedule of a small instance -------------------------------------------------------------------------------


def placements(tiers: list[Tier]) -> list[frozenset[int]]:
    return [frozenset(s) for n in range(len(tiers) + 1) for s in combinations(range(len(tiers)), n)]


def steps(part: Component, phase: Phase, when: str, tiers: list[Tier]) -> Iterator[tuple[int, int, list[float]]]:
    """(placement before, and in and after a window, seconds of each link): all that a whole piece may do in it. It may
    give up copies and then make any number; a copy that was copied down or up is given up in the next window."""
    places, working = placements(tiers), when == "during" and phase.name in part.needed_in
    for (i, held), (j, after) in product(enumerate(places), repeat=2):
        kept, added = held & after, sorted(after - held)
        if working and (0 not in kept or (phase.name in part.changed_in and after != {0})):
            continue
        for sources in product(kept, repeat=len(added)):
            seconds, allowed = [0.0] * len(tiers), True
            for a, b in zip(sources, added, strict=True):
                allowed &= when == "during" or (a < b) == (when == "out")
                for link in range(min(a, b) + 1, max(a, b) + 1):
                    seconds[link] += part.piece / (tiers[link].up if b < a else tiers[link].down)
            if allowed:
                yield i, j, seconds
        if when == "in" and not kept and added == [0] and phase.name in part.remake:
            yield i, j, [part.remake[phase.name] / part.pieces] * len(tiers)


def enumerated(parts: list[Component], phases: list[Phase], tiers: list[Tier]) -> float:
    """The least objective of all schedules, inf where none fits: every way from every placement of all components to
    every other, window by window, and back to the first."""
    whole = [part for part in parts for _ in range(part.pieces)]
    places, capacity = placements(tiers), np.array([tier.capacity for tier in tiers])
    sizes = [np.array([[part.piece * (t in place) for t in range(len(tiers))] for place in places]) for part in whole]
    total = np.zeros((1, len(tiers)))
    for size in sizes:
        total = (total[:, None] + size[None]).reshape(-1, len(tiers))
    fits = (total <= capacity).all(axis=1)
    number = np.where(fits, np.cumsum(fits) - 1, -1)
    least = np.where(np.eye(fits.sum(), dtype=bool), 0.0, inf)
    for phase, when in product(phases, ("out", "in", "during")):
        start, end, busy = np.zeros(1, int), np.zeros(1, int), np.zeros((1, len(tiers)))
        for part in whole:
            i, j, seconds = (np.array(each) for each in zip(*steps(part, phase, when, tiers), strict=True))
            start, end = (np.add.outer(a * len(places), b).ravel() for a, b in ((start, i), (end, j)))
            busy = (busy[:, None] + seconds[None]).reshape(-1, len(tiers))
        hidden = [phase.seconds * (when == "during" and tier.overlaps) for tier in tiers]
        cost = np.maximum(busy - hidden, 0).max(axis=1) + 1e-3 * busy.sum(axis=1)
        inside = fits[start] & fits[end]
        ways = np.full(least.shape, inf)
        np.minimum.at(ways, (number[start[inside]], number[end[inside]]), cost[inside])
        first, least = least, np.full(least.shape, inf)
        for k, then in enumerate(ways):
            area = np.ix_(np.isfinite(first[:, k]), np.isfinite(then))
            least[area] = np.minimum(least[area], np.add.outer(first[area[0].ravel(), k], then[area[1].ravel()]))
    return min(least.diagonal(), default=inf)


def random_instance(seed: int, streams: bool = False) -> Instance:
    """3 to 4 phases, 2 to 3 tiers, 3 to 4 pieces (more with streams); a phase just fits the device, or nearly."""
    draw = random.Random(seed)
    count, depth, pieces = draw.choice([(3, 2, 3), (4, 2, 3), (3, 2, 4), (4, 2, 4), (3, 3, 3)])
    names = [f"p{n}" for n in range(count)]
    phases = [Phase(name, draw.choice([0.0, 1.0, 3.0, 8.0])) for name in names]
    parts: list[Component] = []
    while (left := pieces + 4 * streams - sum(part.pieces for part in parts)) > 0:
        needed = frozenset(draw.sample(names, draw.choice([0, 1, 1, 1, 2, 2])))
        changed = frozenset(name for name in sorted(needed) if draw.random() < 0.5)
        remake = {name: draw.choice([0.0, 0.5, 3.0, 10.0]) for name in names if draw.random() < 0.3}
        split = min(left, draw.choice([1, 2, 3, 4] if streams else [1, 1, 1, 2]))
        streamed = needed if streams and draw.random() < 0.5 else only()
        parts.append(Component(f"c{len(parts)}", split * draw.randint(1, 8), needed, changed, remake, split, streamed))
    most = max(sum(part.bytes for part in parts if name in part.needed_in) for name in names)
    total = sum(part.bytes for part in parts)
    tiers = [Tier("device", draw.randint(most // 2 if streams else most - 1, (most + total) // 2))]
    for name in NAMES[1 : 3 if streams else depth]:
        speeds = draw.choice([0.5, 1.0, 2.0, 4.0]), draw.choice([0.5, 1.0, 2.0, 4.0])
        tiers.append(Tier(name, draw.randint(total // 4, total), *speeds, draw.random() < 0.7))
    return parts, phases, tiers


def solved(parts: list[Component], phases: list[Phase], tiers: list[Tier]) -> tuple[Schedule, list[Tier], list[Tier]]:
    """A schedule, the tiers, the last of them grown by what was found missing, and with a byte less than that."""
    try:
        return best_schedule(parts, dict(phases), tiers), tiers, []
    except ResidencyError as error:
        name, enough = list(error.enough.items())[-1]
        grown, short = (
            [replace(tier, capacity=size) if tier.name == name else tier for tier in tiers]
            for size in (enough, enough - 1)
        )
        return best_schedule(parts, dict(phases), grown), grown, short


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_schedules_are_as_good_as_the_best_enumerated_one(seed: int) -> None:
    parts, phases, tiers = random_instance(seed)
    schedule, tiers, short = solved(parts, phases, tiers)
    assert not short or enumerated(parts, phases, short) == inf
    replay(schedule, parts, phases, tiers)
    best = enumerated(parts, phases, tiers)
    named, at = {part.name: part for part in parts}, {phase.name: phase for phase in phases}
    busy = sum(sum(link_seconds(named[move.component], move, at[move.phase], tiers)) for move in schedule.moves)
    assert best - 1e-6 <= sum(schedule.lost.values()) + 1e-3 * busy <= 1.01 * best + 1e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_pieces_and_streams_replay_to_the_predicted_peaks_and_times(seed: int) -> None:
    parts, phases, tiers = random_instance(seed, streams=True)
    schedule, tiers, _ = solved(parts, phases, tiers)
    replay(schedule, parts, phases, tiers)


def test_236b_on_128_devices_is_solved() -> None:
    """DeepSeek-V2 on 16 x 8 devices: training, reference and reward models sharded over all, vLLM over 8 (TP)."""
    share, train, score, free = 236 * GB // 128, only("train"), only("score"), {"train": 0.0}
    layers, policy = {"pieces": 60}, only("hand-over", "reference", "train")
    parts = [
        Component("parameters", 2 * share, policy, train, **layers),
        Component("master weights", 4 * share, train, train, **layers, streamed_in=train),
        Component("Adam states", 8 * share, train, train, **layers, streamed_in=train),
        Component("gradients", 4 * share, train, train, free),
        Component("activations", 40 * GB, train, train, free),
        Component("reference", 2 * share, only("reference"), **layers, streamed_in=only("reference")),
        *(Component(name, 2 * share, score, **layers, streamed_in=score) for name in ("helpful", "safety")),
        Component("vLLM", 32 * share, only("hand-over", "generate"), only("hand-over"), {"hand-over": 0.0}),
        Component("KV cache", 14 * GB, only("generate"), only("generate"), {"generate": 0.0}),
        Component("communicators", 3 * GB, policy | score | only("generate")),
    ]
    seconds = {"hand-over": 5.0, "generate": 300.0, "score": 30.0, "reference": 20.0, "train": 200.0}
    phases = [Phase(*phase) for phase in seconds.items()]
    tiers = [Tier("device", 80 * GB), Tier("host", 125 * GB, 50e9, 50e9), Tier("disk", 900 * GB, 3e9, 6e9)]
    began = time.perf_counter()
    schedule = best_schedule(parts, dict(phases), tiers)
    print(f"236B: {time.perf_counter() - began:.2f} s, lost {schedule.lost}, peaks {schedule.peaks}")
    assert schedule.gap <= 1e-3, "within the node limit"
    replay(schedule, parts, phases, tiers)
    assert sum(schedule.lost.values()) == pytest.approx(0.0, abs=1e-6)


# -- by hand: bytes, and one byte a second unless said --------------------------------------------------------------


A, B, C = Component("a", 20, only("p0")), Component("b", 20, only("p1")), Component("c", 20, only("p2"))
P0, P1, P2 = (Phase(f"p{n}", 100.0) for n in range(3))


def lost(device: int, *parts: Component, phases: tuple[Phase, ...] = (P0, P1), host: int = 1000, up: float = 1) -> list:
    tiers = [Tier("device", device), Tier("host", host, 1, up)]
    schedule = best_schedule(parts, dict(phases), tiers)
    replay(schedule, list(parts), list(phases), tiers)
    return list(schedule.lost.values())


@pytest.mark.parametrize(("device", "seconds"), [(29, 50), (30, 20), (40, 0)])
def test_a_copy_is_fetched_ahead_where_there_is_room_for_it(device: int, seconds: float) -> None:
    """29: none fits beside another. 30: b (10 here) stays, c comes while p1 computes, a before p0. 40: all ahead."""
    assert sum(lost(device, A, replace(B, bytes=10), C, phases=(P0, P1, P2))) == pytest.approx(seconds)


@pytest.mark.parametrize(("remake", "seconds"), [(5.0, 5.0), (25.0, 20.0)])
def test_what_is_cheaper_to_make_than_to_move_is_dropped(remake: float, seconds: float) -> None:
    assert lost(30, A, replace(B, remake={"p1": remake})) == pytest.approx([20.0, seconds])


def test_changed_contents_are_written_out_in_every_step_and_unchanged_ones_never() -> None:
    """b changes in p1: it goes down (20 s) before p0, beside a's way up (20 s), and comes up (20 s) before p1. A step
    that need not end as it began would save the way down; a stale copy of b would, too."""
    assert lost(30, A, replace(B, changed_in=only("p1"))) == pytest.approx([40.0, 20.0])


def test_both_copies_take_room_while_one_is_in_flight() -> None:
    """a and b change places: 20 bytes lie on the host in each phase, 40 on the way."""
    parts = replace(A, changed_in=only("p0")), replace(B, changed_in=only("p1"))
    assert lost(30, *parts, host=40) == pytest.approx([40.0, 40.0])
    with pytest.raises(ResidencyError) as error:
        lost(30, *parts, host=39)
    assert (error.value.tier, error.value.missing, error.value.enough) == ("host", 1, {"device": 40, "host": 40})


@pytest.mark.parametrize(("device", "up", "seconds"), [(30, 1.0, 20.0), (40, 1.0, 0.0), (30, 2.0, 0.0)])
def test_states_too_large_for_the_device_are_streamed(device: int, up: float, seconds: float) -> None:
    """Two of six pieces of 10 beside 10 of weights; 60 s up and 60 s down less 100 s of compute are lost. With room for
    one more piece only five go."""
    states = Component("states", 60, only("p0"), only("p0"), {}, 6, only("p0"))
    assert lost(device, states, Component("weights", 10, only("p0")), phases=(P0,), up=up) == pytest.approx([seconds])


def test_what_cannot_fit_is_named_with_its_phase_and_what_would_do() -> None:
    policy = Component("policy", 20 * GIB, only("train"), only("train"))
    cache = Component("cache", 20 * GIB, only("generate"), only("generate"), {"generate": 0.0})
    phases = Phase("generate", 1.0), Phase("train", 1.0)
    with pytest.raises(ResidencyError, match=r"generate: 8.00 GiB of host .*: device 40.00 GiB, host 20.00 GiB$"):
        lost(30 * GIB, policy, cache, phases=phases, host=12 * GIB)
    with pytest.raises(ResidencyError, match=r"train: 6.50 GiB of device .* would do: device 26.50 GiB$"):
        lost(20 * GIB, replace(policy, bytes=int(26.5 * GIB)), cache, phases=phases, host=900 * GIB)
    with pytest.raises(ValueError, match="a: p1, p9: not phases of the step that need it"):
        lost(30, replace(A, changed_in=only("p1"), remake={"p9": 0.0}))
