"""A job: the ranks that train one model together, and what they agreed on.

Made once per prepared model, found again through its parameters. It holds the resolved plan, the mesh, the
agreement between ranks and the watch over them, and it collects what the compiler did.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from autodist.artifacts import artifact_folder
from autodist.logs import configure, log
from autodist.passes.analysis.hardware import Hardware, detect, hardware
from autodist.passes.analysis.stages import StagePlan
from autodist.plan import Plan
from autodist.runtime import compat
from autodist.runtime.agreement import Agreement, DisagreementError, MissingRanksError
from autodist.runtime.monitor import RankMonitor

if TYPE_CHECKING:
    from autodist.compiler import GraphReport

_HEARTBEAT_SECONDS = 2.0


@dataclass
class Job:
    """``mesh``, one-dimensional over all ranks, shards parameters; it is None on a single rank: then nothing
    is sharded and nothing is agreed. ``sequence`` is the mesh of the ranks that share this rank's sequences,
    None when the plan has no ``sp``.

    With ``pp``, ranks are laid out as (dp, pp, sp). ``pipeline`` is the mesh of the ranks that hold the
    stages of one copy of the model, this rank being the ``place``-th of them; ``stages[p]`` is the mesh over
    all ranks at place ``p``, members or not, and shards the parameters of the stages there (:attr:`stage`).
    ``cut`` is where the model was cut when its parameters were given places; ``shared_groups`` are the
    process groups of the places that share parameters (:meth:`share`).

    ``artifacts`` is the folder for what a person may want to read. In a ``dry_run`` all decisions
    are made as ever, but nothing is compiled to kernels: the graphs run on fake tensors. Where there are
    ``samples`` memory is not planned: they collect what plans are made of, with each number of tiles.
    """

    plan: Plan
    device: torch.device
    mesh: DeviceMesh | None
    sequence: DeviceMesh | None = None
    pipeline: DeviceMesh | None = None
    stages: tuple[DeviceMesh, ...] = ()
    label: str = "all"
    cut: StagePlan | None = None
    model: weakref.ref[nn.Module] | None = None
    shared_groups: dict[tuple[int, ...], Any] = field(default_factory=dict)
    number: int = field(default_factory=itertools.count().__next__)
    reports: list[GraphReport] = field(default_factory=list)
    agreed: set[str] = field(default_factory=set)
    led: dict[str, str] = field(default_factory=dict)
    artifacts: Path | None = field(default_factory=artifact_folder)
    dry_run: bool = False
    samples: list[Any] | None = None

    @property
    def keep_text(self) -> bool:
        """Whether somebody will read what the passes did."""
        return self.artifacts is not None or compat.structured_trace_enabled()

    def __deepcopy__(self, memo: dict[int, Any]) -> Job:
        return self  # a copy of a mesh, which Dynamo's guards make, is still this job's

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # jobs do not travel between processes

    @cached_property
    def hardware(self) -> Hardware:
        assert self.plan.hardware is not None
        return hardware(self.plan.hardware)

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of the device that this rank may use, if that is bounded."""
        return self.plan.memory_on(self.hardware.memory)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host that this rank may use for what it offloads."""
        asked = self.plan.host_memory_bytes
        return self.hardware.host_memory // 2 if asked is None else asked

    @property
    def group(self) -> str:
        assert self.mesh is not None
        return compat.mesh_group_name(self.mesh)

    @property
    def group_sizes(self) -> dict[str, int]:
        """Ranks of each process group that graphs may name."""
        meshes = [m for m in (self.mesh, self.sequence, self.pipeline) if m is not None]
        return {compat.mesh_group_name(m): m.size() for m in meshes}

    @property
    def group_labels(self) -> dict[str, str]:
        """What to call the groups where ranks compare programs: their names differ between ranks."""
        labels = {} if self.mesh is None else {self.group: "all"}
        if self.sequence is not None:
            labels.setdefault(compat.mesh_group_name(self.sequence), "sp")
        if self.pipeline is not None:
            labels.setdefault(compat.mesh_group_name(self.pipeline), "pp")
        return labels

    @property
    def place(self) -> int:
        """This rank's place in its pipeline."""
        return 0 if self.pipeline is None else self.pipeline.get_local_rank()

    @cached_property
    def stage(self) -> Job:
        """The job of the ranks that hold the same stages as this one: what is compiled for a stage is
        theirs."""
        made = dataclasses.replace(
            self, mesh=self.stages[self.place], label=f"place {self.place}", agreed=set(), led={}
        )
        made.__dict__["monitor"] = self.monitor  # one watch, over all ranks
        return made

    @cached_property
    def line(self) -> Job:
        """The job of the ranks of this rank's pipeline, who share a batch and compile its programs
        together."""
        assert self.pipeline is not None
        first = compat.group_ranks(compat.mesh_group_name(self.pipeline))[0]
        made = dataclasses.replace(
            self, mesh=self.pipeline, label=f"pipeline of rank {first}", agreed=set(), led={}
        )
        made.__dict__["monitor"] = self.monitor
        return made

    def share(self, places: Iterable[tuple[int, ...]]) -> None:
        """Make the groups that sum gradients of parameters with several owners; called alike on all ranks."""
        for owners in sorted({p for p in places if len(p) > 1} - self.shared_groups.keys()):
            self.shared_groups[owners] = None  # known also where this rank is in none of them
            for ranks in zip(*(self.stages[p].mesh.tolist() for p in owners), strict=True):
                group = dist.new_group(list(ranks))
                if dist.get_rank() in ranks:
                    self.shared_groups[owners] = group

    def stage_mesh(self, place: int) -> DeviceMesh:
        """The mesh that shards parameters of stages at a place of the pipeline."""
        if self.stages:
            return self.stages[place]
        assert self.mesh is not None
        return self.mesh

    @property
    def is_first_rank(self) -> bool:
        return self.mesh is None or self.mesh.get_local_rank() == 0

    @cached_property
    def agreement(self) -> Agreement | None:
        if self.mesh is None or self.mesh.size() == 1 or compat.is_fake_group(self.group):
            return None
        ranks = compat.group_ranks(self.group)
        scope = f"autodist/agreement/{self.number}/{self.label}"
        elsewhere = None if self.monitor is None else self.monitor.elsewhere
        return Agreement(
            compat.default_store(), ranks, dist.get_rank(), self.plan.timeout, scope, elsewhere
        )

    @cached_property
    def monitor(self) -> RankMonitor | None:
        if self.mesh is None or compat.is_fake_group(self.group):
            return None
        ranks = compat.group_ranks(self.group)
        scope = f"autodist/monitor/{self.number}"
        return RankMonitor(
            compat.default_store(), ranks, dist.get_rank(), _HEARTBEAT_SECONDS, scope
        )

    def next_graph(self) -> int:
        return len(self.reports)

    def at(self, doing: str) -> None:
        """Tell the other ranks, should they ask, what this one is doing."""
        if self.monitor is not None:
            self.monitor.at(doing)

    def watch(self, doing: str) -> AbstractContextManager[None]:
        """Say for the time of a collective what this rank waits for."""
        return nullcontext() if self.monitor is None else self.monitor.guard(doing)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Where this rank fails in the block, the others do not wait for it: they fail with its reason."""
        try:
            yield
        except Exception as error:
            agreed = isinstance(error, (DisagreementError, MissingRanksError))
            heard = agreed and error.agreement in (None, self.agreement)  # type: ignore[attr-defined]
            if self.agreement is not None and not heard and not compat.restarts_tracing(error):
                self.agreement.fail(f"{type(error).__name__}: {error}")
            raise

    def lead(self, subject: str, make: Callable[[], str]) -> str:
        """What ``make`` gives on the first rank, on every rank; on the others it is not called.

        A ``subject`` is settled once: a rank that compiles again, because its batch has another size, must
        decide as the others did, and must not wait for ranks that do not compile.
        """
        if self.agreement is None:
            return make()
        if subject not in self.led:
            self.led[subject] = self.agreement.lead(subject, make() if self.is_first_rank else None)
        return self.led[subject]

    def largest(self, subject: str, value: int) -> int:
        """The largest of the ranks' values, settled once, like :meth:`lead`'s."""
        if self.agreement is None:
            return value
        if subject not in self.led:
            self.led[subject] = str(self.agreement.largest(subject, value))
        return int(self.led[subject])


def num_ranks() -> int:
    """Ranks that are running: the process group's, or torchrun's when it has not been made yet."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_job(plan: Plan, device: torch.device, alone: bool = False) -> Job:
    """Resolve ``plan`` on the ranks that are running, starting the process group if torchrun was used.

    ``alone`` makes a job of this rank only.
    """
    configure()
    ranks = 1 if alone else num_ranks()
    if ranks > 1 and not dist.is_initialized():
        _init_process_group(device)
    resolved = plan.resolve(ranks, detect(device).name)
    mesh = sequence = pipeline = None
    stages: tuple[DeviceMesh, ...] = ()
    if ranks > 1:
        kind = "cpu" if device.type == "meta" else device.type
        mesh = init_device_mesh(kind, (ranks,), mesh_dim_names=("dp",))
        assert resolved.dp is not None
        sizes, names = (resolved.dp, resolved.pp, resolved.sp), ("dp", "pp", "sp")
        grid = init_device_mesh(kind, sizes, mesh_dim_names=names)
        sequence = grid["sp"] if resolved.sp > 1 else None
        if resolved.pp > 1:
            pipeline = grid["pp"]
            places = [grid.mesh[:, p, :].flatten() for p in range(resolved.pp)]
            # Made by all ranks, in one order; a rank is a member of one of them.
            stages = tuple(DeviceMesh(kind, ranks, mesh_dim_names=("dp",)) for ranks in places)
    job = Job(resolved, device, mesh, sequence, pipeline, stages)
    for made in (m for m in (mesh, sequence, pipeline, *stages) if m is not None):
        made._autodist_job = job  # type: ignore[attr-defined]
        if made.get_coordinate() is not None and not compat.is_fake_group(compat.mesh_group_name(made)):
            compat.set_group_timeout(made.get_group(), resolved.timeout)
    if job.is_first_rank and ranks == num_ranks():
        log.info("plan: %s", resolved)
    return job


def _init_process_group(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def job_of(parameter: nn.Parameter) -> Job | None:
    """The job a prepared parameter belongs to."""
    job = getattr(parameter, "_autodist_job", None)
    if job is None and isinstance(parameter, DTensor):
        # Module.to() and deepcopy make new parameters, on the same mesh.
        job = getattr(parameter.device_mesh, "_autodist_job", None)
    return job
