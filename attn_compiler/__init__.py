"""A compiler pass that finds multi-head attention in traced PyTorch models and rewrites it.

    compiled = torch.compile(model, backend="attn_compiler")

The public names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AttnCompilerError": "attn_compiler.errors",
    "BadOption": "attn_compiler.errors",
    "CompileConfig": "attn_compiler.config",
    "ELAttention": "attn_compiler.variants.el",
    "Flash": "attn_compiler.variants",
    "GAU": "attn_compiler.variants.gau",
    "Hardware": "attn_compiler.cost.hardware",
    "LinearAttention": "attn_compiler.variants.linear_attention",
    "NoLegalVariant": "attn_compiler.errors",
    "Plan": "attn_compiler.planning",
    "Report": "attn_compiler.report",
    "SPION": "attn_compiler.variants.spion",
    "SpionSchedule": "attn_compiler.train.schedule",
    "Selective": "attn_compiler.variants.selective",
    "Shape": "attn_compiler.variants.base",
    "SwitchHead": "attn_compiler.variants.switchhead",
    "UnsupportedCall": "attn_compiler.errors",
    "VerificationFailed": "attn_compiler.errors",
    "calibrate": "attn_compiler.calibrating",
    "distill": "attn_compiler.train.distill",
    "expert_usage": "attn_compiler.train.switchhead",
    "explain": "attn_compiler.api",
    "feature_maps": "attn_compiler.train.linear_attention",
    "fx_pass": "attn_compiler.api",
    "get_budgets": "attn_compiler.train.selective",
    "last_report": "attn_compiler.backend",
    "memory_loss": "attn_compiler.train.selective",
    "op_samples": "attn_compiler.kernels.operators",
    "plan": "attn_compiler.planning",
    "rewrite": "attn_compiler.api",
    "search_budgets": "attn_compiler.train.selective",
    "set_budgets": "attn_compiler.train.selective",
    "spion_pattern": "attn_compiler.kernels.pattern",
    "spion_patterns": "attn_compiler.train.spion",
    "watch_experts": "attn_compiler.train.switchhead",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
