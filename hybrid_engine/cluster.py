"""The machines that a plan is made for: how many devices of which kind, and what each of them can do."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import yaml

from hybrid_engine.residency import GIB, Tier

FIGURES = yaml.safe_load(Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8"))
ASSUMED: Mapping[str, float] = FIGURES["assumptions"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """`hosts` hosts of `devices` devices each. ranks: that can train at once. memory, host_memory: bytes of a device,
    of a host. The other figures are those of `hardware.yaml`: bytes/s one way, FLOP/s by precision. On the CPU (`kind`)
    a device is the memory of the host, which all ranks share. tiers: of a device, what a run may fill. moves: whether
    it moves what a phase does not need."""

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
    tiers: tuple[Tier, ...] = ()
    moves: bool = True

    @property
    def on_cpu(self) -> bool:
        """Whether there are no devices but processors."""
        return self.kind == "cpu"

    def budgeted(self, device: int | None, host: int | None, *, disk: bool) -> Self:
        """As a run uses it with a budget: bytes of a device (None: all) and of a host (None: half; on the CPU all), but
        nothing that is reserved; disk: a folder is given."""
        if self.on_cpu:
            tiers = [Tier("device", min(self.memory, host or self.memory))]
        else:
            room, speed = self.memory - int(ASSUMED["device_reserved"] * GIB), self.host_link * ASSUMED["links"]
            most = max(0, self.host_memory - int(ASSUMED["host_reserved"] * GIB))
            below = min(most, host or self.host_memory // 2) // self.devices
            tiers = [Tier("device", min(room, device or room)), Tier("host", below, speed, speed)]
        speed = self.disk / self.devices
        return replace(self, tiers=(*tiers, *[Tier("disk", 1 << 44, speed, speed)] * disk), moves=True)

    def ring(self, volume: float, ranks: int, stride: int = 1) -> float:
        """Seconds in which each of `ranks` ranks, every `stride`-th one, passes on its share of `volume` bytes: over
        the links in a host or, where the ring leaves it, over the network adapters of its ranks there."""
        inside = max(1, min(ranks, self.devices // stride))
        speed = self.link if ranks <= inside or self.on_cpu else min(self.link, inside * self.network)
        return volume * (1 - 1 / ranks) / (speed * ASSUMED["links"])


def cluster(text: str | None) -> Cluster:
    """The cluster that `text` describes, `HOSTSxDEVICESxKIND[+HOST MEMORYGiB]`; None: this machine's processors.

    A run may fill all of their memory and this machine's disk. Raises ValueError that shows the form and the kinds."""
    if text is None:
        figures, cores = FIGURES["devices"]["cpu"], len(os.sched_getaffinity(0))
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        all_cores = {"bandwidth": cores * figures["bandwidth"], "memory": size, "host_memory": size}
        flops = {dtype: cores * each for dtype, each in figures["flops"].items()}
        here = Cluster("cpu", 1, 1, cores, **{**figures, **all_cores, "flops": flops})
        return here.budgeted(None, None, disk=True)
    kinds = {kind.lower(): kind for kind in FIGURES["devices"] if kind != "cpu"}
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([^+]+)(?:\+(\d+)GiB)?", text.strip(), re.IGNORECASE)
    if match is None or (kind := kinds.get(match[3].lower())) is None:
        raise ValueError(
            f"--cluster {text!r}: give HOSTSxDEVICESxKIND, as in 16x8xH100-80GB, or with the memory of a host,"
            f" 1x1xH200-141GB+128GiB; the kinds are {', '.join(kinds.values())}"
        )
    figures, hosts, devices = FIGURES["devices"][kind], int(match[1]), int(match[2])
    sizes = {"memory": figures["memory"], "host_memory": int(match[4] or figures["host_memory"])}
    sizes = {name: int(size * GIB) for name, size in sizes.items()}
    found = Cluster(kind, hosts, devices, hosts * devices, **{**figures, **sizes})
    return found.budgeted(None, found.host_memory, disk=False)
