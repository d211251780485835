"""From results to the table in docs/performance.md, between its two markers.

    {"rows": [{"section": "forward", "ways": ...}]}   ->   | forward, full ... | 480 TFLOP/s | ...

A ratio is taken inside of each round; medians, with the smallest and the largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu table -->", "<!-- end of gpu table -->"
NOT_MEASURED = "not measured"
# relative distance of two results in bfloat16 above which one of them is wrong
WRONG = 0.02
Row = dict[str, Any]
_NAMES = {
    "triton": "Triton", "gluon": "Gluon", "cudnn": "cuDNN", "flash": "flash (SDPA)",
    "flex": "FlexAttention", "dense": "our own dense kernel", "queries": "dq alone",
    "keys_and_values": "dk and dv alone", "cublas": "a plain product",
    "grouped mm": "gathered rows, grouped product, index_add", "masked": "all experts",
    "kernel": "the kernel alone", "switchhead": "SwitchHead", "own": "our own attention",
    "plain": "PyTorch's operators",
}  # fmt: skip
# what a section shows, and against what
SECTIONS = {
    "ceilings": ("reading, copying, multiplying", "-"),
    "forward": ("forward, head dim 64, 128, 256, full and causal", "cuDNN, flash, FlexAttention"),
    "backward": ("backward", "cuDNN, flash, FlexAttention"),
    "tiles": ("the cost model's tile, other shapes", "every tile that it knows, cuDNN, flash"),
    "tiles backward": ("its tiles of the backward", "every tile that it knows, cuDNN, flash"),
    "variants": ("soft-cap, ALiBi, documents, window", "FlexAttention"),
    "variants backward": ("backward of soft-cap, documents", "FlexAttention"),
    "selective": ("Selective attention, forward", "own dense kernel"),
    "selective training": ("Selective attention, forward and backward", "own dense kernels"),
    "selective decode": ("Selective attention, seconds for a kept token", "the largest budget"),
    "decode": ("decode", "read bandwidth, FlexAttention"),
    "el": ("EL-attention, a step", "read bandwidth, own decode of keys and values"),
    "summaries": ("summaries at the largest batch", "generate(), dynamic cache; static, compiled"),
    "blocks": ("maps of blocks", "own dense kernel, FlexAttention"),
    "expert project": ("projection by experts", "a plain product, PyTorch's grouped product"),
    "expert merge": ("merge by experts", "a plain product, PyTorch's grouped product"),
    "switchhead": ("a block of SwitchHead", "a dense block with our attention, cuDNN, flash"),
    "switchhead training": ("the same block, forward and backward", "the same dense blocks"),
    "gau": ("two gated units, what mixes tokens", "own dense kernel, cuDNN"),
    "gau backward": ("its backward", "PyTorch's operators, own dense kernels, cuDNN"),
    "gau block": ("two gated units, whole block", "dense block on own attention, on cuDNN"),
    "gau block training": ("its forward and backward", "dense block on own attention, on cuDNN"),
    "numerics": ("error in bfloat16 against float64", "SDPA"),
    "launch": ("seconds of the host per call", "SDPA"),
}


def table(results: Sequence[Row]) -> str:
    """The text between the markers; without a result all rows say that they were not measured."""
    return "\n\n".join(_one(result) for result in results or [{"rows": []}])


def _one(result: Row) -> str:
    lines = ["| what | ours | against |", "|---|---|---|"]
    ceiling = _ceiling(result)
    for section, (what, against) in SECTIONS.items():
        rows = [r for r in result["rows"] if r.get("section") == section and "ways" in r]
        if not rows:
            lines.append(f"| {what} | {NOT_MEASURED} | {against} |")
        for row in rows:
            lines.append(f"| {title(row)} | {' | '.join(_WRITTEN[section](row, ceiling))} |")
    notes = [f"- {row['name']}: {row['error']}" for row in result["rows"] if "error" in row]
    notes += [f"- not measured, out of time: {name}" for name in result.get("dropped", ())]
    for row in result["rows"]:
        for way, found in row.get("ways", {}).items():
            if "error" in found:
                notes.append(f"- {row['name']}, {_name(way)}: {found['error']}")
    text = "\n".join(lines)
    if "gpu" in result:
        where = ", ".join(
            f"{key} {result[key]}" for key in ("driver", "torch", "triton") if key in result
        )
        head = f"{result['gpu']} ({where}), {result['dtype']}, {result['rounds']} rounds."
        text = f"{head} {result['method']}\n\n{text}"
    return "\n\n".join([text, "\n".join(notes)]) if notes else text


def title(row: Row) -> str:
    """What a row is about, by its sizes."""
    s = row["sizes"]
    if row["section"] == "ceilings":
        return "this device"
    length = f"T = {s['T']}" if s["T"] == s["S"] else f"{s['T']} of {s['S']} keys"
    heads = f"{s['H']} heads" if s["H"] == s["G"] else f"{s['H']} heads on {s['G']}"
    what = f"{row['section']}, {row['rule']}"
    if row["section"] == "selective decode":
        length = f"budgets to {s['S']}"
    if row["section"] == "el":
        what, length = "EL-attention", f"{s['T']} beams, {s['S']} tokens, width {s['H'] * s['d']}"
    if row["section"] == "summaries":
        return f"summaries, {s['T']} beams, {s['S']} tokens, width {s['H'] * s['d']}"
    if row["section"].startswith("expert"):
        return (
            f"{row['section']}, {s['H']} heads d {s['d']}, {s['G']} experts each, {s['T']} tokens, "
            f"{row.get('routes', 0):.0f} rows an expert"
        )
    if row["rule"] == "blocks":
        what = f"blocks of 128, {row['share']:.0%} kept"
    return f"{what}, B {s['B']}, {heads}, d {s['d']}, {length}"


# ---------------------------------------------------------------- numbers


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (smallest to largest)`."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def measured(row: Row, way: str) -> list[float]:
    """Seconds of a way; none where it failed or its result is wrong."""
    found = row["ways"].get(way, {})
    return [] if wrong(found) else found.get("seconds", [])


def wrong(found: Row) -> bool:
    return any(not share <= WRONG for share in found.get("differences", ()))


def ratios(row: Row, theirs: str, ours: str) -> list[float]:
    """How many times faster ours is, in each round; above 1 is good."""
    pairs = zip(measured(row, theirs), measured(row, ours), strict=False)
    return [slow / fast for slow, fast in pairs]


def _name(way: str) -> str:
    return _NAMES.get(way, way)


def _rates(row: Row, way: str, unit: float, work: str) -> list[float]:
    amount = row["ways"].get(way, {}).get(work, row.get(work, 0.0))
    return [amount / s / unit for s in measured(row, way)]


def _ceiling(result: Row) -> float:
    """Bytes a second: the best median of the ways to read or copy a gigabyte; 0 is unknown."""
    rows = [row for row in result["rows"] if row.get("section") == "ceilings"]
    found = [_rates(row, way, 1.0, "bytes") for row in rows for way in ("sum", "largest", "copy")]
    return max((statistics.median(rates) for rates in found if rates), default=0.0)


def _absent(row: Row, way: str) -> str:
    return "wrong numbers" if wrong(row["ways"].get(way, {})) else "failed"


# ---------------------------------------------------------------- rows by section


def _speeds(row: Row, ceiling: float) -> tuple[str, str]:
    """TFLOP/s of ours, and for each other way how many times faster ours is."""
    ours = [way for way in ("triton", "gluon") if way in row["ways"]]
    others = [w for w in row["ways"] if w not in (*ours, "queries", "keys_and_values")]
    left = "; ".join(_speed(row, way) for way in ours)
    right = "; ".join(
        f"{_name(other)}: {_speed(row, other)}, "
        + ", ".join(
            f"{_name(way)} is {spread(r)}x" for way in ours if (r := ratios(row, other, way))
        )
        for other in others
    )
    return left, right.replace(", ;", ";").removesuffix(", ")


def _speed(row: Row, way: str) -> str:
    rates = _rates(row, way, 1e12, "flops")
    number = f"{spread(rates, 0)} TFLOP/s" if rates else _absent(row, way)
    return f"{_name(way)} {number}" if way in ("triton", "gluon") else number


def _bandwidth(row: Row, ceiling: float) -> tuple[str, str]:
    parts = []
    for way in row["ways"]:
        rates = _rates(row, way, 1e9, "bytes")
        number = f"{spread(rates, 0)} GB/s" if rates else _absent(row, way)
        if rates and ceiling:
            number += f", {statistics.median(rates) * 1e9 / ceiling:.0%} of reading"
        if splits := row["ways"][way].get("tile", {}).get("splits"):
            number += f", {splits} splits"
        parts.append(f"{_name(way)}: {number}")
    return parts[0], "; ".join(parts[1:])


def _steps(row: Row, ceiling: float) -> tuple[str, str]:
    """Bandwidth and operations a second of each way, as shares of what there is, and how many
    times faster ours is.
    """
    parts = []
    for way in row["ways"]:
        text = _bandwidth({**row, "ways": {way: row["ways"][way]}}, ceiling)[0]
        rates = _rates(row, way, 1e12, "flops")
        parts.append(f"{text}, {spread(rates, 0)} TFLOP/s" if rates else text)
        if rates and row.get("peak"):
            parts[-1] += f", {statistics.median(rates) * 1e12 / row['peak']:.0%} of tensor peak"
    if found := ratios(row, "own decode", "el"):
        parts.append(f"el is {spread(found)}x as fast as own decode")
    return parts[0], "; ".join(parts[1:])


def _rated(row: Row, ceiling: float) -> tuple[str, str]:
    """Operations a second of each way, of ours as a share of a plain product's, and how many times
    faster ours is than what is composed.
    """
    parts = []
    for way in row["ways"]:
        rates = _rates(row, way, 1e12, "flops")
        text = f"{spread(rates, 0)} TFLOP/s" if rates else _absent(row, way)
        parts.append(f"{_name(way)}: {text}")
        if way in ("triton", "kernel") and (found := ratios(row, "cublas", way)):
            parts[-1] += f", {spread(found)}x of a plain product"
        elif way in ("masked", "grouped mm") and (found := ratios(row, way, "triton")):
            parts[-1] += f", Triton is {spread(found)}x"
    return "; ".join(parts[:2]), "; ".join(parts[2:])


def _whole(row: Row, ceiling: float) -> tuple[str, str]:
    """Milliseconds of each way, how many times faster ours is, and what the planner says."""
    parts = []
    for way in row["ways"]:
        found = [1e3 * seconds for seconds in measured(row, way)]
        parts.append(f"{_name(way)}: {spread(found)} ms" if found else f"{_name(way)}: failed")
        if way != "switchhead" and (faster := ratios(row, way, "switchhead")):
            parts[-1] += f", SwitchHead is {spread(faster)}x"
    if "declined" in row:
        parts[0] += ", declined by the planner" if row["declined"] else ", taken by the planner"
    return "; ".join(parts[:1]), "; ".join(parts[1:])


def _overheads(row: Row, ceiling: float) -> tuple[str, str]:
    """Milliseconds of each way, and how many times as long as our own dense kernels it takes."""
    parts = []
    for way in row["ways"]:
        found = [1e3 * s for s in measured(row, way)]
        text = (
            f"{_name(way)}: {spread(found)} ms" if found else f"{_name(way)}: {_absent(row, way)}"
        )
        if way != "dense" and (times := ratios(row, way, "dense")):
            text += f", takes {spread(times)}x as long"
        parts.append(text)
    return parts[0], "; ".join(parts[1:])


def _budgets(row: Row, ceiling: float) -> tuple[str, str]:
    """Bandwidth of each budget, and what a byte takes beside the largest budget."""
    first, *others = row["ways"]
    parts = [_bandwidth({**row, "ways": {first: row["ways"][first]}}, ceiling)[0]]
    for way in others:
        text = _bandwidth({**row, "ways": {way: row["ways"][way]}}, ceiling)[0]
        share = row["ways"][first].get("bytes", 1.0) / row["ways"][way].get("bytes", 1.0)
        if found := [share * times for times in ratios(row, way, first)]:
            text += f", a byte takes {spread(found)}x as long"
        parts.append(text)
    return parts[0], "; ".join(parts[1:])


def _samples(row: Row, ceiling: float) -> tuple[str, str]:
    """Samples a second of each way at its batch, and how many times as many ours makes."""
    parts, mine = [], _per_second(row, "el")
    for way in row["ways"]:
        rates = _per_second(row, way)
        number = f"{spread(rates, 1)} samples/s" if rates else _absent(row, way)
        batch = row["ways"][way].get("batch", 1)
        text = f"{_name(way)}: {number}, batch {batch}" if rates else f"{_name(way)}: {number}"
        if way != "el" and rates and mine:
            found = [ours / theirs for ours, theirs in zip(mine, rates, strict=False)]
            text += f", el makes {spread(found)}x as many"
        parts.append(text)
    return parts[0], "; ".join(parts[1:])


def _per_second(row: Row, way: str) -> list[float]:
    batch = row["ways"].get(way, {}).get("batch", 1)
    return [batch / seconds for seconds in measured(row, way)]


def _mixing(row: Row, ceiling: float) -> tuple[str, str]:
    """How many times as fast two units are, and how many operations a second the kernel of a chunk,
    or the backward pass, does for one of a dense kernel.
    """
    own = "chunk kernel" if "chunk kernel" in row["ways"] else "gau"
    parts = [f"{_milliseconds(row, 'gau')}, {own} {_speed(row, own)}"]
    for way in (way for way in row["ways"] if way not in ("gau", own)):
        text = f"{_name(way)}: {_milliseconds(row, way)}"
        if found := ratios(row, way, "gau"):
            text += f", gau is {spread(found)}x as fast"
        rates = (_rates(row, w, 1.0, "flops") for w in (own, way) if way != "plain")
        if found := [ours / theirs for ours, theirs in zip(*rates, strict=False)]:
            text += f", {own} {spread(found)}x the TFLOP/s"
        parts.append(text)
    return parts[0], "; ".join(parts[1:])


def _blocks(row: Row, ceiling: float) -> tuple[str, str]:
    parts = []
    for way, found in row["ways"].items():
        text = f"{_name(way)}: {_milliseconds(row, way)}"
        if "memory" in found:
            text += f", {found['memory'] / 2**20:,.0f} MiB"
        if way != "pair" and (times := ratios(row, way, "pair")):
            text += f", pair is {spread(times)}x as fast"
        parts.append(text)
    return parts[0], "; ".join(parts[1:])


def _milliseconds(row: Row, way: str) -> str:
    found = measured(row, way)
    return f"{spread([1e3 * s for s in found], 3)} ms" if found else _absent(row, way)


def _tiles(row: Row, ceiling: float) -> tuple[str, str]:
    """The picked tile; the fastest one, and what share of its speed the picked one reaches; of a
    backward both kernels.
    """
    left, right = [], []
    for kind, own in _PICKED.items():
        ways = [way for way in row["ways"] if way == own or way.startswith(f"{kind} ")]
        if not ways or len(ways) == 1 < len(row["ways"]):
            continue
        medians = {way: statistics.median(s) for way in ways if (s := measured(row, way))}
        left.append(_tile(row, own))
        if medians:
            best = min(medians, key=lambda way: medians[way])
            share = f"{medians[best] / medians[own]:.0%}" if own in medians else "nothing"
            text = f"{_tile(row, best)} is the fastest of {len(medians)}"
            right.append(f"{text}, the picked one reaches {share}")
    others = [way for way in row["ways"] if way in ("cudnn", "flash")]
    right += [f"{_name(way)}: {_speed(row, way)}" for way in others]
    return "; ".join(left), "; ".join(right) or "-"


# the way with the picked tile, by the kind of its others
_PICKED = {"tile": "triton", "queries": "queries", "keys_and_values": "keys_and_values"}


def _tile(row: Row, way: str) -> str:
    """Rows, keys, warps, stages of a tile, and its speed."""
    found, name = row["ways"].get(way, {}), way.partition(" ")[0]
    tile = found.get("tile", {})
    keys = ("rows", "keys", "warps", "stages", *(["splits"] if tile.get("splits", 1) > 1 else []))
    text = "x".join(str(tile.get(key, "?")) for key in keys)
    if name in ("queries", "keys_and_values"):
        # a part of a backward: its operations are not those of the row
        micros = [1e6 * s for s in measured(row, way)]
        return f"{_name(name)}, {text}: {f'{spread(micros, 0)} µs' if micros else 'failed'}"
    rates = _rates(row, way, 1e12, "flops")
    return f"{text}: {f'{spread(rates, 0)} TFLOP/s' if rates else _absent(row, way)}"


def _ceilings(row: Row, ceiling: float) -> tuple[str, str]:
    parts = []
    for way in row["ways"]:
        unit, name, work = (
            (1e12, "TFLOP/s", "flops") if way == "product" else (1e9, "GB/s", "bytes")
        )
        rates = _rates(row, way, unit, work)
        parts.append(f"{way} {spread(rates, 0)} {name}" if rates else f"{way} failed")
    return "-", "; ".join(parts)


def _errors(row: Row, ceiling: float) -> tuple[str, str]:
    def text(way: str) -> str:
        errors = row["ways"][way].get("errors", {})
        return f"{_name(way)} " + (
            ", ".join(f"{name} {value:.1e}" for name, value in errors.items()) or "failed"
        )

    ways = list(row["ways"])
    ours = [way for way in ways if way in ("triton", "gluon")]
    right = []
    for other in (way for way in ways if way not in ours):
        theirs, mine = (row["ways"][w].get("errors", {}) for w in (other, "triton"))
        worst = [mine[n] / theirs[n] for n in theirs if n in mine and theirs[n] > 0]
        right.append(f"{text(other)}" + (f"; Triton at most {max(worst):.2f}x" if worst else ""))
    return "; ".join(map(text, ours)), "; ".join(right)


def _launches(row: Row, ceiling: float) -> tuple[str, str]:
    sides: dict[bool, list[str]] = {True: [], False: []}
    for way in row["ways"]:
        found = measured(row, way)
        text = f"{spread([s * 1e6 for s in found], 1)} µs" if found else "failed"
        sides[way.startswith("ours")].append(f"{way}: {text}")
    return "; ".join(sides[True]), "; ".join(sides[False])


_WRITTEN: dict[str, Callable[[Row, float], tuple[str, str]]] = {
    **dict.fromkeys(SECTIONS, _speeds),
    "ceilings": _ceilings, "tiles": _tiles, "tiles backward": _tiles, "decode": _bandwidth,
    "el": _steps, "summaries": _samples, "expert project": _rated, "expert merge": _rated,
    "switchhead": _whole, "switchhead training": _whole,
    "selective": _overheads, "selective training": _overheads, "selective decode": _budgets,
    "gau": _mixing, "gau backward": _mixing, "gau block": _blocks, "gau block training": _blocks,
    "numerics": _errors, "launch": _launches,
}  # fmt: skip


def write(page: Path, results: Sequence[Row]) -> None:
    """Put the table between the markers of a page.

    Raises:
        ValueError: the page does not hold both markers, once, in order.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{page} wants the markers {BEGIN} and {END}, once each, in this order")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")
