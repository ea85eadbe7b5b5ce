"""Dropout on split sequences: masks differ between pieces, agree on replicas, come back when recomputed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from autodist.runtime import axis
from tests.ranks import run_ranks

ROWS, LENGTH, WIDTH = 2, 7, 8
OPTIONS = {"sp": 2, "lowering": "eager", "outputs": "gathered"}


class Dropped(nn.Module):
    """``scale`` times ones, dropped; and a pooled value, dropped too."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(3, WIDTH)
        nn.init.ones_(self.table.weight)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.recompute = recompute

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout((x * self.scale).exp(), 0.5).log1p()

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(ids)
        x = checkpoint(self._drop, x, use_reentrant=False) if self.recompute else self._drop(x)
        return x, nn.functional.dropout(x.mean(1), 0.5)


def _compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="autodist", options=OPTIONS)


IDS = torch.zeros(ROWS, LENGTH, dtype=torch.long)


def masks() -> None:
    model = Dropped()
    compiled = _compiled(model)
    torch.manual_seed(100 + dist.get_rank())  # ranks need not be seeded alike
    first, pooled = compiled(IDS)
    kept = first.detach() > 0
    assert 0.2 < kept.float().mean() < 0.8
    assert not torch.equal(kept[:, :3], kept[:, 4:])  # the other rank's piece
    assert not torch.equal(kept[0], kept[1])
    everyone = [torch.empty_like(first) for _ in range(2)]
    dist.all_gather(everyone, first.detach())
    assert torch.equal(*everyone)
    everyone = [torch.empty_like(pooled) for _ in range(2)]
    dist.all_gather(everyone, pooled.detach())
    assert torch.equal(*everyone) and (everyone[0] == 0).any()
    assert not torch.equal(compiled(IDS)[0].detach(), first)  # the next step draws anew
    torch.manual_seed(100 + dist.get_rank())
    assert torch.equal(compiled(IDS)[0].detach(), first)


def gradients(recompute: bool) -> None:
    """The gradient uses the mask of the forward, recomputed or not."""
    model = Dropped(recompute)
    compiled = _compiled(model)
    out, _ = compiled(IDS)
    out.sum().backward()
    kept = (out > 0).double()
    e = torch.e
    by_hand = (kept * (2 * e / (1 + 2 * e))).sum((0, 1))
    found = dict(model.named_parameters())["scale"].grad.full_tensor().double()
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-5)


class Attending(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.table = nn.Embedding(11, WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(self.table(ids)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)
        return x.transpose(1, 2).flatten(2)


def attention() -> None:
    ids = torch.randint(0, 11, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Attending(0.3)
    plain = Attending(0.0)
    plain.load_state_dict(model.state_dict())
    expected = plain(ids).detach()
    compiled = _compiled(model)
    torch.manual_seed(1)
    runs = torch.stack([compiled(ids).detach() for _ in range(300)])
    error = (runs.mean(0) - expected).abs()
    assert (error < 5 * runs.std(0) / 300**0.5 + 1e-6).all()
    assert (runs.std(0) > 0).any()
    # Heads lie on different ranks: their masks are not the same.
    dropped = runs[:, :, 0] == 0  # the first position attends to itself alone
    assert not torch.equal(dropped[..., : WIDTH // 2], dropped[..., WIDTH // 2 :])


@pytest.mark.parametrize("check", [masks, attention], ids=lambda f: f.__name__)
def test_masks(check: object) -> None:
    run_ranks(check, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_use_the_same_mask(recompute: bool) -> None:
    run_ranks(gradients, 2, recompute)


def frequencies() -> list[float]:
    """How often elements are kept, and how often neighbours, other numbers and other seeds agree."""
    group = dist.group.WORLD.group_name
    like, seed = torch.empty(200_000), torch.tensor([1234])
    draw = [axis.keep(like, seed + s, n, 0.25, False, group) for s, n in ((0, 1), (0, 2), (1, 1))]
    mask = draw[0]
    agree = [(mask == other).float().mean().item() for other in draw[1:]]
    neighbours = (mask[1:] == mask[:-1]).float().mean().item()
    far = (mask[4096:] == mask[:-4096]).float().mean().item()
    return [mask.float().mean().item(), *agree, neighbours, far]


def test_masks_are_random() -> None:
    for kept, *agree in run_ranks(frequencies, 2):
        assert abs(kept - 0.75) < 0.005
        # Independent draws agree with probability 0.75^2 + 0.25^2.
        assert all(abs(a - 0.625) < 0.006 for a in agree), agree
