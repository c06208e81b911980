"""Which vLLM is accepted, and what a process that holds one must start with. Nothing here imports vLLM."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from rollout.config import RolloutConfig
from rollout.vllm.environment import environment, installed


@pytest.mark.parametrize("version", ["0.24.0", "0.33.0", "1.0.0"])
def test_versions_that_were_never_run_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ValueError, match=rf"{version} is installed; vLLM 0.25 to 0.32 are supported"):
        installed()


def test_an_absent_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distributions", list)
    with pytest.raises(ValueError, match="vLLM is not installed"):
        installed()


def test_the_environment_follows_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0+cpu")
    assert environment(RolloutConfig())["VLLM_MLA_DISABLE"] == "1"
    assert environment(RolloutConfig(mla=True))["VLLM_MLA_DISABLE"] == "0"
    assert environment(RolloutConfig())["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in environment(RolloutConfig(eager=False))
    assert "RANK" not in environment(RolloutConfig())
    several = RolloutConfig(data=4, expert=True)
    assert [environment(several, 3)[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["3", "3", "4"]
    monkeypatch.setattr(metadata, "version", lambda name: "0.31.0+cpu")
    with pytest.raises(ValueError, match=r"need vLLM 0\.32 on the CPU"):
        environment(several)
    monkeypatch.setattr(metadata, "distributions", lambda: [SimpleNamespace(metadata={"Name": "vllm"})])
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0+cu130")
    assert environment(several, 3)["LOCAL_RANK"] == "0", "on CUDA each process sees one device"
    assert environment(several)["TRITON_F32_DEFAULT"] == "ieee"
    assert "TRITON_F32_DEFAULT" not in environment(RolloutConfig(dtype="bfloat16"))


def test_asking_for_it_imports_neither_vllm_nor_torch() -> None:
    code = "import sys, rollout.vllm.environment; print({'torch', 'vllm', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
