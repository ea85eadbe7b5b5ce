"""Mixed precision: the forward program runs under autocast.

    enter_autocast(device, dtype);  program;  exit_autocast

Matrix products run in the narrow type; reductions, norms and losses stay wide, as ``torch.autocast``
decides. Parameters stay wide in their shards, so gradients are reduced and stepped at full width; that the
narrow type is also what travels is the business of the gathers, which see the casts this leaves behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from autodist.passes.base import Context, Pass, Phase
from autodist.passes.graph import output_of
from autodist.runtime import compat


@dataclass(frozen=True)
class Autocast(Pass):
    """Run the program in ``dtype`` where that is safe."""

    dtype: torch.dtype
    device_type: str
    name: ClassVar[str] = "autocast"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.CAPTURED,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        body = graph.graph
        first = next(n for n in body.nodes if n.op != "placeholder")
        with body.inserting_before(first):
            enter = body.call_function(compat.enter_autocast, (self.device_type, self.dtype, True, True))
        with body.inserting_before(output_of(graph)):
            leave = body.call_function(compat.exit_autocast, (enter,))
        enter.meta["example_value"] = leave.meta["example_value"] = None
        context.decide("program", f"autocast to {self.dtype}", "the plan asks for this precision")
        return graph
