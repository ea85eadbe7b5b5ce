"""The plan: what a person asks of the compiler, and what that resolved to.

One frozen dataclass is the Python API, the ``options=`` of ``torch.compile`` and a JSON file. A plan is
*resolved* against the ranks and the device it will run on: what was left open is filled in, and what cannot
be is refused, naming the field and its legal values.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

_LOWERINGS = ("inductor", "eager")
DEVICE = "device"
_OF_THE_DEVICE = 0.9  # the rest is the driver's, the collectives', and what the allocator cannot fill
_PRECISIONS = ("fp32", "bf16")
_OUTPUTS = ("withheld", "gathered", "sharded")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
SEVERAL_STAGES = ("interleaved", "zero-bubble")
"""Schedules in which a rank may have several stages."""
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class PlanError(ValueError):
    """A plan asks for something that does not exist or cannot be had here."""


@dataclass(frozen=True)
class Plan:
    """How to train a model on many ranks.

    zero:       what is sharded over the data-parallel ranks. 0 nothing (gradients are averaged, as DDP
                does), 1 optimizer state, 2 and gradients, 3 and parameters (arXiv:1910.02054).
    dp:         number of data-parallel ranks; derived from the number of ranks when None.
    sp:         ranks that share a batch, each computing a part of its sequences (Ulysses,
                arXiv:2309.14509). The number of attention heads must be a multiple of it.
    pp:         ranks that share a model's layers, each holding a part of them (a pipeline). They share a
    batch,
                too, which is made in microbatches.
    microbatches: parts that a batch is made in, at most its rows; None for four for each of the ``pp`` ranks.
    schedule:   the order of the microbatches' forwards and backwards: "gpipe", "1f1b", "interleaved" (several
                stages a rank, arXiv:2104.04473) or "zero-bubble" (gradients of weights fill the gaps,
                arXiv:2401.10241).
    stages:     pieces that the model is cut into, a multiple of ``pp``; None for ``pp``, or twice that where
                the schedule can use it.
    cuts:       path of a JSON file with the cuts between stages, as the artifacts have them: names of nodes,
                or of the modules that stages begin with; None to have them chosen.
    outputs:    what becomes of large results that are sharded over sequences (logits): "withheld" gives
                a stand-in that says so when it is used, "gathered" the whole, "sharded" a DTensor.
    strict:     refuse a program with an operator for which sequences would have to be gathered.
    precision:  "fp32" trains in the parameters' own type; "bf16" computes under autocast and gathers
                weights in bf16, with shards, reduction and optimizer at full width.
    memory:     bytes a rank may use ("60GB", "512MiB" or a number), or "device": nine tenths of what the
                device has. Where training would use more, values are computed again, offloaded, or made in
                tiles, by what costs least; where it uses less, weights stay whole from forward to
                backward while they fit (ZeRO-3). None: as torch's min-cut decides.
    host_memory: bytes of the host that a rank may use for what it offloads; None is half of what the
                machine has for each device, 0 offloads nothing.
    lowering:   "inductor", or "eager" to run the same passes without Inductor (to tell whose a bug is).
    timeout:    seconds to wait for other ranks before ending with an error.
    hardware:   the cost model's machine ("h100-80g", "cpu", ...); detected from the device when None.
    """

    zero: int = 3
    dp: int | None = None
    sp: int = 1
    pp: int = 1
    microbatches: int | None = None
    schedule: str = "1f1b"
    stages: int | None = None
    cuts: str | None = None
    outputs: str = "withheld"
    strict: bool = False
    precision: str = "fp32"
    memory: str | int | None = None
    host_memory: str | int | None = None
    lowering: str = "inductor"
    timeout: float = 600.0
    hardware: str | None = None

    def __post_init__(self) -> None:
        _require("zero", self.zero, type(self.zero) is int and 0 <= self.zero <= 3, "0, 1, 2 or 3")
        positive = self.dp is None or (type(self.dp) is int and self.dp > 0)
        _require("dp", self.dp, positive, "a positive number of ranks, or None to derive it")
        _require("sp", self.sp, type(self.sp) is int and self.sp > 0, "a positive number of ranks")
        _require("pp", self.pp, type(self.pp) is int and self.pp > 0, "a positive number of ranks")
        for name in ("microbatches", "stages"):
            given = getattr(self, name)
            positive = given is None or (type(given) is int and given > 0)
            _require(name, given, positive, "a positive number, or None")
        _require("schedule", self.schedule, self.schedule in SCHEDULES, _either(SCHEDULES))
        _require("cuts", self.cuts, self.cuts is None or isinstance(self.cuts, str), "a path, or None")
        self._check_stages()
        _require("outputs", self.outputs, self.outputs in _OUTPUTS, _either(_OUTPUTS))
        _require("strict", self.strict, type(self.strict) is bool, "True or False")
        _require("precision", self.precision, self.precision in _PRECISIONS, _either(_PRECISIONS))
        _require("lowering", self.lowering, self.lowering in _LOWERINGS, _either(_LOWERINGS))
        number = isinstance(self.timeout, (int, float)) and not isinstance(self.timeout, bool)
        _require("timeout", self.timeout, number and self.timeout > 0, "a positive number of seconds")
        _ = self.memory_on(None), self.host_memory_bytes
        if self.hardware is not None:
            from autodist.passes.analysis.hardware import hardware

            try:
                hardware(self.hardware)
            except ValueError as error:
                raise PlanError(f"plan field 'hardware': {error}") from None

    def _check_stages(self) -> None:
        if self.stages is not None:
            whole = self.stages % self.pp == 0
            _require("stages", self.stages, whole, f"a multiple of pp={self.pp}, or None")
            several = self.schedule in SEVERAL_STAGES
            one = f"pp={self.pp} with schedule {self.schedule!r}, which has one stage a rank"
            _require("stages", self.stages, several or self.stages == self.pp, one)
        if self.pp > 1 and self.outputs == "sharded":
            raise PlanError(
                "plan field 'outputs' is 'sharded', and with pp results lie on the ranks of one stage "
                "alone; use 'withheld' or 'gathered'"
            )

    @property
    def num_stages(self) -> int:
        """Pieces that the model is cut into."""
        return self.stages or (2 * self.pp if self.schedule in SEVERAL_STAGES else self.pp)

    def memory_on(self, device: int | None) -> int | None:
        """``memory`` in bytes, on a device with so many; None where there is no bound."""
        if self.memory == DEVICE:
            return None if device is None else int(_OF_THE_DEVICE * device)
        return None if self.memory is None else _bytes("memory", self.memory, least=1)

    @property
    def host_memory_bytes(self) -> int | None:
        """``host_memory`` in bytes."""
        return None if self.host_memory is None else _bytes("host_memory", self.host_memory, least=0)

    @classmethod
    def make(cls, options: PlanLike) -> Plan:
        """A plan from a plan, a mapping of its fields, a path to its JSON, or None (all defaults).

        Raises :class:`PlanError` naming the first unknown field or illegal value.
        """
        if options is None:
            return cls()
        if isinstance(options, Plan):
            return options
        if isinstance(options, (str, os.PathLike)):
            return cls.load(options)
        if not isinstance(options, Mapping):
            raise PlanError(
                f"options must be an autodist.Plan, a dict of its fields, or a path to its JSON; "
                f"got {type(options).__name__}"
            )
        fields = [f.name for f in dataclasses.fields(cls)]
        unknown = [k for k in options if k not in fields]
        if unknown:
            raise PlanError(f"unknown plan field {unknown[0]!r}; the fields are {', '.join(fields)}")
        return cls(**options)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan in a JSON file written by :meth:`dump` or by hand."""
        try:
            fields = json.loads(Path(path).read_text())
        except OSError as error:
            raise PlanError(f"cannot read the plan file {os.fspath(path)!r}: {error}") from None
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan file {os.fspath(path)!r} is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise PlanError(f"the plan file {os.fspath(path)!r} must hold one JSON object")
        return cls.make(fields)

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def resolve(self, num_ranks: int, hardware: str) -> Plan:
        """This plan on ``num_ranks`` ranks; raises :class:`PlanError` when it cannot run on them."""
        for name, size, of in (("sp", self.sp, num_ranks), ("pp", self.pp, num_ranks // self.sp)):
            if of % size:
                legal = ", ".join(str(n) for n in range(1, of + 1) if of % n == 0)
                beside = f" with sp={self.sp}" if name == "pp" and self.sp > 1 else ""
                raise PlanError(
                    f"plan field {name!r} is {size}, which does not divide the {num_ranks} ranks that are "
                    f"running{beside}; use one of {legal}, or start another number of ranks"
                )
        each = self.sp * self.pp
        dp = num_ranks // each
        if self.dp is not None and self.dp != dp:
            given = " and ".join(f"{n}={getattr(self, n)}" for n in ("sp", "pp") if n == "sp" or self.pp > 1)
            raise PlanError(
                f"plan field 'dp' is {self.dp}, but {num_ranks} ranks are running with {given}; "
                f"leave it out, or start {self.dp * each} ranks"
            )
        zero = self.zero if dp * self.sp > 1 else 0
        return dataclasses.replace(self, zero=zero, dp=dp, hardware=self.hardware or hardware)

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(self).items() if v is not None)


PlanLike = Union[Plan, Mapping[str, Any], str, "os.PathLike[str]", None]


def _require(field: str, value: Any, legal: bool, values: str) -> None:
    if not legal:
        raise PlanError(f"plan field {field!r} must be {values}; got {value!r}")


def _bytes(field: str, given: str | int, least: int) -> int:
    """A field's number of bytes."""
    amount = "a positive number of bytes" if least else "a number of bytes, at least 0"
    legal = f'{amount}, or text such as "60GB" or "512MiB"'
    if isinstance(given, int) and not isinstance(given, bool):
        _require(field, given, given >= least, legal)
        return given
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", str(given))
    known = match is not None and match[2].upper() in _UNITS and float(match[1]) >= least
    _require(field, given, known, legal)
    assert match is not None
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _either(values: tuple[str, ...]) -> str:
    return " or ".join(repr(v) for v in values)
