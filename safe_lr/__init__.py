"""safe_lr: learning rates that stay below the edge of stability."""

from safe_lr.decisions import Decision, Summary
from safe_lr.guard import CoherenceGuard
from safe_lr.loggers import ConsoleLogger, JsonlLogger, Logger, TensorBoardLogger, TrackioLogger, WandbLogger
from safe_lr.measurement import Measurement, measure
from safe_lr.preconditioners import Preconditioner, register
from safe_lr.rewind import RewindsExhausted
from safe_lr.scheduler import CoherenceScheduler
from safe_lr.sharpness import sam_sharpness
from safe_lr.spectrum import SpectralDensity, eigenpairs, spectral_density
from safe_lr.stability import UpdateRule

__version__ = "0.1.0.dev0"

__all__ = [
    "CoherenceGuard",
    "CoherenceScheduler",
    "ConsoleLogger",
    "Decision",
    "JsonlLogger",
    "Logger",
    "Measurement",
    "Preconditioner",
    "RewindsExhausted",
    "SpectralDensity",
    "Summary",
    "TensorBoardLogger",
    "TrackioLogger",
    "UpdateRule",
    "WandbLogger",
    "eigenpairs",
    "measure",
    "register",
    "sam_sharpness",
    "spectral_density",
]
