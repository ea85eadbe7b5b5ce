"""Checkpoints: bitwise on any number of ranks, readable without autodist, whole or not at all."""

from __future__ import annotations

import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from autodist import checkpoint
from autodist.checkpoint import export, load, save
from autodist.runtime.parameters import distribute, replace_parameters
from tests.ranks import run_ranks


class Model(nn.Module):
    """One of each: uneven, empty, tied, frozen, integer, 0-d and unused parameters, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.zeros(1, 4))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.order = nn.Parameter(torch.arange(5), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embed(tokens)) * self.scale + self.shift
        return self.head(self.dropout(self.body(hidden))).square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = (p for p in model.parameters() if p.requires_grad)
    groups: list[dict[str, Any]] = [{"params": [first], "lr": 0.1}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=0.01)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = (p for p in model.parameters() if p.requires_grad)
    groups: list[dict[str, Any]] = [{"params": [first], "dampening": 0.3}, {"params": rest}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def prepare(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def convert(_: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(distribute(parameter, mesh, True), parameter.requires_grad)

    replace_parameters(model, convert)
    return model


def build(seed: int, make_optimizer: Callable = adamw) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model, prepared where there are ranks, and its optimizer."""
    torch.manual_seed(seed)
    model = prepare(Model()) if dist.is_initialized() else Model()
    return model, make_optimizer(model)


def micro_step(model: nn.Module, step: int) -> float:
    loss = model((torch.arange(8) * (step + 1)) % 7)
    loss.backward()
    return loss.item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """``steps`` optimizer steps, and half of the next one's accumulation."""
    for step in range(steps):
        micro_step(model, step)
        optimizer.step()
        optimizer.zero_grad()
    micro_step(model, steps)


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    return value.detach().clone() if isinstance(value, Tensor) else value


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything a checkpoint should bring back, flat and whole."""
    state = {f"model {name}": whole(value) for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[f"grad {name}"] = whole(parameter.grad)
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"state {name} {key}"] = whole(value)
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            state[f"group {number} {key}"] = None if key == "params" else value
    return state


def state_types(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Which optimizer state is sharded: torch's optimizers refuse a mixture they did not make."""
    return {
        f"type of {name} {key}": type(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Keys that only one has, or whose values differ in type or in any bit."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return a == b

    return [k for k in left.keys() | right.keys() if not same(left.get(k), right.get(k, "none"))]


# --- the same values on any number of ranks -------------------------------------------------------


def trained_and_saved(path: str) -> dict[str, Any]:
    model, optimizer = build(0)
    train(model, optimizer, 2)
    save(path, model, optimizer, extra={"epoch": 3, "by number": {1: "one"}, "empty": {}})
    return snapshot(model, optimizer)


def loaded(path: str) -> dict[str, Any]:
    model, optimizer = build(1)
    extra = load(path, model, optimizer)
    assert extra == {"epoch": 3, "by number": {1: "one"}, "empty": {}}
    return snapshot(model, optimizer)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_value_on_another_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    path = str(tmp_path / "run")
    saved = run_ranks(trained_and_saved, ranks, path)[0]
    assert any(key.startswith("state embed") for key in saved)
    assert saved["grad embed.weight"] is not None and saved["grad unused"] is None
    assert differences(saved, loaded(path)) == []
    for state in run_ranks(loaded, 5 - ranks, path):
        assert differences(saved, state) == []
    saved = trained_and_saved(path)
    for state in run_ranks(loaded, ranks, path):
        assert differences(saved, state) == []


def resumed(path: str, make_optimizer: Callable) -> tuple[list[float], list[float], list[str]]:
    """Losses of a run that went on, and of one that was loaded; what differs at the end."""

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> list[float]:
        losses = []
        for step in range(3):
            losses.append(micro_step(model, step))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return losses

    model, optimizer = build(0, make_optimizer)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])
    torch.manual_seed(dist.get_rank())
    train(model, optimizer, 1)
    scheduler.step()
    save(path, model, optimizer, extra={"scheduler": scheduler.state_dict()})
    straight = go_on(model, optimizer, scheduler)

    other, other_optimizer = build(1, make_optimizer)
    other_scheduler = torch.optim.lr_scheduler.MultiStepLR(other_optimizer, [1, 3])
    other_scheduler.load_state_dict(load(path, other, other_optimizer)["scheduler"])
    again = go_on(other, other_optimizer, other_scheduler)
    differing = differences(snapshot(model, optimizer), snapshot(other, other_optimizer))
    differing += differences(state_types(model, optimizer), state_types(other, other_optimizer))
    return straight, again, differing


@pytest.mark.distributed
@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, make_optimizer: Callable) -> None:
    results = run_ranks(resumed, 2, str(tmp_path / "run"), make_optimizer)
    for straight, again, differing in results:
        assert straight == again and differing == []
    assert results[0][0] != results[1][0], "ranks drew the same dropout masks: this tests nothing"


def test_before_the_first_step(tmp_path: Path) -> None:
    model, optimizer = build(0, sgd)
    save(tmp_path, model, optimizer)
    fresh = snapshot(model, optimizer)
    train(model, optimizer, 1)
    assert load(tmp_path, model, optimizer) == {}
    assert differences(fresh, snapshot(model, optimizer)) == []


class Accumulator(torch.optim.Optimizer):
    """Keeps float32 state for parameters of any type, and a number that is not a tensor."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": torch.tensor(0.5), "nested": {"a": 1}})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["sum"] = torch.full(parameter.shape, 1 / 3)
            state["count"] = 5


def test_state_keeps_its_own_type(tmp_path: Path) -> None:
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = Accumulator(model.parameters())
    optimizer.step()
    save(tmp_path, model, optimizer)
    other = nn.Linear(3, 2, dtype=torch.bfloat16)
    fresh = Accumulator(other.parameters())
    fresh.param_groups[0].update(lr=torch.tensor(0.0), nested={"a": 2})
    load(tmp_path, other, fresh)
    assert fresh.state[other.weight]["sum"].dtype == torch.float32
    assert differences(snapshot(model, optimizer), snapshot(other, fresh)) == []


class Operators(TorchDispatchMode):
    """Names of the operators that ran; and whether two gathered tensors were ever alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.most_alive = 0
        self._gathered: list[weakref.ref] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        if "all_gather_into_tensor" in func.name():
            self._gathered.append(weakref.ref(result.untyped_storage()))
            self.most_alive = max(self.most_alive, sum(r() is not None for r in self._gathered))
        return result


def operators_of_a_save(path: str) -> set[str]:
    model, optimizer = build(0)
    train(model, optimizer, 1)
    with Operators() as seen:
        save(path, model, optimizer)
    return seen.names


@pytest.mark.distributed
def test_saving_gathers_nothing(tmp_path: Path) -> None:
    for names in run_ranks(operators_of_a_save, 2, str(tmp_path)):
        assert not any("all_gather_into_tensor" in n or "unshard" in n for n in names), names


def test_compiled_modules_lend_no_names(tmp_path: Path) -> None:
    model, optimizer = build(0)
    train(model, optimizer, 1)
    expected = snapshot(model, optimizer)
    model.body = torch.compile(model.body)  # type: ignore
    save(tmp_path, torch.compile(model), optimizer)  # type: ignore[arg-type]
    assert "_orig_mod" not in str(dcp.FileSystemReader(tmp_path).read_metadata())
    plain, plain_optimizer = build(1)
    load(tmp_path, plain, plain_optimizer)
    assert differences(expected, snapshot(plain, plain_optimizer)) == []
    other, other_optimizer = build(1)
    load(tmp_path, torch.compile(other), other_optimizer)  # type: ignore[arg-type]
    assert differences(expected, snapshot(other, other_optimizer)) == []


class Versioned(nn.Module):
    """State that is not a tensor, and a state dict that is not the parameters themselves."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.version = version
        self.weight = nn.Parameter(torch.full((3,), float(version)))
        self.register_state_dict_post_hook(lambda m, state, *_: state.update(weight=-m.weight))
        self.register_load_state_dict_pre_hook(
            lambda m, state, *_: state.update(weight=-state["weight"])
        )

    def get_extra_state(self) -> dict[str, int]:
        return {"version": self.version}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.version = state["version"]


def test_a_model_with_a_state_dict_of_its_own(tmp_path: Path) -> None:
    save(tmp_path, Versioned(7))
    model = Versioned(2)
    load(tmp_path, model)
    assert model.version == 7 and model.weight.tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match="'_extra_state' in the model's state is a dict"):
        export(tmp_path / "export", model)


# --- without autodist -----------------------------------------------------------------------------

READER = """
import io, sys, torch
from typing import Any
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

{definitions}

path, expected = sys.argv[1], torch.load(sys.argv[2])
torch.manual_seed(1)
model = Model()
optimizer = adamw(model)
{snippet}
assert "autodist" not in sys.modules
found = {{f"model {{name}}": value for name, value in model.state_dict().items()}}
for name, parameter in model.named_parameters():
    for key, value in optimizer.state.get(parameter, {{}}).items():
        found[f"state {{name}} {{key}}"] = value
keys = [key for key in expected if key.startswith(("model", "state"))]
bad = [key for key in keys if not torch.equal(found[key], expected[key])]
assert not bad, bad
assert optimizer.state[model.embed.weight]["step"] == 2
assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.01]
state = {{"extra": None}}
dcp.load(state, checkpoint_id=path)
assert torch.load(io.BytesIO(state["extra"]), weights_only=False)["epoch"] == 3
"""


def documented_snippet() -> str:
    """The indented block after the first ``::`` in ``save``'s docstring."""
    lines = inspect.cleandoc(save.__doc__ or "").partition("::\n")[2].splitlines()
    block = [line for line in lines if not line or line.startswith("    ")]
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    return textwrap.dedent("\n".join(block[:end]))


@pytest.mark.distributed
def test_the_documented_way_to_read_it_without_autodist(tmp_path: Path) -> None:
    saved = run_ranks(trained_and_saved, 3, str(tmp_path / "run"))[0]
    torch.save(saved, tmp_path / "expected.pt")
    snippet = documented_snippet()
    assert "dcp.load(state, checkpoint_id=path)" in snippet
    # The model has parameters without optimizer state: the planner the docstring names is needed.
    snippet = snippet.replace(
        "checkpoint_id=path",
        "checkpoint_id=path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True)",
    )
    definitions = inspect.getsource(Model) + "\n\n" + inspect.getsource(adamw)
    script = READER.format(definitions=definitions, snippet=snippet)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, tmp_path / "run", tmp_path / "expected.pt"],
        check=True,
        timeout=120,
    )


# --- whole or not at all --------------------------------------------------------------------------

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def filled(value: float) -> nn.Sequential:
    """A small model with ``value`` everywhere, so that a mixture of two saves would show."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def content(path: Path) -> set[float]:
    model = filled(0.0)
    load(path, model)
    return {float(v) for parameter in model.parameters() for v in parameter.detach().flatten()}


def die_at(event_number: int) -> None:
    """Kill this process just before its ``event_number``-th change to a file from now on."""
    remaining = event_number

    def hook(event: str, args: Any) -> None:
        nonlocal remaining
        if event in FILE_EVENTS:
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked_rank(rank: int, path: Path, store: Path, victim: int, event_number: int) -> int:
    """A child process that saves 2.0 as one of two ranks; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        meeting = dist.FileStore(str(store), 2)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2)
        model = prepare(filled(2.0))
        if rank == victim:
            die_at(event_number)
        save(path, model)
        os._exit(0)
    except BaseException:
        os._exit(1)


def exit_codes(children: list[int], patience: float) -> list[int]:
    """How each child ended; those still waiting for a dead peer after ``patience`` are killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def kill_at_every_point(folder: str) -> None:
    """Save 2.0 over 1.0 on two ranks, killing one of them before each thing it does to a file."""
    torch.set_num_threads(1)
    good, path = Path(folder, "good"), Path(folder, "run")
    save(good, filled(1.0))
    outcomes: list[list[set[float]]] = [[], []]
    for victim in range(2):
        for event_number in range(1, 100):
            shutil.copytree(good, path)
            store = Path(folder, f"store-{victim}-{event_number}")
            children = [forked_rank(r, path, store, victim, event_number) for r in range(2)]
            codes = exit_codes(children, patience=20)
            found = content(path)
            if codes != [0, 0]:
                assert codes[victim] == -signal.SIGKILL, codes
                outcomes[victim].append(found)
            save(path, filled(3.0))
            assert content(path) == {3.0}
            assert {p.name[:14] for p in path.iterdir()} == {".metadata", "autodist-data-"}
            assert len(list(path.iterdir())) == 2, list(path.iterdir())
            shutil.rmtree(path)
            if codes == [0, 0]:
                break
    assert outcomes[0] == sorted(outcomes[0], key=max), outcomes
    assert {1.0} in outcomes[0] and {2.0} in outcomes[0], "never killed on both sides of the commit"
    assert len(outcomes[1]) > 1 and all(found == {1.0} for found in outcomes[1]), outcomes


@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked ranks")
def test_killing_any_rank_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    # In a process of its own, which has no threads and no process group when it forks.
    code = "import sys; from tests.test_checkpoint import kill_at_every_point as f; f(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )


def disk_full_on_one_rank(path: str) -> tuple[str, set[float]]:
    """The second save fails on rank 1, where no file may grow beyond half of its share."""
    model = nn.Linear(100, 1000, bias=False)
    nn.init.constant_(model.weight, 1.0)
    save(path, prepare(model))
    nn.init.constant_(model._parameters["weight"], 2.0)  # type: ignore[arg-type]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        save(path, model)
    except OSError as error:
        sentence = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    load(path, model)
    return sentence, set(whole(model._parameters["weight"]).flatten().tolist())


@pytest.mark.distributed
def test_a_rank_that_cannot_write_is_named(tmp_path: Path) -> None:
    for sentence, values in run_ranks(disk_full_on_one_rank, 2, str(tmp_path)):
        assert sentence.startswith(f"the checkpoint at '{tmp_path}' was not written")
        assert sentence.endswith("rank 1: OSError(27, 'File too large')"), sentence
        assert values == {1.0}


def test_leftovers_go_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk may be full of what the last save left."""
    save(tmp_path, filled(1.0))
    leftover = tmp_path / f"autodist-data-{0:032x}"
    leftover.mkdir()

    def full_disk(*_: Any, **__: Any) -> None:
        assert not leftover.exists()
        raise OSError("no space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(dcp, "save", full_disk)
        save(tmp_path, filled(2.0))
    assert content(tmp_path) == {1.0}


def test_files_that_are_not_ours_stay(tmp_path: Path) -> None:
    (tmp_path / "autodist-data-mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, filled(1.0))
    export(tmp_path, filled(1.0))
    save(tmp_path, filled(2.0))
    assert (tmp_path / "autodist-data-mine").is_dir() and (tmp_path / "notes.txt").exists()
    assert (tmp_path / "model.safetensors").exists() and content(tmp_path) == {2.0}


# --- errors are sentences -------------------------------------------------------------------------


def test_a_path_without_a_complete_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint: it has no"):
        load(tmp_path / "nowhere", filled(0.0))
    save(tmp_path, filled(1.0))
    (data,) = tmp_path.glob("autodist-data-*/__0_0.distcp")
    os.truncate(data, 10)
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint: '.*' is 10 bytes long"):
        load(tmp_path, filled(0.0))


def test_another_model(tmp_path: Path) -> None:
    save(tmp_path, filled(1.0))
    other = nn.Sequential(nn.Linear(3, 6), nn.Linear(5, 2, bias=False))
    other.register_buffer("mean", torch.zeros(2))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError) as raised:
        load(tmp_path, other)
    for part in (
        "lacks 'mean', which the model has",
        "has '1.bias', which the model lacks",
        "'0.weight' has shape (5, 3) in it and (6, 3) in the model",
    ):
        assert part in str(raised.value)
    assert differences(before, dict(other.state_dict())) == []


def test_another_optimizer(tmp_path: Path) -> None:
    model = filled(1.0)
    save(tmp_path, model)
    with pytest.raises(ValueError, match="saved without an optimizer"):
        load(tmp_path, model, torch.optim.SGD(model.parameters()))
    save(tmp_path, model, torch.optim.SGD(model[0].parameters()))
    with pytest.raises(ValueError, match=r"only one of them has '1\.bias', '1\.weight'"):
        load(tmp_path, model, torch.optim.SGD(model.parameters()))
    two_groups = torch.optim.SGD([{"params": m.parameters()} for m in model])
    with pytest.raises(ValueError, match="1 parameter groups and the optimizer 2"):
        load(tmp_path, model, two_groups)


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    model = filled(1.0)
    with pytest.raises(ValueError, match=r"a parameter of shape \(5, 3\) that the model does not"):
        save(tmp_path, model[1], torch.optim.SGD(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[next(model.parameters())]["history"] = [torch.ones(1)]
    with pytest.raises(ValueError, match=r"state 'history' of parameter '0\.weight' is a list"):
        save(tmp_path, model, optimizer)
    with pytest.raises(ValueError, match=r"on the meta device, which hold no values: '0\.weight'"):
        save(tmp_path, model.to("meta"))
    assert not any(tmp_path.iterdir())


def refused_on_ranks(folder: str) -> list[str]:
    model = prepare(filled(1.0))
    optimizer = torch.optim.SGD(model.parameters())
    weight = next(model.parameters())
    sentences = []

    def attempt(path: str, **extra: Any) -> None:
        with pytest.raises((ValueError, OSError)) as raised:
            save(path, model, optimizer, extra=extra)
        sentences.append(str(raised.value))

    attempt(f"{folder}/run", average=weight)
    attempt(f"{folder}/file/run")
    optimizer.state[weight]["local"] = torch.ones(2)
    attempt(f"{folder}/run")
    return sentences


@pytest.mark.distributed
def test_every_rank_refuses_alike(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for in_extra, in_the_way, local in run_ranks(refused_on_ranks, 2, str(tmp_path)):
        assert "extra holds a DTensor" in in_extra
        assert "Not a directory" in in_the_way
        assert "state 'local' of parameter '0.weight' is a plain tensor of shape (2,)" in local


# --- export ---------------------------------------------------------------------------------------


def exported_llama(folder: str) -> tuple[dict[str, Tensor], int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=33,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = prepare(LlamaForCausalLM(config))
    with Operators() as seen:
        export(f"{folder}/one", model)
    checkpoint.SHARD_BYTES = 4000
    try:
        export(f"{folder}/many", model)
        export(f"{folder}/many", model)
    finally:
        checkpoint.SHARD_BYTES = 5_000_000_000
    return {name: whole(value) for name, value in model.state_dict().items()}, seen.most_alive


@pytest.mark.distributed
def test_an_export_is_what_from_pretrained_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (expected, alive), (_, alive_elsewhere) = run_ranks(exported_llama, 2, str(tmp_path))
    assert max(alive, alive_elsewhere) <= 2  # gloo's thread may let go of the last one a bit late
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == ["config.json", "model.safetensors"]
    written = load_file(tmp_path / "one" / "model.safetensors")
    assert written.keys() == expected.keys() - {"lm_head.weight"}
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 1 and {p.name for p in files} == set(index["weight_map"].values())
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in written.values())
    for folder in ("one", "many"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert differences(expected, dict(model.state_dict())) == []


def test_an_export_replaces_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path, filled(1.0))
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1)
    export(tmp_path, torch.compile(filled(2.0)))  # type: ignore[arg-type]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        *(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
        "model.safetensors.index.json",
    ]
    assert load_file(tmp_path / names[0]).keys() == {"0.weight"}
