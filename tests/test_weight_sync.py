"""The packed buffer holds what `save_pretrained` writes, byte for byte."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import xxhash
from ranks import CONFIGS, tiny_model
from safetensors.torch import load_file

from hybrid_engine import weight_sync
from hybrid_engine.weight_sync import ALIGNMENT, WeightPacker, checkpoint_views
from rollout.config import RolloutConfig
from rollout.weights import TORCH_DTYPES, Parcel


def unpacked(parcel: Parcel) -> dict[str, torch.Tensor]:
    """What a receiver reads, by the manifest alone (and without `whole_tensors`)."""
    found = {}
    for piece in parcel.manifest.pieces:
        assert piece.size == piece.shape and not any(piece.start)
        raw = bytearray(parcel.buffer[piece.offset : piece.offset + piece.nbytes].tobytes())
        found[piece.name] = torch.frombuffer(raw, dtype=TORCH_DTYPES[piece.dtype]).view(piece.shape)
    return found


def pack(family: str, dtype: str = "float32", **layout) -> dict[int | None, Parcel]:
    return WeightPacker(tiny_model(family), RolloutConfig(dtype=dtype, **layout)).pack(0)


def saved(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_bytes_are_those_of_save_pretrained(family: str, tmp_path: Path):
    model = tiny_model(family)
    packer = WeightPacker(model, RolloutConfig())
    packer.pack(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))  # the second pack must see the change
    parcel = packer.pack(2)[None]
    manifest = parcel.manifest
    expected, found = saved(model, tmp_path), unpacked(parcel)
    assert manifest.version == 2
    assert found.keys() == expected.keys() == manifest.digests.keys()
    assert len(manifest.pieces) == len(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
        assert manifest.digests[name] == xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes()), name


def test_bfloat16_is_one_rounding_of_the_training_weights(tmp_path: Path):
    found = unpacked(pack("deepseek-v2", "bfloat16")[None])
    for name, tensor in saved(tiny_model("deepseek-v2"), tmp_path).items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], tensor.bfloat16()), name


def test_a_routers_correction_bias_stays_float32():
    dtypes = {piece.name: piece.dtype for piece in pack("deepseek-v3", "bfloat16")[None].manifest.pieces}
    biases = [name for name in dtypes if name.endswith("e_score_correction_bias")]
    assert biases and all(dtypes[name] == "float32" for name in biases)
    assert {dtypes[name] for name in dtypes if name not in biases} == {"bfloat16"}


def test_tensors_are_aligned_and_do_not_overlap():
    parcel = pack("deepseek-v2", "bfloat16")[None]
    ends = [0]
    for piece in parcel.manifest.pieces:
        assert piece.offset % ALIGNMENT == 0 and ends[-1] <= piece.offset < ends[-1] + ALIGNMENT
        ends.append(piece.offset + piece.nbytes)
    assert parcel.manifest.nbytes == ends[-1] == parcel.buffer.nbytes


@pytest.mark.parametrize("family", ["deepseek-v2", "qwen3-moe", "mixtral"])
def test_with_expert_parallelism_an_expert_goes_only_to_the_rank_that_holds_it(family: str):
    whole = unpacked(pack(family)[None])
    experts = re.compile(r"\.experts\.(\d+)\.")
    parcels = pack(family, tensor=2, expert=True)
    count = 1 + max(int(match[1]) for name in whole if (match := experts.search(name)))
    assert parcels.keys() == {None, 0, 1}
    for receiver, parcel in parcels.items():
        for name, tensor in unpacked(parcel).items():
            match = experts.search(name)
            assert receiver == (match and int(match[1]) // (count // 2)), name
            assert torch.equal(tensor, whole.pop(name))
    assert not whole


def test_buckets_hold_at_most_what_they_may_and_together_everything(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("deepseek-v2")
    whole = unpacked(WeightPacker(model, RolloutConfig()).pack(0)[None])
    largest = max(tensor.nbytes for tensor in whole.values())
    for most in (largest // 2, largest, 3 * largest):
        monkeypatch.setattr(weight_sync, "MEBIBYTE", most)
        packer, left = WeightPacker(model, RolloutConfig(bucket_mb=1)), dict(whole)
        assert packer.buckets > 3
        for bucket in range(packer.buckets):
            found = unpacked(packer.pack(0, bucket)[None])
            assert len(found) == 1 or sum(tensor.nbytes for tensor in found.values()) <= most
            assert all(torch.equal(tensor, left.pop(name)) for name, tensor in found.items())
        assert not left


def test_a_conversion_that_joins_tensors_is_refused(monkeypatch: pytest.MonkeyPatch):
    def join(model, tensors):
        first, second, *_ = tensors.values()
        return {"joined": torch.cat([first.flatten(), second.flatten()])}

    monkeypatch.setattr("hybrid_engine.weight_sync.revert_weight_conversion", join)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM: checkpoint tensor joined"):
        checkpoint_views(model, model.state_dict())
