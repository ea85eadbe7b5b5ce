"""One step of a model, sharded and compiled, beside the same step on one process.

    reference   whole weights, eager, each rank's own batch; gradients averaged over ranks
    model       the step as it trains

Errors are relative, in the norm. With ``x`` the value of a gradient, ``r`` its reference and ``R`` the norm
of the reference's whole gradient,

    error = |x - r| / max(|r|, R / 1000)

so that a gradient which is only rounding (a key bias in attention) is not measured against itself. For
a buffer ``R`` is 1. Squares are summed over ranks: errors are those of whole tensors, alike on all ranks.

Invariant: the model is left as it was. Gradients are asked for, never accumulated: no ``.grad`` is
touched and no hook on accumulation runs. Buffers, modes and torch's random states are put back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autodist.job import Job, num_ranks
from autodist.prepare import prepare, prepared_job
from autodist.runtime import compat
from autodist.runtime.compat import tree_map
from autodist.runtime.parameters import containers, distribute, whole_value
from autodist.runtime.stage_parameters import is_here, owners

_SHOWN = 8
_TINY = 1e-30


@dataclass(frozen=True)
class Row:
    """One tensor: its ``name``, ``kind`` ("gradient" or "buffer"), reference ``norm`` and ``error``."""

    name: str
    kind: str
    norm: float
    error: float


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found. ``passed`` is the same on every rank.

    ``mode`` is "training" or "evaluation". ``loss`` and ``reference_loss`` are this rank's, ``loss_error`` is
    the worst rank's. ``norm`` and ``reference_norm`` are those of the whole gradient. ``rows`` has an entry
    for each gradient and each buffer, the worst first.
    """

    passed: bool
    tolerance: float
    mode: str
    loss: float
    reference_loss: float
    loss_error: float
    norm: float
    reference_norm: float
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """The outcome in plain words."""
        if self.passed:
            return f"passed: loss, gradients and buffers are right within {self.tolerance:g}"
        wrong = [r for r in self.rows if not r.error <= self.tolerance]
        what, error = "The loss", self.loss_error
        if wrong:
            what, error = f"The {wrong[0].kind} of '{wrong[0].name}'", wrong[0].error
        others = f", and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
        return (
            "FAILED: the model does not compute what it computes on one process. "
            f"{what} is off by {error:.1e}{others}; {self.tolerance:g} is allowed."
        )


def verify(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: Callable[[Any], Tensor] | None = None,
    tolerance: float = 1e-4,
) -> Report:
    """Compare one step of ``model`` with the same step on one process; print and return what was found.

    Every rank calls it with a batch of its own: a mapping (keyword arguments), a tuple or list
    (positional arguments), or the one argument. The loss is ``loss_fn(output)`` if given, else the output
    if that is a scalar tensor, else ``output.loss``. A model that is not prepared is prepared, under the
    options it was compiled with; one that is not compiled is compiled. ``tolerance`` bounds the error of
    the loss and of every gradient and buffer. The reference of a bf16 plan runs under autocast, and still
    rounds in other places: allow about 2e-2 there, and for a model whose parameters are bf16.

    The reference needs the whole model's weights and gradients in each rank's memory. If the model draws
    random numbers in training mode, the step is done in evaluation mode, and the report says so.

    A difference is no exception: ``passed`` is False, and what is printed says FAILED. Raises
    ``ValueError`` for a model without a scalar loss, or with a random one in evaluation mode too.
    """
    root = compat.compiled_module(model) or model
    if num_ranks() > 1:
        arguments = tuple(batch) if isinstance(batch, list) else batch
        prepare(root, compat.compile_options(model), batch=arguments)
    compiled: Any = model
    if compat.compiled_module(model) is None:
        compiled = torch.compile(model, backend="autodist")
    step = _Step(root, batch, loss_fn, prepared_job(root))
    with _modes_and_randomness_kept(root, step.device):
        reference = step.reference()
        report = _compare(step.run(compiled, step.parameters), reference, step, tolerance)
    if step.job is None or step.job.is_first_rank:
        _print(report)
    return report


# --- steps -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """A step's loss, and by name the gradients (this rank's part) and the buffers after it."""

    loss: float
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Step:
    """One step of ``root`` on ``batch``. ``job`` is None on one rank."""

    root: nn.Module
    batch: Any
    loss_fn: Callable[[Any], Tensor] | None
    job: Job | None

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.root.parameters()), torch.device("cpu"))

    @property
    def num_ranks(self) -> int:
        return 1 if self.job is None or self.job.mesh is None else self.job.mesh.size()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.root.named_parameters())

    def loss(self, model: Callable[..., Any], seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        if isinstance(self.batch, Mapping):
            output = model(**self.batch)
        elif isinstance(self.batch, (tuple, list)):
            output = model(*self.batch)
        else:
            output = model(self.batch)
        loss: Any = output if isinstance(output, Tensor) else getattr(output, "loss", None)
        if self.loss_fn is not None:
            loss = self.loss_fn(output)
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            raise ValueError(
                f"no scalar loss can be had from {type(output).__name__}, which the model returns: pass "
                "loss_fn=..., a function from the model's output to a scalar tensor"
            )
        return loss

    def run(self, model: Callable[..., Any], parameters: Mapping[str, nn.Parameter]) -> _Outcome:
        trained = {n: p for n, p in parameters.items() if p.requires_grad}
        gradients: dict[str, Tensor | None] = dict.fromkeys(trained)
        with torch.enable_grad(), _buffers_kept(self.root):
            loss = self.loss(model)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
                gradients = {n: _local(g) for n, g in zip(trained, found, strict=True)}
            buffers = {n: b.clone() for n, b in self.root.named_buffers()}
        return _Outcome(loss.item(), gradients, buffers)

    def reference(self) -> _Outcome:
        """The step on whole weights. Leaves ``root`` in evaluation mode if it is random in training."""
        parameters = self.parameters
        whole = {n: _whole(p) for n, p in parameters.items()}
        narrow = self.job is not None and self.job.plan.precision == "bf16"
        precision = torch.autocast(self.device.type, torch.bfloat16) if narrow else _NOTHING
        substitutes = {p: whole[n] for n, p in parameters.items()}
        with torch.compiler.set_stance("force_eager"), _holding(self.root, substitutes), precision:
            if self._is_random():
                self.root.eval()
                self._require_certain()
            outcome = self.run(self.root, whole)
        means = {n: self._mean(g, parameters[n]) for n, g in outcome.gradients.items()}
        return _Outcome(outcome.loss, means, outcome.buffers)

    def _require_certain(self) -> None:
        if self._is_random():
            raise ValueError(
                "the model's loss is random in evaluation mode too, so there is none to compare with: "
                "pass what it draws as part of the batch"
            )

    def _is_random(self) -> bool:
        """Whether the loss of any rank depends on the seed."""
        with torch.no_grad(), _buffers_kept(self.root):
            first, second = (self.loss(self.root, seed).item() for seed in (0, 1))
        differ = abs(first - second) > 1e-6 * max(abs(first), abs(second))
        return self.over_ranks([float(differ)], dist.ReduceOp.MAX)[0] > 0

    def _mean(self, gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
        """The average of the ranks' whole gradients; of that, what this rank holds."""
        if gradient is None:
            gradient = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        total = _wide(gradient)
        if self.job is None or self.job.mesh is None:
            return total
        dist.all_reduce(total, group=self.job.mesh.get_group())
        if isinstance(parameter, DTensor) and not is_here(parameter):
            return total[:0]
        mesh = self.job.stage_mesh(self.job.place)
        return distribute(total / self.job.mesh.size(), mesh, _is_sharded(parameter)).to_local()

    def copies(self, parameter: Tensor) -> int:
        """How many ranks hold the same elements of a parameter."""
        if self.job is None or self.job.mesh is None:
            return 1
        replicas = 1 if _is_sharded(parameter) else self.job.stage_mesh(self.job.place).size()
        return replicas * max(1, len(owners(parameter)))

    def over_ranks(self, numbers: list[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.job is None or self.job.mesh is None:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op, group=self.job.mesh.get_group())
        return tensor.tolist()


_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and parameter.placements[0].is_shard()


def _wide(tensor: Tensor) -> Tensor:
    """A contiguous copy in double precision."""
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _whole(parameter: nn.Parameter) -> nn.Parameter:
    if owners(parameter):
        value = whole_value(parameter)
    else:
        kept = parameter.detach()
        value = whole_value(kept) if isinstance(kept, DTensor) else kept.clone()
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


# --- leaving the model as it was -------------------------------------------------------------------


@contextlib.contextmanager
def _holding(root: nn.Module, substitutes: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Inside, ``root`` has ``substitutes`` for its parameters, wherever it holds them."""

    def substitute(leaf: Any) -> Any:
        return substitutes.get(leaf, leaf) if isinstance(leaf, nn.Parameter) else leaf

    registered = [(m, dict(m._parameters)) for m in root.modules()]
    elsewhere = [(m, name, vars(m)[name]) for m in root.modules() for name in containers(m)]
    try:
        for module, held in registered:
            module._parameters.update({n: substitute(p) for n, p in held.items()})
        for module, name, value in elsewhere:
            vars(module)[name] = tree_map(substitute, value)
        yield
    finally:
        for module, held in registered:
            module._parameters.update(held)
        for module, name, value in elsewhere:
            vars(module)[name] = value


@contextlib.contextmanager
def _buffers_kept(root: nn.Module) -> Iterator[None]:
    """Afterwards every buffer is the same tensor with the same values."""
    registered = [(m, dict(m._buffers)) for m in root.modules()]
    values = {b: b.clone() for _, held in registered for b in held.values() if b is not None}
    try:
        yield
    finally:
        for module, held in registered:
            module._buffers.update(held)
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)


@contextlib.contextmanager
def _modes_and_randomness_kept(root: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards training modes and torch's random states are what they were."""
    modes = {m: m.training for m in root.modules()}
    on_cpu = device.type == "cpu"
    devices = [] if on_cpu else [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(devices, device_type="cuda" if on_cpu else device.type):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


# --- comparing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """What was found and what should have been; ``copies`` ranks hold the same elements of it."""

    name: str
    kind: str
    found: Tensor | None
    wanted: Tensor
    copies: int

    def squares(self) -> list[float]:
        """This rank's part of |found|^2, |wanted|^2 and |found - wanted|^2; None counts as zero."""
        wanted = _wide(self.wanted)
        found = torch.zeros_like(wanted) if self.found is None else _wide(self.found)
        norms = [torch.linalg.vector_norm(t).item() for t in (found, wanted, found - wanted)]
        return [n**2 / self.copies for n in norms]


def _pairs(mine: _Outcome, reference: _Outcome, step: _Step) -> list[_Pair]:
    parameters, ranks = step.parameters, step.num_ranks
    gradients = [
        _Pair(n, "gradient", mine.gradients[n], r, step.copies(parameters[n]))
        for n, r in reference.gradients.items()
        if r is not None
    ]
    buffers = [_Pair(n, "buffer", mine.buffers[n], r, ranks) for n, r in reference.buffers.items()]
    return gradients + buffers


def _compare(mine: _Outcome, reference: _Outcome, step: _Step, tolerance: float) -> Report:
    pairs = _pairs(mine, reference, step)
    squares = step.over_ranks([s for pair in pairs for s in pair.squares()], dist.ReduceOp.SUM)
    norms = [tuple(map(math.sqrt, squares[i : i + 3])) for i in range(0, len(squares), 3)]
    gradients = [n for n, pair in zip(norms, pairs, strict=True) if pair.kind == "gradient"]
    norm, reference_norm = (math.hypot(*(n[i] for n in gradients)) for i in (0, 1))
    rows = []
    for pair, (_, wanted, difference) in zip(pairs, norms, strict=True):
        least = (reference_norm if pair.kind == "gradient" else 1) / 1000
        rows.append(Row(pair.name, pair.kind, wanted, difference / max(wanted, least, _TINY)))
    rows.sort(key=lambda row: math.inf if math.isnan(row.error) else row.error, reverse=True)
    off = abs(mine.loss - reference.loss) / max(abs(reference.loss), _TINY)
    loss_error = step.over_ranks([math.inf if math.isnan(off) else off], dist.ReduceOp.MAX)[0]
    return Report(
        passed=loss_error <= tolerance and all(row.error <= tolerance for row in rows),
        tolerance=tolerance,
        mode="training" if step.root.training else "evaluation",
        loss=mine.loss,
        reference_loss=reference.loss,
        loss_error=loss_error,
        norm=norm,
        reference_norm=reference_norm,
        rows=tuple(rows),
    )


def _print(report: Report) -> None:
    table = Table(title=f"autodist.verify: one step in {report.mode} mode", title_justify="left")
    for heading in ("", "reference", "error"):
        table.add_column(heading, overflow="fold")
    table.add_row("loss", f"{report.reference_loss:.6g}", f"{report.loss_error:.1e}")
    off = abs(report.norm - report.reference_norm) / max(report.reference_norm, _TINY)
    table.add_row("norm of the gradient", f"{report.reference_norm:.6g}", f"{off:.1e}")
    for row in report.rows[:_SHOWN]:
        table.add_row(f"{row.kind} of {row.name}", f"norm {row.norm:.3g}", f"{row.error:.1e}")
    if len(report.rows) > _SHOWN:
        table.caption = f"the worst {_SHOWN} of {len(report.rows)} tensors"
    console = Console()
    console.print(table)
    console.print(f"autodist.verify {report}", highlight=False, markup=False, soft_wrap=True)
