"""Stages of a small model cut by hand, run by autograd: what a compiler's stage programs must behave like.

The model is a stack of layers with all that a cut may meet: a skip from the first stage to the last, relayed
by those between; a weight of both, ``shared``; integers that travel beside; a value that nobody
differentiates; dropout; rows that no loss counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autodist.runtime.pipeline import Spec

WIDTH = 5


class Stack(nn.Module):
    """``layers`` layers; each goes to the stage of its number."""

    def __init__(self, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.shared = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)
        self.dropout = dropout

    def piece(self, stage: int, received: list[Tensor], x: Tensor, counted: Tensor, total: float) -> Any:
        """(sent, results) of a stage: values, the skip, integers, and a value without a gradient."""
        if stage == 0:
            h = skip = x @ self.shared
            number, lost = torch.arange(len(x)), h.sum(1)
        else:
            h, skip, number, lost = received
        h = nn.functional.dropout(torch.tanh(self.layers[stage](h)), self.dropout)
        if stage < len(self.layers) - 1:
            return [h, skip, number + 1, lost if stage == 0 else lost.detach() * 2], []
        scores = (h + skip) @ self.shared.T + number[:, None]
        return [], [((scores**2).sum(1) * counted).sum() / total, scores]

    def weights(self, stage: int) -> list[nn.Parameter]:
        ends = stage in (0, len(self.layers) - 1)
        return [*self.layers[stage].parameters(), *([self.shared] if ends else [])]


class AutogradProgram:
    """A stage as autograd runs it: saved are the inputs and outputs of its graph."""

    def __init__(self, model: Stack, stage: int, batch: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.model, self.index, self.batch = model, stage, batch
        self.draws = model.dropout > 0
        self.total = float(sum(counted.sum() for _, counted in batch))
        self.calls: list[tuple[str, int]] = []
        self.alive = self.most_alive = 0

    def _specs(self, microbatch: int) -> list[Spec]:
        rows = len(self.batch[microbatch][0])
        wide, flat = (rows, WIDTH), (rows,)
        return [
            Spec(wide, torch.float32, True),
            Spec(wide, torch.float32, True),
            Spec(flat, torch.int64, False),
            Spec(flat, torch.float32, True),
        ]

    def received(self, microbatch: int) -> list[Spec]:
        return self._specs(microbatch) if self.index > 0 else []

    def sent(self, microbatch: int) -> list[Spec]:
        return self._specs(microbatch) if self.index < len(self.model.layers) - 1 else []

    def forward(
        self, received: list[Tensor], microbatch: int
    ) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        self.calls.append(("forward", microbatch))
        inputs = [r.detach().requires_grad_(r.is_floating_point()) for r in received]
        with torch.enable_grad():
            sent, results = self.model.piece(self.index, inputs, *self.batch[microbatch], self.total)
        graph = Graph(results[:1] or sent)
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(graph, self._died)
        return [s.detach() for s in sent], [r.detach() for r in results], [graph, *inputs]

    def _died(self) -> None:
        self.alive -= 1

    def backward(self, saved: list[Any], gradients: list[Tensor | None]) -> tuple[list[Any], list[Any]]:
        self.calls.append(("backward", -1))
        graph, *inputs = saved
        weights = self.model.weights(self.index)
        found = graph.gradients([*inputs, *weights], gradients)
        return found[: len(inputs)], found[len(inputs) :]

    def backward_input(self, saved: list[Any], gradients: list[Tensor | None]) -> tuple[list[Any], list[Any]]:
        self.calls.append(("backward_input", -1))
        graph, *inputs = saved
        return graph.gradients(inputs, gradients, again=True), [graph, gradients, *inputs]

    def backward_weight(self, kept: list[Any]) -> list[Any]:
        self.calls.append(("backward_weight", -1))
        graph, gradients, *_ = kept
        return graph.gradients(self.model.weights(self.index), gradients)


class Graph:
    """Outputs that autograd can go back from."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.outputs = outputs

    def gradients(
        self, inputs: Sequence[Tensor], gradients: list[Tensor | None], again: bool = False
    ) -> list[Tensor | None]:
        wanted = [i for i in inputs if i.requires_grad]
        outputs = list(zip(self.outputs, gradients or [None] * len(self.outputs), strict=True))
        outputs = [(o, g) for o, g in outputs if o.requires_grad]
        found: Any = [None] * len(wanted)
        if wanted:
            of, given = [o for o, _ in outputs], [g for _, g in outputs]
            found = torch.autograd.grad(of, wanted, given, retain_graph=again, allow_unused=True)
        by_input = {id(i): g for i, g in zip(wanted, found, strict=True)}
        return [by_input.get(id(i)) for i in inputs]


def split(rows: int, microbatches: int, seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    """A batch in microbatches of unequal sizes: inputs, and which rows count."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator)
    counted = torch.arange(rows) % 3 != 1
    return list(zip(x.tensor_split(microbatches), counted.tensor_split(microbatches), strict=True))
