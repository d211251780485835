"""The option `measure_top`: the fastest of the first candidates by a clock that is given, kept on
disk, asked for once, and run from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import CAUSAL, text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attn_compiler as ac
from attn_compiler.cost import store
from attn_compiler.cost.hardware import Hardware
from attn_compiler.kernels import attention, gpu, measure, measured, sdpa_gpu, timing
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.launch import Tile
from attn_compiler.kernels.measured import Choice

CPU = torch.device("cpu")
WINDOW = text(mask="(k <= q) & (k > q - 37)")


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTN_COMPILER_CACHE", str(tmp_path))
    measured.forget()


class Clock:
    """Runs each call, and gives seconds by the way that ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.calls, self._seconds, self._way = 0, seconds, ""
        by = attention.by

        def seen(given: Inputs, way: str) -> Any:
            self._way = way
            return by(given, way)

        monkeypatch.setattr(attention, "by", seen)

    def __call__(self, call: Callable[[], Any]) -> float:
        self.calls += 1
        call()
        return self._seconds[self._way]


def call(program: str = WINDOW, length: int = 293, device: str = "cpu") -> Inputs:
    q, k, v = (torch.randn(1, length, 3, 16, device=device).transpose(1, 2) for _ in range(3))
    return Inputs.of(q, k, v, [], [], None, program=program, scale=0.25, dropout=0.0)


@pytest.mark.parametrize("best", ["blocked", "whole", "rows"])
def test_the_fastest_way_is_kept_and_taken(monkeypatch: pytest.MonkeyPatch, best: str) -> None:
    clock = Clock(monkeypatch, **{"blocked": 2.0, "whole": 2.0, "rows": 2.0, best: 1.0})
    given = call()
    exact, _ = attention.reference(*given.qkv, [], [], given.program, given.scale)
    found = measure.measure(given, CPU, 3, time=clock)
    assert found == Choice(best) == measured.fastest(given, "forward")
    asked = clock.calls
    assert measure.measure(given, CPU, 3, time=clock) == found and clock.calls == asked
    # a length of the same class needs no measurement either, another class does
    assert measure.measure(call(length=301), CPU, 3, time=clock) == found and clock.calls == asked
    assert measured.fastest(call(length=997), "forward") is None
    ran: list[str] = []
    by = attention.by
    monkeypatch.setattr(attention, "by", lambda g, way: ran.append(way) or by(g, way))
    out, _ = attention.forward(given)
    assert ran == [best]
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
    # another process finds it on disk
    measured.forget()
    assert measured.fastest(given, "forward") == found


def test_only_so_many_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, blocked=2.0, whole=1.0)
    assert measure.measure(call(), CPU, 2, time=clock) == Choice("whole")
    # nothing to choose among
    assert measure.measure(call(length=307, program=text()), CPU, 1, time=clock) is None


def test_a_damaged_file_is_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = call()
    measured.keep(measured.place(given, "forward"), Choice("whole"), {})
    assert measured.fastest(given, "forward") == Choice("whole")
    measured.place(given, "forward").write_text('{"way": 3}')
    measured.forget()
    assert measured.fastest(given, "forward") is None and "is ignored" in caplog.text
    attention.forward(given)


def test_a_map_of_blocks_is_not_measured() -> None:
    given = call(text(mask="t0[q // 64, k // 64]", empty="zero"))
    given = replace(given, reads=[torch.ones(5, 5, dtype=torch.bool)])
    assert measure.measure(given, CPU, 3) is None


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        far = (i[None] > i[:, None]) | (i[None] <= i[:, None] - 37)
        return (q @ k.mT / 4).masked_fill(far, float("-inf")).softmax(-1) @ v


def test_through_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, blocked=2.0, whole=1.0, rows=3.0)
    monkeypatch.setattr(measure, "clock", lambda device: clock)
    q, k, v = (torch.randn(1, 3, 293, 16) for _ in range(3))
    options = {"measure_top": 3, "then": "eager"}
    compiled = torch.compile(Layer(), backend="attn_compiler", options=options)
    before = torch.get_rng_state()
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), Layer()(q, k, v), rtol=1e-4, atol=1e-5)
    assert torch.equal(before, torch.get_rng_state())
    (site,) = ac.last_report().sites
    assert site.facts["kernel"] == "whole (measured)" and clock.calls > 0
    asked = clock.calls
    torch._dynamo.reset()
    compiled = torch.compile(Layer(), backend="attn_compiler", options=options)
    with torch.no_grad():
        compiled(q, k, v)
    assert clock.calls == asked


@pytest.mark.parametrize("wrong", ["3", 1.5, -1, True])
def test_a_wrong_number(wrong: object) -> None:
    from attn_compiler.config import make_config

    with pytest.raises(ac.BadOption, match="measure_top"):
        make_config({"measure_top": wrong})
    assert make_config({"measure_top": 3}).measure_top == 3
    assert make_config({"measure_top": None}).measure_top == make_config().measure_top == 0


# ---------------------------------------------------------------- on a GPU that is not there


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "family", lambda device: "hopper")
    monkeypatch.setattr(gpu, "backends", lambda device: ("cudnn", "flash"))
    monkeypatch.setattr(gpu, "hardware", lambda device: Hardware.named("h200"))
    monkeypatch.setattr(gpu, "warp_specialises", lambda device: True)
    monkeypatch.setattr(sdpa_gpu, "available", lambda backend: True)
    monkeypatch.setattr(measured, "name_of_device", lambda device: "NVIDIA H200")


@pytest.fixture
def long_call(h200: None) -> Inputs:
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, 2048, 16, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
            for _ in range(3)
        )
    return Inputs.of(q, k, v, [], [], None, program=text(mask=CAUSAL), scale=0.1, dropout=0.0)


def test_candidates_come_in_the_order_of_the_model(long_call: Inputs) -> None:
    found = list(gpu.choices(long_call, "forward"))
    assert found[0] == Choice("cudnn") and Choice("flash") in found
    tiles = [choice.tiles[0] for choice in found if choice.name == "triton"]
    assert len(tiles) > 3 and len(set(tiles)) == len(tiles)
    both = [c for c in gpu.choices(long_call, "backward") if c.name == "triton"]
    assert both and all(len(choice.tiles) == 2 for choice in both)


@pytest.mark.parametrize("work", ["forward", "backward"])
def test_a_measurement_overrules(long_call: Inputs, work: gpu.Work) -> None:
    assert gpu.chosen(long_call, work).name == "cudnn"
    tiles = (Tile(128, 64, 8, 3), Tile(64, 64, 4, 2))[: 1 if work == "forward" else 2]
    kept = Choice("triton", tiles)
    measured.keep(measured.place(long_call, work), kept, {kept: 1e-4})
    assert gpu.chosen(long_call, work) == kept
    # of what cannot express the call nothing is believed
    capped = replace(long_call, program=text("30.0 * tanh(dot / 30.0)", CAUSAL))
    measured.keep(measured.place(capped, work), Choice("cudnn"), {})
    assert gpu.chosen(capped, work).name == "triton"


def test_what_nothing_predicts_runs_only_where_it_was_measured(
    long_call: Inputs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = {choice.name: choice for choice in gpu.choices(long_call, "forward")}
    assert set(tried) == {"cudnn", "flash", "triton", "gluon", "efficient"}
    assert "gluon" not in [choice.name for choice in gpu.choices(long_call, "backward")]
    monkeypatch.setattr(gpu, "_given_up", set())
    for name in ("efficient", "gluon"):
        assert gpu.chosen(long_call, "forward").name == "cudnn"
        measured.keep(measured.place(long_call, "forward"), tried[name], {})
        assert gpu.chosen(long_call, "forward") == tried[name]
        measured.place(long_call, "forward").unlink()
        measured.forget()
    measured.keep(measured.place(long_call, "forward"), tried["gluon"], {})
    ran: list[str] = []

    def renamed(frame: object, tile: Tile) -> None:
        ran.append("gluon")
        raise AttributeError("module 'gl' has no attribute 'barrier'")

    monkeypatch.setattr(gpu.flash_gluon, "forward", renamed)
    monkeypatch.setattr(sdpa_gpu, "forward", lambda backend, given: ran.append(backend))
    for _ in range(2):
        gpu.forward(long_call)
    assert ran == ["gluon", "cudnn", "cudnn"] and "has no attribute" in caplog.text
    # a device of another capability, and a program with tensors
    monkeypatch.setattr(gpu, "_given_up", set())
    monkeypatch.setattr(gpu, "warp_specialises", lambda device: False)
    assert gpu.chosen(long_call, "forward").name == "cudnn"


def test_the_clock_decides_on_a_gpu_too(long_call: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, seen = torch.device("cuda"), []
    wanted = list(gpu.choices(long_call, "forward"))[2]
    monkeypatch.setattr(measure, "_filled", lambda given, device: given)
    monkeypatch.setattr(measure, "_capturing", lambda device: False)
    monkeypatch.setattr(gpu, "forward_by", lambda given, choice: seen.append(choice))

    def clock(run: Callable[[], Any]) -> float:
        run()
        return 1.0 if seen[-1] == wanted else 2.0

    assert measure.measure(long_call, cuda, 4, time=clock) == wanted
    assert len(set(seen)) == 4 and gpu.chosen(long_call, "forward") == wanted
    other = replace(long_call, program=text())
    monkeypatch.setattr(measure, "_capturing", lambda device: True)
    asked = len(seen)
    assert measure.measure(other, cuda, 4, time=clock) is None and len(seen) == asked


def test_the_file_says_what_was_measured() -> None:
    given = call()
    path = measured.place(given, "forward")
    measured.keep(path, Choice("rows"), {Choice("rows"): 0.5, Choice("whole"): 0.75})
    assert store.read(path)["seconds"] == {"rows": 0.5, "whole": 0.75}


def test_rounds_turn_around() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = timing.alternated(calls, 2, timing.seconds)
    assert "".join(order) == "abccbaabc" and [len(each) for each in found.values()] == [2, 2, 2]
