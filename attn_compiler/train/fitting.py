"""What `rewrite` does with data: fit what is fitted to it, and say what a change of function costs.

loss_before(model)   ->   the model is rewritten   ->   fitted(model, report, ...)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from attn_compiler.config import CompileConfig
from attn_compiler.errors import BadOption
from attn_compiler.report import Report
from attn_compiler.train import gau, selective, spion, switchhead_convert
from attn_compiler.variants import is_measured, needs_data
from attn_compiler.variants.base import VariantSpec
from attn_compiler.variants.sites.switchhead import converts

Data = Iterable[Any] | Literal["later"] | None


def checked(config: CompileConfig, calibration: Iterable[Any] | Literal["later"] | None) -> Data:
    """The data, if it is there for what is fitted to it or measured by it, and only then.

    Raises:
        BadOption: it is missing, or nothing needs it.
    """
    specs = [spec for _, spec in config.to if isinstance(spec, VariantSpec)]
    fitted = [spec for spec in specs if needs_data(spec)]
    converted = [spec for spec in fitted if gau.converts(spec) or converts(spec)]
    if (calibration is None and fitted) or (calibration == "later" and converted):
        later_too = "" if converted else '; or "later" with a schedule'
        raise BadOption(
            "calibration is missing",
            why=[f"{type((converted or fitted)[0]).__name__} is fitted to a model's own attention"],
            do=f"give calibration=batches, pairs (args, kwargs){later_too}",
        )
    later = calibration == "later" and not fitted
    measured = fitted or any(map(is_measured, specs))
    if calibration is not None and (later or not measured):
        raise BadOption(
            "calibration is given, and nothing that is asked for is fitted to data",
            do="leave it out",
        )
    # it is gone through more than once
    again = bool(converted) or any(map(is_measured, specs))
    if calibration is None or calibration == "later" or not again:
        return calibration
    return list(calibration)


def loss_before(model: nn.Module, config: CompileConfig, data: Data) -> float | None:
    """The loss of a model that is about to get another function, where there is data."""
    other = any(is_measured(spec) for _, spec in config.to)
    return selective.losses(model, data) if other and isinstance(data, list) else None


def learnt(
    model: nn.Module, example: tuple[Any, Any], config: CompileConfig, data: Data
) -> switchhead_convert.Conversions:
    """What has to be known of a model before it is rewritten.

    Raises:
        BadOption: data shows nothing of a layer.
    """
    if not any(converts(spec) for _, spec in config.to):
        return switchhead_convert.Conversions({}, config)
    assert data is not None and data != "later"  # see `checked`
    return switchhead_convert.conversions(model, example, config, data)


def fitted(
    model: nn.Module, report: Report, config: CompileConfig, data: Data, before: float | None
) -> Report:
    """Fit what is fitted to data, put in what a spec says of single layers; the report says how.

    Args:
        model: rewritten.
        report: of that.
        config: of that.
        data: see `checked`.
        before: see `loss_before`.

    Raises:
        BadOption: budgets do not fit the model, or data shows nothing of a layer.
    """
    selective.put_budgets(model, config.wanted)
    layers = spion.layers_of(model, config.wanted)
    done = spion.put_given(layers)
    left = [layer for layer in layers if layer.path not in done]
    if left and data is not None and data != "later":
        done |= spion.calibrate(model, left, data)
    report = replace(report, sites=spion.described(report.sites, done))
    if isinstance(data, list):
        report = gau.convert(model, report, data)
    if before is not None and isinstance(data, list):
        after = selective.losses(model, data)
        report = replace(report, sites=selective.described(report.sites, before, after))
    return report
