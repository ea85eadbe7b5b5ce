"""How a step sees its sharded tensors while it is captured.

    as they are     this rank's parts: the program runs on them
    whole           as if nothing were sharded: the program says which stages a model can be cut into, before
                    anybody holds a part of it
    as if here      every parameter of a pipeline as if it lay on the ranks of this rank's own stages: the
                    program of the whole model, the same at every place, of which each place then runs what
                    is its own (:mod:`autodist.passes.step_places`)

Parts are those of one coordinate of a stage's ranks, which all places have alike. So what is computed of
parts of several places (a norm) is computed of parts that belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autodist.runtime import compat, dialect
from autodist.runtime.stage_parameters import is_here


class Layout:
    """Tensors as they are."""

    def fake(self, mode: compat.FakeTensorMode, x: Tensor, dynamic: set[int], number: int) -> Tensor:
        """What the program takes for ``x``, its input ``number``, with symbols for sizes that are
        ``dynamic``."""
        return compat.fake_of(mode, compat.local_part(x), dynamic, number)

    def spec(self, x: Tensor) -> Any:
        """What makes a DTensor of what the program takes for ``x``; None for a plain tensor."""
        return compat.specification(x) if isinstance(x, DTensor) else None

    def shown(self, x: Tensor, fake: Tensor) -> Tensor:
        """``fake``, taken for ``x``, as the kind of tensor that ``x`` is."""
        spec = self.spec(x)
        return fake if spec is None else compat.dtensor_of(fake, spec, False)


@dataclass(frozen=True)
class Whole(Layout):
    """Tensors as if nothing were sharded; those on meta on ``device``, where they will be."""

    device: torch.device

    def fake(self, mode: compat.FakeTensorMode, x: Tensor, dynamic: set[int], number: int) -> Tensor:
        if not (isinstance(x, DTensor) or x.is_meta):
            return super().fake(mode, x, dynamic, number)
        stride = torch.empty(x.shape, device="meta").stride() if isinstance(x, DTensor) else x.stride()
        with mode:
            return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=self.device)

    def spec(self, x: Tensor) -> Any:
        return None


@dataclass(frozen=True)
class AsIfHere(Layout):
    """Tensors of all stages as if they lay on ``mesh``, that of this rank's own."""

    mesh: DeviceMesh

    def fake(self, mode: compat.FakeTensorMode, x: Tensor, dynamic: set[int], number: int) -> Tensor:
        if not isinstance(x, DTensor) or is_here(x):
            return super().fake(mode, x, dynamic, number)
        shape = [*x.shape]
        if x.placements[0].is_shard():
            shape[0] = dialect.local_rows(shape[0], self.mesh.size(), self.mesh.get_local_rank())
        with mode:
            return torch.empty(shape, dtype=x.dtype, device=x.device)

    def spec(self, x: Tensor) -> Any:
        if not isinstance(x, DTensor) or is_here(x):
            return super().spec(x)
        return compat.specification_on(x, self.mesh)


__all__ = ["AsIfHere", "Layout", "Whole"]
