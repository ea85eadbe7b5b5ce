"""What a training loop may do to a model compiled with ``backend="autodist"``, on two ranks.

Every check compares with the same model on one process. Models are small and the lowering is eager: what
is tested is how parameters, optimizers, shapes and modes meet the compiler, not the kernels.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import autodist
from autodist.prepare import prepared_job
from autodist.runtime.parameters import MovedParameterError
from tests.models import CASES, VOCAB, Output
from tests.parity import check_gradients, check_parameters, error, full, reference_step
from tests.ranks import run_ranks

EAGER = {"lowering": "eager"}


class Net(nn.Module):
    """Few rows that two ranks cannot share evenly; a loss over all positions but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.up = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, VOCAB, bias=False)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.tanh(self.up(self.embed(ids))))

    def forward(self, ids: torch.Tensor) -> Output:
        logits = self.head(self.hidden(ids))
        targets = ids[:, 1:].flatten()
        return Output(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets))


def batch(step: int, rank: int, rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {"ids": torch.randint(0, VOCAB, (rows, length), generator=generator)}


def batches(step: int, **size: int) -> list[dict[str, torch.Tensor]]:
    """One batch a rank, all different."""
    return [batch(step, r, **size) for r in range(dist.get_world_size())]


def pair(build: Callable[[], nn.Module] = Net, **options: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model, the same compiled, and an unsharded copy to compare with."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autodist", options={**EAGER, **options})
    return model, compiled, reference


def backward(
    compiled: nn.Module,
    reference: nn.Module,
    all_batches: list[dict[str, Any]],
    tolerance: float = 1e-5,
) -> None:
    """One forward and backward of both; the losses must agree."""
    rank = dist.get_rank()
    losses = reference_step(reference, all_batches)
    loss = compiled(**all_batches[rank]).loss
    loss.backward()
    assert abs(loss.item() - losses[rank]) < tolerance * abs(losses[rank]), (
        loss.item(),
        losses[rank],
    )


def refusal(kind: type[Exception], action: Callable[[], Any]) -> str:
    """The message of the error that ``action`` raises."""
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


# --- optimizers ------------------------------------------------------------------------------------


def steppers(build: Callable[..., torch.optim.Optimizer], *models: nn.Module) -> list[torch.optim.Optimizer]:
    return [build(m.parameters()) for m in models]


def optimizer_built_before_the_first_call() -> None:
    model, compiled, reference = pair()
    both = steppers(lambda p: torch.optim.AdamW(p, lr=1e-2), model, reference)
    backward(compiled, reference, batches(0))
    # Gradients dropped before the first step must be those of the parameters that took the old ones' place.
    for stepper in both:
        stepper.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    for step in (1, 2):
        backward(compiled, reference, batches(step))
        check_gradients(model, reference)
        for stepper in both:
            stepper.step()
            stepper.zero_grad()
    check_parameters(model, reference)
    assert {p for g in both[0].param_groups for p in g["params"]} == set(model.parameters())
    assert all(isinstance(s["exp_avg"], DTensor) for s in both[0].state.values())


def stale_parameters() -> None:
    model, compiled, reference = pair()
    old = list(model.parameters())
    backward(compiled, reference, batches(0))
    for use in (
        lambda: old[0].sum(),
        lambda: nn.utils.clip_grad_norm_(old, 1.0),
        lambda: torch.optim.SGD(old, lr=1.0),
        lambda: old[0].grad,
    ):
        assert "'embed.weight' was replaced" in refusal(MovedParameterError, use)


def optimizer_with_state() -> str:
    model = Net()
    stepper = torch.optim.AdamW(model.parameters())
    model(**batch(0, 0)).loss.backward()
    stepper.step()
    stepper.zero_grad()
    compiled = torch.compile(model, backend="autodist", options=EAGER)
    return refusal(Exception, lambda: compiled(**batch(1, dist.get_rank())))


def test_parameters_move_once_and_loudly() -> None:
    run_ranks(optimizer_built_before_the_first_call, 2)
    run_ranks(stale_parameters, 2)
    for message in run_ranks(optimizer_with_state, 2):
        assert "AdamW already has state for 'embed.weight'" in message


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, foreach=True),
}


def training_loops() -> None:
    """Accumulation, clipping, a schedule and both ways of clearing gradients, with every optimizer."""
    model, compiled, reference = pair()
    autodist.prepare(model, EAGER)
    for number, (name, build) in enumerate(OPTIMIZERS.items()):
        both = steppers(build, model, reference)
        schedules = [torch.optim.lr_scheduler.StepLR(s, 1, gamma=0.5) for s in both]
        for step in (1, 2):
            for part in (0, 1):
                backward(compiled, reference, batches(100 * number + 10 * step + part))
            check_gradients(model, reference)
            norm, wanted = (nn.utils.clip_grad_norm_(m.parameters(), 0.3) for m in (model, reference))
            assert wanted > 0.3, "nothing to clip"
            assert error(norm, wanted) < 1e-5, name
            check_gradients(model, reference)
            for stepper, schedule in zip(both, schedules, strict=True):
                stepper.step()
                schedule.step()
                stepper.zero_grad(set_to_none=step == 1)
        check_parameters(model, reference, 1e-5)
        for stepper in both:
            stepper.zero_grad()
    job = prepared_job(model)
    assert job is not None and len(job.reports) == 1, "compiled more than once"


def test_training_loops() -> None:
    run_ranks(training_loops, 2)


def zero_stages() -> None:
    for zero in range(4):
        model, compiled, reference = pair(zero=zero)
        both = steppers(OPTIMIZERS["sgd"], model, reference)
        for step in (0, 1):
            backward(compiled, reference, batches(step))
            check_gradients(model, reference)
            for stepper in both:
                stepper.step()
                stepper.zero_grad()
        check_parameters(model, reference, 1e-5)


def test_zero_stages() -> None:
    run_ranks(zero_stages, 2)


# --- eager moments ---------------------------------------------------------------------------------


class Breaks(Net):
    """A forward that Dynamo captures in pieces."""

    def forward(self, ids: torch.Tensor) -> Output:
        x = self.hidden(ids)
        print(end="")
        if x.abs().max().item() > 0:
            x = x * 2
        logits = self.head(x)
        return Output(nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))


def graph_breaks() -> int:
    model, compiled, reference = pair(Breaks)
    for step in (0, 1):
        backward(compiled, reference, batches(step))
        check_gradients(model, reference)
    job = prepared_job(model)
    assert job is not None
    return len(job.reports)


def weights_read_in_python() -> None:
    model, compiled, reference = pair()
    for step in (0, 1):
        everyone = batches(step)
        backward(compiled, reference, everyone)
        for m in (model, reference):
            (0.1 * m.up.weight.square().sum()).backward()
        check_gradients(model, reference)
        assert torch.equal(model.up.weight, reference.up.weight)
        # A call without the compiler, on a model that is sharded.
        assert torch.allclose(model(**everyone[0]).loss, reference(**everyone[0]).loss)


def evaluation() -> None:
    model, compiled, reference = pair()
    rank = dist.get_rank()
    backward(compiled, reference, batches(0))
    for m in (model, reference):
        m.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found, wanted = compiled(**batch(1, rank)).loss, reference(**batch(1, rank)).loss
        assert torch.allclose(found, wanted) and not found.requires_grad
    for m in (model, reference):
        m.train()
    backward(compiled, reference, batches(2))
    check_gradients(model, reference)


def test_graph_breaks() -> None:
    assert min(run_ranks(graph_breaks, 2)) > 1


def test_eager_reads_and_evaluation() -> None:
    run_ranks(weights_read_in_python, 2)
    run_ranks(evaluation, 2)


def small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=32,
        )
    )  # fmt: skip


def generation() -> None:
    model, compiled, reference = pair(small_llama)
    autodist.prepare(model, EAGER)
    prompt = batch(0, dist.get_rank())["ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = compiled.generate(prompt, **options)
    assert torch.equal(found, reference.generate(prompt, **options))
    assert found.shape[1] == prompt.shape[1] + 6


def test_generation() -> None:
    run_ranks(generation, 2)


# --- types and checkpointing -----------------------------------------------------------------------


@contextmanager
def artifacts() -> Iterator[None]:
    """Jobs begun inside keep their scheduled graphs."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTODIST_ARTIFACTS"] = folder
        try:
            yield
        finally:
            del os.environ["AUTODIST_ARTIFACTS"]


def travelling(model: nn.Module, part: str) -> dict[tuple[int, ...], torch.dtype]:
    """Shape and type of what each gather of a forward or reduction of a backward takes."""
    job = prepared_job(model)
    assert job is not None
    found = {}
    for node in job.reports[-1].parts[part].graph.nodes:
        if any(kind in str(node.target) for kind in ("all_gather_into", "reduce_scatter")):
            sent = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
            for value in (n.meta["val"] for n in sent):
                found[tuple(value.shape)] = value.dtype
    return found


def mixed_precision() -> None:
    for options, outside in (({}, True), ({"precision": "bf16"}, False)):
        with artifacts():
            model, compiled, reference = pair(**options)
            everyone = batches(0)
            with torch.autocast("cpu", torch.bfloat16):
                losses = reference_step(reference, everyone)
            with torch.autocast("cpu", torch.bfloat16, enabled=outside):
                loss = compiled(**everyone[dist.get_rank()]).loss
            loss.backward()
        # The same kernels see the same numbers: only the order of the reduction differs.
        assert abs(loss.item() - losses[dist.get_rank()]) < 1e-5
        check_gradients(model, reference, 1e-5)
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        gathered = travelling(model, "forward")
        assert gathered[(5, 6)] is torch.bfloat16, "up.weight"
        assert gathered[(34, 9)] is torch.bfloat16, "head.weight"
        assert gathered[(34, 6)] is torch.float32, "embed.weight"
        assert set(travelling(model, "backward").values()) >= {torch.float32}
        reduced = travelling(model, "backward")
        assert reduced[(10, 6)] is torch.float32 and reduced[(68, 9)] is torch.float32


def test_mixed_precision() -> None:
    run_ranks(mixed_precision, 2)


class Checkpointed(Net):
    def forward(self, ids: torch.Tensor) -> Output:
        x = checkpoint(self.hidden, ids, use_reentrant=False)
        logits = self.head(x)
        return Output(nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))


def saved_shapes(loss: torch.Tensor) -> list[tuple[int, ...]]:
    """Shapes of what the compiled functions behind ``loss`` keep for their backwards."""
    found: list[tuple[int, ...]] = []
    frontier, seen = [loss.grad_fn], set()
    while frontier:
        node = frontier.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [tuple(t.shape) for t in getattr(node, "saved_tensors", ())]
            frontier += [following for following, _ in node.next_functions]
    return found


def checkpointing() -> None:
    model, compiled, reference = pair(Checkpointed)
    for step in (0, 1):
        backward(compiled, reference, batches(step))
        check_gradients(model, reference)
    saved = saved_shapes(compiled(**batch(0, 0)).loss)
    assert saved and not {tuple(p.shape) for p in reference.parameters() if p.ndim > 1} & {*saved}, saved
    model, compiled, reference = pair(small_llama)
    for m in (model, reference):
        m.gradient_checkpointing_enable({"use_reentrant": False})
        m.train()
    ids = [b["ids"] for b in batches(0)]
    everyone = [{"input_ids": i, "labels": i, "use_cache": False} for i in ids]
    backward(compiled, reference, everyone)
    check_gradients(model, reference)
    saved = saved_shapes(compiled(**everyone[0]).loss)
    assert saved and not {tuple(p.shape) for p in reference.parameters() if p.ndim > 1} & {*saved}, saved


def test_activation_checkpointing() -> None:
    run_ranks(checkpointing, 2)


# --- shapes ----------------------------------------------------------------------------------------


def sizes_change() -> int:
    model, compiled, reference = pair()
    for step, (rows, length) in enumerate([(2, 7), (3, 9), (5, 4), (2, 11), (4, 8)]):
        backward(compiled, reference, batches(step, rows=rows, length=length))
        check_gradients(model, reference)
    job = prepared_job(model)
    assert job is not None
    return len(job.reports)


def sizes_differ_between_ranks() -> None:
    model, compiled, reference = pair()
    for step in range(4):
        # Rank 1's sizes change at the second step, rank 0's at the third.
        sizes = [(2, 7 if step < 2 else 9 + step), (3, 5 if step < 1 else 6 + step)]
        everyone = [batch(step, r, *size) for r, size in enumerate(sizes)]
        backward(compiled, reference, everyone)
        check_gradients(model, reference)


def test_sizes() -> None:
    assert max(run_ranks(sizes_change, 2)) <= 2
    run_ranks(sizes_differ_between_ranks, 2)


# --- how it is asked for ---------------------------------------------------------------------------


def forms() -> None:
    """In place, with a mode, with a plan and with a path to one."""
    plan = autodist.Plan(lowering="eager", zero=2)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "plan.json")
        plan.dump(path)
        for options in (plan, path):
            model, _, reference = pair()
            model.compile(backend="autodist", options=options)
            backward(model, reference, batches(0))
            check_gradients(model, reference)
            job = prepared_job(model)
            assert job is not None and job.plan.zero == 2 and job.plan.dp == 2 and len(job.reports) == 1
    model, _, reference = pair()
    autodist.prepare(model, plan)
    backward(torch.compile(model, backend="autodist", mode="max-autotune"), reference, batches(0))
    check_gradients(model, reference)


def refusals() -> None:
    model = Net()
    here = batch(0, dist.get_rank())

    def compiled(**asked: Any) -> Callable[[], Any]:
        torch._dynamo.reset()
        return lambda: torch.compile(model, backend="autodist", **asked)(**here)

    message = refusal(Exception, compiled(mode="fastest"))
    assert "PlanError" in message and "mode must be one of" in message and "'fastest'" in message
    message = refusal(Exception, compiled(options={"zeros": 3}))
    assert "unknown plan field 'zeros'; the fields are zero, dp," in message
    message = refusal(Exception, compiled(options={"dp": 4}))
    assert "plan field 'dp' is 4, but 2 ranks are running" in message
    assert not any(isinstance(p, DTensor) for p in model.parameters()), "refused, and prepared all the same"
    autodist.prepare(model, EAGER)
    message = refusal(Exception, compiled(options={**EAGER, "zero": 1}))
    assert "was prepared with zero=3, and is now asked to run with zero=1" in message


def test_forms_and_refusals() -> None:
    run_ranks(forms, 2)
    run_ranks(refusals, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero": 4}, "'zero' must be 0, 1, 2 or 3; got 4"),
        ({"zero": True}, "'zero' must be 0, 1, 2 or 3; got True"),
        ({"dp": 0}, "'dp' must be a positive number of ranks, or None to derive it; got 0"),
        ({"precision": "fp8"}, "'precision' must be 'fp32' or 'bf16'; got 'fp8'"),
        ({"lowering": "jit"}, "'lowering' must be 'inductor' or 'eager'; got 'jit'"),
        ({"timeout": -1}, "'timeout' must be a positive number of seconds; got -1"),
        ({"memory": "60 apples"}, 'such as "60GB" or "512MiB"; got \'60 apples\''),
        ({"memory": 0}, "got 0"),
        ({"hardware": "abacus"}, "plan field 'hardware'"),
        ({"sharding": 3}, "unknown plan field 'sharding'"),
        (3, "got int"),
        ("no/such/plan.json", "cannot read the plan file 'no/such/plan.json'"),
    ],
)
def test_a_plan_names_what_is_wrong(options: Any, message: str) -> None:
    assert message in refusal(autodist.PlanError, lambda: autodist.Plan.make(options))


def test_one_rank_needs_no_process_group() -> None:
    model, compiled, reference = pair()
    both = steppers(OPTIMIZERS["adamw"], model, reference)
    for step in (0, 1):
        for m in (compiled, reference):
            m(**batch(step, 0)).loss.backward()
        for stepper in both:
            stepper.step()
            stepper.zero_grad()
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert type(found) is nn.Parameter and error(found, wanted) < 1e-5
    assert type(next(autodist.prepare(model, EAGER).parameters())) is nn.Parameter


# --- prepare ---------------------------------------------------------------------------------------


def built_on_meta() -> None:
    for build in (Net, CASES["t5"].build, small_llama):
        torch.manual_seed(7)
        reference = build()
        with torch.device("meta"):
            model = build()
        torch.manual_seed(7)
        autodist.prepare(model, EAGER)
        for name, value in model.state_dict().items():
            assert torch.equal(full(value), reference.state_dict()[name]), name
        for name, value in model.named_buffers():
            assert torch.equal(value, dict(reference.named_buffers())[name]), name
    with torch.device("meta"):
        model = Net()
    torch.manual_seed(0)
    reference = Net()
    both = steppers(OPTIMIZERS["sgd"], model, reference)  # on meta, and re-pointed
    torch.manual_seed(0)
    autodist.prepare(model, EAGER)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="autodist")
    for step in (0, 1):
        backward(compiled, reference, batches(step))
        check_gradients(model, reference)
        for stepper in both:
            stepper.step()
            stepper.zero_grad()
    check_parameters(model, reference)


class Unfilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 2))


def preparations() -> None:
    """What prepare() accepts and refuses."""
    with torch.device("meta"):
        unfilled = nn.Sequential(nn.Linear(2, 2), Unfilled())
    message = refusal(ValueError, lambda: autodist.prepare(unfilled, EAGER))
    assert "'1.table' was built on meta and nothing has given it a value" in message
    model = autodist.prepare(Net(), EAGER)
    parameters = list(model.parameters())
    assert autodist.prepare(model) is autodist.prepare(model, EAGER) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    message = refusal(autodist.PlanError, lambda: autodist.prepare(model, {"zero": 1}))
    assert "was prepared with zero=3" in message
    for refused, name in (
        (nn.Embedding(4, 3, max_norm=1.0), "max_norm"),
        (nn.LazyLinear(3), "no shape"),
    ):
        message = refusal(autodist.PrepareError, lambda refused=refused: autodist.prepare(refused, EAGER))
        assert name in message


class Untraced(Net):
    """Dynamo runs this eagerly and never asks a backend."""

    @torch.compiler.disable
    def forward(self, ids: torch.Tensor) -> Output:
        return super().forward(ids)


class Recurrent(nn.Module):
    """Dynamo gives up at the LSTM: of the whole forward, or, in newer versions, there alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.rnn = nn.LSTM(6, 5, batch_first=True)

    def forward(self, ids: torch.Tensor) -> Output:
        return Output(self.rnn(self.embed(ids))[0].square().mean())


def untraceable() -> list[str]:
    messages = []
    for build in (Untraced, Recurrent):
        model, compiled, reference = pair(build)
        both = steppers(OPTIMIZERS["sgd"], model, reference)
        compiled(**batch(0, dist.get_rank())).loss.backward()
        if build is Untraced or prepared_job(model) is None:
            messages.append(refusal(autodist.PrepareError, both[0].step))
            messages.append(refusal(autodist.PrepareError, torch.compile(both[0].step, backend="eager")))
        both[0].zero_grad()
        autodist.prepare(model, EAGER)
        for step in (0, 1):
            backward(compiled, reference, batches(step))
            check_gradients(model, reference)
            for stepper in both:
                stepper.step()
                stepper.zero_grad()
        check_parameters(model, reference)
    return messages


def compiled_steps() -> None:
    """Of a model that has nothing to do with autodist, in a process that has imported it."""
    graphs = []

    def kept(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    reference = copy.deepcopy(model)
    for module in (model, reference):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend=kept) if module is model else optimizer.step
        for _ in range(3):
            module(torch.ones(2, 3)).square().sum().backward()
            step()
            optimizer.zero_grad()
    assert len(graphs) == 1
    check_parameters(model, reference)


def test_models_built_on_meta() -> None:
    run_ranks(built_on_meta, 2)


def test_prepare() -> None:
    run_ranks(preparations, 2)


def test_a_compiled_step_of_another_model() -> None:
    run_ranks(compiled_steps, 2)


def test_a_model_that_cannot_be_traced() -> None:
    for messages in run_ranks(untraceable, 2):
        for message in messages:
            assert "SGD is about to step 'embed.weight', which is not sharded" in message
