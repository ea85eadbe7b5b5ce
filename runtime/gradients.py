"""The operator that stands where a program asks for gradients.

    gradients(loss, leaves) -> d loss / d leaf, for each leaf

A captured training step holds it in place of ``loss.backward()``: everything before it is the program as
its author wrote it, before autograd, which is what placement passes want to see; everything after it
reads its results. On tensors that autograd has followed it *is* autograd; on fake ones it says the shapes.

A leaf that the loss does not depend on has a gradient of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autodist.runtime import compat

_LIBRARY = torch.library.Library("autodist", "FRAGMENT")


def _shapes(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(leaf) for leaf in leaves]


def _differentiated(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(loss, compat.FakeTensor):
        return [x.detach() for x in _shapes(loss, leaves)]
    return list(
        torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    )


_LIBRARY.define("gradients(Tensor loss, Tensor[] leaves) -> Tensor[]")
_LIBRARY.impl("gradients", _shapes, "CompositeExplicitAutograd")
_LIBRARY.impl("gradients", _differentiated, "Autograd")

gradients = torch.ops.autodist.gradients.default
