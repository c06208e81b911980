"""The packed buffer holds what `save_pretrained` writes, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from ranks import CONFIGS, tiny_model
from safetensors.torch import load_file

from hybrid_engine.weight_sync import ALIGNMENT, WeightPacker, checkpoint_views
from rollout.weights import TORCH_DTYPES, WeightManifest


def unpacked(manifest: WeightManifest, buffer: np.ndarray) -> dict[str, torch.Tensor]:
    """What a receiver reads, by the manifest alone (and without `tensor_views`)."""
    found = {}
    for spec in manifest.tensors:
        raw = bytearray(buffer[spec.offset : spec.offset + spec.nbytes].tobytes())
        found[spec.name] = torch.frombuffer(raw, dtype=TORCH_DTYPES[spec.dtype]).view(spec.shape)
    return found


def saved(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_bytes_are_those_of_save_pretrained(family: str, tmp_path: Path):
    model = tiny_model(family)
    packer = WeightPacker(model, "float32")
    packer.pack(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))  # the second pack must see the change
    manifest, buffer = packer.pack(2)
    expected, found = saved(model, tmp_path), unpacked(manifest, buffer)
    assert manifest.version == 2
    assert found.keys() == expected.keys() == manifest.digests.keys()
    assert len(manifest.tensors) == len(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
        assert manifest.digests[name] == xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes()), name


def test_bfloat16_is_one_rounding_of_the_training_weights(tmp_path: Path):
    model = tiny_model("deepseek-v2")
    found = unpacked(*WeightPacker(model, "bfloat16").pack(0))
    for name, tensor in saved(model, tmp_path).items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], tensor.bfloat16()), name


def test_a_routers_correction_bias_stays_float32():
    manifest, _ = WeightPacker(tiny_model("deepseek-v3"), "bfloat16").pack(0)
    dtypes = {spec.name: spec.dtype for spec in manifest.tensors}
    biases = [name for name in dtypes if name.endswith("e_score_correction_bias")]
    assert biases and all(dtypes[name] == "float32" for name in biases)
    assert {dtypes[name] for name in dtypes if name not in biases} == {"bfloat16"}


def test_tensors_are_aligned_and_do_not_overlap():
    manifest, buffer = WeightPacker(tiny_model("deepseek-v2"), "bfloat16").pack(0)
    ends = [0]
    for spec in manifest.tensors:
        assert spec.offset % ALIGNMENT == 0 and ends[-1] <= spec.offset < ends[-1] + ALIGNMENT
        ends.append(spec.offset + spec.nbytes)
    assert manifest.nbytes == ends[-1] == buffer.nbytes


def test_a_conversion_that_joins_tensors_is_refused(monkeypatch: pytest.MonkeyPatch):
    def join(model, tensors):
        first, second, *_ = tensors.values()
        return {"joined": torch.cat([first.flatten(), second.flatten()])}

    monkeypatch.setattr("hybrid_engine.weight_sync.revert_weight_conversion", join)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM: checkpoint tensor joined"):
        checkpoint_views(model, model.state_dict())
