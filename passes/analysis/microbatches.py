"""The axis laid out in time over the batch: the program of one microbatch, so that a loop over all is exact.

A batch of ``B`` rows is made in ``M`` microbatches of ``rows`` rows each, the last one's missing rows
repeating row ``B - 1``. Placements and rules are those of :mod:`autodist.passes.analysis.placement`, along
dimension 0:

    Shard        rows of this microbatch; what needs other microbatches' rows is refused
    R, W         the same in every microbatch; computed again in each
    P            sums over rows: the part of this microbatch

What a rule wants of the whole batch is a *request*. There are two ways to meet one:

    before       what depends on the batch alone (the number of valid labels, say) is computed for all
                 microbatches before the first: :attr:`Microbatch.prologue`
    at the end   a sum that depends on weights is known when the last microbatch is done. So what follows it
                 must be *linear*: f(sum of parts) = sum of f(parts). Then f is applied to each part, the
                 results are added up, and so are their gradients. What is added to a part and is the same
                 in every microbatch is divided by M.

What is not linear in such a sum, and leads to results alone that nothing is differentiated through (the
perplexity of a loss), is *late*: computed once, of the whole sums, after the last microbatch.

Everything else mixes microbatches (the statistics of a batch norm, products of two means), and is refused by
name: made in microbatches it would be another function.

Invariant: with ``f_i`` the program on microbatch i, ``sum_i f_i = f`` for outputs that are sums, ``f_i`` are
the rows of ``f`` for outputs that have rows, and ``sum_i grad f_i = grad f``. Late outputs are functions of
such outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from autodist.passes.analysis.chunks import joined
from autodist.passes.analysis.placement import Axis, PlacementError, Propagation, Shard, Value
from autodist.passes.graph import behind, insert, output_of, part_of, where
from autodist.runtime import axis, compat

_aten = torch.ops.aten
_STRIDE = 1_000_003  # between the seeds of neighbouring rows: any number that no program counts in


@dataclass(frozen=True)
class Request:
    """Something of the whole batch: a ``shard`` joined, or (None) a sum, as ``like``."""

    like: Tensor
    shard: Shard | None


@dataclass(frozen=True)
class Rows(Axis):
    """``size`` microbatches of ``rows`` of the ``batch``'s rows; this one begins at row ``first``.

    ``met`` are the values of requests, in the order in which rules make them, for as many as are known.
    """

    batch: int = 1
    rows: int = 1
    first: Tensor | None = None
    met: Sequence[Tensor] = ()
    parts: list[tuple[Tensor, Shard | None]] = field(default_factory=list)
    refuse: list[Any] = field(default_factory=list)

    @property
    def shard(self) -> Shard:
        """Where the batch's rows lie in dimension 0."""
        return Shard(0, 1, self.batch, self.rows, self.batch)

    def request(self, part: Tensor, shard: Shard | None) -> Tensor:
        self.parts.append((part, shard))
        if len(self.parts) <= len(self.met):
            return self.met[len(self.parts) - 1]
        return _like(part, shard)

    def whole(self, value: Value) -> Tensor:
        if not value.sharded:
            return value.tensor
        self.refuse[0]("needs the rows of other microbatches")
        return self.request(value.tensor, value.shard)

    def beside(self, value: Value) -> Tensor:
        return self.whole(value)

    def sharded(self, value: Value, to: Shard) -> Tensor:
        if value.sharded and value.shard.same(to):
            return value.tensor
        whole = self.whole(value)
        before, after = whole.shape[: to.dim], whole.shape[to.dim + 1 :]
        seen = whole.reshape([*before, to.outer, to.length, *after])
        return seen.index_select(to.dim + 1, self._positions(to)).reshape([*before, to.local, *after])

    def total(self, partial: Tensor) -> Tensor:
        return self.request(partial, None)

    def agreed(self, tensor: Tensor) -> Tensor:
        raise self.refuse[0]("draws random numbers for a whole batch, other than dropout's", always=True)

    def keep(self, like: Tensor, seed: Tensor, number: int, p: float, sharded: bool) -> Tensor:
        assert self.first is not None
        mine = seed + (self.first + 1) * _STRIDE if sharded else seed
        return axis.keep(like, mine, number, p, False, self.group)

    def last(self, tensor: Tensor, shard: Shard) -> Tensor:
        raise self.refuse[0]("takes rows from the end of the batch", always=True)

    def valid(self, like: Tensor, shard: Shard) -> Tensor:
        row, _ = self._rows_of(shard)
        return (row < self.batch).repeat(shard.outer)

    def _rows_of(self, shard: Shard) -> tuple[Tensor, int]:
        """The batch's row of each position of a piece, and how many positions a row has."""
        assert self.first is not None
        each = shard.chunk // self.rows
        return torch.arange(shard.chunk, device=self.first.device) // each + self.first, each

    def _positions(self, shard: Shard) -> Tensor:
        row, each = self._rows_of(shard)
        within = torch.arange(shard.chunk, device=row.device) % each
        return row.clamp(max=self.batch - 1) * each + within


class _Propagation(Propagation):
    """Runs a whole batch's program on the rows of one microbatch."""

    def __init__(self, graph: GraphModule, rows: Rows, weights: set[str], batched: set[str]) -> None:
        super().__init__(graph, rows, weights)
        self.rows, self.batched = rows, batched
        self.from_weights = _depend_on(graph, weights)
        rows.refuse.append(self.refuse)

    def start(self, seed: Tensor | None) -> None:
        self._seed = seed

    def run(self, *inputs: Any, **kwargs: Any) -> Any:
        return super(Propagation, self).run(*inputs, **kwargs)  # the seed is an input, not a draw

    def refuse(self, what: str, always: bool = False) -> PlacementError:
        """Raise for the node at hand; where it depends on the batch alone only if told ``always``."""
        error = PlacementError(
            f"node '{self.node.name}' ({where(self.node)}): {self.node.target} {what}, so the batch cannot "
            f"be made in {self.rows.size} microbatches of {self.rows.rows} rows. Use operators that treat "
            "every row by itself, microbatches=1, or a plan without pp."
        )
        if always or any(n in self.from_weights for n in self.node.all_input_nodes):
            raise error
        return error

    def _gathers(self, target: Any, values: Sequence[Value]) -> None:
        self.refuse("has no rule that keeps rows apart, or mixes them")

    def even_pieces(self, dim: int, length: Any, what: str) -> Shard:
        raise self.refuse("mixes the rows of a batch", always=True)

    def _start(self, target: Any, args: Any) -> Any:
        return args  # rows begin at the inputs

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = super().placeholder(target, args, kwargs)
        if self.node.name in self.batched:
            shape = (self.rows.batch, *given.shape[1:])
            return Value(given.tensor, self.rows.shard, shape)
        return given


def _depend_on(graph: GraphModule, names: set[str]) -> set[Node]:
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node.name in names or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


# --- the program of one microbatch ---------------------------------------------------------------------


@dataclass(frozen=True)
class Prologue:
    """One request that is met before the first microbatch.

    ``graph`` takes the microbatch's inputs named ``inputs``, then the values of requests ``earlier``; what it
    returns is summed over microbatches, or joined as ``shard`` says.
    """

    graph: GraphModule
    inputs: tuple[int, ...]
    earlier: tuple[int, ...]
    shard: Shard | None

    def meet(self, parts: list[Tensor]) -> Tensor:
        if self.shard is not None:
            return joined(parts, self.shard)
        return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class Result:
    """How an output comes from the microbatches': the ``sum``, the ``rows`` joined, the ``same`` in all, or
    ``late``, from others: no microbatch has it."""

    kind: Literal["sum", "rows", "same", "late"]
    shard: Shard | None = None

    def combined(self, parts: Sequence[Tensor]) -> Tensor:
        if self.kind == "sum":
            return sum(parts[1:], parts[0])
        if self.shard is not None:
            return joined(list(parts), self.shard)
        return parts[0]


@dataclass(frozen=True)
class Late:
    """The outputs numbered ``places``, made by ``graph`` of the last ``taken`` results. ``why`` says what of
    them is not linear."""

    graph: GraphModule
    places: tuple[int, ...]
    taken: int
    why: str


@dataclass(frozen=True)
class Microbatch:
    """The program of one microbatch.

    ``graph`` takes the whole program's inputs (those in ``batched`` as rows), then values of ``prologue``'s
    requests, then ``seed`` and ``first`` (the number of the microbatch's first row). It returns what the
    whole program returns (None for what is late), then what ``late`` takes, each as ``results`` says.
    """

    graph: GraphModule
    count: int
    rows: int
    batch: int
    batched: tuple[int, ...]
    prologue: tuple[Prologue, ...]
    results: tuple[Result, ...]
    late: Late | None = None

    @property
    def num_outputs(self) -> int:
        """How many of the results are the whole program's outputs; ``late`` takes the others."""
        return len(self.results) - (0 if self.late is None else self.late.taken)

    def finished(self, results: Sequence[Any]) -> list[Any]:
        """What the whole program returns, from the combined ``results``."""
        if self.late is None:
            return list(results)
        found, made = list(results[: self.num_outputs]), self.late.graph(*results[self.num_outputs :])
        for place, value in zip(self.late.places, made, strict=True):
            found[place] = value
        return found

    def pieces(self, whole: Tensor) -> list[Tensor]:
        """A batched input's rows for each microbatch."""
        if self.count == 1:
            return [whole]
        missing = self.count * self.rows - self.batch
        if missing:
            last = whole.narrow(0, self.batch - 1, 1).expand(missing, *whole.shape[1:])
            whole = torch.cat([whole, last])
        return list(torch.split(whole, self.rows))


def batch_size(values: Sequence[Tensor]) -> int:
    """Rows of the batch: the first size that most inputs of at least one dimension begin with."""
    sizes = [int(v.shape[0]) for v in values if v.ndim > 0 and v.shape[0] > 1]
    return max(sizes, key=sizes.count, default=1)


def parts_of(batch: int, wanted: int) -> tuple[int, int]:
    """Rows of a microbatch, and how many there are: at most ``wanted``."""
    rows = -(-batch // min(wanted, batch))
    return rows, -(-batch // rows)


def microbatch(
    graph: GraphModule,
    fakes: Sequence[Tensor],
    weights: set[str],
    wanted: int,
    group: str,
) -> Microbatch:
    """The program of one of at most ``wanted`` microbatches of a functional program on static ``fakes``.

    ``weights`` names the placeholders that are parameters or buffers; ``group`` is the process group
    whose ranks draw the same dropout masks. Raises :class:`PlacementError` where the batch cannot be split.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    own = [i for i, n in enumerate(placeholders) if n.name not in weights and isinstance(fakes[i], Tensor)]
    batch = batch_size([fakes[i] for i in own])
    rows, count = parts_of(batch, wanted)
    batched = tuple(i for i in own if count > 1 and fakes[i].ndim > 0 and fakes[i].shape[0] == batch)
    names = {placeholders[i].name for i in batched}
    local = [x.narrow(0, 0, rows).clone() if i in batched else x for i, x in enumerate(_detached(fakes))]
    mode, device = compat.fake_mode_of(fakes), _device(fakes)
    assert mode is not None
    with mode:
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        first = torch.zeros((), dtype=torch.int64, device=device)

    def propagation(first: Tensor, seed: Tensor, met: Sequence[Tensor]) -> tuple[_Propagation, Rows]:
        rows_axis = Rows("microbatch", count, group, batch, rows, first, met)
        made = _Propagation(graph, rows_axis, weights, names)
        made.start(seed)
        return made, rows_axis

    # Once to see what is asked for, then traced with that among the inputs.
    with mode, torch.enable_grad():
        probe, asked = propagation(first, seed, ())
        placed = probe.run(*local)
        requests = [Request(_like(part, shard), shard) for part, shard in asked.parts]

    def run(*inputs: Any) -> list[Any]:
        given, (seed, first) = inputs[:-2], inputs[-2:]
        mine, met = given[: len(local)], given[len(local) :]
        made, axis_ = propagation(first, seed, met)
        results = [v.tensor if isinstance(v, Value) else v for v in made.run(*mine)]
        return [*results, *(part for part, _ in axis_.parts)]

    traced = compat.trace_before_autograd(run, [*local, *(r.like for r in requests), seed, first])
    results = [
        Result("rows", v.shard) if isinstance(v, Value) and v.sharded else Result("same") for v in placed
    ]
    return _resolved(
        traced, requests, results, weights_at(placeholders, weights), batched, count, rows, batch
    )


def weights_at(placeholders: Sequence[Node], weights: set[str]) -> frozenset[int]:
    return frozenset(i for i, n in enumerate(placeholders) if n.name in weights)


def _detached(fakes: Sequence[Any]) -> list[Any]:
    return [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in fakes]


def _device(fakes: Sequence[Any]) -> torch.device:
    return next(x.device for x in fakes if isinstance(x, Tensor))


def _like(part: Tensor, shard: Shard | None) -> Tensor:
    """A value like the one that a request is met with."""
    if shard is None:
        return torch.empty_like(part).detach()
    shape = [*part.shape]
    shape[shard.dim] = shard.outer * shard.length
    return part.new_empty(shape).detach()


def _resolved(
    traced: GraphModule,
    requests: Sequence[Request],
    results: list[Result],
    weights: frozenset[int],
    batched: tuple[int, ...],
    count: int,
    rows: int,
    batch: int,
) -> Microbatch:
    """Requests that depend on the batch alone go before; the others are sums, and what follows is linear."""
    body = traced.graph
    inputs = body.find_nodes(op="placeholder")
    own = len(inputs) - len(requests) - 2
    output = output_of(traced)
    returned = list(output.args[0])  # type: ignore[arg-type]
    outputs, parts = returned[: len(returned) - len(requests)], returned[len(returned) - len(requests) :]
    from_weights = _depend_on(traced, {inputs[i].name for i in weights})
    prologue: list[Prologue] = []
    met: dict[Node, int] = {}
    partial: set[Node] = set()
    for request, part, asked in zip(requests, parts, inputs[own:-2], strict=True):
        if part not in from_weights:
            prologue.append(_before(traced, part, inputs, own, met, request.shard))
            met[asked] = len(prologue) - 1
            continue
        assert request.shard is None  # refused where it was asked for
        partial.add(part)
        asked.replace_all_uses_with(part)
        outputs = [part if o is asked else o for o in outputs]
        from_weights |= _depend_on(traced, {part.name})
    output.args = (outputs,)
    varying = _depend_on(traced, {inputs[i].name for i in (*batched, -1)})
    linear = _Linear(traced, count, partial, varying)
    linear.check()
    # What became part of the sum in the course of that is one too.
    outputs = list(output.args[0])  # type: ignore[arg-type]
    sums = _depend_on(traced, {n.name for n in partial}) - linear.late
    kinds = [
        Result("sum") if o in sums and r.kind == "same" else r for o, r in zip(outputs, results, strict=True)
    ]
    late = _late(traced, outputs, kinds, sums, linear)
    output.args = (outputs,)
    for asked in inputs[own:-2]:
        if asked not in met:
            body.erase_node(asked)
    body.eliminate_dead_code()
    traced.recompile()
    return Microbatch(traced, count, rows, batch, batched, tuple(prologue), tuple(kinds), late)


def _late(
    traced: GraphModule, outputs: list[Any], kinds: list[Result], sums: set[Node], linear: _Linear
) -> Late | None:
    """Take what is late out of ``traced``: ``outputs`` and their ``kinds`` become those of the rest."""
    places = tuple(i for i, o in enumerate(outputs) if isinstance(o, Node) and o in linear.late)
    if not places:
        return None
    needed = behind([outputs[i] for i in places])
    made = {n for n in needed if n in linear.late or n.op == "get_attr"}
    taken = [n for n in traced.graph.nodes if n not in made and any(u in made for u in n.users)]
    program = part_of(traced, taken, made, [outputs[i] for i in places])
    for place in places:
        outputs[place], kinds[place] = None, Result("late")
    outputs += taken
    kinds += [Result("sum" if n in sums else "same") for n in taken]
    return Late(program, places, len(taken), linear.why)


def _before(
    traced: GraphModule,
    part: Node,
    inputs: Sequence[Node],
    own: int,
    met: dict[Node, int],
    shard: Shard | None,
) -> Prologue:
    """The program of a request that depends on the batch alone."""
    needed = behind([part])
    number = {n: i for i, n in enumerate(inputs)}
    taken = [n for n in inputs if n in needed]
    own_inputs, earlier = [n for n in taken if n not in met], [n for n in taken if n in met]
    program = part_of(traced, (*own_inputs, *earlier), needed, part)
    # The last two inputs count from the end.
    mine = tuple(number[n] if number[n] < own else number[n] - len(inputs) for n in own_inputs)
    return Prologue(program, mine, tuple(met[n] for n in earlier), shard)


# --- what follows a sum -----------------------------------------------------------------------------------

_ALONE = {
    _aten.neg.default, _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default,
    _aten.expand.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims,
    _aten.unsqueeze.default, _aten.select.int, _aten.slice.Tensor, _aten.transpose.int,
    _aten.permute.default, _aten.clone.default, _aten.alias.default, _aten.detach.default,
    _aten.sum.default, _aten.sum.dim_IntList, _aten.mean.default, _aten.mean.dim,
    _aten._to_copy.default, _aten.to.dtype, _aten.contiguous.default, _aten.cumsum.default,
    operator.getitem,
}  # fmt: skip
"""Linear in their one operand."""
_SUMS = {
    _aten.add.Tensor, _aten.sub.Tensor, _aten.add.Scalar, _aten.sub.Scalar, _aten.rsub.Tensor,
    _aten.rsub.Scalar,
}  # fmt: skip
_LISTS = {_aten.cat.default, _aten.stack.default}
_PRODUCTS = {_aten.mul.Tensor, _aten.mul.Scalar}
_QUOTIENTS = {_aten.div.Tensor, _aten.div.Scalar}


@dataclass
class _Linear:
    """Walks what follows sums, and divides by ``count`` what is added to them in every microbatch.

    ``late`` are the nodes that need whole sums, and ``why`` says so of the first."""

    graph: GraphModule
    count: int
    partial: set[Node]
    varying: set[Node]
    """What depends on the rows of the microbatch at hand."""
    late: set[Node] = field(default_factory=set)
    why: str = ""

    def check(self) -> None:
        for node in list(self.graph.graph.nodes):
            if node.op == "output":
                continue
            of = [n for n in node.all_input_nodes if n in self.partial]
            after = any(n in self.late for n in node.all_input_nodes)
            if after or (of and (node not in self.partial or any(n is not node for n in of))):
                self._follow(node, after)

    def _follow(self, node: Node, after: bool) -> None:
        if any(n in self.varying - self.partial - self.late for n in node.all_input_nodes):
            raise PlacementError(self._refusal(node))  # every row would need the whole sum
        if not after and self._is_linear(node):
            self.partial.add(node)
            return
        if node in self.partial:
            raise PlacementError(self._refusal(node))  # a sum over rows of what needs the whole
        self.late.add(node)
        self.why = self.why or self._refusal(node)

    def _is_linear(self, node: Node) -> bool:
        """And divides what it adds to the sum."""
        target, args = node.target, node.args
        mine = [a in self.partial if isinstance(a, Node) else False for a in args]
        if target in _ALONE and mine[0] and sum(mine) == 1:
            return not _to_whole_numbers(node)
        if target in _SUMS and len(args) >= 2:
            added = [a if m else self._share(node, a) for a, m in zip(args[:2], mine, strict=False)]
            node.args = (*added, *args[2:])
            return True
        if target in _LISTS:
            parts: Any = args[0]
            node.args = ([a if a in self.partial else self._share(node, a) for a in parts], *args[1:])
            return True
        scaled = target in _PRODUCTS and sum(mine[:2]) == 1
        return scaled or (target in _QUOTIENTS and mine[:2] == [True, False])

    def _refusal(self, node: Node) -> str:
        return (
            f"node '{node.name}' ({where(node)}): {node.target} is not linear in a sum over the batch, which "
            f"is known only when all {self.count} microbatches are done (a statistic of the batch that the "
            "model goes on with, or a product of two). Use microbatches=1, or a plan without pp."
        )

    def _share(self, before: Node, value: Any) -> Any:
        """A microbatch's share of what is the same in all."""
        if not isinstance(value, Node):
            return value / self.count
        with self.graph.graph.inserting_before(before):
            return insert(self.graph.graph, _aten.div.Tensor, (value, self.count), before)


def _to_whole_numbers(node: Node) -> bool:
    """Whether a conversion rounds."""
    val = node.meta["val"]
    given = node.args[0].meta["val"]  # type: ignore[union-attr]
    if not isinstance(val, Tensor) or not isinstance(given, Tensor):
        return False
    return given.is_floating_point() and not val.is_floating_point()


__all__ = ["Late", "Microbatch", "Prologue", "Result", "batch_size", "microbatch", "parts_of"]
