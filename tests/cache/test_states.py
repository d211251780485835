"""The cache of hidden states beside transformers' own: same keys and values after every change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_compiler.cache.maps import Maps, Rows
from attn_compiler.cache.states import States, equal_neighbours
from attn_compiler.errors import UnsupportedCall
from attn_compiler.kernels.schema import attention

transformers = pytest.importorskip("transformers")
el = pytest.importorskip("attn_compiler.cache.el")
layers = pytest.importorskip("attn_compiler.cache.layer")

HEADS, FEATURES, WIDTH = 3, 5, 17
ROWS = Rows(0, FEATURES, HEADS, FEATURES)
INNER = HEADS * FEATURES


class Projections(nn.Module):
    """Keys and values of x, with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k, self.v = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (p(x).unflatten(-1, (HEADS, FEATURES)).transpose(1, 2) for p in (self.k, self.v))
        return k, v

    @property
    def weights(self) -> Any:
        return self.k.weight, self.k.bias, self.v.weight, self.v.bias


def states(rows: int, length: int) -> Tensor:
    draw = torch.Generator().manual_seed(rows + length)
    return torch.randn(rows, length, WIDTH, dtype=torch.float64, generator=draw)


def same(ours: Any, theirs: Any) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.allclose(mine.keys, other.keys, 1e-12, 1e-12)
        assert torch.allclose(mine.values, other.values, 1e-12, 1e-12)


def caches(made: Projections, x: Tensor, borrowed: bool, layers: int = 2) -> tuple[Any, Any]:
    """Ours and the library's, filled alike."""
    ours, theirs = transformers.DynamicCache(), transformers.DynamicCache()
    for index in range(layers):
        el.keep(ours, (x, made.weights, borrowed, 0, None, None), (ROWS, ROWS), index)
        theirs.update(*made(x), index)
    return ours, theirs


# ---------------------------------------------------------------- the batch


@pytest.mark.parametrize("borrowed", [False, True])
@pytest.mark.parametrize("index", [[0, 0, 1, 3, 2, 2], [1, 0, 2, 3, 5, 4], [5, 5, 5, 0, 0, 0]])
def test_reordering(borrowed: bool, index: list[int]) -> None:
    made, x = Projections(), states(2, 7).repeat_interleave(3, 0)
    ours, theirs = caches(made, x, borrowed)
    for _ in range(2):
        for cache in (ours, theirs):
            cache.reorder_cache(torch.tensor(index))
        same(ours, theirs)


def test_beams_and_layers_share_one_tensor() -> None:
    made, x = Projections(), states(2, 7).repeat_interleave(3, 0)
    ours, theirs = caches(made, x, True, layers=4)
    held = {id(layer.states) for layer in ours.layers}
    assert len(held) == 1 and ours.layers[0].states.x.shape == (2, 7, WIDTH)
    assert el.nbytes(ours) == x.nbytes == ours.layers[0].nbytes
    before = ours.layers[0].states.x
    ours.reorder_cache(torch.tensor([1, 1, 0, 4, 3, 5]))
    assert ours.layers[3].states.x is before
    assert el.nbytes(theirs) == 4 * 2 * 6 * 7 * INNER * 8


@pytest.mark.parametrize("borrowed", [False, True])
def test_selecting_repeating_cropping(borrowed: bool) -> None:
    made, x = Projections(), states(2, 7).repeat_interleave(2, 0)
    ours, theirs = caches(made, x, borrowed)
    keep = torch.tensor([True, False, True, True])
    changes = [
        lambda c: c.batch_select_indices(torch.tensor([2, 3, 0, 1])),
        lambda c: c.batch_repeat_interleave(3),
        lambda c: c.crop(-2),
        lambda c: c.batch_select_indices(keep.repeat_interleave(3)),
        lambda c: c.batch_select_indices(torch.tensor([0])),
        lambda c: c.crop(-11),
    ]
    for change in changes:
        for cache in (ours, theirs):
            change(cache)
        same(ours, theirs)


@pytest.mark.parametrize("borrowed", [False, True])
def test_growing(borrowed: bool) -> None:
    made, x = Projections(), states(2, 7).repeat_interleave(2, 0)
    ours, theirs = caches(made, x, borrowed)
    for step in (1, 3):
        more = states(4, step)
        for index in range(2):
            el.keep(ours, (more, made.weights, False, 0, None, None), (ROWS, ROWS), index)
            theirs.update(*made(more), index)
        same(ours, theirs)
        for cache in (ours, theirs):
            cache.reorder_cache(torch.tensor([1, 1, 2, 0]))
        same(ours, theirs)


def test_equal_neighbours() -> None:
    x = states(3, 5)
    assert equal_neighbours(x) == 1
    assert equal_neighbours(x.repeat_interleave(4, 0)) == 4
    assert equal_neighbours(x[[0, 0, 1, 1, 2]]) == 1
    assert equal_neighbours(x[[0, 0, 0]]) == 3
    other = x[[0, 0, 1, 1]].clone()
    other[1, -1, -1] += 1
    assert equal_neighbours(other) == 1


# ---------------------------------------------------------------- code that knows nothing of it


def test_keys_that_others_write_make_an_ordinary_layer() -> None:
    made, x, more = Projections(), states(2, 7), states(2, 1)
    ours, theirs = caches(made, x, True)
    for cache in (ours, theirs):
        cache.update(*made(more), 1)
    same(ours, theirs)
    assert type(ours.layers[1]) is transformers.cache_utils.DynamicLayer
    # and x alone is then no longer enough
    kept = el.keep(ours, (more, made.weights, False, 0, None, None), (ROWS, ROWS), 1)
    assert isinstance(kept, el.Pair)
    theirs.update(*made(more), 1)
    same(ours, theirs)


def test_setting_keys() -> None:
    made, x = Projections(), states(2, 7)
    ours, theirs = caches(made, x, True)
    for cache in (ours, theirs):
        cache.layers[0].keys = cache.layers[0].keys * 2
    same(ours, theirs)


def test_what_two_models_have_written() -> None:
    one, other, x, more = Projections(), Projections(), states(2, 7), states(2, 1)
    other.k.weight.mul_(1.5)
    ours, theirs = caches(one, x, True)
    for index in range(2):
        el.keep(ours, (more, other.weights, False, 0, None, None), (ROWS, ROWS), index)
        theirs.update(*other(more), index)
    same(ours, theirs)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies(again: Any) -> None:
    made, x = Projections(), states(2, 7)
    ours, theirs = caches(made, x, True)
    twin = again(ours)
    ours.reorder_cache(torch.tensor([1, 0]))
    same(twin, theirs)
    twin.crop(-1)
    theirs.crop(-1)
    same(twin, theirs)


def test_reset() -> None:
    made, x = Projections(), states(2, 7)
    ours, _ = caches(made, x, True)
    ours.reset()
    assert ours.get_seq_length() == 0
    el.keep(ours, (x, made.weights, False, 0, None, None), (ROWS, ROWS), 0)
    assert ours.get_seq_length() == 7


CONFIG = transformers.GPT2Config(n_layer=2, n_head=HEADS, n_embd=INNER)


def static(length: int) -> Any:
    return transformers.StaticCache(config=CONFIG, max_cache_len=length)


def put(ours: Any, theirs: Any, made: Projections, x: Tensor, borrowed: bool = False) -> None:
    """Into all layers of both."""
    for index in range(2):
        el.keep(ours, (x, made.weights, borrowed, 0, None, None), (ROWS, ROWS), index)
        theirs.update(*made(x), index)


def test_a_static_cache_is_written_in_place() -> None:
    made, ours, theirs = Projections(), static(11), static(11)
    put(ours, theirs, made, states(3, 7))
    assert [type(one) for one in ours.layers] == 2 * [layers.StaticStatesLayer]
    held = ours.layers[1]
    places = [tensor.data_ptr() for tensor in held.states.tensors]
    for again in range(2):
        for step in (1, 2):
            same(ours, theirs)
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor([2, 0, 2]))
            put(ours, theirs, made, states(3, step + again))
        same(ours, theirs)
        asked = [
            (c.get_max_length(), c.get_mask_sizes(1, 0), c.is_compileable) for c in (ours, theirs)
        ]
        assert asked[0] == asked[1]
        for cache in (ours, theirs):
            cache.reset()
    assert [tensor.data_ptr() for tensor in held.states.tensors] == places
    assert el.nbytes(ours) == 2 * (3 * 11 * WIDTH * 8 + 8) and ours.layers[1] is held
    with pytest.raises(IndexError):
        el.keep(ours, (states(3, 12), made.weights, False, 0, None, None), (ROWS, ROWS), 0)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_of_a_static_cache(again: Any) -> None:
    made, ours, theirs = Projections(), static(11), static(11)
    put(ours, theirs, made, states(2, 7))
    twin = again(ours)
    put(ours, static(11), made, states(2, 1))
    same(twin, theirs)
    put(twin, theirs, made, states(2, 3))
    same(twin, theirs)


def test_a_static_cache_that_others_write() -> None:
    made, ours, theirs = Projections(), static(11), static(11)
    put(ours, theirs, made, states(2, 7))
    for cache in (ours, theirs):
        cache.update(*made(states(2, 1)), 0)
        cache.layers[1].values = cache.layers[1].values * 2
    same(ours, theirs)
    assert [type(one) for one in ours.layers] == 2 * [transformers.cache_utils.StaticLayer]
    assert vars(ours.layers[0]).keys() == vars(theirs.layers[0]).keys()
    # and x alone is then no longer enough
    put(ours, theirs, made, states(2, 2))
    same(ours, theirs)


@pytest.mark.parametrize(("length", "borrowed"), [(7, True), (11, True), (7, False)])
def test_a_static_cache_that_is_filled_at_once(length: int, borrowed: bool) -> None:
    """That of cross-attention shares what the encoder gave; one with room left is the library's."""
    made, x = Projections(), states(2, 7).repeat_interleave(2, 0)
    ours, theirs = static(length), static(length)
    put(ours, theirs, made, x, borrowed)
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([1, 1, 2, 3]))
    same(ours, theirs)
    shares = length == 7 and borrowed
    kind = layers.StatesLayer if shares else layers.StaticStatesLayer
    kind = transformers.cache_utils.StaticLayer if length == 11 else kind
    assert {type(layer) for layer in ours.layers} == {kind}
    assert not shares or el.nbytes(ours) == x.nbytes


def test_a_static_layer_of_a_window_keeps_its_keys() -> None:
    config = transformers.MistralConfig(num_hidden_layers=2, sliding_window=5)
    made = Projections()
    ours, theirs = (transformers.StaticCache(config=config, max_cache_len=11) for _ in range(2))
    for step in (3, 1, 4, 1):
        put(ours, theirs, made, states(2, step))
        same(ours, theirs)
    assert {type(one) for one in ours.layers} == {type(one) for one in theirs.layers}


def test_a_cache_whose_layers_go_elsewhere_holds_keys() -> None:
    made, x = Projections(), states(2, 7)
    cache = transformers.DynamicCache()
    cache.offloading = True
    assert layers.hold(cache, 0, (x, ()), Maps(made.weights, (ROWS, ROWS)), False) is None
    cache.offloading = False
    assert layers.hold(cache, 0, (x, ()), Maps(made.weights, (ROWS, ROWS)), False) is not None


class Weaker(transformers.DynamicCache):
    """A cache whose `update` somebody wrote."""

    def update(self, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
        return super().update(0.5 * keys, values, index, *more)


def test_an_update_of_somebody_s_own_is_called() -> None:
    made, x = Projections(), states(2, 7)
    ours, theirs = Weaker(), Weaker()
    for step in (x, x[:, :1]):
        kept = el.keep(ours, (step, made.weights, False, 0, None, None), (ROWS, ROWS), 0)
        theirs.update(*made(step), 0)
        assert isinstance(kept, el.Pair)
    same(ours, theirs)


# ---------------------------------------------------------------- lifetime


def test_a_borrowed_tensor_that_is_overwritten_is_refused() -> None:
    made, x = Projections(), states(2, 7)
    ours, _ = caches(made, x, True)
    x.mul_(2)
    with pytest.raises(UnsupportedCall, match="overwritten"):
        _ = ours.layers[0].keys


def test_its_own_tensor_is_a_copy() -> None:
    made, x = Projections(), states(2, 7)
    ours, theirs = caches(made, x, False)
    x.mul_(2)
    same(ours, theirs)


def test_the_weights_belong_to_the_model() -> None:
    made, x = Projections(), states(2, 7)
    ours, _ = caches(made, x, True)
    del made
    with pytest.raises(UnsupportedCall, match="model is gone"):
        _ = ours.layers[0].keys


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("key_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 29])
def test_attention_over_what_is_kept(rows: int, key_bias: bool) -> None:
    made, x = Projections(), states(2, 31).repeat_interleave(2, 0)
    ours, theirs = caches(made, x, True)
    q = torch.randn(4, HEADS, rows, FEATURES, dtype=torch.float64)
    options = {"program": "score: dot; mask: t0[b, k]; empty: any", "scale": 0.4}
    mask = [torch.arange(31) < torch.tensor([[31], [7], [5], [29]])]
    found = el.attend(ours.layers[1], q, mask, [], key_bias=key_bias, **options)
    wanted = [
        el.attend(theirs.layers[1], q, mask, [], key_bias=key_bias, **options),
        attention(q, *made(x), mask, [], None, dropout=0.0, **options)[0],
    ]
    for other in wanted:
        assert torch.allclose(found, other, 1e-11, 1e-12)


@pytest.mark.parametrize("rows", [1, 29])
@pytest.mark.parametrize("room", [0, 37])
def test_attention_over_the_first_keys(room: int, rows: int) -> None:
    made, x = Projections(), states(2, 31)
    ours, theirs = (static(room), static(room)) if room else caches(made, x, False)
    if room:
        put(ours, theirs, made, x)
    q = torch.randn(2, HEADS, rows, FEATURES, dtype=torch.float64)
    options = {"program": "score: dot; mask: k <= q + (S - T); empty: any", "scale": 0.4}
    wanted, _ = attention(q, *made(x[:, :29]), [], [], None, dropout=0.0, **options)
    for cache in (ours, theirs):
        found = el.attend(cache.layers[1], q, [], [], 29, key_bias=False, **options)
        assert torch.allclose(found, wanted, 1e-11, 1e-12)


def test_few_rows_read_x_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = Projections(), states(2, 31)
    ours, _ = caches(made, x, True)
    built: list[int] = []
    make = States.keys_and_values
    monkeypatch.setattr(
        States, "keys_and_values", lambda self, maps: built.append(1) or make(self, maps)
    )
    options = {"program": "score: dot; mask: True; empty: any", "scale": 0.4, "key_bias": False}
    for rows, count in ((1, 0), (53, 1)):
        q = torch.randn(2, HEADS, rows, FEATURES, dtype=torch.float64)
        el.attend(ours.layers[0], q, [], [], **options)
        assert len(built) == count


# ---------------------------------------------------------------- which rows of a weight


@pytest.mark.parametrize(("start", "step"), [(0, 5), (15, 5), (5, 15), (10, 15)])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows(start: int, step: int, transposed: bool) -> None:
    weight = torch.randn(45, WIDTH)
    found = Rows(start, step, HEADS, FEATURES, transposed)
    view = found.of(weight.t().contiguous() if transposed else weight)
    for g in range(HEADS):
        for f in range(FEATURES):
            assert torch.equal(view[g, f], weight[start + g * step + f])
    bias = torch.randn(45)
    assert torch.equal(found.of(bias)[2, 3], bias[start + 2 * step + 3])
