"""Where values stand on an axis: the typing that makes a sharded program compute what one process would.

The *axis* has ``P`` places (ranks, here). On it a value has one of four placements, and its cotangent
(gradient) the dual one:

    R            the same complete value everywhere                            cotangent R
    W            likewise, and computed only from weights and from values      cotangent P
                 without gradient: each place owes its part of the gradient,
                 and the reduction at the parameter pays for all of it
    Shard(dim)   dimension ``dim``, seen as (outer, length), in pieces of      cotangent Shard
                 ``chunk`` positions (:mod:`autodist.runtime.axis`)
    P            the true value is the sum over the axis                       cotangent R

P never rests: what makes a partial sum reduces it at once. This is the typing of shard_map (varying and
invariant values) plus W, which makes weights free: a weight beside sharded values needs only the reduction
that ZeRO performs anyway.

A *rule* says how an operator runs when at least one of its operands is sharded: which placements it wants
its operands in, what it is called with, and where its results stand. :data:`RULES` is the table, from an
operator's name to its rule; operators that work elementwise share one. A rule that cannot keep the
operands sharded returns None, and so does an operator without a rule: then they are gathered, which is
counted and reported (:class:`Gathered`). Where all operands are whole, an operator runs as it is: its result
is W when all that need a gradient are W, else R.

Rules speak of sizes of the whole value (``shape``), never of this rank's, and know nothing of module names.
The paper around attention: DeepSpeed Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from autodist.passes.graph import where
from autodist.runtime import axis, compat
from autodist.runtime.compat import tree_leaves, tree_map

_aten = torch.ops.aten


class PlacementError(ValueError):
    """A program cannot run sharded as the plan asks; names node, source line, value and remedy."""


# --- placements ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shard:
    """Dimension ``dim``, seen as (``outer``, ``length``), in pieces of ``chunk`` positions.

    ``origin`` is the length that was cut into these pieces; where positions were dropped from the end it is
    longer than ``length``. Shards of different origin are never the same, even where their chunks happen to
    be equal: what is communicated must not depend on the length of a batch.
    """

    dim: int
    outer: Any
    length: Any
    chunk: Any
    origin: Any

    def same(self, other: object) -> bool:
        if not isinstance(other, Shard) or self.dim != other.dim:
            return False
        return _known_same(
            (self.outer, self.length, self.chunk, self.origin),
            (other.outer, other.length, other.chunk, other.origin),
        )

    def at(self, dim: int) -> Shard:
        return replace(self, dim=dim)

    @property
    def local(self) -> Any:
        """Size of the dimension on one place."""
        return self.outer * self.chunk


Placement: TypeAlias = "Literal['R', 'W'] | Shard"
R: Literal["R"] = "R"
W: Literal["W"] = "W"


@dataclass
class Value:
    """``tensor`` is what this place holds of a value of ``shape``."""

    tensor: Tensor
    placement: Placement
    shape: tuple[Any, ...]
    repeats: Value | None = None
    """For keys and values repeated for the queries' sake: what was repeated, along dimension 1."""

    @property
    def sharded(self) -> bool:
        return isinstance(self.placement, Shard)

    @property
    def shard(self) -> Shard:
        assert isinstance(self.placement, Shard)
        return self.placement


@dataclass(frozen=True)
class Gathered:
    """An operator whose operands were gathered because it cannot run on shards."""

    node: str
    operator: str
    num_bytes: int
    source: str


# --- the axis, laid out in space -------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """``size`` places: the ranks of ``group``. All communication of the analysis is asked for here."""

    name: str
    size: int
    group: str

    def pieces(self, dim: int, length: Any, outer: Any = 1) -> Shard:
        """The shard of ``length`` positions in equal pieces, the last one padded."""
        chunk = (length + self.size - 1) // self.size
        if isinstance(chunk, torch.SymInt) and compat.size_hint(chunk) == 1:
            # torch treats a size of one as a constant: the program would be one for this length alone.
            chunk = chunk + 1
        return Shard(dim, outer, length, chunk, length)

    def is_even(self, shard: Shard) -> bool:
        """Whether it is certain that no place holds padding."""
        return compat.known_equal(shard.chunk * self.size, shard.length)

    def whole(self, value: Value) -> Tensor:
        """The complete value, with cotangent R."""
        if value.placement == R:
            return value.tensor
        if value.placement == W:
            return axis.settle(value.tensor, self.group) if value.tensor.requires_grad else value.tensor
        s = value.shard
        return axis.gather(value.tensor, s.dim, s.outer, s.length, s.chunk, self.group)

    def beside(self, value: Value) -> Tensor:
        """The complete value for use beside sharded ones: each place's cotangent is its part."""
        if value.sharded:
            value = Value(self.whole(value), R, value.shape)
        if value.placement == R and value.tensor.requires_grad:
            return axis.vary(value.tensor, self.group)
        return value.tensor

    def sharded(self, value: Value, to: Shard) -> Tensor:
        """This place's piece of ``value`` under ``to``."""
        place = (to.dim, to.outer, to.length, to.chunk)
        if value.placement == W:
            return axis.part(value.tensor, *place, self.group)
        if value.placement == R:
            return axis.slice_(value.tensor, *place, True, self.group)
        has = value.shard
        if has.same(to):
            return value.tensor
        if has.dim == to.dim:
            return self.sharded(Value(self.whole(value), R, value.shape), to)
        back = (has.dim, has.outer, has.length, has.chunk)
        return axis.exchange(value.tensor, *place, *back, True, self.group)

    def total(self, partial: Tensor) -> Tensor:
        """The sum over all places."""
        return axis.reduce(partial, self.group)

    def agreed(self, tensor: Tensor) -> Tensor:
        """The first place's value."""
        return axis.agreed(tensor, self.group)

    def keep(self, like: Tensor, seed: Tensor, number: int, p: float, sharded: bool) -> Tensor:
        """A mask that is False with probability ``p``: each piece's own, or one for all."""
        return axis.keep(like, seed, number, p, sharded, self.group)

    def last(self, tensor: Tensor, shard: Shard) -> Tensor:
        """The last position of a dimension whose ``outer`` is one, on every place."""
        return axis.last(tensor, shard.dim, shard.outer, shard.length, shard.chunk, self.group)

    def valid(self, like: Tensor, shard: Shard) -> Tensor:
        """A mask over the shard's dimension: True where it holds a position, False on padding."""
        return axis.valid(like, shard.outer, shard.length, shard.chunk, self.group)


# --- propagation -----------------------------------------------------------------------------------


@dataclass
class Report:
    """What propagation found: operators whose operands it gathered, and how often each rule applied."""

    gathered: list[Gathered] = field(default_factory=list)
    sharded: int = 0


class Propagation(Interpreter):
    """Run a whole-value graph on one place's pieces.

    ``graph`` is a functional ATen graph whose nodes carry their whole value's metadata (``meta["val"]``).
    ``weights`` are the placeholders that are W. ``starts(node, value)`` may answer a shard in which a whole
    operand of ``node`` is to be taken: that is where sharding begins. Traced, the run yields the sharded
    program. ``strict`` raises :class:`PlacementError` instead of gathering.
    """

    def __init__(self, graph: GraphModule, axis: Axis, weights: set[str], strict: bool = False) -> None:
        super().__init__(graph)
        self.axis, self.weights, self.strict = axis, weights, strict
        self.report = Report()
        self.node: Node = next(iter(graph.graph.nodes))
        self._from_batch: set[Node] = _from_batch(graph, weights)
        self._values: dict[Node, Value] = {}
        self._moved: dict[tuple[int, str], tuple[Value, Value]] = {}
        self._seed: Tensor | None = None
        self._draws = 0
        self._shortened: list[Shard] = []
        self.single = False
        """Whether there is a sequence of one position: elsewhere a size of one is none."""

    # What rules ask for.

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the current node's whole result; of the first, where it has several."""
        val = self.node.meta["val"]
        return tuple(val[0].shape if isinstance(val, (tuple, list)) else val.shape)

    def to(self, value: Value, shard: Shard) -> Value:
        """``value`` under ``shard``; a value that is moved twice the same way is moved once."""
        # What was moved where no gradient flows does not serve where one does.
        place = f"{shard} {torch.is_grad_enabled()}"
        key = (id(value), place)
        if key not in self._moved:
            if value.sharded and value.shard.dim == shard.dim and not value.shard.same(shard):
                self._gathers(self.node.target, [value])
            moved = self._repeated_heads(value, shard)
            moved = moved or Value(self.axis.sharded(value, shard), shard, value.shape)
            self._moved[key] = (value, moved)  # held together: an id is unique while its object lives
        return self._moved[key][1]

    def _repeated_heads(self, value: Value, shard: Shard) -> Value | None:
        """Move what was repeated, and repeat it here: only real heads travel."""
        base = value.repeats
        if base is None or shard.dim != 1 or not value.sharded or value.shard.dim == 1:
            return None
        mine = self.heads(base)
        if mine is None:
            return None
        times = shard.chunk // mine.shard.chunk
        return Value(_aten.repeat_interleave.self_int(mine.tensor, times, 1), shard, value.shape)

    def heads(self, value: Value) -> Value | None:
        """Keys or values by heads, this place's; with fewer heads than places each is repeated just enough.

        None where heads and places do not divide one another.
        """
        count, places = value.shape[1], self.axis.size
        if compat.known_equal(count % places, 0):
            return self.to(value, Shard(1, 1, count, count // places, count))
        if not compat.known_equal(places % count, 0):
            return None
        more = _aten.repeat_interleave.self_int(value.tensor, places // count, 1)
        shape = (value.shape[0], places, *value.shape[2:])
        return self.to(Value(more, value.placement, shape), Shard(1, 1, places, 1, places))

    def repeated(self, node: Node) -> Value | None:
        """What ``node``, a reshape to (batch, heads, ...), repeats along its heads, if it does."""
        source = node.all_input_nodes[0]
        while _operator_name(source.target) in ("clone", "contiguous"):
            source = source.all_input_nodes[0]
        if _operator_name(source.target) != "expand" or len(source.meta["val"].shape) != 5:
            return None
        wide = source.meta["val"].shape
        source = source.all_input_nodes[0]
        while source.meta["val"].ndim > 4 and _operator_name(source.target) in _SAME_ELEMENTS:
            if _operator_name(source.target) == "unsqueeze" and _dim(source.args[1], 5) != 2:
                return None  # heads in turn, not each several times
            source = source.all_input_nodes[0]
        base = self._values.get(source)
        shape = tuple(node.meta["val"].shape)
        if base is None or len(base.shape) != 4 or len(shape) != 4:
            return None
        expected = (base.shape[0], base.shape[1], wide[2], *base.shape[2:])
        merged = (base.shape[0], base.shape[1] * wide[2], *base.shape[2:])
        return base if _known_same(expected, wide) and _known_same(merged, shape) else None

    def heads_in_batch(self) -> Shard | None:
        """Shards of the heads that operands of this product, of three dimensions, merge with the batch."""
        for node in self.node.all_input_nodes:
            while node.target not in _RESHAPES and len(node.all_input_nodes) == 1:
                turned = _operator_name(node.target) in ("transpose", "mT") and node.meta["val"].ndim == 3
                if turned and 0 in [_dim(d, 3) for d in node.args[1:]]:
                    break
                if not turned and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
                    break
                node = node.all_input_nodes[0]
            if node.target not in _RESHAPES:
                continue
            shape = node.all_input_nodes[0].meta["val"].shape
            if len(shape) != 4 or not _known_same((shape[0] * shape[1], *shape[2:]), node.meta["val"].shape):
                continue
            batch, heads = shape[:2]
            if compat.known_equal(heads % self.axis.size, 0):
                return Shard(0, batch, heads, heads // self.axis.size, heads)
        return None

    def beside(self, value: Any) -> Any:
        """A value that must be whole beside sharded ones."""
        if isinstance(value, Value) and value.sharded:
            self._gathers(self.node.target, [value])
        return self.axis.beside(value) if isinstance(value, Value) else value

    def whole(self, value: Value) -> Tensor:
        """The complete value; one that is sharded is gathered, which is counted."""
        if value.sharded:
            self._gathers(self.node.target, [value])
        return self.axis.whole(value)

    def result(self, tensor: Any, placement: Placement, shape: Sequence[Any] | None = None) -> Any:
        """Values of a node's result, all under one placement."""
        val = self.node.meta["val"]
        if isinstance(tensor, (tuple, list)):
            return type(tensor)(
                Value(t, placement, tuple(v.shape)) if isinstance(t, Tensor) else t
                for t, v in zip(tensor, val, strict=True)
            )
        return Value(tensor, placement, tuple(val.shape if shape is None else shape))

    def total(self, partial: Tensor) -> Value:
        return self.result(self.axis.total(partial), R)

    def masked(self, value: Value, fill: float = 0) -> Tensor:
        """The piece, with ``fill`` on padding: for sums over the sharded dimension."""
        shard = value.shard
        if self.axis.is_even(shard):
            return value.tensor
        mask = self.axis.valid(value.tensor, shard)
        after = len(value.shape) - shard.dim - 1
        return torch.where(mask.reshape([-1] + [1] * after), value.tensor, fill)

    def pieces(self, dim: int, length: Any) -> Shard:
        """Pieces of ``length`` positions: of a sequence that lost its end, as they lie already."""
        for shard in self._shortened:
            if compat.known_equal(shard.length, length):
                return shard.at(dim)
        return self.axis.pieces(dim, length)

    def shortened(self, shard: Shard, length: Any) -> Shard:
        """``shard`` of a sequence of which the first ``length`` positions are left, where they are."""
        found = replace(shard, length=length)
        self._shortened.append(found)
        self.single = self.single or compat.known_equal(length, 1)
        return found

    def even_pieces(self, dim: int, length: Any, what: str) -> Shard:
        """Pieces of a dimension that must not be padded: attention heads."""
        if compat.known_equal(length % self.axis.size, 0):
            return Shard(dim, 1, length, length // self.axis.size, length)
        size = compat.size_hint(length)
        legal = [d for d in range(1, size + 1) if size % d == 0]
        raise PlacementError(
            f"{what} at node '{self.node.name}' ({where(self.node)}): {size} heads cannot be shared out over "
            f"{self.axis.name}={self.axis.size} ranks. Legal values of {self.axis.name} for this model are "
            f"{', '.join(map(str, legal))}."
        )

    def dropped(self, tensor: Tensor, p: float, sharded: bool) -> tuple[Tensor, Tensor]:
        """Dropout of ``tensor`` and its mask: each piece's own where ``sharded``, the same on replicas."""
        assert self._seed is not None
        self._draws += 1
        mask = self.axis.keep(tensor, self._seed, self._draws, p, sharded)
        scale = 0.0 if p >= 1 else 1 / (1 - p)
        return torch.where(mask, tensor * scale, 0), mask

    # How a graph is run.

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if any(compat.is_random(n.target) for n in self.module.graph.nodes):  # type: ignore[union-attr]
            # Ahead of all nodes, so of any that is to be computed again.
            device = next(a.device for a in args if isinstance(a, Tensor))
            drawn = _aten.randint.low(0, 2**31 - 1, [1], dtype=torch.int64, device=device, pin_memory=False)
            self._seed = self.axis.agreed(drawn)
        return super().run(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        self.node = n
        result = super().run_node(n)
        if isinstance(result, Value):
            self._values[n] = result
        return result

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = super().placeholder(target, args, kwargs)
        if not isinstance(given, Tensor):
            return given
        return Value(given, W if self.node.name in self.weights else R, tuple(given.shape))

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return args[0]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = super().get_attr(target, args, kwargs)
        return Value(given, R, tuple(given.shape)) if isinstance(given, Tensor) else given

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem and not isinstance(args[0], Value):
            return args[0][args[1]]
        if _operator_name(target) == "sym_size":
            return args[0].shape[args[1]]
        if target is _aten.copy.default:  # it has no derivative, and what it copies into is not read
            target, args = _copy, (args[1], args[0])
        args = self._start(target, args)
        values = _values(args, kwargs)
        if compat.is_random(target):
            drawn = RANDOM.get(_operator_name(target), _draw)(self, target, args, kwargs)
            if drawn is not None:
                return drawn
        if target is axis.keep:  # a mask that another axis has asked for: on this one, too, one a place
            like, seed, number, probability, *_ = args
            mask = self.axis.keep(like.tensor, self.axis.whole(seed), number, probability, like.sharded)
            return Value(mask, like.placement, like.shape)
        if not any(v.sharded for v in values):
            return self._whole(target, args, kwargs) if values else _as_value(target(*args, **kwargs))
        rule = _rule_for(target)
        result = None if rule is None else rule(self, target, args, kwargs)
        if result is not None:
            self.report.sharded += 1
            return result
        self._gathers(target, values)
        args, kwargs = _map_values(
            lambda v: Value(self.axis.whole(v), R, v.shape) if v.sharded else v, (args, kwargs)
        )
        return self._whole(target, args, kwargs)

    def _whole(self, target: Any, args: Any, kwargs: Any) -> Any:
        differentiable = [v for v in _values(args, kwargs) if v.tensor.requires_grad]
        # What an operator of the user's own does to gradients need not be linear: it gets all of them.
        weights_only = _is_known(target) and all(v.placement == W for v in differentiable)
        convert = (lambda v: v.tensor) if weights_only else self.axis.whole
        args, kwargs = _map_values(convert, (args, kwargs))
        result = target(*args, **kwargs)
        if isinstance(result, (Tensor, tuple, list)):
            return self.result(result, W if weights_only and differentiable else R)
        return result

    def _gathers(self, target: Any, values: Sequence[Value]) -> None:
        name = str(target)
        size = sum(
            math.prod(map(compat.size_hint, v.shape)) * v.tensor.element_size() for v in values if v.sharded
        )
        found = Gathered(self.node.name, name, size, where(self.node))
        if self.strict:
            raise PlacementError(
                f"node '{found.node}' ({found.source}): {name} cannot run on sharded operands and would "
                f"gather {size} bytes, which the plan's strict=True forbids. Rewrite the line or drop strict."
            )
        self.report.gathered.append(found)

    def _start(self, target: Any, args: Any) -> Any:
        """Take a whole operand sharded where sequences begin: token ids, and the first token-local layer."""
        name = _operator_name(target)
        if name == "embedding" and _argument(args, {}, 3, "scale_grad_by_freq", False):
            return args
        place = {"embedding": 1, "linear": 0, "matmul": 0, "layer_norm": 0, "rms_norm": 0}.get(name)
        if place is None or len(args) <= place or not isinstance(args[place], Value):
            return args
        value, node = args[place], self.node.args[place]
        if value.sharded or node not in self._from_batch:
            return args
        dim = len(value.shape) - (1 if name == "embedding" else 2)
        if dim < 1:
            return args
        single = compat.known_equal(value.shape[dim], 1)
        if single and name != "embedding" and not self._all_single(dim):
            return args
        others = _values(args[1:], {})
        if name in ("linear", "matmul") and any(v.placement != W or len(v.shape) > 2 for v in others):
            return args
        self.single = self.single or single
        started = self.to(value, self.pieces(dim, value.shape[dim]))
        return (*args[:place], started, *args[place + 1 :])

    def _all_single(self, dim: int) -> bool:
        """Whether no input has more than one position there: then one is a sequence's length."""
        vals = (n.meta["val"] for n in self._from_batch if n.op == "placeholder")
        return all(v.ndim <= dim or compat.known_equal(v.shape[dim], 1) for v in vals)


def _from_batch(graph: GraphModule, weights: set[str]) -> set[Node]:
    """Nodes that depend on an input that is no weight and has at least two dimensions."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        val = node.meta.get("val")
        if node.op == "placeholder":
            if isinstance(val, Tensor) and node.name not in weights and val.ndim >= 2:
                found.add(node)
        elif any(n in found for n in node.all_input_nodes) and _operator_name(node.target) != "sym_size":
            found.add(node)
    return found


def _copy(source: Tensor, like: Tensor) -> Tensor:
    return source.to(like.dtype).expand(like.shape).clone()


def _as_value(result: Any) -> Any:
    return Value(result, R, tuple(result.shape)) if isinstance(result, Tensor) else result


_RESHAPES = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
_END = 2**63 - 1
"""Where a slice ends that has no end."""

_SAME_ELEMENTS = ("slice", "unsqueeze", "alias")


def _known_same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(compat.known_equal(x, y) for x, y in zip(a, b, strict=True))


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Value)


def _values(args: Any, kwargs: Any) -> list[Value]:
    return [v for v in tree_leaves((args, kwargs), is_leaf=_is_value) if isinstance(v, Value)]


def _map_values(function: Callable[[Value], Any], tree: Any) -> Any:
    return tree_map(lambda v: function(v) if isinstance(v, Value) else v, tree, is_leaf=_is_value)


def _operator_name(target: Any) -> str:
    """An operator's name without its namespace and overload: ``add`` for ``aten.add.Tensor``."""
    packet = getattr(target, "overloadpacket", None)
    return getattr(packet, "__name__", getattr(target, "__name__", ""))


# --- the table -------------------------------------------------------------------------------------

Rule = Callable[[Propagation, Any, Any, Any], Any]
RULES: dict[str, Rule] = {}


def _rule_for(target: Any) -> Rule | None:
    found = RULES.get(_operator_name(target)) if _is_known(target) else None
    if found is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return elementwise
    return found


def _is_known(target: Any) -> bool:
    """Whether an operator is torch's own: other libraries' may have the names of ATen's."""
    return target is _copy or getattr(target, "namespace", None) in ("aten", "prims")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule into the table under the operators' names."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def _dim(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def _argument(args: Sequence[Any], kwargs: Any, place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


# Elementwise: operands are aligned from the last dimension; what is size one there stays whole.


@rule(
    "_copy", "to", "_to_copy", "alias", "contiguous", "clone", "type_as", "detach", "masked_fill", "where",
    "lift_fresh_copy", "__and__", "__or__", "__xor__", "gelu", "silu", "relu",
    "zeros_like", "ones_like", "full_like", "new_zeros_like", "empty_like", "type", "float", "half", "double",
)  # fmt: skip
def elementwise(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    ndim = len(p.shape)
    sharded = [v for v in _values(args, kwargs) if v.sharded]
    widest = max(sharded, key=lambda v: len(v.shape))
    shard = widest.shard.at(widest.shard.dim + ndim - len(widest.shape))
    if not compat.known_equal(p.shape[shard.dim], shard.outer * shard.length):
        return None

    args, kwargs = _map_values(lambda v: _aligned(p, v, shard, ndim), (args, kwargs))
    return p.result(target(*args, **kwargs), shard)


def _aligned(p: Propagation, value: Value, shard: Shard, ndim: int) -> Tensor:
    """``value`` for use beside a value of ``ndim`` dimensions under ``shard``, to which it is broadcast."""
    dim = shard.dim - (ndim - len(value.shape))
    total = shard.outer * shard.length
    if dim < 0:
        return p.beside(value)
    # Beside a sequence of one position, what is whole has a size of one because it is broadcast.
    one = compat.known_equal(value.shape[dim], 1)
    if one and not (value.sharded and compat.known_equal(total, 1)):
        return p.beside(value)
    return p.to(value, shard.at(dim)).tensor


@rule("broadcast_tensors")
def broadcast(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    """All operands in one shape: what losses do first."""
    ndim = len(p.shape)
    widest = max((v for v in args[0] if v.sharded), key=lambda v: len(v.shape))
    shard = widest.shard.at(widest.shard.dim + ndim - len(widest.shape))
    if not compat.known_equal(p.shape[shard.dim], shard.outer * shard.length):
        return None
    local = [s if d != shard.dim else shard.local for d, s in enumerate(p.shape)]
    return p.result([_aligned(p, v, shard, ndim).expand(local) for v in args[0]], shard)


# Shapes.


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def reshape(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    last = len(x.shape) - 1
    if len(p.shape) == 2 and x.sharded and _known_same((x.shard.dim, x.shape[last]), (last, p.shape[1])):
        # Tokens become rows of a matrix, for a product that wants its columns whole.
        x = _freed(p, x, x.shard.dim) or x
    shard = reshaped(x.shape, x.shard, p.shape) if x.sharded else None
    if shard is None:
        return None
    local = [shard.local if d == shard.dim else s for d, s in enumerate(p.shape)]
    out = p.result(_aten.reshape.default(x.tensor, local), shard)
    out.repeats = p.repeated(p.node)
    return out


def reshaped(shape: Sequence[Any], shard: Shard, to: Sequence[Any]) -> Shard | None:
    """Where a shard of a value of ``shape`` stands once that is viewed as ``to``.

    The dimension is (outer, length); flattened, ``before`` elements lie outside the axis. The new
    dimension must start at a divisor of that, and its rest be a multiple (inner dimensions merged in) or a
    divisor (split off) of the length.
    """
    before = math.prod(shape[: shard.dim]) * shard.outer
    own = _single(shard, before, to) if compat.known_equal(shard.length, 1) else None
    if own is not None:
        return replace(shard, dim=own, outer=1)
    start: Any = 1
    for dim, size in enumerate(to):
        if compat.known_equal(size, 1) and not compat.known_equal(shard.length, 1):
            continue
        if compat.known_equal(before % start, 0):
            outer = before // start
            if compat.known_equal(size % outer, 0):
                rest = size // outer
                if compat.known_equal(rest, shard.length):
                    return replace(shard, dim=dim, outer=outer)
                if compat.known_equal(rest % shard.length, 0) and not compat.known_equal(rest, 0):
                    times = rest // shard.length
                    return Shard(dim, outer, rest, shard.chunk * times, shard.origin * times)
                inner = shard.length // rest
                whole = all(compat.known_equal(n, 0) for n in (shard.length % rest, shard.chunk % inner))
                if whole and not compat.known_equal(rest, 1):
                    return Shard(dim, outer, rest, shard.chunk // inner, shard.origin // inner)
        start = start * size
    return None


def _single(shard: Shard, before: Any, to: Sequence[Any]) -> int | None:
    """Which of the dimensions of size one is the sequence of one position: where a longer one would be.

    Any of them could be; but what is communicated should not depend on the length. Batches come first.
    """
    found = [d for d, s in enumerate(to) if _known_same((s, math.prod(to[:d])), (1, before))]
    later = [d for d in found if d > 0]
    return shard.dim if shard.dim in later else next(iter([*later, *found]), None)


@rule("transpose", "swapaxes", "t", "mT", "mH")
def transpose(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    ndim = len(x.shape)
    # A matrix's own two dimensions, where none are named.
    a, b = (_dim(args[1], ndim), _dim(args[2], ndim)) if len(args) > 2 else (max(ndim - 2, 0), ndim - 1)
    dim = {a: b, b: a}.get(x.shard.dim, x.shard.dim)
    out = p.result(target(x.tensor, *args[1:]), x.shard.at(dim))
    if x.repeats is not None and x.repeats.sharded and min(a, b) > 1:
        shape = list(x.repeats.shape)
        shape[a], shape[b] = shape[b], shape[a]
        out.repeats = Value(target(x.repeats.tensor, *args[1:]), x.repeats.shard.at(dim), tuple(shape))
    return out


@rule("permute")
def permute(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    order = [_dim(d, len(x.shape)) for d in args[1]]
    return p.result(target(x.tensor, order), x.shard.at(order.index(x.shard.dim)))


@rule("unsqueeze")
def unsqueeze(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    dim = _dim(args[1], len(x.shape) + 1)
    return p.result(target(x.tensor, dim), x.shard.at(x.shard.dim + (dim <= x.shard.dim)))


@rule("squeeze")
def squeeze(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if len(args) < 2:
        dims = [d for d, s in enumerate(x.shape) if compat.known_equal(s, 1)]
    else:
        given = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        dims = [d for d in (_dim(d, len(x.shape)) for d in given) if compat.known_equal(x.shape[d], 1)]
    if x.shard.dim in dims:
        return None
    before = sum(d < x.shard.dim for d in dims)
    return p.result(_aten.squeeze.dims(x.tensor, dims), x.shard.at(x.shard.dim - before))


@rule("expand", "expand_as")
def expand(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not x.sharded:
        return None
    shard = x.shard.at(x.shard.dim + len(p.shape) - len(x.shape))
    if not compat.known_equal(p.shape[shard.dim], x.shape[x.shard.dim]):
        return None
    local = [shard.local if d == shard.dim else s for d, s in enumerate(p.shape)]
    return p.result(_aten.expand.default(x.tensor, local), shard)


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def new(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    """Reads nothing of its operand but its type."""
    return p.result(target(args[0].tensor, *args[1:], **kwargs), R)


@rule("slice")
def narrow(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    dim = _dim(_argument(args, kwargs, 1, "dim", 0), len(x.shape))
    if dim != x.shard.dim:
        return p.result(target(x.tensor, *args[1:], **kwargs), x.shard)
    start, step = _argument(args, kwargs, 2, "start") or 0, _argument(args, kwargs, 4, "step", 1)
    end = _argument(args, kwargs, 3, "end")
    if _is_position(p.shape[dim], start, end):
        return _position(p, x, dim, start, keep=True)
    if compat.known_equal(p.shape[dim], x.shape[dim]):
        return x
    if not (compat.known_equal(start, 0) and step == 1 and compat.known_equal(x.shard.outer, 1)):
        return None
    # Positions cut off the end become padding where they are. What stood there is no longer used, and need
    # not be fit to be computed with (the square root of what was set to zero, say).
    shard = p.shortened(x.shard, p.shape[dim])
    if not x.tensor.is_floating_point():
        return p.result(x.tensor, shard)
    after = [1] * (len(x.shape) - dim - 1)
    valid = p.axis.valid(x.tensor, shard).reshape([-1, *after])
    return p.result(torch.where(valid, x.tensor, p.axis.last(x.tensor.detach(), shard)), shard)


def _is_position(size: Any, start: Any, end: Any) -> bool:
    """Whether a slice takes one position of a sequence of any length, not what is left of a short one."""
    is_open = end is None or compat.known_equal(end, _END)
    if compat.known_equal(start, 0):
        return compat.known_equal(size, 1) and not is_open and not end < 0  # [:1], not [:-1] nor [:]
    return compat.known_equal(size, 1) and not (is_open and compat.known_equal(start, 1))  # not [1:]


@rule("select")
def select(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, dim, index = args
    dim = _dim(dim, len(x.shape))
    if dim != x.shard.dim:
        return p.result(target(x.tensor, dim, index), x.shard.at(x.shard.dim - (dim < x.shard.dim)))
    return _position(p, x, dim, index, keep=False)


def _position(p: Propagation, x: Value, dim: int, index: Any, keep: bool) -> Value | None:
    """One position (a class token): what has it adds it, the others add zero."""
    size = x.shape[dim]
    chosen = torch.arange(size, device=x.tensor.device) == (index + size if index < 0 else index)
    place = x.shard.at(0)
    piece = p.axis.sharded(Value(chosen, R, (size,)), place)
    mask = p.masked(Value(piece, place, (size,)), False)  # padding repeats the last position
    after = [1] * (len(x.shape) - dim - 1)
    mine = torch.where(mask.reshape([-1, *after]), x.tensor, 0).sum(dim, keep, dtype=x.tensor.dtype)
    return p.total(mine) if x.tensor.dtype is not torch.bool else None


@rule("split", "chunk", "split_with_sizes", "unbind")
def split(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    unbind = _operator_name(target) == "unbind"
    dim = _dim(_argument(args, kwargs, 1 if unbind else 2, "dim", 0), len(x.shape))
    if dim == x.shard.dim:
        return None
    shard = x.shard.at(x.shard.dim - (unbind and dim < x.shard.dim))
    return p.result(target(x.tensor, *args[1:], **kwargs), shard)


@rule("cat", "stack", "concat", "concatenate")
def cat(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    # torch.cat leaves out what is empty and one-dimensional: caches begin so.
    parts = [v for v in args[0] if not (len(v.shape) == 1 and compat.known_equal(v.shape[0], 0))]
    ndim = len(parts[0].shape)
    stack = _operator_name(target) == "stack"
    dim = _dim(_argument(args, kwargs, 1, "dim", 0), ndim + stack)
    shard = next(v.shard for v in parts if v.sharded)
    if len(parts) == 1 and not stack:
        return parts[0]
    if not stack and shard.dim == dim:
        return None
    local = [p.to(v, shard).tensor for v in parts]
    return p.result(target(local, dim), shard.at(shard.dim + (stack and dim <= shard.dim)))


@rule("repeat_interleave")
def repeat_interleave(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, count = args[0], args[1] if len(args) > 1 else None
    dim = _argument(args, kwargs, 2, "dim")
    if not x.sharded or dim is None or _dim(dim, len(x.shape)) == x.shard.dim or isinstance(count, Value):
        return None
    return p.result(target(x.tensor, *args[1:], **kwargs), x.shard)


@rule("constant_pad_nd", "pad")
def pad(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, widths = args[0], args[1]
    from_end = len(x.shape) - 1 - x.shard.dim
    if len(widths) > 2 * from_end and any(widths[2 * from_end : 2 * from_end + 2]):
        return None
    return p.result(target(x.tensor, *args[1:], **kwargs), x.shard)


@rule("roll")
def roll(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args[0], _argument(args, kwargs, 2, "dims")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or x.shard.dim in [_dim(d, len(x.shape)) for d in dims]:
        return None
    return p.result(target(x.tensor, *args[1:], **kwargs), x.shard)


@rule("tril", "triu")
def triangle(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    return p.result(target(x.tensor, *args[1:]), x.shard) if x.shard.dim < len(x.shape) - 2 else None


@rule("slice_scatter", "select_scatter")
def scatter_into(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    """Writes of what another dimension selects."""
    x, source, *rest = args
    select = _operator_name(target) == "select_scatter"
    dim = _dim(_argument(args, kwargs, 2, "dim", 0), len(x.shape))
    shard = x.shard if x.sharded else source.shard.at(source.shard.dim + (select and source.shard.dim >= dim))
    if shard.dim == dim:
        return None
    local = p.to(x, shard).tensor
    piece = _aligned(p, source, shard.at(shard.dim - (select and dim < shard.dim)), len(x.shape) - select)
    return p.result(target(local, piece, *rest, **kwargs), shard)


# Images and the like: what treats every index of the first dimension by itself.


@rule("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
      "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
      "upsample_bicubic2d", "upsample_trilinear3d", "group_norm", "pixel_shuffle", "pixel_unshuffle",
      "im2col", "col2im", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
      "replication_pad2d")  # fmt: skip
def by_row(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    if not x.sharded or x.shard.dim != 0 or len(x.shape) != len(p.shape):
        return None
    rest, kwargs = _map_values(p.beside, (rest, kwargs))
    return p.result(target(x.tensor, *rest, **kwargs), x.shard)


@rule("batch_norm")
def batch_norm(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    """By running statistics: those of the batch at hand are other ones in a part of it."""
    x, *rest = args
    if not x.sharded or x.shard.dim == 1 or _argument(args, kwargs, 5, "training", True):
        return None
    rest, kwargs = _map_values(p.beside, (rest, kwargs))
    return p.result(target(x.tensor, *rest, **kwargs), x.shard)


# Along a dimension: softmax and its like, norms, sorting need the dimension whole.


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "flip")
def along(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    dims = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
    if x.shard.dim in [_dim(d, len(x.shape)) for d in dims]:
        return None
    return p.result(target(x.tensor, *args[1:], **kwargs), x.shard)


@rule("topk", "sort", "argsort")
def order(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    place = 2 if _operator_name(target) == "topk" else 1
    dim = _argument(args, kwargs, place, "dim", -1)
    if x.shard.dim == _dim(-1 if isinstance(dim, bool) else dim, len(x.shape)):
        return None
    return p.result(target(x.tensor, *args[1:], **kwargs), x.shard)


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def norm(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, sizes, *rest = args
    if not x.sharded or x.shard.dim >= len(x.shape) - len(sizes):
        return None
    args = (x.tensor, sizes, *map(p.beside, rest))
    return p.result(target(*args, **_map_values(p.beside, kwargs)), x.shard)


@rule("gather")
def gather_along(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, dim, index = args
    shard = (x if x.sharded else index).shard
    aligned = compat.known_equal(x.shape[shard.dim], index.shape[shard.dim])
    if shard.dim == _dim(dim, len(x.shape)) or not aligned:
        return None
    return p.result(target(p.to(x, shard).tensor, dim, p.to(index, shard).tensor, **kwargs), shard)


@rule("take_along_dim")
def take_along(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, index = args[:2]
    dim, ndim = _argument(args, kwargs, 2, "dim"), len(p.shape)
    shard = (x if x.sharded else index).shard
    if dim is None or shard.dim == _dim(dim, ndim):
        return None
    if not compat.known_equal(p.shape[shard.dim], shard.outer * shard.length):
        return None
    return p.result(target(*(_aligned(p, v, shard, ndim) for v in (x, index)), dim), shard)


@rule("index_select")
def index_select(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, dim, index = args
    if not x.sharded or index.sharded or x.shard.dim == _dim(dim, len(x.shape)):
        return None
    return p.result(target(x.tensor, dim, index.tensor), x.shard)


@rule("index")
def index(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    """By whole positions in other dimensions: what they select stands where the first of them does."""
    x, positions = args
    places = [d for d, v in enumerate(positions) if v is not None]
    if not x.sharded or x.shard.dim in places or any(v.sharded for v in _values(positions, {})):
        return None
    if any(positions[d].tensor.dtype in (torch.bool, torch.uint8) for d in places):  # as many as are True
        return None
    adjacent = places == list(range(places[0], places[-1] + 1))
    made = max(len(positions[d].shape) for d in places)
    first = places[0] if adjacent else 0
    others = sum(d not in places for d in range(x.shard.dim))
    dim = others if others < first else others + made
    return p.result(target(x.tensor, _map_values(lambda v: v.tensor, positions)), x.shard.at(dim))


# Sums over the sharded dimension are partial: reduced at once. Padding counts as nothing.


@rule("sum", "mean")
def reduction(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    ndim = len(x.shape)
    given = _argument(args, kwargs, 1, "dim")
    given = [given] if isinstance(given, int) else given
    dims = [_dim(d, ndim) for d in given] if given else list(range(ndim))
    keep = bool(_argument(args, kwargs, 2, "keepdim", False))
    if x.shard.dim not in dims:
        shift = 0 if keep else sum(d < x.shard.dim for d in dims)
        return p.result(target(x.tensor, *args[1:], **kwargs), x.shard.at(x.shard.dim - shift))
    dtype = kwargs.get("dtype") or (x.tensor.dtype if x.tensor.is_floating_point() else torch.int64)
    # Narrow types are added up at full width, as inside one kernel.
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    total = p.axis.total(_aten.sum.dim_IntList(p.masked(x), dims, keep, dtype=wide))
    if _operator_name(target) == "mean":
        total = total / math.prod(x.shape[d] for d in dims)
    return p.result(total.to(dtype), R)


@rule("any", "all", "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "std", "var", "norm",
      "linalg_vector_norm", "prod", "count_nonzero")  # fmt: skip
def other_reduction(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if _operator_name(target) in ("std", "var"):
        spread = _spread(p, target, args, kwargs)
        if spread is not None:
            return spread
    place = {"norm": 2, "linalg_vector_norm": 2}.get(_operator_name(target), 1)
    given = _argument(args, kwargs, place, "dim")
    given = [given] if isinstance(given, int) and not isinstance(given, bool) else given
    if not isinstance(given, (list, tuple)) or any(isinstance(v, Value) for v in args[1:]):
        return None
    dims = [_dim(d, len(x.shape)) for d in given]
    if x.shard.dim in dims or not dims:
        return None
    result = target(x.tensor, *args[1:], **kwargs)
    first = result[0] if isinstance(result, (tuple, list)) else result
    keep = first.ndim == len(x.shape)
    shift = 0 if keep else sum(d < x.shard.dim for d in dims)
    return p.result(result, x.shard.at(x.shard.dim - shift))


def _spread(p: Propagation, target: Any, args: Any, kwargs: Any) -> Value | None:
    """The variance over the sharded dimension, or its root: the mean first, then squares of what deviates."""
    names = [name for name, _ in compat.operator_arguments(target)]
    given = dict(zip(names, args, strict=False)) | kwargs
    x, dims, keep = given["self"], given.get("dim"), bool(given.get("keepdim", False))
    dims = [_dim(d, len(x.shape)) for d in dims] if dims else list(range(len(x.shape)))
    dtype = x.tensor.dtype
    if x.shard.dim not in dims or not dtype.is_floating_point:
        return None
    correction = given.get("correction")
    if correction is None:
        correction = int(given.get("unbiased", True))
    count = math.prod(x.shape[d] for d in dims)
    wide = Value(x.tensor.to(torch.promote_types(dtype, torch.float32)), x.placement, x.shape)
    total = p.axis.total(_aten.sum.dim_IntList(p.masked(wide), dims, True))
    mean = Value(total / count, R, tuple(total.shape))
    squares = Value((wide.tensor - p.axis.beside(mean)).square(), x.placement, x.shape)
    found = p.axis.total(_aten.sum.dim_IntList(p.masked(squares), dims, keep)) / (count - correction)
    return p.result((found.sqrt() if _operator_name(target) == "std" else found).to(dtype), R)


# Products.


@rule("embedding")
def embedding(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    table, ids, *rest = args
    # Gradients scaled by how often a token occurs: counted over the whole sequence.
    if not ids.sharded or _argument(args, kwargs, 3, "scale_grad_by_freq", False):
        return None
    return p.result(target(p.beside(table), ids.tensor, *rest, **kwargs), ids.shard)


@rule("one_hot")
def one_hot(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    return p.result(target(args[0].tensor, *args[1:], **kwargs), args[0].shard)


def _freed(p: Propagation, x: Value, dim: int) -> Value | None:
    """``x`` with dimension ``dim`` whole and another one, before it, sharded instead."""
    for other in range(dim - 1, 0, -1):
        size = x.shape[other]
        if p.single or not compat.known_equal(size, 1):
            return p.to(x, p.pieces(other, size))
    return None


@rule("linear")
def linear(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    if any(v.sharded for v in _values(rest, kwargs)):
        return None
    if x.shard.dim == len(x.shape) - 1:
        moved = _freed(p, x, x.shard.dim)
        if moved is None:
            return None
        x = moved
    return p.result(target(x.tensor, *map(p.beside, rest), **_map_values(p.beside, kwargs)), x.shard)


@rule("addmm")
def addmm(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    bias, x, weight = args
    if weight.sharded or bias.sharded or x.shard.dim != 0 or len(bias.shape) != 1:
        return None
    return p.result(target(p.beside(bias), x.tensor, p.beside(weight), **kwargs), x.shard)


@rule("baddbmm")
def baddbmm(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    added, a, b = args
    product = matmul(p, _aten.bmm.default, (a, b), {}) if a.sharded or b.sharded else None
    if product is None or not product.sharded:
        return None
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    scaled = product.tensor * alpha
    if beta != 0:  # else what is added may be anything, NaN too
        scaled = scaled + _aligned(p, added, product.shard, len(p.shape)) * beta
    return p.result(scaled, product.shard)


@rule("matmul", "bmm", "mm")
def matmul(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    if len(a.shape) < 2 or len(b.shape) < 2:
        return None
    ndim = len(p.shape)

    def role(v: Value, row: str, column: str) -> Any:
        """Which of the product's indices is sharded: a batch dimension, or rows (m), columns (n), sum (k)."""
        if not v.sharded:
            return None
        last = len(v.shape) - 1
        named = {last - 1: row, last: column}
        return named.get(v.shard.dim, v.shard.dim + ndim - len(v.shape))

    in_a, in_b = role(a, "m", "k"), role(b, "k", "n")
    if in_a == "m" and in_b is None:
        return p.result(target(a.tensor, p.beside(b)), a.shard.at(ndim - 2))
    if in_b == "n" and in_a is None:
        return p.result(target(p.beside(a), b.tensor), b.shard.at(ndim - 1))
    if in_a == "k" and in_b == "k" and a.shard.same(b.shard.at(a.shard.dim)):
        return p.total(target(p.masked(a), p.masked(b)))
    return _in_batch(p, target, a, b, (in_a, in_b))


def _in_batch(p: Propagation, target: Any, a: Value, b: Value, roles: tuple[Any, Any]) -> Any:
    """Operands that disagree meet in a common batch dimension: for attention, its heads."""
    ndim = len(p.shape)
    taken = next((r for r in roles if isinstance(r, int)), None)
    if taken is not None:
        source = a if roles[0] == taken else b
        shard = source.shard.at(taken)
    else:
        common = [
            d for d in range(ndim - 3, -1, -1)
            if all(_has(v, d, ndim) for v in (a, b))
        ]  # fmt: skip
        if not common:
            x = _freed(p, a, a.shard.dim) if roles[0] == "k" else None
            return None if x is None else p.result(target(x.tensor, p.beside(b)), x.shard)
        dim, size = common[0], p.shape[common[0]]
        # Heads must divide; batches, which come first, may be padded.
        what = "a product of sequences (attention)"
        shard = p.axis.pieces(0, size) if dim == 0 else p.even_pieces(dim, size, what)
        if dim == 0:
            shard = p.heads_in_batch() or shard

    def local(v: Value) -> Tensor:
        own = shard.dim - (ndim - len(v.shape))
        if not _has(v, shard.dim, ndim) and not (v.sharded and v.shard.dim == own):
            return p.beside(v)
        return p.to(v, shard.at(own)).tensor

    return p.result(target(local(a), local(b)), shard)


@rule("einsum")
def einsum(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    """A product by letters. Operands sharded along different ones meet in one that all have, as matmul's."""
    equation, operands = args[0].replace(" ", ""), args[1]
    if "->" not in equation or "." in equation:
        return None
    given, made = equation.split("->")
    terms = given.split(",")
    if any(len(set(term)) < len(term) for term in terms):
        return None
    letters = {term[v.shard.dim]: v.shard for term, v in zip(terms, operands, strict=True) if v.sharded}
    shards = [v.shard.at(0) for v in operands if v.sharded]
    letter, shard = next(iter(letters.items()))
    if len(letters) > 1 or not all(s.same(shards[0]) for s in shards):
        common = [c for c in made if all(c in term for term in terms)]
        if not common:
            return None
        letter = common[-1]
        place = made.index(letter)
        size = p.shape[place]
        shard = p.axis.pieces(0, size) if place == 0 else p.even_pieces(place, size, "a product of sequences")

    def local(term: str, v: Value) -> Tensor:
        if letter not in term:
            return p.beside(v)
        mine = p.to(v, shard.at(term.index(letter)))
        return mine.tensor if letter in made else p.masked(mine)

    result = target(equation, [local(*pair) for pair in zip(terms, operands, strict=True)], **kwargs)
    return p.result(result, shard.at(made.index(letter))) if letter in made else p.total(result)


def _has(value: Value, dim: int, ndim: int) -> bool:
    own = dim - (ndim - len(value.shape))
    return own >= 0 and not compat.known_equal(value.shape[own], 1)


# Attention: sequence shards are exchanged for heads and back.


@rule("scaled_dot_product_attention")
def attention(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    q, k, v, *rest = args
    kwargs = dict(kwargs)
    ndim = len(q.shape)
    if q.sharded and q.shard.dim < ndim - 2:  # not along the sequence that attends
        local = {k: _aligned(p, v, q.shard, ndim) if isinstance(v, Value) else v for k, v in kwargs.items()}
        args = _map_values(lambda v: _aligned(p, v, q.shard, ndim), args)
        upto = q.shard.dim + 1  # heads behind it may be fewer for keys and values
        apart = _known_same(q.shape[:upto], k.shape[:upto])
        return p.result(target(*args, **local), q.shard) if apart else None
    if ndim != 4:
        return None
    heads = p.even_pieces(1, q.shape[1], "attention")
    sharded = [p.to(q, heads), *(_key_value(p, x, heads) for x in (k, v))]
    names = ("attn_mask", "dropout_p", "is_causal")
    kwargs |= dict(zip(names, rest, strict=False))
    mask = kwargs.get("attn_mask")
    if isinstance(mask, Value):
        kwargs["attn_mask"] = _heads_of_mask(p, mask, heads)
    kwargs["enable_gqa"] = len({x.shard.local for x in sharded}) > 1
    out = p.result(target(*(x.tensor for x in sharded), **kwargs), heads)
    return p.to(out, p.pieces(2, p.shape[2]))


def _heads_of_mask(p: Propagation, mask: Value, heads: Shard) -> Tensor:
    has_heads = len(mask.shape) > 2 and not compat.known_equal(mask.shape[-3], 1)
    return p.to(mask, heads.at(len(mask.shape) - 3)).tensor if has_heads else p.beside(mask)


def _key_value(p: Propagation, x: Value, heads: Shard) -> Value:
    found, count, wanted = p.heads(x.repeats or x), x.shape[1], heads.length
    if found is None and x.repeats is None and compat.known_equal(wanted % count, 0):
        # Neither divides the other, but the queries' heads do: one head of each for each query's.
        every = _aten.repeat_interleave.self_int(x.tensor, wanted // count, 1)
        return p.to(Value(every, x.placement, (x.shape[0], wanted, *x.shape[2:])), heads)
    if found is None:
        found = p.to(x, p.even_pieces(1, x.shape[1], "attention (keys and values)"))
    return found


# Random numbers: a function of seed, operator and place (:mod:`autodist.runtime.axis`).


def _dropout(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, probability, train = args
    if not train or probability == 0:
        return x
    out, mask = p.dropped(x.tensor, probability, x.sharded)
    shape = x.shape
    placed = Value(out, x.placement, shape)
    return placed if _operator_name(target) == "dropout" else (placed, Value(mask, x.placement, shape))


def _attention_dropout(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    """Attention whose probabilities are dropped: taken apart, so that the mask is one of ours."""
    if not _argument(args, kwargs, 4, "dropout_p", 0.0):
        return None
    q, k, v, *rest = args
    names = ("attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, rest, strict=False)) | kwargs
    probability = given["dropout_p"]
    sharded = q.sharded and len(q.shape) == 4
    aside = sharded and q.shard.dim == 0  # rows of a batch, each of which attends to itself
    heads = p.even_pieces(1, q.shape[1], "attention") if sharded and not aside else None
    mask, placement = given.get("attn_mask"), q.shard if aside else heads or R

    if aside:
        queries, keys, values = (_aligned(p, x, q.shard, 4) for x in (q, k, v))
        bias = None if mask is None else _aligned(p, mask, q.shard, 4)
    elif heads is None:
        queries, keys, values = (p.whole(x) for x in (q, k, v))
        bias = None if mask is None else p.whole(mask)
    else:
        queries = p.to(q, heads).tensor
        keys, values = (_key_value(p, x, heads).tensor for x in (k, v))
        bias = None if mask is None else _heads_of_mask(p, mask, heads)
    times = queries.shape[-3] // keys.shape[-3]
    if times > 1:
        keys, values = (_aten.repeat_interleave.self_int(x, times, -3) for x in (keys, values))
    scale = given.get("scale") or q.shape[-1] ** -0.5
    scores = queries @ keys.transpose(-2, -1) * scale
    if given.get("is_causal"):
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = torch.where(causal, scores, -math.inf)
    if bias is not None:
        scores = torch.where(bias, scores, -math.inf) if bias.dtype is torch.bool else scores + bias
    # Rows that are masked altogether attend to nothing, as in torch.
    dropped, _ = p.dropped(_aten._safe_softmax.default(scores, -1), probability, sharded)
    out = p.result(dropped @ values, placement)
    return out if heads is None else p.to(out, p.pieces(2, p.shape[2]))


_LIKE = ("rand_like", "randn_like", "randint_like")


def _draw(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    """Any other random operator draws whole values, the first place's on all."""
    if _operator_name(target) in _LIKE:  # it reads a shape
        like = args[0]
        args = (Value(like.tensor.detach().new_empty(like.shape), R, like.shape), *args[1:])
    if any(v.tensor.requires_grad for v in _values(args, kwargs)):
        raise PlacementError(
            f"node '{p.node.name}' ({where(p.node)}): {target} draws random numbers for a value that has a "
            "gradient, and ranks would draw different ones. Use torch.nn.functional.dropout, or draw the "
            "numbers first (torch.rand) and compute with them."
        )
    args, kwargs = _map_values(p.whole, (args, kwargs))
    result = target(*args, **kwargs)
    return p.result(tree_map(lambda t: p.axis.agreed(t) if isinstance(t, Tensor) else t, result), R)


def _other_dropout(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    x, probability, train = args
    return x if not train or probability == 0 else _draw(p, target, args, kwargs)


def _rrelu(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    return _draw(p, target, args, kwargs) if _argument(args, kwargs, 3, "training", False) else None


RANDOM: dict[str, Rule] = {
    "dropout": _dropout,
    "native_dropout": _dropout,
    "alpha_dropout": _other_dropout,
    "feature_dropout": _other_dropout,
    "feature_alpha_dropout": _other_dropout,
    "rrelu": _rrelu,
    "scaled_dot_product_attention": _attention_dropout,
}

# Losses.

_NONE, _MEAN = 0, 1


@rule("cross_entropy_loss")
def cross_entropy(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    """Sums and counts are combined over the axis, never means; a place without a valid token adds zero."""
    logits, labels, *rest = args
    defaults = {"weight": None, "reduction": _MEAN, "ignore_index": -100, "label_smoothing": 0.0}
    given = defaults | dict(zip(defaults, rest, strict=False)) | kwargs
    if len(logits.shape) != len(labels.shape) + 1 or not logits.sharded:
        return None
    classes = 1 if len(logits.shape) > 1 else 0
    if logits.shard.dim == classes:
        return None
    place = logits.shard.at(0 if logits.shard.dim == 0 else logits.shard.dim - 1)
    mine = p.to(labels, place)
    weight = p.beside(given["weight"])
    each = target(logits.tensor, mine.tensor, weight, _NONE, given["ignore_index"], given["label_smoothing"])
    return _combined(p, each, mine, weight, given)


def _combined(p: Propagation, each: Tensor, labels: Value, weight: Any, given: dict[str, Any]) -> Value:
    """The loss of all tokens from that of ``each`` in this piece, reduced as the caller asked."""
    place, shape = labels.shard, labels.shape
    if given["reduction"] == _NONE:
        return p.result(each, place)
    wide = torch.promote_types(each.dtype, torch.float32)  # sums are made at full width
    summed = p.axis.total(p.masked(Value(each.to(wide), place, shape)).sum())
    if given["reduction"] != _MEAN:
        return p.result(summed.to(each.dtype), R)
    counted = labels.tensor != given["ignore_index"]
    share = counted.to(wide)
    if weight is not None:
        share = share * weight[torch.where(counted, labels.tensor, 0)]
    total = p.axis.total(p.masked(Value(share, place, shape)).sum())
    return p.result((summed / total).to(each.dtype), R)


@rule("nll_loss", "nll_loss_nd")
def nll(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    """Negative log-likelihood, as :func:`cross_entropy`."""
    scores, labels, *rest = args
    defaults = {"weight": None, "reduction": _MEAN, "ignore_index": -100}
    given = defaults | dict(zip(defaults, rest, strict=False)) | kwargs
    if not scores.sharded or scores.shard.dim != 0 or len(scores.shape) != 2:
        return None
    mine, weight = p.to(labels, scores.shard), p.beside(given["weight"])
    each = target(scores.tensor, mine.tensor, weight, _NONE, given["ignore_index"])
    return _combined(p, each, mine, weight, given)


@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
      "binary_cross_entropy_with_logits", "soft_margin_loss", "kl_div")  # fmt: skip
def elementwise_loss(p: Propagation, target: Any, args: Any, kwargs: Any) -> Any:
    names = [name for name, _ in compat.operator_arguments(target)]
    given = dict(zip(names, args, strict=False)) | kwargs
    reduction = given.get("reduction", _MEAN)
    first, second = args[:2]
    if not _known_same(first.shape, second.shape):
        return None
    shard = (first if first.sharded else second).shard
    local = _map_values(lambda v: _aligned(p, v, shard, len(first.shape)), given)
    each = target(**local | {"reduction": _NONE})
    if reduction == _NONE:
        return p.result(each, shard)
    total = p.axis.total(p.masked(Value(each, shard, first.shape)).sum())
    return p.result(total / math.prod(first.shape) if reduction == _MEAN else total, R)
