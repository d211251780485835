"""What the experts of a rewritten model do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_compiler as ac
from attn_compiler.terminal import text
from tests.doors.pages import Page
from tests.doors.switched import Separate, Stack, draw

BATCHES = [((draw(seed),), {}) for seed in (2, 3)]


def test_shares_and_entropies_of_each_router() -> None:
    torch.manual_seed(0)
    spec = ac.SwitchHead(heads=2, experts=3, k=2, head_dim=11)
    model = ac.rewrite(Stack(Separate), (draw(),), to=spec).train()
    found = ac.expert_usage(model, BATCHES)
    assert model.training and set(found) == {"layers.0", "layers.1"}
    x = torch.cat([args[0] for args, _ in BATCHES])
    usage = found["layers.0"]["w_s"]
    logits = (x @ model.layers[0].w_s.mT).unflatten(-1, (2, 3))
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(2).indices, 0.5)
    shares = chosen.mean((0, 1)).double()
    torch.testing.assert_close(usage.shares, shares)
    torch.testing.assert_close(usage.entropy, -(shares * shares.log()).sum(-1))
    mean = logits.softmax(-1).mean((0, 1)).double()
    torch.testing.assert_close(usage.chance, -(mean * mean.log()).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_router_that_has_collapsed_is_seen() -> None:
    spec = ac.SwitchHead(heads=2, experts=3, k=1, head_dim=11, shared_selection=True)
    model = ac.rewrite(Separate(), (draw(),), to=spec)
    with torch.no_grad():
        model.w_d.zero_()[::3] = 1.0
    (usage,) = ac.expert_usage(model, [((draw().abs(),), {})])[""].values()
    assert usage.shares[:, 0].eq(1).all() and usage.entropy.eq(0).all()
    assert "0% of an even choice" in str(usage)
    assert float(usage.chance.max()) < math.log(3)


def test_it_is_told_while_a_model_trains() -> None:
    torch.manual_seed(0)
    spec = ac.SwitchHead(heads=2, experts=3, k=2, head_dim=11)
    model = ac.rewrite(Stack(Separate), (draw(),), to=spec).train()
    told: list[dict[str, dict[str, Any]]] = []
    with ac.watch_experts(model, told.append, every=2):
        for seed in range(5):
            model(draw(seed)).square().sum().backward()
    assert len(told) == 2 and all(p.grad is not None for p in model.parameters())
    for number, usages in enumerate(told):
        alone = ac.expert_usage(model, [((draw(2 * number + i),), {}) for i in range(2)])
        for path in ("layers.0", "layers.1"):
            for router in ("w_s", "w_d"):
                mine, theirs = usages[path][router], alone[path][router]
                torch.testing.assert_close(mine.shares, theirs.shares)
                torch.testing.assert_close(mine.chance, theirs.chance)
    model(draw())
    model(draw())
    assert len(told) == 2 and not model._forward_hooks
    with pytest.raises(ac.BadOption, match="every is 0"), ac.watch_experts(model, print, every=0):
        pass
    with pytest.raises(ac.BadOption, match="no routers"), ac.watch_experts(Separate(), print):
        pass


def test_there_is_nothing_to_see() -> None:
    with pytest.raises(ac.BadOption, match="no routers"):
        ac.expert_usage(Separate(), BATCHES)
    spec = ac.SwitchHead(heads=2, experts=3, k=1, head_dim=11)
    with pytest.raises(ac.BadOption, match="chose anything"):
        ac.expert_usage(ac.rewrite(Separate(), (draw(),), to=spec), [])


def test_a_report_tells_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = ac.SwitchHead(heads=2, experts=3, k=1, head_dim=11)
    model = ac.rewrite(Stack(Separate), (draw(),), to=spec)
    report = ac.last_report()
    with torch.no_grad():  # one head routes all to one expert
        model.layers[1].w_s[:3] = 0.0
        model.layers[1].w_s[0] = 1.0
    usage = ac.expert_usage(model, [((draw().abs(),), {})])
    found = report.with_usage(usage)
    assert report.sites[1].facts == ac.last_report().sites[1].facts and len(found.sites) == 2
    line = "; ".join(f"{name}: {usage['layers.1'][name]}" for name in ("w_s", "w_d"))
    assert f"experts {line}" in str(found) and "least used 0.0%" in line
    assert line in " ".join(text(found).split())
    numbers = json.loads(found.to_json())["sites"][1]["facts"]["experts"]
    assert numbers["routers"]["w_s"]["shares"][0] == [1.0, 0.0, 0.0] and numbers["text"] == line
    found.to_html(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.complaints == [] and page.text.count("Its experts") == 2
    assert "w_s , of the keys' side: 2 heads down, 3 experts to the right" in page.text
    assert "0.0 to 100.0 % of the routes of its head" in page.text
    idle = [str(path["d"]) for path in page.all("path") if path.get("class") == "idle"]
    assert len(idle) == 4 and any(d.startswith("M1 0h2v1h-2z") for d in idle)
    assert "not all by the same function" in page.text


def test_usage_of_another_model() -> None:
    with pytest.raises(ac.BadOption, match="no site"):
        ac.last_report().with_usage({"layers.9": {}})
