"""What the families are called with: token ids, pixels, sound; with and without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCAB = 97
BATCH, LENGTH = 5, 13
IMAGE, PATCH = 20, 5

Inputs = dict[str, Any]
MakeInputs = Callable[[int, int, bool, int], Inputs]


def _ids(batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def _mask(batch: int, length: int, sides: str) -> Tensor:
    """Ones; rows from 1 on are padded on the right by 4, with "lr" the last on the left by 3."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:, -4:] = 0
    if sides == "lr":
        mask[-1] = 1
        mask[-1, :3] = 0
    return mask


def text(batch: int, length: int, padding: bool, seed: int) -> Inputs:
    """Token ids; with `padding` a mask with a left-padded and a right-padded row."""
    inputs: Inputs = {"input_ids": _ids(batch, length, seed)}
    if padding:
        inputs["attention_mask"] = _mask(batch, length, "lr")
    return inputs


def text_right(batch: int, length: int, padding: bool, seed: int) -> Inputs:
    """Token ids, padded on the right only: what encoder-decoder models are given."""
    inputs: Inputs = {"input_ids": _ids(batch, length, seed)}
    if padding:
        inputs["attention_mask"] = _mask(batch, length, "r")
    return inputs


def text_pair(batch: int, length: int, padding: bool, seed: int) -> Inputs:
    """Encoder and decoder ids of different lengths."""
    inputs = text_right(batch, length, padding, seed)
    inputs["decoder_input_ids"] = _ids(batch, length - 2, seed + 1)
    if padding:
        inputs["decoder_attention_mask"] = _mask(batch, length - 2, "r")
    return inputs


def image(batch: int, length: int, padding: bool, seed: int) -> Inputs:
    """Pixels; `length` has no meaning, the positions of an image are a part of the model."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)}


def image_and_text(batch: int, length: int, padding: bool, seed: int) -> Inputs:
    return text_right(batch, length, padding, seed) | image(batch, length, padding, seed)


def image_and_pixel_mask(batch: int, length: int, padding: bool, seed: int) -> Inputs:
    """Pixels; with `padding` the last columns of some images are no part of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs: Inputs = {"pixel_values": torch.randn(batch, 3, 96, 64, generator=generator)}
    if padding:
        pixels = torch.ones(batch, 96, 64, dtype=torch.long)
        pixels[1:, :, 40:] = 0
        inputs["pixel_mask"] = pixels
    return inputs


def sound(batch: int, length: int, padding: bool, seed: int) -> Inputs:
    """A waveform of `length` frames of two samples each (the convolutions below halve it)."""
    generator = torch.Generator().manual_seed(seed)
    samples = 2 * length + 1
    inputs: Inputs = {"input_values": torch.randn(batch, samples, generator=generator)}
    if padding:
        mask = torch.ones(batch, samples, dtype=torch.long)
        mask[1:, -7:] = 0
        inputs["attention_mask"] = mask
    return inputs


def spectrogram(batch: int, length: int, padding: bool, seed: int) -> Inputs:
    """Whisper's encoder takes one length only; the decoder's varies."""
    generator = torch.Generator().manual_seed(seed)
    inputs: Inputs = {
        "input_features": torch.randn(batch, 8, 2 * 11, generator=generator),
        "decoder_input_ids": _ids(batch, length, seed),
    }
    if padding:
        inputs["decoder_attention_mask"] = _mask(batch, length, "r")
    return inputs
