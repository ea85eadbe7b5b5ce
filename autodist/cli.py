"""The command line: ``autodist inspect``."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from autodist import __version__
from autodist.dry_run import StepError, dry_run, token_batch
from autodist.inspect import InspectError, choose_graph, find_artifacts, show, show_lengths, show_reasons
from autodist.longest import longest as longest_sequence
from autodist.plan import DEVICE, Plan, PlanError

_PLAIN_WIDTH = 160  # columns, where the output is not a terminal
_DEFAULT_HARDWARE = "h100-80g"

app = typer.Typer(
    name="autodist",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train any PyTorch model sharded, and see what the compiler does to it.",
)


class UsageError(ValueError):
    """The command line asks for something that does not exist."""


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIR | FILE.py:FUNCTION",
            help="What AUTODIST_ARTIFACTS was in a run; or a function that returns a model.",
        ),
    ],
    batch: Annotated[
        str | None,
        typer.Option(metavar="ROWSxLENGTH", help="The batch of one rank, as 4x512."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="How many ranks to compile for.")] = 8,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="The plan; default: ZeRO-3.")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help=f"The machine to predict for; default: the plan's, or {_DEFAULT_HARDWARE}."),
    ] = None,
    graph: Annotated[
        str | None, typer.Option(metavar="N", help="Which graph; default: the longest.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Show the graph after this pass.")
    ] = None,
    why: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Only the decisions on parameters and nodes with NAME in theirs."
        ),
    ] = None,
    longest: Annotated[
        bool,
        typer.Option("--longest", help="The longest sequence that fits the plan's memory, from LENGTH on."),
    ] = False,
    rank: Annotated[int, typer.Option(min=0, help="Whose artifacts of DIR to show.")] = 0,
) -> None:
    """Show what the passes do to a model: graphs, gathers, memory, time, and why.

    With FILE.py:FUNCTION the model is compiled here, without cluster, GPU or weights: FUNCTION
    returns it and is called with meta as default device. If the file also has a function
    make_batch(rows, length), it gives the batch; otherwise token ids and labels do. --longest compiles
    for one length after the other, and shows what the plan does at each.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    if longest:
        _show_longest(console, target, batch, ranks, plan, hardware)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(target)
        if ".py" in target and not folder.is_dir():
            folder = Path(scratch)
            _compile(target, batch, ranks, plan, hardware, folder)
        found = find_artifacts(folder, rank)
        chosen = choose_graph(found, graph)
        if why is not None:
            show_reasons(console, chosen, why)
        else:
            show(console, found, chosen, after)


def _compile(
    target: str, batch: str | None, ranks: int, plan: Path | None, hardware: str | None, folder: Path
) -> None:
    rows, length = _sizes(batch)
    module, make_model = _load(target)
    make_batch = getattr(module, "make_batch", None)
    wanted = _plan(plan, hardware)
    try:
        dry_run(make_model, lambda: (make_batch or token_batch)(rows, length), wanted, ranks, folder)
    except StepError as error:
        if make_batch is not None:
            raise
        raise StepError(
            f"{error}\nThe batch was token ids and labels (input_ids, labels). If the model takes "
            f"something else, define make_batch(rows, length) in {module.__file__}."
        ) from error


def _show_longest(
    console: Console, target: str, batch: str | None, ranks: int, plan: Path | None, hardware: str | None
) -> None:
    rows, length = _sizes(batch)
    module, make_model = _load(target)
    wanted = _plan(plan, hardware)
    if wanted.memory is None:
        wanted = dataclasses.replace(wanted, memory=DEVICE)
    make_batch = getattr(module, "make_batch", token_batch)
    tried = longest_sequence(make_model, make_batch, wanted, ranks, rows, length)
    found = []
    for number, one in enumerate(tried, 1):
        fits = "fits" if one.fits else "does not fit"
        print(f"autodist: try {number}: {rows} sequences of {one.length}: {fits}", file=sys.stderr)
        found.append(one)
    show_lengths(console, found)


def _plan(plan: Path | None, hardware: str | None) -> Plan:
    wanted = Plan.make(plan)
    return dataclasses.replace(wanted, hardware=hardware or wanted.hardware or _DEFAULT_HARDWARE)


def _sizes(batch: str | None) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", batch or "")
    if match is None:
        got = "nothing" if batch is None else repr(batch)
        raise UsageError(f"--batch must give rows and length of one rank's batch, as 4x512; got {got}")
    return int(match[1]), int(match[2])


def _load(target: str) -> tuple[ModuleType, Callable[[], Any]]:
    """The user's module, and the function in it that ``target`` (FILE.py:FUNCTION) names."""
    path, _, name = target.rpartition(":") if ":" in target else (target, "", "")
    file = Path(path)
    if not name:
        raise UsageError(f"say which function of '{target}' returns the model: {target}:make_model")
    if not file.is_file():
        raise UsageError(f"there is no file '{file}'")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"'{file}' cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        have = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(f"'{file}' has no function {name!r}; it has {', '.join(have) or 'none'}")
    return module, function


def main() -> None:
    """Run the command line; what goes wrong ends in a sentence, and in 2 for a person's mistakes."""
    os.environ.setdefault("AUTODIST_LOGS", "warning")
    try:
        app(prog_name="autodist")
    except Exception as error:
        if os.environ["AUTODIST_LOGS"] == "debug":
            traceback.print_exc()
        print(f"autodist: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (UsageError, PlanError, InspectError)) else 1)
