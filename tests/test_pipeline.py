"""Pipelines against one process: losses, every gradient, parameters after several steps.

Several plans are tried in one group of ranks, so that torch is imported once.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import autodist
from autodist import pipeline
from autodist.passes.analysis.stages import StagePlan
from autodist.runtime.parameters import plain_tensor
from autodist.runtime.stage_parameters import StageGradientError, is_here, owners
from tests.models import CASES, Output
from tests.parity import adamw, error
from tests.ranks import run_ranks

TOLERANCE = 1e-5
EAGER: dict[str, Any] = {"lowering": "eager"}


class UNet(nn.Module):
    """Skips over several stages, and a weight that both ends use."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8)])
        self.up = nn.ModuleList([nn.Conv2d(16, 8, 3, padding=1) for _ in range(3)])
        self.norm = nn.GroupNorm(2, 8)
        self.up[1].weight = self.up[0].weight
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Output:
        x, skips = pixel_values, []
        for layer in self.down:
            x = self.norm(layer(x)).relu()
            skips.append(x)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], 1)).relu()
        return Output(nn.functional.cross_entropy(self.head(x.mean((2, 3))), labels))


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    return UNet() if case == "unet" else CASES[case].build().train()


def batch(case: str, step: int, coordinate: int, rows: int) -> dict[str, Any]:
    """A batch of ``rows`` rows for one data-parallel coordinate."""
    g = torch.Generator().manual_seed(1000 * step + coordinate)
    parts = [CASES["vit" if case == "unet" else case].batch(g) for _ in range(rows)]
    return {
        k: torch.cat([p[k] for p in parts])[:rows] if isinstance(v, torch.Tensor) else v
        for k, v in parts[0].items()
    }


def check(model: nn.Module, reference: nn.Module, what: str, tolerance: float = TOLERANCE) -> int:
    """Compare this rank's parameters, or their gradients; how many it has."""
    wanted = dict(reference.named_parameters())
    count = 0
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        if not is_here(parameter):
            assert parameter.grad is None and parameter.to_local().numel() == 0, name
            continue
        count += 1
        got, want = (p.grad if what == "gradient" else p for p in (parameter, wanted[name]))
        assert (got is None) == (want is None), f"{name}: has a gradient on one side only"
        if want is not None:
            assert isinstance(got, DTensor) and got.placements == parameter.placements
            found = error(got, want)
            assert found < tolerance, f"{what} of {name}: relative error {found:.2e}"
    return count


def trained(case: str, options: dict[str, Any], sizes: Sequence[int]) -> tuple[int, int]:
    """For batches of these ``sizes``, train ``case`` as a pipeline and whole, side by side; how many
    parameters this rank holds, and all."""
    torch._dynamo.reset()
    options = {**EAGER, **options}
    model = build(case)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autodist", options=options)
    stepper, reference_stepper = adamw(model.parameters()), adamw(reference.parameters())
    shared = options["pp"] * options.get("sp", 1)
    coordinate, coordinates = dist.get_rank() // shared, dist.get_world_size() // shared
    count = 0
    for step, rows in enumerate(sizes):
        batches = [batch(case, step, c, rows) for c in range(coordinates)]
        losses = [reference(**b).loss for b in batches]
        sum(losses, torch.zeros(())).div(coordinates).backward()
        loss = compiled(**batches[coordinate]).loss
        loss.backward()
        wanted = losses[coordinate].item()
        assert abs(loss.item() - wanted) < TOLERANCE * abs(wanted), (step, loss.item(), wanted)
        # After a step of Adam, which divides rounding by small second moments, weights differ by that.
        count = check(model, reference, "gradient", TOLERANCE if step == 0 else 1e-4)
        stepper.step(), reference_stepper.step()
        stepper.zero_grad(), reference_stepper.zero_grad()
    check(model, reference, "parameter", 1e-4)
    return count, len(dict(reference.named_parameters()))


def all_trained(plans: list[tuple[str, dict[str, Any]]], *sizes: int) -> list[tuple[int, int]]:
    return [trained(case, options, sizes) for case, options in plans]


def check_counts(found: list[list[tuple[int, int]]]) -> None:
    """Every rank holds some of the parameters, and none all."""
    assert all(0 < count < total for rank in found for count, total in rank), found


SCHEDULES = [
    ("llama_tied", {"pp": 2, "schedule": "1f1b", "microbatches": 4}),
    ("llama_tied", {"pp": 2, "schedule": "gpipe", "microbatches": 3}),
    ("llama_tied", {"pp": 2, "schedule": "interleaved"}),
    ("llama_tied", {"pp": 2, "schedule": "zero-bubble", "microbatches": 4}),
    ("unet", {"pp": 2, "schedule": "interleaved"}),
]


@pytest.mark.distributed
def test_schedules() -> None:
    check_counts(run_ranks(all_trained, 2, SCHEDULES, 6, 6, seconds=600))


@pytest.mark.distributed
@pytest.mark.parametrize("cases", [("gpt2", "bert", "t5"), ("llama", "qwen3", "vit", "gemma2")])
def test_families(cases: tuple[str, ...]) -> None:
    plans: list[tuple[str, dict[str, Any]]] = [(case, {"pp": 2}) for case in cases]
    check_counts(run_ranks(all_trained, 2, plans, 5, 5, seconds=600))


@pytest.mark.distributed
def test_beside_data_parallelism() -> None:
    """Two pipelines of two ranks, under each of ZeRO's stages; and one of four."""
    plans: list[tuple[str, dict[str, Any]]] = [
        ("llama_tied", {"pp": 2, "zero": 3}),
        ("llama_tied", {"pp": 2, "zero": 1, "schedule": "zero-bubble"}),
        ("bert", {"pp": 2, "zero": 0}),
        ("llama_tied", {"pp": 4}),
    ]
    check_counts(run_ranks(all_trained, 4, plans, 6, 6, seconds=600))


@pytest.mark.distributed
def test_beside_sequence_parallelism() -> None:
    plans: list[tuple[str, dict[str, Any]]] = [
        ("llama_tied", {"pp": 2, "sp": 2, "zero": 3}),
        ("bert", {"pp": 2, "sp": 2, "zero": 2}),
    ]
    check_counts(run_ranks(all_trained, 4, plans, 5, 5, seconds=600))


@pytest.mark.distributed
@pytest.mark.thorough
def test_inductor_and_a_long_run() -> None:
    """Five steps of Adam, a short batch among them."""
    plans: list[tuple[str, dict[str, Any]]] = [
        ("llama_tied", {"pp": 2, "schedule": "zero-bubble", "lowering": "inductor"}),
    ]
    check_counts(run_ranks(all_trained, 2, plans, 8, 8, 8, 7, 8))


def varied() -> None:
    """A user's checkpoints and autocast, a plan in bf16, a program that may not break."""
    bf16: dict[str, Any] = {"device_type": "cpu", "dtype": torch.bfloat16}
    for options, autocast, checkpoints, tolerance in (
        ({}, False, True, TOLERANCE),
        # In bfloat16 products are rounded, and added up, in other parts than the whole batch's.
        ({}, True, False, 2e-2),
        ({"precision": "bf16"}, False, False, 2e-2),
    ):
        torch._dynamo.reset()
        model = build("llama_tied")
        if checkpoints:
            model.gradient_checkpointing_enable()
        reference = copy.deepcopy(model)
        plan = {**EAGER, "pp": 2, "microbatches": 3, **options}
        compiled = torch.compile(model, backend="autodist", options=plan, fullgraph=True)
        given = batch("llama_tied", 0, 0, 5)
        with torch.autocast(**bf16, enabled=autocast):
            loss = compiled(**given).loss
        with torch.autocast(**bf16, enabled=autocast or "precision" in options):
            wanted = reference(**given).loss
        loss.backward()
        wanted.backward()
        assert error(loss, wanted) < tolerance, (options, autocast, loss, wanted)
        check(model, reference, "gradient", tolerance)


@pytest.mark.distributed
def test_variations() -> None:
    run_ranks(varied, 2)


def three_stages() -> None:
    for options in ({"microbatches": 4}, {"schedule": "interleaved"}):
        trained("llama", {"pp": 3, **options}, (7, 3))


@pytest.mark.distributed
def test_three_stages() -> None:
    run_ranks(three_stages, 3)


def uneven_replicas(zero: int) -> str:
    """Replicas with other numbers of rows, which are other numbers of microbatches."""
    torch._dynamo.reset()
    model = build("llama_tied")
    reference = copy.deepcopy(model)
    options = {**EAGER, "pp": 2, "zero": zero, "microbatches": 4}
    compiled = torch.compile(model, backend="autodist", options=options)
    batches = [batch("llama_tied", 0, c, rows) for c, rows in ((0, 3), (1, 8))]
    try:
        compiled(**batches[dist.get_rank() // 2]).loss.backward()
    except Exception as raised:
        cause = getattr(raised, "inner_exception", raised)
        return f"{type(cause).__name__}: {cause}"
    sum((reference(**b).loss for b in batches), torch.zeros(())).div(2).backward()
    check(model, reference, "gradient")
    return "trained"


@pytest.mark.distributed
def test_replicas_with_other_numbers_of_rows() -> None:
    assert run_ranks(uneven_replicas, 4, 1) == ["trained"] * 4
    found = run_ranks(uneven_replicas, 4, 3)
    assert all(re.search("makes its batch of [38] rows in [34] microbatches", text) for text in found), found


# --- around the step -----------------------------------------------------------------------------------


def clipped() -> None:
    """Clipping sees the whole model's norm; torch's, which would see a stage's, is refused."""
    torch._dynamo.reset()
    options = {**EAGER, "pp": 2}
    model = build("llama_tied")
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autodist", options=options)
    for step in range(2):  # gradients of two batches are accumulated
        given = batch("llama_tied", step, 0, 6)
        (compiled(**given).loss * 0.5).backward()
        (reference(**given).loss * 0.5).backward()
    with pytest.raises(StageGradientError, match=r"autodist\.clip_grad_norm_"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    mine = next(p for p in model.parameters() if p.grad is not None)
    with pytest.raises(StageGradientError):
        mine.grad.data.norm(2)
    scaler, optimizer = torch.amp.GradScaler("cpu"), adamw(model.parameters())
    scaler.scale(torch.ones(()))
    with pytest.raises(StageGradientError, match="GradScaler"):
        scaler.step(optimizer)
    for kind in (2.0, 1.0, float("inf")):
        got = autodist.clip_grad_norm_(model.parameters(), 0.1, kind)
        want = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1, kind)
        assert error(got, want) < TOLERANCE, (kind, got, want)
    check(model, reference, "gradient")
    with pytest.raises(StageGradientError, match="outside of the compiled program"):
        model.lm_head.weight.sum().backward()
    with torch.no_grad():
        evaluated = compiled(**batch("llama_tied", 7, 0, 6))
        assert error(evaluated.loss, reference(**batch("llama_tied", 7, 0, 6)).loss) < TOLERANCE
        # Weights can be read on every rank, and the model runs eagerly.
        assert error(plain_tensor(model.lm_head.weight), reference.lm_head.weight) < TOLERANCE
        eager = model(**batch("llama_tied", 8, 0, 2)).logits
        assert error(plain_tensor(eager), reference(**batch("llama_tied", 8, 0, 2)).logits) < TOLERANCE
    again = torch.compile(model, backend="autodist", options={**options, "pp": 1})
    with pytest.raises(Exception, match="was prepared with pp=2"):
        again(**batch("llama_tied", 0, 0, 6))


@pytest.mark.distributed
def test_around_the_step() -> None:
    run_ranks(clipped, 2)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x), 0.5, self.training)
        return x.square().mean()


def dropped() -> list[float]:
    """The same seed gives the same run; masks differ between runs."""
    losses = []
    for _ in range(2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Dropped()
        compiled = torch.compile(model, backend="autodist", options={**EAGER, "pp": 2})
        torch.manual_seed(5 + dist.get_rank())  # the first rank's seed is all ranks'
        x = torch.ones(8, 64)
        losses += [compiled(x).item(), compiled(x).item()]
        model.layers[0].requires_grad_(True)
    return losses


@pytest.mark.distributed
def test_dropout() -> None:
    first, second = run_ranks(dropped, 2)
    assert first == second
    assert first[:2] == first[2:] and first[0] != first[1]


def saved(folder: str) -> list[float]:
    """A checkpoint of a pipeline loads into another plan, and goes on as the pipeline would have."""
    torch._dynamo.reset()
    losses = []
    for resumed in (False, True):
        torch._dynamo.reset()
        options = {**EAGER, "pp": 1 if resumed else 2}
        model = build("llama_tied")
        given = [batch("llama_tied", s, 0, 4) for s in range(4)]
        autodist.prepare(model, options, batch=given[0])
        optimizer = adamw(model.parameters())
        if resumed:
            autodist.load(folder, model, optimizer)
        compiled = torch.compile(model, backend="autodist", options=options)
        for step in range(2 if resumed else 0, 4):
            loss = compiled(**given[step]).loss
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            if not resumed and step == 1:
                autodist.save(folder, model, optimizer)
                autodist.export(folder + "-export", model)
            losses += [loss.item()] if step >= 2 else []
    return losses


@pytest.mark.distributed
def test_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for losses in run_ranks(saved, 2, str(tmp_path / "run")):
        for got, want in zip(losses[2:], losses[:2], strict=True):
            assert abs(got - want) < 1e-4 * abs(want), losses
    names = load_file(tmp_path / "run-export" / "model.safetensors")
    assert len(names) == len(dict(build("llama_tied").named_parameters()))


def from_meta() -> int:
    """A model that is built on meta never has memory for other stages' parameters."""
    torch._dynamo.reset()
    with torch.device("meta"):
        model = CASES["llama"].build().train()
    given = batch("llama", 0, 0, 4)
    autodist.prepare(model, {**EAGER, "pp": 2}, batch=given)
    torch.compile(model, backend="autodist")(**given).loss.backward()
    held = [p.to_local().numel() for p in model.parameters()]
    here = [dist.get_rank() in owners(p) for p in model.parameters()]
    assert [n > 0 for n in held] == here
    return sum(held)


@pytest.mark.distributed
def test_a_model_on_meta() -> None:
    held = run_ranks(from_meta, 2)
    total = sum(p.numel() for p in CASES["llama"].build().parameters())
    assert sum(held) == total and max(held) < 0.7 * total


def verified() -> list[bool]:
    """verify() takes pipelines, and notices a gradient that is not the model's."""
    torch._dynamo.reset()
    given = batch("llama_tied", 0, 0, 4)
    model = build("llama_tied")
    compiled = torch.compile(model, backend="autodist", options={**EAGER, "pp": 2})
    right = autodist.verify(compiled, given).passed
    if is_here(model.lm_head._parameters["weight"]):
        model.lm_head._parameters["weight"].register_hook(lambda grad: grad * 1.5)
    return [right, autodist.verify(compiled, given).passed]


@pytest.mark.distributed
def test_verify() -> None:
    assert run_ranks(verified, 2) == [[True, False]] * 2


def two_models() -> None:
    """Of one class: Dynamo runs the program of the first with the parameters of the second."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    models = [Regularised(False), Regularised(False)]
    models.append(copy.deepcopy(models[1]))
    references = [copy.deepcopy(m) for m in models]
    compiled = [torch.compile(m, backend="autodist", options={**EAGER, "pp": 2}) for m in models]
    for _ in range(2):
        for model, reference, step in zip(models, references, compiled, strict=True):
            step(x).backward()
            reference(x).backward()
            check(model, reference, "gradient")
            for each in (model, reference):
                torch.optim.SGD(each.parameters(), lr=0.1).step()
                each.zero_grad()
    average = copy.deepcopy(models[0])
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
        got = torch.compile(average, backend="autodist", options={**EAGER, "pp": 2})(x)
        for parameter in references[0].parameters():
            parameter.mul_(0.5)
        assert error(got, references[0](x)) < TOLERANCE


@pytest.mark.distributed
def test_two_models_of_one_class() -> None:
    run_ranks(two_models, 2)


# --- what is shown ---------------------------------------------------------------------------------------


def test_the_stages_are_shown(tmp_path: Path) -> None:
    """Without a cluster, for more ranks than there are: the map, and the schedule as planned."""
    from rich.console import Console

    from autodist.dry_run import dry_run, token_batch
    from autodist.inspect import find_artifacts, show

    plan = autodist.Plan(pp=2, sp=2, hardware="h100-80g")
    job = dry_run(CASES["llama_tied"].build, lambda: token_batch(8, 16), plan, 64, tmp_path)
    assert job.plan.dp == 16 and job.cut is not None
    [folder] = (tmp_path / "rank0").glob("pipeline*")
    found = StagePlan.from_json((folder / "stages.json").read_text())
    assert len(found.stages) == 2 and found.cuts == job.cut.cuts
    assert (folder / "schedule.svg").read_text().startswith("<svg")
    graphs = find_artifacts(tmp_path)
    console = Console(width=200, record=True, file=io.StringIO())
    show(console, graphs, graphs[0], None)
    text = console.export_text()
    assert f"at '{found.cuts[0]}'" in text and "the slowest stage takes" in text
    # A person may edit the cuts, and the plan names the file.
    edited = tmp_path / "cuts.json"
    edited.write_text(json.dumps({"cuts": ["nowhere"]}))
    with pytest.raises(autodist.StageError, match="no such node"):
        dry_run(
            CASES["llama_tied"].build, lambda: token_batch(8, 16),
            autodist.Plan(pp=2, cuts=str(edited)), 2, None,
        )  # fmt: skip
    edited.write_text(json.dumps({"cuts": ["model.layers.1"]}))
    plan = autodist.Plan(pp=2, cuts=str(edited))
    job = dry_run(CASES["llama_tied"].build, lambda: token_batch(8, 16), plan, 2, None)
    assert job.cut is not None and job.cut.why[0].startswith("asked for")
    assert any(n.startswith("model.layers.1.") for n in job.cut.stages[1].parameters)


# --- what is refused -----------------------------------------------------------------------------------


class Regularised(nn.Module):
    """A loss of a mean and of weights alone; ``square`` makes it no sum over rows."""

    def __init__(self, square: bool) -> None:
        super().__init__()
        self.layers, self.square = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))), square

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.layers(x).tanh().mean()
        penalty = sum(layer.weight.square().sum() for layer in self.layers)
        return (mean * mean if self.square else mean) + 0.1 * penalty


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(x)
        torch._dynamo.graph_break()
        return x.mean()


def refused() -> dict[str, str]:
    found = {}
    plain: Callable[[], nn.Module] = lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))  # noqa: E731
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    attempts: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Any]] = {
        "batch norm": (lambda: CASES["resnet"].build().train(), {}, batch("resnet", 0, 0, 6)),
        "square": (lambda: Regularised(True), {}, x),
        "graph break": (Broken, {}, x),
        "no loss": (plain, {}, x),
        "too many stages": (lambda: Regularised(False), {"stages": 64, "schedule": "interleaved"}, x),
        "no batch": (plain, {}, None),
    }
    for name, (make, more, given) in attempts.items():
        torch._dynamo.reset()
        model, options = make(), {**EAGER, "pp": 2, **more}
        try:
            if given is None:
                autodist.prepare(model, options)
            elif isinstance(given, dict):
                torch.compile(model, backend="autodist", options=options)(**given)
            else:
                wrapped = torch.compile(functools.partial(model), backend="autodist", options=options)
                wrapped(given)
            found[name] = "trained"
        except Exception as raised:
            cause = getattr(raised, "inner_exception", raised)
            found[name] = f"{type(cause).__name__}: {cause}"
    return found


@pytest.mark.distributed
def test_what_is_refused() -> None:
    wanted = {
        "batch norm": "PipelineError.*running statistics.*without pp",
        "square": r"PlacementError.*mul.*not linear in a sum over the batch",
        "graph break": "PipelineError.*graph_breaks",
        "no loss": "PipelineError.*no output of the compiled program is a loss",
        "too many stages": "StageError.*cannot be cut into",
        "no batch": "PlanError.*prepare a batch",
    }
    for found in run_ranks(refused, 2):
        for name, pattern in wanted.items():
            assert re.search(pattern, found[name], re.DOTALL), (name, found[name])


def regularised() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Regularised(False)
    reference = copy.deepcopy(model)
    x = torch.randn(7, 6)
    loss = torch.compile(model, backend="autodist", options={**EAGER, "pp": 2})(x)
    loss.backward()
    wanted = reference(x)
    wanted.backward()
    assert error(loss, wanted) < TOLERANCE
    check(model, reference, "gradient")


@pytest.mark.distributed
def test_what_is_added_to_a_mean_counts_once() -> None:
    run_ranks(regularised, 2)


class Partly(nn.Module):
    """The first layers are frozen, a weight is used by what is not the loss, and one by nothing; what is not
    linear in the loss is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(6)])
        self.beside, self.unused = nn.Linear(6, 2), nn.Linear(3, 3)
        for layer in self.layers[:4]:
            layer.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for layer in self.layers:
            x = layer(x).tanh()
        loss = x.square().mean()
        return self.beside(x), loss, loss.detach().exp(), loss > 0.1


def partly() -> None:
    for schedule in ("1f1b", "zero-bubble"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Partly()
        reference = copy.deepcopy(model)
        x = torch.randn(8, 6)
        options = {**EAGER, "pp": 2, "schedule": schedule, "outputs": "gathered"}
        shown, loss, *metrics = torch.compile(model, backend="autodist", options=options)(x)
        loss.backward()
        wanted_shown, wanted, *wanted_metrics = reference(x)
        wanted.backward()
        torch.testing.assert_close(metrics, wanted_metrics)
        assert error(loss, wanted) < TOLERANCE and error(shown, wanted_shown) < TOLERANCE
        check(model, reference, "gradient")
        with pytest.raises(StageGradientError):
            shown.sum().backward()


@pytest.mark.distributed
def test_frozen_stages_and_unused_weights() -> None:
    run_ranks(partly, 2)


class Fails(nn.Module):
    """On the last rank tracing it raises, once its parameters have places."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def fails() -> str:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Fails()
    compiled = torch.compile(model, backend="autodist", options={**EAGER, "pp": 2})
    x = torch.randn(8, 6)
    compiled(x).backward()
    for layer in model.layers[:2]:
        layer.requires_grad_(False)
    with pytest.raises(autodist.PipelineError, match="asks for a gradient"):
        compiled(x.clone().requires_grad_())
    for layer in model.layers[:2]:
        layer.requires_grad_(True)
    compiled(x).backward()
    with pytest.raises(StageGradientError):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    right = pipeline._compile
    pipeline._compile = wrong if dist.get_rank() == 1 else right  # type: ignore[assignment]
    try:
        compiled(torch.randn(6, 6))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        pipeline._compile = right  # workers are kept between tests
    return "ran"


def wrong(*args: Any) -> Any:
    raise RuntimeError("the compiler of rank 1 is out of order")


@pytest.mark.distributed
def test_a_rank_that_cannot_compile_ends_the_others() -> None:
    first, second = run_ranks(fails, 2)
    assert "out of order" in first and first.startswith(("MissingRanksError", "DisagreementError")), first
    assert second == "RuntimeError: the compiler of rank 1 is out of order"
