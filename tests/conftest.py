"""Markers, where the real data lies, and a run folder to look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fake_run import fake_run

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes long; `make test-slow` runs it, `make test` does not")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; `python -m pytest -m gpu` runs it")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `gpu` is skipped, with its reason, where there is no CUDA device."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data files (GSM8K, BBH) beside the project; skips where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at ../shared/data (looked for {folder})")
    return folder


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def run_dir(demo_run: Path, tmp_path: Path) -> Path:
    """A run folder of the demo that a test may change."""
    return Path(shutil.copytree(demo_run, tmp_path / "run"))
