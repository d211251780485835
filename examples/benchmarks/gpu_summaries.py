"""Summaries on a GPU: samples a second of beam search, each way at the largest batch that fits.

    generate() with its dynamic cache  |  with its static cache, layers compiled  |  EL-attention

A random encoder-decoder, as large as BART-large. What fits is the memory beside the weights that
was the whole memory of the paper's GPUs, so that a run takes seconds; a batch is found from the
peaks of two small ones and then tried.

Source: EL-Attention (arXiv 2105.04779), its tables of samples a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_cases import Case
from gpu_timing import Machine, NotHere, Way
from torch import Tensor

import attn_compiler as ac

MEMORY = 16 * 2**30
TOKENS = 32
_PROBE = 16
_TRIES = 3
# every layer is a kind of call by its number, in a first step and in others
_KINDS = 64


class Summaries:
    """Sizes of a case: d features of H heads, S tokens of input, T beams."""

    def __init__(self, case: Case, machine: Machine) -> None:
        self.sizes, self.machine = case.sizes, machine
        self.layers, self.vocabulary = (12, 50265) if machine.cuda else (1, 101)

    def ways(self) -> dict[str, Callable[[], Way]]:
        """By name, ours first."""
        return {"el": self._rewritten, "dynamic": self._dynamic, "static, compiled": self._static}

    def _model(self) -> Any:
        try:
            from transformers import BartConfig, BartForConditionalGeneration
        except ImportError:
            raise NotHere("needs transformers") from None
        s = self.sizes
        config = BartConfig(
            d_model=s.H * s.d, encoder_layers=self.layers, decoder_layers=self.layers,
            encoder_attention_heads=s.H, decoder_attention_heads=s.H,
            encoder_ffn_dim=4 * s.H * s.d, decoder_ffn_dim=4 * s.H * s.d,
            vocab_size=self.vocabulary, max_position_embeddings=s.S, forced_eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        with self.machine.device:
            return BartForConditionalGeneration(config).eval().to(self.machine.dtype)

    def _rewritten(self) -> Way:
        ids = self._ids(2)
        example = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        model = ac.rewrite(self._model(), (), example, to=ac.ELAttention(), inplace=True)
        return self._way(model, self._largest(model))

    def _dynamic(self) -> Way:
        model = self._model()
        return self._way(model, self._largest(model))

    def _static(self) -> Way:
        model, options = self._model(), {"cache_implementation": "static"}
        batch = self._largest(model, **options)
        # what is generated for one layer is found again for the others
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=False, backend="inductor" if self.machine.cuda else "eager")
        way = self._way(model, batch, **options)

        def call() -> Any:
            with torch._dynamo.config.patch(recompile_limit=_KINDS):
                return way.call()

        return replace(way, call=call)

    def _way(self, model: Any, batch: int, **options: Any) -> Way:
        # in half precision ties are broken by rounding: other words, and others after them
        return Way(
            lambda: self._tokens(model, batch, **options),
            {"batch": batch},
            compared=not self.machine.cuda,
        )

    def _ids(self, batch: int) -> Tensor:
        draw = torch.Generator().manual_seed(2)
        ids = torch.randint(4, self.vocabulary, (batch, self.sizes.S), generator=draw)
        return ids.to(self.machine.device)

    @torch.no_grad()
    def _tokens(self, model: Any, batch: int, **options: Any) -> Tensor:
        tokens = TOKENS if self.machine.cuda else 5
        found: Tensor = model.generate(
            input_ids=self._ids(batch), num_beams=self.sizes.T, do_sample=False,
            max_new_tokens=tokens, min_new_tokens=tokens, disable_compile=True, **options,
        )  # fmt: skip
        return found

    # ------------------------------------------------------------ what fits

    def _largest(self, model: Any, **options: Any) -> int:
        """The batch; without a GPU there is nothing to measure, and it is 2."""
        if not self.machine.cuda:
            return 2

        def peak(batch: int) -> int:
            return self._peak(lambda: self._tokens(model, batch, **options))

        peak(2)  # kinds of calls are met once
        return largest(peak)

    def _peak(self, call: Callable[[], Any]) -> int:
        device = self.machine.device
        self.machine.wait()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        self.machine.wait()
        return torch.cuda.max_memory_allocated(device) - before


def largest(peak: Callable[[int], int], memory: int = MEMORY) -> int:
    """The largest batch, a multiple of 8, whose peak of bytes stays within the memory.

    Raises:
        NotHere: not even 8 do.
    """
    first, second = peak(_PROBE), peak(2 * _PROBE)
    each = max(1.0, (second - first) / _PROBE)
    batch = int((memory - first) / each + _PROBE)
    for _ in range(_TRIES):
        batch = batch // 8 * 8
        if batch < 8:
            break
        found = peak(batch)
        if found <= memory:
            return batch
        batch = min(batch - 8, int(batch * memory / found))
    raise NotHere(f"no batch was found that fits into {memory / 2**30:.0f} GiB")


def summaries(case: Case, machine: Machine) -> dict[str, Callable[[], Way]]:
    """The ways of a case."""
    made = Summaries(case, machine).ways()
    return {name: made[name] for name in case.ways}
