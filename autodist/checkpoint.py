"""Checkpoints: a run's state on disk, whole or not at all.

A checkpoint is a torch.distributed.checkpoint (DCP) of one nested dictionary, under the names the
parameters had before the model was prepared or compiled:

    model       {name: tensor}                model.state_dict(); plain tensors from rank 0
    optimizer   state         {name: {key: value}}
                param_groups  [{params: [name, ...], lr: value, ...}, ...]
    grad        {name: tensor}                the gradients present at the save
    rng         {rank: {device type: state}}  torch's generators, if an optimizer was given
    extra       bytes                         torch.save of the caller's mapping

On disk ``path/.metadata`` says where each value lies, and the values lie in
``path/autodist-data-<id>/``. A save writes a data folder of its own; replacing ``.metadata`` in one
``os.replace`` *commits* it.

Invariant: what ``.metadata`` refers to is complete, and is deleted only after another ``.metadata``
has taken its place. So at every instant ``path`` is either the old checkpoint or the new one, and
any data folder that ``.metadata`` does not refer to was left by an interrupted save and may go.

Names come from ``named_parameters`` and ``state_dict``, never from attributes: reading an attribute
of a prepared module gathers the weight. (That is why DCP's own ``get_state_dict`` is not used. It
also runs an optimizer step to fill in state that does not exist yet, which is not what was saved.)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate

from autodist.runtime import compat
from autodist.runtime.compat import tree_any
from autodist.runtime.parameters import whole_value
from autodist.runtime.stage_parameters import as_stage_gradient, is_here, owners

METADATA = ".metadata"
DATA = "autodist-data-"
EXPORT = "autodist-export-"
SHARD_BYTES = 5_000_000_000

Result = TypeVar("Result")
Entries = dict[tuple[Any, ...], Any]  # path in the saved dictionary -> DCP's description of it


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save ``model``, and the run around it, to the folder ``path``. Every rank calls this.

    Saved: parameters and persistent buffers; gradients, where there are any, so that a run stopped
    in the middle of accumulating resumes bitwise; with ``optimizer``, its state and groups and each
    rank's torch random state; and rank 0's ``extra``, which may hold anything picklable, such as
    ``{"scheduler": scheduler.state_dict()}``.

    ``path`` must be on a file system all ranks share. A checkpoint already there is replaced when
    the new one is complete and not before, so there must be room for both. Whatever kills the
    processes, at whatever point, the last complete checkpoint still loads; the next save removes
    the leftovers.

    One process reads it without autodist, into any model with the same names::

        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import (
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        state = {
            "model": model.state_dict(),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.load(state, checkpoint_id=path)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    A parameter that never had a gradient has no optimizer state to read: give ``dcp.load`` the
    argument ``planner=dcp.DefaultLoadPlanner(allow_partial_load=True)`` then. ``extra`` is loaded
    into ``{"extra": None}``, as bytes for ``torch.load(io.BytesIO(...), weights_only=False)``.

    Raises:
        ValueError: something that could not be loaded again: an optimizer holding parameters the
            model does not have, optimizer state that differs between ranks, a sharded tensor in
            ``extra``, or a model on the meta device.
        OSError: ``path`` cannot be written on some rank, or is not shared by the ranks; what was
            there is untouched.
    """
    root, state = Path(path), _run_state(model, optimizer, extra)
    folder = _on_rank_0(partial(_begin, root))
    with _failing_as(f"the checkpoint at '{root}' was not written, and the last one is untouched"):
        dcp.save(
            state,
            storage_writer=_Writer(root / folder),
            planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
        )
    _on_rank_0(partial(_commit, root, folder))


def load(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Load what :func:`save` wrote into ``model`` and ``optimizer``; returns ``extra``.

    Every rank calls this, on any number of ranks, whatever number saved: each reads its own shards.
    Prepare a model that is to be sharded first: optimizer state loaded before cannot follow it.

    Values come back bitwise where the types agree, and are cast to the model's types where not.
    Gradients are restored too, and cleared where none were saved. With ``optimizer`` its state is
    replaced, and, if as many ranks load as saved, each rank's torch random state is set; with
    another number of ranks random states are left as they are. Learning-rate schedulers write into
    the optimizer when they are built, so build them first and load their state from ``extra`` last.

    Checkpoints hold pickled objects: load only what you trust.

    Raises:
        FileNotFoundError: ``path`` holds no complete checkpoint.
        ValueError: names, shapes or parameter groups do not match. Nothing has been changed then.
        OSError: some rank could not read its part.
    """
    root = Path(path)
    entries = _entries(_on_rank_0(partial(_complete_metadata, root)))
    model_state = _model_state(model)
    _check_model(root, model_state, entries)
    with _failing_as(f"the checkpoint at '{root}' could not be read"):
        described = compat.load_checkpoint_keys(str(root), {"optimizer.param_groups", "extra"})
    if optimizer is not None:
        saved_groups = described.get("optimizer", {}).get("param_groups")
        _check_groups(root, model, optimizer, saved_groups)
    target: dict[str, Any] = {"model": model_state, "grad": _gradient_targets(model, entries)}
    if optimizer is not None:
        target["optimizer"] = {"state": _optimizer_targets(model, optimizer, entries)}
        target["rng"] = _random_targets(entries)
    with _failing_as(f"the checkpoint at '{root}' could not be read"):
        dcp.load(target, checkpoint_id=root)
    _set_model(model, target["model"])
    for name, parameter in _parameters(model):
        parameter.grad = target["grad"].get(name)
        if owners(parameter):
            as_stage_gradient(parameter)
    if optimizer is not None:
        _set_optimizer(model, optimizer, target["optimizer"]["state"], saved_groups)
        _set_random_state(target["rng"])
    packed = described.get("extra")
    return {} if packed is None else _unpack_extra(packed)


def export(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write ``model``'s weights to the folder ``path`` as safetensors. Every rank calls this.

    Files, names and index are those of transformers' ``save_pretrained``: one
    ``model.safetensors``, or shards of at most 5 GB with ``model.safetensors.index.json``; and
    ``config.json`` where ``model.config`` can write itself. A tensor known under several names is
    written once, under the first.

    Parameters are gathered one by one, so no rank's device holds the whole model; rank 0 holds one
    file's worth in host memory, and it alone writes. Files of an earlier export are replaced once
    all new ones are complete.

    Raises:
        ValueError: the model's state holds something other than tensors, or is on the meta device.
        OSError: ``path`` cannot be written.
    """
    root, entries = Path(path), list(_distinct_tensors(model))
    shards = _split(entries)
    names = _file_names(len(shards))
    folder = _on_rank_0(partial(_new_folder, root, EXPORT, set()))
    for file_name, shard in zip(names, shards, strict=True):
        whole = {name: host for name, value in shard if (host := _on_host(value)) is not None}
        _on_rank_0(partial(save_file, whole, root / folder / file_name, metadata={"format": "pt"}))
    _on_rank_0(partial(_finish_export, root, folder, model, dict(zip(names, shards, strict=True))))


# --- what is saved --------------------------------------------------------------------------------


def _run_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The dictionary of the module's docstring, as this rank sees it."""
    grads = {name: p.grad for name, p in _parameters(model) if p.grad is not None}
    state: dict[str, Any] = {"model": _model_state(model), "grad": grads}
    if optimizer is not None:
        state["optimizer"] = _optimizer_state(model, optimizer)
        state["rng"] = {str(_rank()): _random_state(model)}
    if extra is not None:
        state["extra"] = _pack_extra(extra)
    return state


def _clean(name: str) -> str:
    """``name`` without the level ``torch.compile`` adds for each module it wraps."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once, under its first name."""
    for name, parameter in model.named_parameters():
        yield _clean(name), parameter


def _model_state(model: nn.Module, keep_vars: bool = False) -> dict[str, Any]:
    state = {_clean(n): v for n, v in model.state_dict(keep_vars=keep_vars).items()}
    on_meta = [n for n, v in state.items() if isinstance(v, Tensor) and v.is_meta]
    if on_meta:
        raise ValueError(
            f"the model has tensors on the meta device, which hold no values: {_listing(on_meta)}; "
            "materialise it first (model.to_empty, or autodist.prepare)"
        )
    return state


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with names for numbers."""
    packed, names = optimizer.state_dict(), _optimizer_names(model, optimizer)
    parameters = dict(_parameters(model))
    state = {names[number]: values for number, values in packed["state"].items()}
    for name, values in state.items():
        for key, value in values.items():
            _check_state_value(name, parameters[name], key, value)
    groups = [{**g, "params": [names[n] for n in g["params"]]} for g in packed["param_groups"]]
    return {"state": state, "param_groups": groups}


def _optimizer_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """The name of the parameter behind each number in ``optimizer.state_dict()``."""
    known = {id(parameter): name for name, parameter in _parameters(model)}
    names: dict[int, str] = {}
    packed = optimizer.state_dict()["param_groups"]
    for group, numbers in zip(optimizer.param_groups, packed, strict=True):
        for parameter, number in zip(group["params"], numbers["params"], strict=True):
            if id(parameter) not in known:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that the "
                    "model does not, so it has no name in a checkpoint: pass the module that holds "
                    "every parameter of the optimizer"
                )
            names[number] = known[id(parameter)]
    return names


def _check_state_value(name: str, parameter: nn.Parameter, key: Any, value: Any) -> None:
    """Refuse optimizer state that another number of ranks could not take over."""
    sharded = isinstance(parameter, DTensor) and parameter.placements != (Replicate(),)
    plain = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not isinstance(key, str) or isinstance(value, (Mapping, list)):
        trouble = f"a {type(value).__name__}; only tensors and plain values can change ranks"
    elif sharded and plain and value.ndim > 0:
        trouble = (
            f"a plain tensor of shape {tuple(value.shape)} while the parameter is sharded, so each "
            "rank has its own; keep it as a DTensor (torch.zeros_like(parameter) gives one)"
        )
    else:
        return
    raise ValueError(f"the optimizer's state {key!r} of parameter '{name}' is {trouble}")


def _random_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of this process's generators: the CPU's, and that of the device the model is on."""
    states = {"cpu": torch.get_rng_state()}
    for kind in sorted({p.device.type for p in model.parameters()} - {"cpu"}):
        states[kind] = torch.get_device_module(kind).get_rng_state()
    return states


def _pack_extra(extra: Mapping[str, Any]) -> bytes:
    # Bytes, because DCP would flatten a dictionary and lose its empty parts and non-string keys.
    if tree_any(lambda leaf: isinstance(leaf, DTensor), dict(extra)):
        raise ValueError(
            "extra holds a DTensor, of which only rank 0's shard would be saved: make it a buffer "
            "of the model, or pass its full_tensor()"
        )
    buffer = io.BytesIO()
    torch.save(dict(extra), buffer)
    return buffer.getvalue()


def _unpack_extra(packed: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)


# --- what is loaded, and where it goes ------------------------------------------------------------


def _entries(metadata: Metadata) -> Entries:
    paths = compat.checkpoint_paths(metadata)
    return {paths[key]: entry for key, entry in metadata.state_dict_metadata.items()}


def _below(entries: Entries, *prefix: str) -> Entries:
    """The entries whose path starts with ``prefix``, by the rest of their path."""
    depth = len(prefix)
    return {path[depth:]: entry for path, entry in entries.items() if path[:depth] == prefix}


def _check_model(root: Path, state: dict[str, Any], entries: Entries) -> None:
    saved = _below(entries, "model")
    names = {str(path[0]) for path in saved}
    if not names:
        raise ValueError(
            f"the checkpoint at '{root}' was not written by autodist.save: it has no model in it"
        )
    complaints = []
    if missing := sorted(state.keys() - names):
        complaints.append(f"it lacks {_listing(missing)}, which the model has")
    if unexpected := sorted(names - state.keys()):
        complaints.append(f"it has {_listing(unexpected)}, which the model lacks")
    for name, value in state.items():
        size = getattr(saved.get((name,)), "size", None)
        if isinstance(value, Tensor) and size is not None and size != value.shape:
            shapes = f"{tuple(size)} in it and {tuple(value.shape)} in the model"
            complaints.append(f"'{name}' has shape {shapes}")
    if complaints:
        raise ValueError(
            f"the checkpoint at '{root}' is of another model: {'; '.join(complaints)}. "
            "Build the model as it was when it was saved"
        )


def _check_groups(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: list[dict[str, Any]] | None,
) -> None:
    if saved is None:
        raise ValueError(
            f"the checkpoint at '{root}' was saved without an optimizer: load it without one"
        )
    names = _optimizer_names(model, optimizer)
    groups = [[names[n] for n in g["params"]] for g in optimizer.state_dict()["param_groups"]]
    if len(groups) != len(saved):
        raise ValueError(
            f"the checkpoint at '{root}' has {len(saved)} parameter groups and the optimizer "
            f"{len(groups)}: build the optimizer with the groups it was saved with"
        )
    for number, (here, there) in enumerate(zip(groups, saved, strict=True)):
        differing = sorted(set(here) ^ set(there["params"]))
        if differing:
            raise ValueError(
                f"parameter group {number} of the optimizer is not the one in the checkpoint at "
                f"'{root}': only one of them has {_listing(differing)}. Build the optimizer with "
                "the groups it was saved with"
            )


def _gradient_targets(model: nn.Module, entries: Entries) -> dict[str, Tensor]:
    saved = {path[0] for path in _below(entries, "grad")}
    return {
        name: torch.empty_like(p.detach()) if p.grad is None else p.grad
        for name, p in _parameters(model)
        if name in saved and _is_here(p)
    }


def _is_here(parameter: nn.Parameter) -> bool:
    """Whether this rank holds any of a parameter: of a pipeline's, a rank may hold nothing."""
    return not isinstance(parameter, DTensor) or is_here(parameter)


def _optimizer_targets(
    model: nn.Module, optimizer: torch.optim.Optimizer, entries: Entries
) -> dict[str, dict[str, Any]]:
    """A place for each saved value: the tensor the optimizer already has there, or a new one."""
    parameters, names = dict(_parameters(model)), _optimizer_names(model, optimizer)
    present = {names[number]: s for number, s in optimizer.state_dict()["state"].items()}
    targets: dict[str, dict[str, Any]] = {}
    for (name, key), entry in _below(entries, "optimizer", "state").items():
        if not _is_here(parameters[name]):
            continue
        place = present.get(name, {}).get(key)
        if not isinstance(entry, TensorStorageMetadata):
            place = None
        elif not _fits(place, entry):
            place = _new_state(parameters[name], key, entry)
        targets.setdefault(name, {})[key] = place
    return targets


def _fits(place: Any, entry: TensorStorageMetadata) -> bool:
    return (
        isinstance(place, Tensor)
        and place.shape == entry.size
        and place.dtype == entry.properties.dtype
    )


def _new_state(parameter: nn.Parameter, key: str, entry: TensorStorageMetadata) -> Tensor:
    """Room for a state tensor in an optimizer that has not made it yet.

    It goes where the parameter goes if it has its shape. ``step`` never does: torch's optimizers
    keep that as a scalar of their own, and ``Optimizer.load_state_dict`` knows it by the same name.
    """
    dtype = entry.properties.dtype
    if entry.size == parameter.shape and key != "step":
        return torch.empty_like(parameter.detach(), dtype=dtype)
    if isinstance(parameter, DTensor) and len(entry.size) > 0:
        whole = torch.empty(entry.size, dtype=dtype, device=parameter.device)
        return DTensor.from_local(whole, parameter.device_mesh, [Replicate()], run_check=False)
    return torch.empty(entry.size, dtype=dtype)


def _random_targets(entries: Entries) -> dict[str, dict[str, Tensor]]:
    """This rank's part of ``rng``, if as many ranks load as saved; else nothing."""
    saved = _below(entries, "rng")
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if {path[0] for path in saved} != {str(rank) for rank in range(world_size)}:
        return {}
    mine = str(_rank())
    states = {
        str(kind): torch.empty(entry.size, dtype=torch.uint8)
        for (kind,), entry in _below(saved, mine).items()
    }
    return {mine: states}


def _set_random_state(states: dict[str, dict[str, Tensor]]) -> None:
    for kind, state in states.get(str(_rank()), {}).items():
        if kind == "cpu":
            torch.set_rng_state(state)
        elif (accelerator := torch.accelerator.current_accelerator()) and accelerator.type == kind:
            torch.get_device_module(kind).set_rng_state(state)


def _set_model(model: nn.Module, state: dict[str, Any]) -> None:
    # The tensors were read in place; this runs the model's own loading hooks and sets extra state.
    model.load_state_dict({name: state[_clean(name)] for name in model.state_dict()})


def _set_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, dict[str, Any]],
    saved_groups: list[dict[str, Any]],
) -> None:
    names = _optimizer_names(model, optimizer)
    numbered = {number: state[name] for number, name in names.items() if name in state}
    groups = [
        {**here, **there, "params": here["params"]}
        for here, there in zip(optimizer.state_dict()["param_groups"], saved_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})
    _undo_casts(model, optimizer, state)


def _undo_casts(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]
) -> None:
    """``Optimizer.load_state_dict`` casts state to its parameter's type: put the saved back."""
    for name, parameter in _parameters(model):
        for key, value in state.get(name, {}).items():
            held = optimizer.state[parameter][key]
            if isinstance(value, Tensor) and value.dtype != held.dtype:
                optimizer.state[parameter][key] = value.to(held.device)


# --- files ----------------------------------------------------------------------------------------


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which reports a full disk as that, not as what ``torch.save`` makes of it."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


def _begin(root: Path) -> str:
    """Clear what interrupted saves left; a new data folder's name."""
    return _new_folder(root, DATA, _committed_folders(root))


def _commit(root: Path, folder: str) -> None:
    """Make the checkpoint in ``root/folder`` the one at ``root``, then delete the old one."""
    written = dcp.FileSystemReader(root / folder).read_metadata()
    metadata = compat.move_checkpoint_files(written, folder)
    _check_files(root, metadata)
    _sync_folder(root / folder)
    pending = root / f"{METADATA}.pending"
    with open(pending, "wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(pending, root / METADATA)
    _sync_folder(root)
    _remove_folders(root, DATA, {folder})


def _complete_metadata(root: Path) -> Metadata:
    """The metadata at ``root``, once everything it refers to is known to be there."""
    if not (root / METADATA).is_file():
        raise FileNotFoundError(
            f"'{root}' holds no complete checkpoint: it has no {METADATA} file, "
            "which a save writes last"
        )
    metadata = dcp.FileSystemReader(root).read_metadata()
    _check_files(root, metadata)
    return metadata


def _check_files(root: Path, metadata: Metadata) -> None:
    for name, size in compat.checkpoint_extents(metadata).items():
        found = (root / name).stat().st_size if (root / name).is_file() else None
        if found is None or found < size:
            state = "missing" if found is None else f"{found} bytes long"
            raise FileNotFoundError(
                f"'{root}' holds no complete checkpoint: '{name}' is {state} and should have "
                f"{size} bytes. The path must be on a file system that all ranks share"
            )


def _committed_folders(root: Path) -> set[str]:
    if not (root / METADATA).is_file():
        return set()
    metadata = dcp.FileSystemReader(root).read_metadata()
    return {Path(name).parts[0] for name in compat.checkpoint_extents(metadata)}


def _new_folder(root: Path, prefix: str, keep: set[str]) -> str:
    """The name of a new folder in ``root``; others of its kind, except ``keep``, are removed."""
    root.mkdir(parents=True, exist_ok=True)
    _remove_folders(root, prefix, keep)
    name = f"{prefix}{uuid.uuid4().hex}"
    (root / name).mkdir()
    return name


def _remove_folders(root: Path, prefix: str, keep: set[str]) -> None:
    # The whole pattern, identifier included: a user's own folder is never taken for one of ours.
    for folder in root.glob(prefix + "[0-9a-f]" * 32):
        if folder.name not in keep:
            shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power failure, as fsync of a file does its contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- export ---------------------------------------------------------------------------------------


def _distinct_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, each object once under its first name."""
    seen: set[int] = set()
    for name, value in _model_state(model, keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"'{name}' in the model's state is a {type(value).__name__}, and safetensors hold "
                "tensors only: use autodist.save"
            )
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _split(entries: Iterable[tuple[str, Tensor]]) -> list[list[tuple[str, Tensor]]]:
    """Consecutive runs of at most ``SHARD_BYTES``; a larger tensor has a run of its own."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, value in entries:
        if shards[-1] and size + _bytes(value) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, value))
        size += _bytes(value)
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _on_host(value: Tensor) -> Tensor | None:
    """The whole of ``value`` in host memory on rank 0; None elsewhere. Every rank takes part."""
    whole = whole_value(value) if owners(value) else value.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    if _rank() != 0:
        return None
    return whole.cpu().clone(memory_format=torch.contiguous_format)


def _finish_export(
    root: Path, folder: str, model: nn.Module, files: dict[str, list[tuple[str, Tensor]]]
) -> None:
    """Put the new files in the place of an earlier export's, with index and configuration."""
    index_name = "model.safetensors.index.json"
    if len(files) > 1:
        total = sum(_bytes(value) for shard in files.values() for _, value in shard)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in files.items() for name, _ in shard},
        }
        (root / folder / index_name).write_text(json.dumps(index, indent=2) + "\n")
    for pattern in ("model.safetensors", "model-*-of-*.safetensors", index_name):
        for old in root.glob(pattern):
            old.unlink()
    for new in (root / folder).iterdir():
        os.replace(new, root / new.name)
    (root / folder).rmdir()
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        config.save_pretrained(root)


# --- ranks and sentences --------------------------------------------------------------------------


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _on_rank_0(function: Callable[[], Result]) -> Result:
    """What ``function`` returns on rank 0, on every rank; what it raises there, likewise."""
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def _failing_as(sentence: str) -> Iterator[None]:
    """Run DCP; what failed on which rank ends ``sentence``, an :class:`OSError` on every rank.

    DCP's remark that no process group means one process is silenced.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        try:
            yield
        except dcp.CheckpointException as error:
            causes = [f"rank {rank}: {cause!r}" for rank, (cause, _) in error.failures.items()]
            raise OSError(f"{sentence}: {'; '.join(causes)}") from error


def _listing(names: list[str], most: int = 5) -> str:
    """``'a', 'b' and 3 more``."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
