"""One library family: how its tiny model is built, called and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from zoo.inputs import MakeInputs, text


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        config: keyword arguments of the configuration, or a function that builds it.
        kind: the stem of the library's class names (`Bert` of `BertConfig` and `BertModel`).
        inputs: makes keyword arguments from (batch, length, padding, seed).
        sites: attentions in one forward.
        attns: the `attn_implementation`s that the library offers for it.
        masks: False if it takes no padding mask.
        lengths: False if only the batch can vary.
        model: suffix of the model class.
        options: further arguments of `from_config`.
        stock: why stock torch.compile breaks its graph (empty: it does not).
        refused: reason codes that a reader accepts, with the explanation.
        kept: how many of the sites may be refused for them (other codes: things that are none).
    """

    config: Mapping[str, Any] | Callable[[], Any]
    kind: str
    inputs: MakeInputs = text
    sites: int = 2
    attns: tuple[str, ...] = ("eager", "sdpa")
    masks: bool = True
    lengths: bool = True
    model: str = "Model"
    options: Mapping[str, Any] = field(default_factory=dict)
    stock: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    kept: int = 0

    def build(self, attn: str) -> nn.Module:
        """The model in eval mode, with weights that make no output degenerate."""
        import transformers

        torch.manual_seed(0)
        config = (
            self.config()
            if callable(self.config)
            else getattr(transformers, f"{self.kind}Config")(**self.config)
        )
        _no_dropout(config)
        config.use_cache = False
        cls = getattr(transformers, self.kind + self.model)
        model: nn.Module = cls._from_config(
            config, attn_implementation=self._attn(attn), **self.options
        )
        _random_weights(model)
        return model.eval()

    def _attn(self, attn: str) -> str | dict[str, str]:
        # a convolutional backbone has no attention of its own to choose
        return {"": attn, "backbone_config": "eager"} if self.kind == "Detr" else attn


def _no_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        if hasattr(value, "to_dict"):
            _no_dropout(value)


def _random_weights(model: nn.Module) -> None:
    """Matrices of deviation 0.2; norms, biases, sinks and relative tables away from 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim < 2 or "norm" in name:
                p.add_(0.2 * noise)
            else:
                p.copy_((0.5 if "relative" in name else 0.2) * noise)
