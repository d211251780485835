"""Names of the user's code that a generated forward uses as well: nothing may hide anything."""

from __future__ import annotations

import builtins
import enum
import keyword
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import pytest
import torch
from doors.living import calls
from torch import Tensor, nn

import attn_compiler as ac
from attn_compiler.installed import CHECKS

WIDTH = 6


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def attend(self, given: Sequence[Tensor], flags: Sequence[bool] = ()) -> Tensor:
        x = self.proj(sum(given) / len(given)) * (0.5 if all(flags) else 0.25)
        return (x @ x.mT * 0.3).softmax(-1) @ x  # type: ignore[no-any-return]


def tensors(count: int) -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(2, 5, WIDTH) for _ in range(count)]


def made(me: str, more: str, rest: str, names: Sequence[str]) -> nn.Module:
    """An attention whose forward has parameters of these names: each third one is a tensor, a tuple
    of tensors that is only given by its name, and a flag with a default.
    """
    first, tuples, flags = names[0::3], names[1::3], names[2::3]
    declared = [me, *first, *(f"{n}=True" for n in flags), f"*{more}", *tuples, f"**{rest}"]
    given = [*first, *(f"*{n}" for n in tuples), f"*{more}", f"*{rest}.values()"]
    text = (
        f"def forward({', '.join(declared)}):\n"
        f"    return {me}.attend([{', '.join(given)}], [{', '.join(flags)}])\n"
    )
    space: dict[str, Any] = {}
    exec(text, space)
    torch.manual_seed(3)
    return type("Named", (Attention,), {"forward": space["forward"]})()


def compare(me: str, more: str, rest: str, names: Sequence[str]) -> Any:
    """Rewrite it; it must compute the same, with the operator and with calls unlike the example."""
    model = made(me, more, rest, names)
    first, tuples, flags = names[0::3], names[1::3], names[2::3]
    args = (*tensors(len(first)), *([True] * len(flags)), *tensors(2))
    kwargs: dict[str, Any] = {name: tuple(tensors(1)) for name in tuples} | {"key": tensors(1)[0]}
    new = ac.rewrite(model, args, kwargs)
    assert ac.last_report().rewritten == 1, ac.last_report()
    torch.testing.assert_close(new(*args, **kwargs), model(*args, **kwargs))
    assert calls(new, *args, **kwargs) == 1
    # what is unlike the example needs the other half of the forward
    args, kwargs = args[: len(first)], dict.fromkeys(tuples, ())
    torch.testing.assert_close(new(*args, **kwargs), model(*args, **kwargs))
    return new


def names_in(function: Any) -> set[str]:
    """Local names, globals and builtins: all that a parameter could hide."""
    code, there = function.__code__, {*function.__globals__, *dir(builtins)}
    return {*code.co_varnames, *(name for name in code.co_names if name in there)}


def used() -> list[str]:
    """Names that the generator writes: in the subclass's forward and in a variant."""
    new = compare("self", "more", "rest", ["x", "pair", "flag"])
    (variant, *_) = new._attn_variants
    body = variant.run.__globals__["body"]
    assert isinstance(body, FunctionType)
    found = set(CHECKS) | names_in(body)
    for function in (type(new).forward, variant.covers, variant.run):
        found |= names_in(function)
        found |= {n for n in function.__globals__ if not n.startswith("_")}
    return sorted(n for n in found if not keyword.iskeyword(n))


@pytest.mark.parametrize(
    ("me", "more", "rest", "turn"),
    [
        ("self", "variant", "plain", 0),
        pytest.param("found", "torch", "defaults", 1, marks=pytest.mark.slow),
        pytest.param("body", "type", "base", 2, marks=pytest.mark.slow),
    ],
)
def test_no_name_of_the_generator_hides_or_is_hidden(
    me: str, more: str, rest: str, turn: int
) -> None:
    """Each name is that of a parameter of each kind in turn, some that of the module itself."""
    names = used()
    assert {"plain", "keeps", "torch", "type", "body", "found", "defaults", "self"} <= {*names}
    others = [n for n in names if n not in (me, more, rest, "self")]
    # no call of a module can name its `self`, so that it is the first
    first = [] if me == "self" else ["self"]
    compare(me, more, rest, [*first, *others[turn:], *others[:turn]])


class Undeclared(Attention):
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        self, x = args
        return self.attend([x * kwargs["by"]])


def test_a_forward_that_declares_nothing_gets_all_its_arguments() -> None:
    model, x, half = Undeclared(), torch.randn(2, 5, WIDTH), torch.tensor(0.5)
    new = ac.rewrite(model, (x,), {"by": half})
    assert ac.last_report().rewritten == 1 and calls(new, x, by=half) == 1
    torch.testing.assert_close(new(x, by=half), model(x, by=half))
    torch.testing.assert_close(new(x, by=2.0), model(x, by=2.0))


class body(enum.IntEnum):
    last = -1


class Inner(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)


class Named(nn.Module):
    """Modules, attributes, keys and a class whose names are alike, or are no names in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.inner_drop = Inner(), nn.Dropout(0.25)
        setattr(self, "scale-1", 0.5)

    def forward(self, given: dict[str, Tensor], given_0: Tensor) -> Tensor:
        x = given["a-b"] + self.inner_drop(given["a_b"]) + given_0
        inner = self.inner.drop(x)
        x = self.inner.proj(inner) * getattr(self, "scale-1")
        return (x @ x.mT).softmax(body.last) @ x  # type: ignore[no-any-return]


def test_names_that_are_alike_or_none() -> None:
    torch.manual_seed(7)
    model, x = Named().eval(), torch.randn(2, 5, WIDTH)
    values = ({"a-b": x, "a_b": x + 1}, x - 2)
    new: Any = ac.rewrite(model, values)
    assert ac.last_report().rewritten == 1 and calls(new, *values) == 1
    torch.testing.assert_close(new(*values), model(*values))
    variant = new._attn_variants[0]
    for path in ("inner_drop", "inner.drop"):  # each is checked by itself, if at all
        hook = new.get_submodule(path).register_forward_hook(lambda *_: None)
        assert variant.covers(new, *values) is (f"self.{path}(" in variant.source)
        hook.remove()
    setattr(new, "scale-1", 0.25)
    setattr(model, "scale-1", 0.25)
    torch.testing.assert_close(new(*values), model(*values))


class Keywords(nn.Module):
    """Modules that are called as Python has words of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Sequential()
        self.keys.add_module("in", nn.Conv1d(WIDTH, WIDTH, 1))
        self.add_module("not", Inner())

    def forward(self, x: Tensor) -> Tensor:
        y = self.keys(x.mT).mT
        y = getattr(self, "not").proj(y)
        return (y @ y.mT).softmax(-1) @ x  # type: ignore[no-any-return]


def test_modules_with_the_names_of_keywords() -> None:
    model, x = Keywords().eval(), torch.randn(2, 5, WIDTH)
    new = ac.rewrite(model, (x,))
    assert ac.last_report().rewritten == 1 and calls(new, x) == 1
    torch.testing.assert_close(new(x), model(x))


class Block(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend([x])


class LooksUp(nn.Module):
    """Dynamo reads the submodules of such a module in its dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_paths_where_a_module_looks_up_attributes_itself() -> None:
    compiled = torch.compile(LooksUp(), backend="attn_compiler", options={"then": "eager"})
    compiled(*tensors(1))
    assert [site.path for site in ac.last_report().sites] == ["blocks.0", "blocks.1"]
