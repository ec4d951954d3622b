"""Smoothness-regularised fine-tuning (SMART, arXiv 1911.03437): exact, fast and drop-in."""

from smart_kernels.ops._library import empty_cache, load_compiled
from smart_kernels.ops.divergence import (
    DivergenceLoss,
    SymmetricKLLoss,
    divergence,
    divergence_grad,
    symmetric_kl,
    symmetric_kl_grad,
)
from smart_kernels.ops.ema import ema_update_
from smart_kernels.ops.linear_divergence import LinearDivergenceLoss, linear_divergence
from smart_kernels.ops.perturbation import init_perturbation, perturbation_step, perturbation_step_
from smart_kernels.smart.config import SmartConfig
from smart_kernels.smart.objective import Smart

COMPILED = load_compiled()
"""The extension modules of compiled kernels: None where one is loaded, else why it is not."""

__version__ = "0.1.0"
__all__ = [
    "DivergenceLoss",
    "LinearDivergenceLoss",
    "Smart",
    "SmartConfig",
    "SymmetricKLLoss",
    "divergence",
    "divergence_grad",
    "ema_update_",
    "empty_cache",
    "init_perturbation",
    "linear_divergence",
    "perturbation_step",
    "perturbation_step_",
    "symmetric_kl",
    "symmetric_kl_grad",
]
