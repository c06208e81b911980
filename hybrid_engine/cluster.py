"""The machines that a plan is made for: how many devices of which kind, and what each of them can do."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

GIB = 2**30
FIGURES = yaml.safe_load(Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8"))
ASSUMED: Mapping[str, float] = FIGURES["assumptions"]
FORM = re.compile(r"(\d+)x(\d+)x([^+]+)(?:\+(\d+)GiB)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Cluster:
    """`hosts` hosts of `devices` devices each. ranks: that can train at once. memory: bytes of a device, host_memory: of a host. The other figures are
    those of `hardware.yaml`: bytes/s one way, FLOP/s by precision."""

    kind: str
    hosts: int
    devices: int
    ranks: int
    memory: int
    host_memory: int
    flops: Mapping[str, float]
    bandwidth: float
    link: float
    network: float
    host_link: float
    disk: float

    @property
    def on_cpu(self) -> bool:
        """Whether the device is host memory, which all ranks of a host share."""
        return self.kind == "cpu"

    def collective(self, ranks: int, stride: int = 1) -> float:
        """Bytes/s that pass each rank in a ring over `ranks` ranks, every `stride`-th one: the slower of the links in a
        host and, where the ring leaves it, of the network adapters that its ranks there have between them."""
        inside = max(1, min(ranks, self.devices // stride))
        speed = self.link if ranks <= inside else min(self.link, inside * self.network)
        return speed * ASSUMED["links"]


def cluster(text: str | None) -> Cluster:
    """The cluster that `text` describes, `HOSTSxDEVICESxKIND[+HOST MEMORYGiB]`; None: this machine's processors.

    Raises ValueError that shows the form and the kinds.
    """
    if text is None:
        cores, pages = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        one = _cluster("cpu", 1, 1, FIGURES["devices"]["cpu"])
        flops = {dtype: cores * each for dtype, each in one.flops.items()}
        bandwidth = cores * one.bandwidth
        return replace(one, ranks=cores, memory=pages, host_memory=pages, flops=flops, bandwidth=bandwidth)
    kinds = {kind.lower(): kind for kind in FIGURES["devices"] if kind != "cpu"}
    match = FORM.fullmatch(text.strip())
    kind = kinds.get(match[3].lower()) if match else None
    if match is None or kind is None or not int(match[1]) * int(match[2]):
        raise ValueError(
            f"--cluster {text!r}: give HOSTSxDEVICESxKIND, as in 16x8xH100-80GB, or with the memory of a host,"
            f" 1x1xH200-141GB+128GiB; the kinds are {', '.join(kinds.values())}"
        )
    found = _cluster(kind, int(match[1]), int(match[2]), FIGURES["devices"][kind])
    return found if match[4] is None else replace(found, host_memory=int(match[4]) * GIB)


def _cluster(kind: str, hosts: int, devices: int, figures: Mapping[str, Any]) -> Cluster:
    sizes = {name: int(figures[name] * GIB) for name in ("memory", "host_memory")}
    return Cluster(kind, hosts, devices, hosts * devices, **{**figures, **sizes})
