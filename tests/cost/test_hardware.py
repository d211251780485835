"""The table agrees with what the vendors publish, survives JSON, and says what it does not know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attn_compiler.cost.at_hand import of_cpuinfo
from attn_compiler.cost.hardware import Hardware, known, of_properties, resolve
from attn_compiler.errors import BadOption
from attn_compiler.planning import plan
from attn_compiler.variants.base import Shape

# 1e12 operations per second of 16-bit, 8-bit and tf32 products, as published, dense
PEAKS = {
    "v100": (125, 0, 0), "v100-16gb": (125, 0, 0), "t4": (65, 0, 0), "a100-40gb": (312, 0, 156),
    "a100-80gb": (312, 0, 156), "a100-pcie": (312, 0, 156), "a10": (125, 0, 62.5),
    "rtx3090": (71, 0, 35.6), "l4": (121, 242, 60), "l40s": (362, 733, 183),
    "rtx4090": (165, 330, 82.6), "h100-pcie": (756, 1513, 378), "h100-sxm": (989, 1979, 495),
    "h200": (989, 1979, 495), "gh200": (989, 1979, 495), "gh200-144gb": (989, 1979, 495),
    "b200": (2250, 4500, 1125), "rtx5090": (209, 419, 105), "mi250x": (191.5, 0, 0),
    "mi300x": (1307, 2615, 654), "mi355x": (2517, 5033, 0),
}  # fmt: skip
# the same of the ordinary units, where they run at the same clock
ORDINARY = {
    "v100": 15.7, "t4": 8.1, "a100-80gb": 19.5, "a10": 31.2, "rtx3090": 35.6, "l4": 30.3,
    "l40s": 91.6, "rtx4090": 82.6, "rtx5090": 105,
}  # fmt: skip


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_the_product_of_its_parts(name: str) -> None:
    row = Hardware.named(name)
    assert row.peak16 / 1e12 == pytest.approx(PEAKS[name][0], rel=0.005)
    # the others are rounded more, and those of the L40S count at a clock 1.2 percent higher
    for rate, peak in zip((row.flops8, row.flops_tf32), PEAKS[name][1:], strict=True):
        found = row.processors * row.clock * rate / 1e12
        assert found == pytest.approx(peak, rel=0.013)


@pytest.mark.parametrize("name", ORDINARY)
def test_the_ordinary_units(name: str) -> None:
    row = Hardware.named(name)
    assert row.processors * row.clock * row.flops32 / 1e12 == pytest.approx(
        ORDINARY[name], rel=0.013
    )


def test_every_row_is_cross_checked() -> None:
    assert set(PEAKS) | {"cpu"} == set(known())


@pytest.mark.parametrize("name", known())
def test_json_round_trip(name: str) -> None:
    row = Hardware.named(name)
    assert Hardware.from_json(row.to_json()) == row
    assert hash(row) == hash(Hardware.from_json(row.to_json()))


@pytest.mark.parametrize(
    ("written", "canonical"),
    [("H200", "h200"), ("a100", "a100-80gb"), ("RTX_4090", "rtx4090"), (" h100 sxm ", "h100-sxm")],
)
def test_other_names(written: str, canonical: str) -> None:
    assert Hardware.named(written).name == canonical


def test_an_unknown_name_gives_near_ones() -> None:
    with pytest.raises(BadOption, match=r"did you mean .*h200"):
        Hardware.named("h20")
    with pytest.raises(BadOption, match="known: v100"):
        Hardware.named("quantum")


def changed(**values: object) -> str:
    return json.dumps({**json.loads(Hardware.named("l4").to_json()), **values})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "missing: clock"),
        (changed(colour=1), "unknown: colour"),
        (changed(processors=1.5), "processors is 1.5"),
        (changed(clock="fast"), "clock is 'fast'"),
        (changed(clock=True), "clock is True"),
        (changed(dram=-1), "dram is -1"),
        (changed(dram_rate=0), "dram_rate is 0"),
        (changed(kind="tpu"), "kind is 'tpu'"),
        (changed(name=3), "name is 3"),
        (changed(clock=1).replace('"clock": 1,', '"clock": Infinity,'), "clock is inf"),
    ],
)
def test_wrong_json_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(BadOption, match=complaint):
        Hardware.from_json(text)


@pytest.mark.parametrize(
    ("device", "arch", "processors", "gib", "row"),
    [
        ("NVIDIA H200", "sm_90", 132, 140, "h200"),
        ("NVIDIA GH200 144G HBM3e", "sm_90", 132, 141, "gh200-144gb"),
        ("NVIDIA H100 80GB HBM3", "sm_90", 132, 79, "h100-sxm"),
        ("NVIDIA H100 PCIe", "sm_90", 114, 79, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "sm_80", 108, 39, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "sm_80", 108, 79, "a100-pcie"),
        ("NVIDIA L40S", "sm_89", 142, 44, "l40s"),
        ("NVIDIA L4", "sm_89", 58, 22, "l4"),
        ("NVIDIA GeForce RTX 4090", "sm_89", 128, 24, "rtx4090"),
        ("AMD Instinct MI300X", "gfx942", 304, 192, "mi300x"),
    ],
)
def test_a_device_finds_its_row(
    device: str, arch: str, processors: int, gib: int, row: str
) -> None:
    found = of_properties(device, arch, processors, gib * 2**30)
    assert found == replace(Hardware.named(row), dram=gib * 2.0**30)


def test_an_unknown_device_gets_the_nearest_row_with_its_own_numbers() -> None:
    found = of_properties("NVIDIA L20", "sm_89", 92, 48 * 2**30)
    assert (found.name, found.processors, found.mark) == ("NVIDIA L20", 92, "?")
    assert found.shared == Hardware.named("l4").shared
    assert found.dram_rate <= Hardware.named("rtx4090").dram_rate
    # a part of a chip has a part of its rates
    part = of_properties("NVIDIA A30", "sm_80", 54, 24 * 2**30)
    assert part.dram_rate < Hardware.named("a100-40gb").dram_rate
    assert of_properties("NVIDIA B300", "sm_103", 148, 270 * 2**30).arch == "sm_103"
    with pytest.raises(BadOption, match="no hardware numbers"):
        of_properties("NVIDIA Tesla K80", "sm_37", 13, 12 * 2**30)


def test_resolve() -> None:
    row = Hardware.named("l4")
    assert resolve("l4") == row and resolve(row) is row
    assert resolve(None, torch.device("cpu")).kind == "cpu"
    with pytest.raises(BadOption, match="hardware is a float"):
        resolve(3.0)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="meta device"):
        resolve(None, "meta")


def test_a_file_with_own_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    mine = replace(Hardware.named("h200"), name="mine", dram_rate=2e12)
    path.write_text(mine.to_json(), encoding="utf-8")
    assert resolve(str(path)) == mine
    shape = Shape(64, 1, 8192, 32, 128, kv_heads=8)
    slow, fast = (plan("fastest", shape, hardware=h) for h in (str(path), "h200"))
    assert slow.hardware == "mine" and slow.seconds > 2 * fast.seconds
    with pytest.raises(BadOption, match=r"no hardware in .*other\.json"):
        resolve(str(tmp_path / "other.json"))
    path.write_bytes(b"\xff")
    with pytest.raises(BadOption, match="no hardware in"):
        resolve(str(path))
    path.write_text(changed(clock=0), encoding="utf-8")
    with pytest.raises(BadOption, match="clock is 0"):
        resolve(str(path))


def test_the_cpu_at_hand() -> None:
    found = Hardware.from_device("cpu")
    assert found.kind == "cpu" and found.processors >= 1
    assert Hardware.from_json(found.to_json()) == found


def test_a_cpu_by_its_flags() -> None:
    text = (
        "processor\t: 0\ncpu MHz\t\t: 2500.0\ncache size\t: 8192 KB\nflags\t\t: fpu avx2 avx512f\n"
    )
    wide = of_cpuinfo(text + "\n" + text, 8)
    assert (wide.processors, wide.clock, wide.flops32, wide.l2) == (8, 2.5e9, 64, 2**23)
    assert of_cpuinfo(text.replace("avx512f", "sse"), 8).flops32 == 32
    assert of_cpuinfo(text.replace("fpu", "amx_bf16"), 8).flops16 == 4 * 64
    assert of_cpuinfo("Features\t: fp asimd", 3).flops32 == 16
    assert of_cpuinfo("", 2).flops32 == Hardware.named("cpu").flops32
