"""What moves before and during each phase, worked out by hand; a schedule that follows what was measured; recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import DeepseekV2Config

from alignment.config import GRPOConfig, SFTConfig, TrainConfig
from hybrid_engine.footprint import model_of
from hybrid_engine.memory import predicted_work, used_by_processes
from hybrid_engine.offload import Place
from hybrid_engine.phases import Residency
from hybrid_engine.residency import Component, ResidencyError, Tier, best_schedule
from recipes.schema import load_recipe
from recipes.source import RecipeError
from rollout.config import RolloutConfig, memory_bytes

HERE, DISK, NOWHERE = frozenset({"host"}), frozenset({"disk"}), frozenset()


def residency(host: int, said: list[str] | None = None, disk: int = 10**6) -> Residency:
    """Parameters 100, optimizer 200 in 4 pieces (of which none is there yet), a reference 100, an engine 100 + 50, the
    processes' own 50; a disk of 1,000 a second each way."""
    held = Residency([Tier("host", host), Tier("disk", disk, 1e3, 1e3)], (said if said is not None else []).append)
    held.add("weights", 100, here=False)
    held.add("KV cache", 50, here=False)
    held.begin()
    held.cycle = ["handover", "generate", "reference", "train"]
    held.add("parameters", 100, 2)
    held.add("gradients", 100, moves=False, here=False)
    held.add("optimizer", 200, 4, here=False)
    held.add("reference", 100, 2)
    held.add("baseline", 50, moves=False, phases=[*held.cycle, "checkpoint"])
    for phase in held.cycle:
        held.add(f"work in {phase}", 10, moves=False, here=False, phases=(phase,), remade=0.0)
    return held


def moved(rounds: list[list[Place]]) -> list[set[tuple[str, frozenset[str], bool]]]:
    return [{(place.component, place.tiers, place.streamed) for place in places} for places in rounds]


def step(held: Residency) -> dict[str, list]:
    return {phase: moved(held.enter(phase)) for phase in held.cycle}


def test_where_all_fits_only_the_engine_comes_and_goes() -> None:
    held = residency(1000)
    assert held.resident() == 200  # the optimizer is still to come
    for _ in range(2):
        rounds = step(held)
        assert rounds["handover"][1] >= {("weights", HERE, False)}
        assert rounds["generate"] == [set(), {("KV cache", HERE, False)}, set()]
        assert rounds["reference"] == [{("weights", NOWHERE, False), ("KV cache", NOWHERE, False)}, set(), set()]
        assert rounds["train"][0] == set() == rounds["train"][2]
    assert held.predicted == {"handover": 560, "generate": 610, "reference": 460, "train": 560}


def test_a_budget_too_small_for_all_streams_the_optimizer_and_moves_the_reference() -> None:
    said: list[str] = []
    held = residency(390, said)  # train: 50 + 10 + 200 + two pieces of 50 and one that may stay
    first, second = step(held), step(held)
    assert max(held.predicted.values()) <= 390
    assert ("optimizer", DISK, True) in second["train"][2]
    assert ("reference", DISK, False) in {*second["train"][0], *first["handover"][0], *second["handover"][0]}
    assert first.keys() == second.keys() and step(held) == second  # a step ends as it began
    assert len(said) == 1 and "optimizer" in said[0] and "disk -> host and back" in said[0]


def test_phases_may_be_skipped_and_others_come_between() -> None:
    held = residency(390)
    step(held)
    held.enter("handover")
    held.enter("generate")
    held.enter("reference")
    again = moved(held.enter("handover"))  # no group had signal: there was no train phase
    assert {name for name, _, _ in again[1]} >= {"weights"}
    out, into, *_ = moved(held.only(("parameters", "optimizer"), "checkpoint"))
    assert {(name, tiers) for name, tiers, _ in out} >= {("weights", NOWHERE)}
    assert {name for name, _, _ in into} <= {"parameters", "optimizer"}
    assert held.resident() == 300
    held.only(("parameters", "optimizer"), "checkpoint", changed=True)
    step(held)
    assert max(held.predicted.values()) <= 390


def test_what_no_phase_of_the_step_needs_is_given_up_or_stays_where_it_is() -> None:
    held = residency(1000)
    held.enter("handover")
    held.cycle = ["train"]  # as of SFT, after evals
    assert held.enter("train")[0] == [Place("weights", 0, NOWHERE)]
    assert held.resident() == 400  # the reference too
    assert [place.component for place in held.enter("generate")[1]] == ["weights", "KV cache"]  # an eval


def test_what_cannot_work_is_said_with_the_phase_the_missing_gib_and_what_would_do() -> None:
    with pytest.raises(ResidencyError, match=r"train: .* GiB of host are missing; any of these would do: host"):
        step(residency(300))
    held = residency(380)
    with pytest.raises(ResidencyError, match=r"^checkpoint: 0\.00 GiB of host are missing") as error:
        held.only(("parameters", "optimizer", "reference"), "checkpoint")
    assert (error.value.missing, error.value.enough) == (70, {"host": 450})


def test_measured_work_and_durations_are_solved_for_at_the_next_step() -> None:
    said: list[str] = []
    held = residency(1000, said)
    step(held)
    held.measured("generate", 1.2, 640)  # a fifth longer, and 30 more than predicted
    held.measured("train", 1.0, 500)
    assert held.predicted["generate"] == 610  # the schedule in force
    step(held)
    assert held.predicted["generate"] == 659  # 3% are spared
    assert held.predicted["train"] == 550  # no work is less than none
    held.measured("generate", 1.0, 600)  # another batch took less: the most of all counts
    step(held)
    assert held.predicted["generate"] == 659


def test_a_budget_that_turns_out_too_small_within_a_run_is_said_and_does_not_end_it() -> None:
    said: list[str] = []
    held = residency(390, said)
    first = step(held), step(held)
    held.measured("generate", 1.0, held.predicted["generate"] + 200)
    assert step(held) == first[1]
    assert len(said) == 2 and "the schedule stays as it is: generate: 0.00 GiB of host are missing" in said[1]


@pytest.mark.parametrize(("seconds", "solved"), [(1.2, 1), (1.3, 2), (0.7, 2)])
def test_a_duration_off_by_more_than_a_quarter_has_the_schedule_solved_again(
    seconds: float, solved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hybrid_engine.phases as module

    calls: list[int] = []
    solve = module.best_schedule
    monkeypatch.setattr(module, "best_schedule", lambda *given: (calls.append(1), solve(*given))[1])
    held = residency(1000)
    step(held)
    for phase in held.cycle:
        held.measured(phase, seconds if phase == "generate" else 1.0, held.predicted[phase])
    held.enter("generate")
    assert len(calls) == 1  # not within a step
    step(held)
    assert len(calls) == solved


def test_the_predicted_work_grows_with_what_causes_it() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "moe_intermediate_size": 32}
    model = model_of(DeepseekV2Config(vocab_size=300, n_routed_experts=4, num_experts_per_tok=2, **sizes))
    grpo = GRPOConfig(prompts={"path": "x"}, rewards=[{"function": "m:f"}], steps=1)
    sft = SFTConfig(data={"path": "x"}, steps=1)

    def train(stage=sft, on_cpu: bool = False, **changes) -> int:
        return predicted_work(stage, TrainConfig(**changes), RolloutConfig(), model, on_cpu)["train"]

    assert train(tokens_per_rank=4096) == 2 * train(tokens_per_rank=2048)
    assert train(activation_checkpointing=True) < train()
    assert train(grpo, tokens_per_rank=10**9) == train(grpo, tokens_per_rank=32 * 8 * 1024)  # all of a step's tokens
    assert train(shard=4, on_cpu=True) >= 4 * train(shard=4) > 4 * train()  # a device has one rank, a CPU all of them


def test_used_memory_counts_what_this_process_takes() -> None:
    before = used_by_processes()
    taken = bytearray(b"1") * 50_000_000
    assert 45e6 < used_by_processes() - before < 80e6 and taken


RECIPE = """
name: r
model: {path: m}
stages: [{sft: {data: {path: a.jsonl}, steps: 1}}]
memory: MEMORY
"""


@pytest.mark.parametrize(
    ("memory", "problem"),
    [
        ("{device: 70GiB, host: 1.5 TiB, disk: ./scratch, offload: auto}", None),
        ("{offload: off}", None),
        ("{host: 70}", "no amount of memory: write it as 70GiB"),
        ("{host: 70GB}", "'70GB' is no amount of memory"),
        ("{host: 0GiB}", "'0GiB' is no amount of memory"),
        ("{offload: on}", "`offload` is `auto` or `off`"),
        ("{disk: no}", "`disk` is a folder"),
        ("{dvice: 70GiB}", "memory.dvice"),
    ],
)
def test_memory_in_a_recipe(tmp_path: Path, memory: str, problem: str | None) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("MEMORY", memory))
    if problem is None:
        assert load_recipe(path).recipe.memory
        return
    with pytest.raises(RecipeError, match=problem):
        load_recipe(path)


def test_memory_with_devices_of_their_own_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("MEMORY", "{device: 70GiB}"))
    with pytest.raises(RecipeError, match=r"memory: is for ranks that take turns on a device.*`split`"):
        load_recipe(path, ["rollout.placement=split"])


def test_what_cannot_be_copied_is_made_again_or_stays() -> None:
    parts = [
        Component("x", 60, frozenset({"a"}), remake={"a": 9.0}, copied=False),
        Component("y", 60, frozenset({"b"}), remake={"b": 0.0}, copied=False),
    ]
    tiers = [Tier("device", 100), Tier("host", 1000, 1e9, 1e9)]
    found = best_schedule(parts, {"a": 1.0, "b": 1.0}, tiers)
    assert found.lost["a"] == pytest.approx(9.0)
    assert not any("host" in move.before + move.after for move in found.moves)


@pytest.mark.parametrize("disk", [10.0, 1e6])
def test_what_only_its_own_files_bring_back_is_never_copied(disk: float) -> None:
    """A reward model: however fast the disk is, nobody could carry that out."""
    held = Residency([Tier("host", 390), Tier("disk", 10**6, disk, disk)], print)
    held.cycle = ["generate", "score", "train"]
    held.add("KV cache", 200, here=False)
    held.add("parameters", 150, 3)
    held.add("reward model x", 200, here=False, phases=("score",), remade=0.5)
    held.add("work in score", 0, here=False, moves=False, phases=("score",), remade=0.0)
    for _ in range(2):
        found = [place for phase in held.cycle for places in held.enter(phase) for place in places]
        assert {p.tiers for p in found if p.component == "reward model x"} == {HERE, NOWHERE}
    held.measured("score", 1.0, held.predicted["score"] + 20)
    held.only((), "checkpoint")
    assert held.enter("score") and held._held["reward model x"].tiers == [HERE]


def test_measured_work_is_not_added_to_itself_while_the_schedule_stays() -> None:
    held = residency(100_000)
    step(held)
    for _ in range(5):
        held.measured("train", 1.0, held.predicted["train"] + 100)  # 2% of the tier are let pass
    predicted = held.predicted["train"]
    assert held._held["work in train"].component.bytes == int(1.03 * (predicted + 100)) - predicted + 10
    assert {tier for tiers in held._held["work in train"].tiers for tier in tiers} <= {"host"}


def test_what_makes_room_goes_to_the_highest_tier_that_has_it() -> None:
    held = Residency([Tier("device", 300), Tier("host", 150), Tier("disk", 10**6)], print)
    held.add("parameters", 100, 2)
    held.add("optimizer", 200, 4)
    out, into = held.only(("parameters",), "checkpoint", visiting="optimizer")
    assert [sorted(place.tiers)[0] for place in out] == ["host", "host", "host", "disk"] and not into
    held.tiers[0] = Tier("device", 149)
    with pytest.raises(ResidencyError, match=r"^checkpoint: .* of device are missing"):
        held.only(("parameters",), "checkpoint", visiting="optimizer")


def test_amounts_of_memory() -> None:
    assert (memory_bytes("1.5GiB"), memory_bytes("2 TiB"), memory_bytes("300MiB")) == (3 * 2**29, 2**41, 300 * 2**20)
