"""The benchmark of whole models on a CPU: its table, and that its code runs."""

from __future__ import annotations

import json

import pytest
import variants_cpu


def test_a_table_holds_medians_with_their_spread() -> None:
    one = {"median": 1.0, "least": 0.5, "most": 2.0}
    row = {"seconds": one, "peak": 3 * 2**20, "compiled_over": one}
    head, _, line = variants_cpu.table("forward", {"compiled": row}).splitlines()
    assert head == "| forward | ms | compiled / it | MiB at most |"
    assert line == "| compiled | 1,000 (500 to 2,000) | 1.00 (0.50 to 2.00) | 3 |"


def test_every_way_has_a_spec() -> None:
    given = variants_cpu.arguments(["--length", "512", "--density", "0.25"])
    for name in (*variants_cpu.VARIANTS, *variants_cpu.GENERATING):
        assert variants_cpu.spec(name, given) is not None
    # of 8 x 8 blocks, a quarter of the 36 that a causal mask leaves
    assert variants_cpu.spec("spion", given).pattern.density == 9 / 64


@pytest.mark.slow
def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"length": 128, "width": 64, "layers": 1, "rounds": 1, "tokens": 2, "beams": 2}
    sizes = [f"--{name}={value}" for name, value in numbers.items()]
    asked = ["--only", "forward", "generate", "--variants", "spion", "el", "--json"]
    assert variants_cpu.main([*sizes, *asked]) == 0
    printed = capsys.readouterr()
    parts = json.loads(printed.out)["parts"]
    assert list(parts["forward"]) == ["eager", "compiled", "sdpa", "spion"]
    assert list(parts["generate"]) == ["sdpa", "el"]
    assert parts["forward"]["spion"]["sdpa_over"]["median"] > 0
    assert "| spion | " in printed.err
