"""Summaries by beam search with a cache of hidden states: the same tokens, less memory.

generate(documents, num_beams=4)  ->  rewrite(model, to=ELAttention()), then the same call

A random encoder-decoder reads documents of several lengths. Printed are the bytes that stay from
step to step (caches and encoder states) and the seconds, before and after; the two curves of memory
are drawn into an SVG. With --width 1024 --heads 16 --layers 12 it is as large as BART-large.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attn_compiler as ac

COLOURS = {"stock": "#b04030", "rewritten": "#2060a0"}


def build(width: int, heads: int, layers: int) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        d_model=width, encoder_layers=1, decoder_layers=layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width,
        vocab_size=1000, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def kept_bytes(thing: Any, seen: set[int]) -> int:
    """Bytes of the storages that can be reached from something, each counted once."""
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if id(thing) in seen or isinstance(thing, type | str | int | float | nn.Module):
        return 0
    seen.add(id(thing))
    held = list(thing.values()) if isinstance(thing, dict) else []
    held += thing if isinstance(thing, list | tuple) else []
    return sum(kept_bytes(x, seen) for x in (*held, *getattr(thing, "__dict__", {}).values()))


def summarise(model: Any, ids: Tensor, beams: int, tokens: int) -> tuple[Tensor, int, float]:
    """Tokens, bytes kept, seconds."""
    given: list[Any] = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: given.append(kwargs["encoder_outputs"]), with_kwargs=True
    )
    start = time.perf_counter()
    with hook:
        found = model.generate(
            input_ids=ids, num_beams=beams, do_sample=False, max_new_tokens=tokens,
            min_new_tokens=tokens, return_dict_in_generate=True,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    return found.sequences, kept_bytes([found.past_key_values, given[-1]], set()), seconds


def difference(model: Any, new: Any, ids: Tensor, tokens: Tensor) -> float:
    """Of the logits that both give to the same summaries, without a cache."""
    with torch.no_grad():
        both = [m(input_ids=ids, decoder_input_ids=tokens).logits for m in (model, new)]
    return float((both[0] - both[1]).abs().max())


def plot(lengths: Sequence[int], curves: dict[str, list[float]], path: Path) -> None:
    """Lines over lengths, as an SVG."""
    width, height, edge = 480, 300, 50
    top = max(max(values) for values in curves.values())

    def place(x: float, y: float) -> str:
        right = edge + (width - 2 * edge) * x / max(lengths)
        return f"{right:.1f},{height - edge - (height - 2 * edge) * y / top:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<polyline points="{place(0, top)} {place(0, 0)} {place(max(lengths), 0)}" '
        'fill="none" stroke="black"/>',
        f'<text x="{edge}" y="{edge - 12}">MB kept, at most {top:.2f}</text>',
        f'<text x="{width - edge}" y="{height - edge + 30}" text-anchor="end">input tokens</text>',
    ]
    for number, (name, values) in enumerate(curves.items()):
        colour, line = COLOURS[name], edge + 16 * (number + 1)
        points = " ".join(place(x, y) for x, y in zip(lengths, values, strict=True))
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{edge + 20}" y="{line}" fill="{colour}">{name}</text>',
        ]
    for length in lengths:
        x, y = place(length, 0).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 15}" text-anchor="middle">{length}</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, value in {"width": 64, "heads": 4, "layers": 2, "beams": 4, "tokens": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lengths", type=int, nargs="+", default=(128, 256, 512))
    svg = Path(tempfile.gettempdir()) / "generate_with_el.svg"
    parser.add_argument("--plot", type=Path, default=svg, help="where the SVG goes")
    return parser.parse_args(given)


def main(given: Sequence[str] = ()) -> None:
    options = arguments(given)
    model = build(options.width, options.heads, options.layers)
    ids = torch.randint(4, 1000, (2, max(options.lengths)))
    example = {"input_ids": ids[:, :7], "decoder_input_ids": ids[:, :5]}
    models = {"stock": model, "rewritten": ac.rewrite(model, (), example, to=ac.ELAttention())}
    summarise(models["rewritten"], ids[:, :7], options.beams, 2)  # kinds of calls, met once
    curves: dict[str, list[float]] = {name: [] for name in models}
    print("tokens of input   MB kept: stock rewritten   seconds: stock rewritten   same tokens")
    for length in options.lengths:
        found = {
            name: summarise(m, ids[:, :length], options.beams, options.tokens)
            for name, m in models.items()
        }
        for name, (_, kept, _) in found.items():
            curves[name].append(kept / 1e6)
        (old, _, before), (new, _, after) = found["stock"], found["rewritten"]
        print(
            f"{length:15} {curves['stock'][-1]:16.3f} {curves['rewritten'][-1]:9.3f} "
            f"{before:16.2f} {after:9.2f}   {torch.equal(old, new)}"
        )
    plot(options.lengths, curves, options.plot)
    print(f"drawn in {options.plot}")
    worst = difference(model, models["rewritten"], ids, old)
    saved = curves["stock"][-1] / curves["rewritten"][-1]
    print(f"largest difference: {worst:.1e}; {saved:.0f} times fewer bytes are kept")


if __name__ == "__main__":
    main(sys.argv[1:])
