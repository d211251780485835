"""When maps have settled: the rule of the method, step by step."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_compiler.errors import BadOption
from attn_compiler.train.criterion import SwitchCriterion, skewness


def at(x: float) -> Tensor:
    """A map at a distance from another that is the difference of their numbers."""
    return torch.tensor([[x, 0.0], [0.0, 0.0]])


def looks(numbers: list[float], **options: Any) -> tuple[list[bool], list[float]]:
    criterion = SwitchCriterion(**options)
    said, changes = [], []
    for x in numbers:
        said.append(criterion.look({"a": at(x)}))
        changes.append(criterion.changes.get("a", -1.0))
    return said, changes


def test_the_third_look_is_measured_against_the_first() -> None:
    # distances: |10 - 0|, |19 - 0| to the first map, then |20 - 19| to the one before
    said, changes = looks([0, 10, 19, 20])
    assert changes == pytest.approx([-1, -1, 90, 100 * 18 / 19])
    assert not any(said)
    # against the map before: 10, 9, 1
    said, changes = looks([0, 10, 19, 20], transition="clean")
    assert changes == pytest.approx([-1, -1, 10, 10])
    assert said == [False, False, True, True]


def test_the_earliest_switch() -> None:
    assert looks([0, 10, 10])[0] == [False, False, True]
    assert looks([0, 10, 11.4])[0] == [False, False, True]
    assert looks([0, 10, 11.5])[0] == [False, False, False]  # 15 is not below 15
    assert looks([0, 10, 11.5], percent=15.1)[0] == [False, False, True]


def test_maps_that_do_not_move() -> None:
    assert looks([4, 4, 4]) == ([False, False, True], [-1, -1, 0])


def test_distances_that_double_never_settle() -> None:
    numbers, step = [0.0, 1.0, 2.0], 4.0  # distances 1, 2 to the first map, then 4, 8, ...
    for _ in range(20):
        numbers.append(numbers[-1] + step)
        step *= 2
    said, changes = looks(numbers)
    assert not any(said) and changes[2:] == pytest.approx([100] * 21)


def test_every_layer_has_to_settle() -> None:
    criterion = SwitchCriterion()
    for a, b in ((0, 0), (10, 10)):
        assert not criterion.look({"a": at(a), "b": at(b)})
    assert not criterion.look({"a": at(10), "b": at(20)})
    assert criterion.changes == {"a": 0.0, "b": 100.0}


def test_once_settled_it_stays_so() -> None:
    criterion = SwitchCriterion()
    for x in (0, 10, 10):
        criterion.look({"a": at(x)})
    assert criterion.settled and criterion.look({}) and criterion.looks == 3
    assert criterion.state_dict()["references"] == {}


def noise(seed: int, stripe: float = 0.0, causal: bool = False) -> Tensor:
    """The mean map of 64 random heads of scores near 0; `stripe` is the score of the first key."""
    scores = 0.3 * torch.randn(64, 48, 48, generator=torch.Generator().manual_seed(seed))
    scores[..., 0] += stripe
    if causal:
        scores = scores.masked_fill(torch.ones(48, 48).triu(1).bool(), -torch.inf)
    return scores.softmax(-1).mean(0)


@pytest.mark.parametrize("causal", [False, True])
def test_noise_at_the_start_does_not_switch(causal: bool) -> None:
    """Batches differ by as much each time, which the published rule takes for settled maps."""
    published, ours = SwitchCriterion(), SwitchCriterion(skewness=1.7)
    for seed in range(20):
        maps = {name: noise(2 * seed + k, causal=causal) for k, name in enumerate("ab")}
        published.look(maps)
        assert not ours.look(maps) and max(map(skewness, maps.values())) < 1
    assert published.settled and published.looks == 3
    assert max(ours.changes.values()) < 15
    # one layer has learned to attend to the first key: far from before, near, then about as near
    said = []
    for step in range(6):
        learned = noise(50 + step, 5.0, causal), noise(70 + step, causal=causal)
        said.append(ours.look(dict(zip("ab", learned, strict=True))))
    assert not any(said[:2]) and said[-1]


def test_skewness() -> None:
    assert skewness(torch.full((7, 7), 1 / 7)) == 0 == skewness(torch.zeros(3, 3))
    # up to rounding
    assert skewness(torch.ones(101, 600).tril(499) / torch.arange(500.0, 601).unsqueeze(1)) == 0
    p = torch.tensor([[1.0, 2, 3, 10]])
    # by hand: around the mean of 4 these are -3, -2, -1, 6
    wanted = (-27 - 8 - 1 + 216) / 4 / ((9 + 4 + 1 + 36) / 4) ** 1.5
    assert skewness(p / p.sum()) == pytest.approx(wanted) == skewness(8 * p)


def test_maps_may_be_written_over() -> None:
    criterion, a = SwitchCriterion(), at(0)
    for x in (0, 10, 19):
        a[0, 0] = x
        said = criterion.look({"a": a})
    assert not said and criterion.changes["a"] == pytest.approx(90)


@pytest.mark.parametrize("split", range(5))
@pytest.mark.parametrize("transition", ["code", "clean"])
def test_a_training_that_is_resumed(split: int, transition: Any) -> None:
    numbers = [0.0, 10.0, 19.0, 40.0, 59.5]
    whole = looks(numbers, transition=transition)
    first, second = (SwitchCriterion(transition=transition) for _ in range(2))
    said = [first.look({"a": at(x)}) for x in numbers[:split]]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    said += [second.look({"a": at(x)}) for x in numbers[split:]]
    assert (said, second.changes["a"]) == (whole[0], whole[1][-1])


def test_what_is_refused() -> None:
    for options, message in (({"percent": 0.0}, "percent"), ({"transition": "x"}, "transition")):
        with pytest.raises(BadOption, match=message):
            SwitchCriterion(**options)  # type: ignore[arg-type]
    criterion = SwitchCriterion()
    with pytest.raises(BadOption, match="no map"):
        criterion.look({})
    criterion.look({"a": at(0)})
    for maps in ({"b": at(0)}, {"a": torch.zeros(3, 3)}, {"a": at(0), "b": at(0)}):
        with pytest.raises(BadOption, match="seen before"):
            criterion.look(maps)
    with pytest.raises(BadOption, match="not the state"):
        criterion.load_state_dict({"looks": 1})
