"""The doors beside the backend: `rewrite`, `explain` and `fx_pass`."""

from __future__ import annotations
import copy
from typing import Any
from torch import nn
from attn_compiler.backend import _reports
from attn_compiler.config import make_config
from attn_compiler.install import rewrite_module


def rewrite(model: Any, args=(), kwargs=None, *, to="fastest", hardware=None, on_reject="keep", verify=True, calibration=None, inplace=False):
    config = make_config({"to": to, "hardware": hardware, "on_reject": on_reject})
    new = model if inplace else copy.deepcopy(model)
    _reports.clear(); _reports.graphs.append(rewrite_module(new, args, kwargs or {}, config, verify))
    return new
