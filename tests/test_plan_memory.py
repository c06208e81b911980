"""`align plan` and `memory:`: it says what the run does that has one, and what the run does that has none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_plan import H100, LITE, RECIPES, ROLLOUT, TRAIN, WORK

from hybrid_engine.cluster import GIB, cluster
from hybrid_engine.forecast import Work
from hybrid_engine.offload import spread
from hybrid_engine.phases import NEEDED, Residency
from hybrid_engine.prospect import prospect, ranked, remedies
from hybrid_engine.residency import ResidencyError, Tier
from recipes.cli import main

ONE = cluster("1x1xH200-141GB+128GiB")


def test_a_recipe_without_memory_is_judged_by_what_lies_there_when_nothing_moves():
    still = cluster("1x8xH200-141GB")
    still = replace(still, tiers=still.tiers[:1], moves=False)
    works = [replace(WORK, reference=True), Work(groups=32, rows=1, prompt=0, new=2048, longest=2048)]
    for work in works:  # GRPO; SFT, in which the engine lies idle
        given = prospect(LITE, TRAIN.model_copy(update={"shard": 8, "expert": 8}), ROLLOUT, still, work).solved()
        (schedule,) = given.schedules.values()
        found = {phase: peak["device"] for phase, peak in schedule.peaks.items()}
        assert found == pytest.approx(given.resident("device"), abs=1000) and not schedule.copies() and given.over == 0
        names = {part.name for part in given.parts["device"]}
        assert {"weights", "KV cache"} <= names and ("reference" in names) == work.reference
    tight = replace(still, tiers=(replace(still.tiers[0], capacity=max(found.values()) - 1),))
    short = prospect(LITE, given.train, ROLLOUT, tight, works[1]).solved()
    assert 0 < short.over < 1000 and 0 < short.error.missing < GIB / 100
    for each in ranked(LITE, TRAIN, ROLLOUT, still, works):
        assert each.over == 0 and not [copied for s in each.schedules.values() for copied in s.copies()]


def test_memory_is_the_first_remedy_of_what_fits_only_where_it_is_moved():
    still = replace(ONE, tiers=ONE.tiers[:1], moves=False)
    small = Work(groups=32, rows=8, prompt=64, new=64, longest=64, samples=True)
    train = TRAIN.model_copy(update={"tokens_per_rank": 128})
    given = prospect(LITE, train, ROLLOUT, replace(still, host_memory=400 * GIB), small).solved()
    assert given.over > 100 * GIB and given.error.missing == pytest.approx(given.over, rel=1e-4)
    assert remedies(LITE, given, replace(still, host_memory=400 * GIB), small)[0] == ("memory: {offload: auto}", 0)
    assert dict(remedies(LITE, given, still, small))["memory: {offload: auto}"] > 0  # half of 128 GiB is too little
    split = ROLLOUT.model_copy(update={"placement": "split"})
    given = prospect(LITE, train, split, still, small).solved()
    assert not [text for text, _ in remedies(LITE, given, still, small) if text.startswith("memory")]


def test_a_budget_bounds_the_tiers_and_leaves_the_engine_its_share_of_the_device():
    whole = [tier.capacity // GIB for tier in cluster(H100).tiers]
    assert whole == [77, 1992 // 8]  # 2 and 8 GiB are reserved
    found = cluster(H100).budgeted(70 * GIB, 160 * GIB, disk=True)
    assert [(t.name, t.capacity // GIB) for t in found.tiers[:2]] == [("device", 70), ("host", 20)]
    assert found.tiers[2].name == "disk" and found.tiers[2].up == found.disk / 8
    assert [t.capacity // GIB for t in cluster(H100).budgeted(None, None, disk=False).tiers] == [77, 1000 // 8]
    assert [t.capacity // GIB for t in cluster(H100).budgeted(900 * GIB, 9000 * GIB, disk=False).tiers] == whole
    for each in (cluster(H100), found):
        parts = {part.name: part.bytes for part in prospect(LITE, TRAIN, ROLLOUT, each, WORK).parts["device"]}
        assert parts["KV cache"] + parts["weights"] == int(0.45 * each.memory) - 2 * GIB
    here = cluster(None).budgeted(None, GIB, disk=False)
    assert [(t.name, t.capacity) for t in here.tiers] == [("device", GIB)]


@pytest.mark.parametrize("spare", [1, -1])
def test_a_plan_fits_where_a_run_is_not_refused(spare: int):
    """The run's own scheduler, given the plan's bytes as what it finds."""
    plan = prospect(LITE, TRAIN, ROLLOUT, replace(ONE, tiers=(Tier("device", GIB), ONE.tiers[1])), WORK).solved()
    least = plan.error.enough["device"]
    tiers = [Tier("device", least + spare * GIB // 8), ONE.tiers[1]]
    run = Residency(tiers, lambda text: None)
    run.cycle = list(plan.seconds)
    for part in plan.parts["device"]:
        if part.name in NEEDED:
            moves = part.name != "gradients"
            run.add(part.name, part.bytes, part.pieces, moves=moves, here=False)
    for phase in run.cycle:
        work = [p.bytes for p in plan.parts["device"] if p.name not in NEEDED and phase in p.needed_in]
        run.add(f"work in {phase}", sum(work), moves=False, here=False, phases=(phase,), remade=0.0)
    assert len(spread(dict.fromkeys(range(64), 1))) == 32 == LITE.pieces
    again = prospect(LITE, TRAIN, ROLLOUT, replace(ONE, tiers=tuple(tiers)), WORK).solved()
    if spare > 0:
        assert again.error is None and run.enter("handover") is not None
        assert max(run.predicted.values()) <= tiers[0].capacity
    else:
        assert again.error is not None
        with pytest.raises(ResidencyError):
            run.enter("handover")


def test_streamed_states_take_their_time_in_the_optimisers_step():
    given = prospect(LITE, TRAIN, ROLLOUT, ONE, WORK).solved()
    (schedule,) = given.schedules.values()
    moved = sum(move.bytes for move in schedule.moves if move.streamed)
    found = given.seconds["train"]
    assert "step" not in given.seconds and moved > 100 * GIB
    assert found["optimizer"] == pytest.approx(28 * 15.7e9 / (0.6 * 4.8e12), rel=0.01)
    assert found["streaming"] == pytest.approx(2 * moved / (0.7 * 64e9) - found["optimizer"])  # there and back
    twice = prospect(LITE, TRAIN, ROLLOUT, ONE, replace(WORK, updates=2)).solved().seconds["train"]
    assert twice["streaming"] == pytest.approx(2 * found["streaming"], rel=1e-3)


@pytest.mark.parametrize(
    ("memory", "said", "unsaid"),
    [
        ("{}", ["It does not fit", "memory: {offload: auto}", "A checkpoint takes", "Nothing is moved"], "back"),
        ("{host: 120GiB}", ["optimizer, host -> device and back"], "A checkpoint takes"),
        ("{host: 60GiB}", ["It does not fit", "device 1", "host 1"], "A checkpoint takes"),
        ("{host: 60GiB, disk: ./scratch}", ["on the disk", "optimizer, disk -> device and back"], "does not fit. "),
        ("{device: 80GiB, host: 120GiB}", ["It does not fit", "GiB of device are missing"], "Nothing is moved"),
        ("{host: 120GiB, offload: off}", ["It does not fit", "Nothing is moved"], "back"),
    ],
)
def test_memory_in_a_recipe_is_what_the_plan_plans(memory: str, said: list[str], unsaid: str, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    recipe = str(RECIPES / "deepseek_v2_lite_one_gpu.yaml")
    assert main(["plan", recipe, "--cluster", "1x1xH200-141GB+128GiB", "--set", f"memory={memory}"]) == 0
    found = capsys.readouterr().out
    assert all(text in found for text in said) and unsaid not in found
