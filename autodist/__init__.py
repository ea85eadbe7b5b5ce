"""autodist: any PyTorch model, trained sharded, with the same gradients and a plan you can read.

    model = torch.compile(model, backend="autodist")

Launched with torchrun, that line trains an unmodified model with parameters, gradients and optimizer state
sharded over all ranks (ZeRO-3). See README.md.
"""

__version__ = "0.1.0"

from autodist import backend  # noqa: F401  (watches optimizers from now on)
from autodist.checkpoint import export, load, save
from autodist.clip import clip_grad_norm_
from autodist.passes.analysis.placement import PlacementError
from autodist.passes.analysis.stages import StageError
from autodist.passes.base import StepError
from autodist.pipeline import PipelineError
from autodist.plan import Plan, PlanError
from autodist.prepare import PrepareError, prepare
from autodist.runtime.agreement import DisagreementError, MissingRanksError
from autodist.runtime.monitor import PeerError
from autodist.runtime.outputs import DifferentBatchError, WithheldOutputError
from autodist.runtime.parameters import LostWriteError, MixedReadError, MovedParameterError
from autodist.runtime.stage_parameters import StageGradientError
from autodist.train_step import train_step
from autodist.verify import Report, verify

__all__ = [
    "DifferentBatchError",
    "DisagreementError",
    "LostWriteError",
    "MissingRanksError",
    "MixedReadError",
    "MovedParameterError",
    "PeerError",
    "PipelineError",
    "PlacementError",
    "Plan",
    "PlanError",
    "PrepareError",
    "Report",
    "StageError",
    "StageGradientError",
    "StepError",
    "WithheldOutputError",
    "__version__",
    "clip_grad_norm_",
    "export",
    "load",
    "prepare",
    "save",
    "train_step",
    "verify",
]
