"""Machines, as far as the cost model sees them: a few rates per device.

A rate is what a long-running kernel achieves, not what the datasheet promises:

    achieved = datasheet x efficiency      0.6 for matrix products, 0.8 for memory and for links

which is about what large matrix products, copies and collectives reach on these machines. Datasheet
numbers are for dense matrices, one device of the vendor's eight-device machine, links in one
direction; memory is counted in powers of ten, which is a little below what the driver reports. The
``cpu`` entry is one core of a server and gloo on the local host, measured once and rounded: good
for orders of magnitude.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

_COMPUTE, _MEMORY, _LINK = 0.6, 0.8, 0.8
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Hardware:
    """One device and its connections.

    ``flops`` are achieved FLOP/s by the type of a matrix product's operands; ``memory_bandwidth``
    is in B/s, ``memory`` in bytes (None: not bounded by the device), ``launch`` in seconds a kernel
    costs whatever its size. Two devices of a node exchange ``link_bandwidth`` B/s after
    ``link_latency`` seconds; each device has its own ``network_bandwidth`` B/s to other nodes,
    reached after ``network_latency`` seconds. ``stages_collectives`` says that
    its transport copies what it sends and receives, as gloo does for CPUs.

    The host has ``host_memory`` bytes for each device (0: the device is the host), and copies to it
    and from it move ``host_bandwidth`` B/s, beside the computation where ``copies_overlap``.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    memory_bandwidth: float
    memory: int | None
    launch: float
    link_bandwidth: float
    link_latency: float
    network_bandwidth: float
    network_latency: float
    ranks_per_node: int
    host_bandwidth: float
    host_memory: int
    copies_overlap: bool = True
    stages_collectives: bool = False

    def flops_of(self, dtype: torch.dtype) -> float:
        """FLOP/s for operands of ``dtype``; a type without an entry runs at float32's rate."""
        return self.flops.get(dtype, self.flops[torch.float32])


def _gpu(
    name: str,
    *,
    fp32: float,
    half: float,
    memory_bandwidth: float,
    memory: float,
    link: float,
    nic: float,
    bus: float,
    host: float,
) -> Hardware:
    """An entry from datasheet numbers: TFLOP/s, then GB/s, GB, and GB/s one way for links, network
    and bus to the host, whose GB are an eighth of the machine's."""
    return Hardware(
        name=name,
        flops={
            torch.float32: fp32 * 1e12 * _COMPUTE,
            **dict.fromkeys(_HALF, half * 1e12 * _COMPUTE),
        },
        memory_bandwidth=memory_bandwidth * 1e9 * _MEMORY,
        memory=int(memory * 1e9),
        launch=4e-6,
        link_bandwidth=link * 1e9 * _LINK,
        link_latency=3e-6,
        network_bandwidth=nic * 1e9 * _LINK,
        network_latency=1.5e-5,
        ranks_per_node=8,
        host_bandwidth=bus * 1e9 * _LINK,
        host_memory=int(host * 1e9),
    )


_ENTRIES = (
    Hardware(
        name="cpu",
        flops={torch.float32: 6e10, torch.float64: 3e10},
        memory_bandwidth=8e9,
        memory=None,
        launch=1e-5,
        link_bandwidth=3e8,
        link_latency=5e-4,
        network_bandwidth=1e8,
        network_latency=1e-3,
        ranks_per_node=8,
        host_bandwidth=4e9,
        host_memory=0,
        copies_overlap=False,
        stages_collectives=True,
    ),
    _gpu(
        "a100-40g", fp32=19.5, half=312, memory_bandwidth=1555,
        memory=40, link=300, nic=25, bus=32, host=128,
    ),
    _gpu(
        "a100-80g", fp32=19.5, half=312, memory_bandwidth=2039,
        memory=80, link=300, nic=25, bus=32, host=128,
    ),
    _gpu("h100-80g", fp32=67, half=989, memory_bandwidth=3350, memory=80, link=450, nic=50, bus=64, host=256),
    _gpu("h200", fp32=67, half=989, memory_bandwidth=4800, memory=141, link=450, nic=50, bus=64, host=256),
    _gpu("b200", fp32=75, half=2250, memory_bandwidth=7700, memory=180, link=900, nic=50, bus=64, host=256),
)
_TABLE = {entry.name: entry for entry in _ENTRIES}


def hardware(name: str) -> Hardware:
    """The entry called ``name``. Raises :class:`ValueError`, listing the legal names, for any
    other.
    """
    if name not in _TABLE:
        raise ValueError(f"there is no hardware called {name!r}; use one of {', '.join(_TABLE)}")
    return _TABLE[name]


def detect(device: torch.device) -> Hardware:
    """The machine ``device`` belongs to: the table's entry, or a guess from what the driver
    reports.

    Raises :class:`ValueError` for devices that are neither ``cpu`` nor ``cuda``.
    """
    if device.type == "cpu":
        return _TABLE["cpu"]
    if device.type != "cuda":
        raise ValueError(f"device '{device}' is neither cpu nor cuda; name its hardware: {', '.join(_TABLE)}")
    return from_properties(torch.cuda.get_device_properties(device))


def from_properties(properties: Any) -> Hardware:
    """The entry for a CUDA device's properties (``torch.cuda.get_device_properties``), with its
    memory.

    An entry fits when every part of its name ("h100", "80g") is a word of the device's ("80GB"
    counts for "80g"); of several, the one with the longest name. When none fits, the rates are
    A100's, scaled by the number of multiprocessors, and the links those of a PCIe machine.
    """
    words = set(re.split(r"\W+|_", properties.name.lower()))
    fitting = [e for e in _ENTRIES if all({p, p + "b"} & words for p in e.name.split("-"))]
    entry = max(fitting, key=lambda e: len(e.name)) if fitting else _generic(properties)
    return replace(entry, memory=properties.total_memory)


def _generic(properties: Any) -> Hardware:
    like = _TABLE["a100-40g"]
    scale = properties.multi_processor_count / 108
    return replace(
        like,
        name=properties.name,
        flops={dtype: rate * scale for dtype, rate in like.flops.items()},
        memory_bandwidth=like.memory_bandwidth * scale,
        link_bandwidth=25e9 * _LINK,
        network_bandwidth=10e9 * _LINK,
    )
