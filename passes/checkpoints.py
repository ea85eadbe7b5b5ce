"""What a user's selective activation checkpoint says of each operator.

A checkpoint with a policy (``context_fn``) speaks of the operators of the joint graph, not of those its
author wrote: ``mm``, not ``linear``. So when the body of one has been inlined before autograd, the policy is
asked here, of each node that carries its tag, and its answer is the tag that the partitioner obeys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import GraphModule

from autodist.passes.base import Context, Pass, Phase
from autodist.passes.graph import example


@dataclass(frozen=True)
class AskPolicies(Pass):
    """Tag nodes as ``policies`` say, by the number of the checkpoint they belong to."""

    policies: Mapping[int, Any] = field(default_factory=dict)
    name: ClassVar[str] = "ask_policies"
    phase: ClassVar[tuple[Phase, ...]] = (Phase.JOINT,)

    def apply(self, graph: GraphModule, context: Context) -> GraphModule:
        for node in graph.graph.nodes:
            policy = self.policies.get(node.meta.get("ac_graph_id"))
            if node.op == "call_function" and policy is not None and "recompute" in node.meta:
                node.meta["recompute"] = policy(node.target, example(node.args), example(node.kwargs))
        return graph
