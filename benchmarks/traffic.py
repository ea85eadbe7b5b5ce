"""How many bytes a rank sends in one step, by kind of collective.

Counted where every variant passes, compiled or not: at torch's ``c10d`` operators, to which all of
torch.distributed comes down, as an execution trace records them with the sizes of their tensors. A
rank's share is what the bandwidth-optimal algorithm over a ring sends, whatever a backend does (gloo
makes an all-reduce of a reduce-scatter, say). Every collective is taken to be among all ranks.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ExecutionTraceObserver

# The kind, and the position of the argument that holds what is sent.
_KINDS = {
    "c10d::alltoall_base_": ("all-to-all", 1),
    "c10d::alltoall_": ("all-to-all", 1),
    "c10d::allgather_": ("all-gather", 1),
    "c10d::_allgather_base_": ("all-gather", 1),
    "c10d::allgather_coalesced_": ("all-gather", 1),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
}
_SEND_NOTHING = {"c10d::barrier", "c10d::recv_"}


def sent_bytes(step: Callable[[], object], ranks: int) -> dict[str, int]:
    """Run ``step`` and return what this rank has sent.

    Raises KeyError for a collective this module does not know, so that none goes uncounted.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        observer = ExecutionTraceObserver().register_callback(str(trace))
        observer.start()
        step()
        observer.stop()
        observer.unregister_callback()
        nodes = json.loads(trace.read_text())["nodes"]
    sent = dict.fromkeys(["all-to-all", "all-gather", "reduce-scatter", "all-reduce", "broadcast", "send"], 0)
    for node in nodes:
        if node["name"].startswith("c10d::") and node["name"] not in _SEND_NOTHING:
            kind, argument = _KINDS[node["name"]]
            sent[kind] += _share(kind, _num_bytes(node["inputs"]["values"][argument]), ranks)
    return sent


def _num_bytes(value: list[Any]) -> int:
    """Of a tensor in the trace, [id, storage, offset, elements, bytes of one, device], or of a list."""
    if value and isinstance(value[0], list):
        return sum(_num_bytes(item) for item in value)
    return int(value[3]) * int(value[4]) if value else 0


def _share(kind: str, num_bytes: int, ranks: int) -> int:
    """What one of ``ranks`` sends when ``num_bytes`` are what it hands to the collective."""
    others = ranks - 1
    return {
        "all-to-all": num_bytes * others // ranks,
        "all-gather": num_bytes * others,
        "reduce-scatter": num_bytes * others // ranks,
        "all-reduce": 2 * num_bytes * others // ranks,
        "broadcast": num_bytes * others // ranks,
        "send": num_bytes,
    }[kind]
