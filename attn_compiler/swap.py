"""Parameters of a module taken out and others put in, and the way back.

    self_attn.q_proj, .k_proj, .v_proj, .o_proj   ->   self_attn.w_q, .w_k, .w_v, .w_o, .w_s, .w_d

What is taken out leaves the model: its parameters, its state and its optimiser. A copy without
numbers stays, because the original forward is traced again where a call is unlike the example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attn_compiler.variants.base import NewModule, NewTensor, filled

Held = dict[str, tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class Taken:
    """A module or a parameter that was taken out.

    Attributes:
        path: below the owner.
        value: the module or parameter.
        before: the names of its kind that its home had, in order.
    """

    path: str
    value: nn.Module | nn.Parameter
    before: tuple[str, ...]


def take(owner: nn.Module, paths: Iterable[str]) -> tuple[Taken, ...]:
    """Take modules and parameters out of an owner."""
    found = []
    for path in dict.fromkeys(paths):
        home, name = _place(owner, path)
        table = _table(home, name)
        found.append(Taken(path, table[name], tuple(table)))
    for item in found:
        home, name = _place(owner, item.path)
        del _table(home, name)[name]
    return tuple(found)


def give_back(owner: nn.Module, taken: Sequence[Taken]) -> Held:
    """Put back what was taken, in the old order; what the homes held until now."""
    held: Held = {}
    for item in taken:
        home, name = _place(owner, item.path)
        held.setdefault(_above(item.path), (dict(home._parameters), dict(home._modules)))
        home._parameters.pop(name, None)
        table: dict[str, Any] = (
            home._modules if isinstance(item.value, nn.Module) else home._parameters
        )
        table[name] = item.value
        later = [n for n in table if n not in item.before]
        ordered = {n: table[n] for n in (*item.before, *later) if n in table}
        table.clear()
        table.update(ordered)
    return held


def put_back(owner: nn.Module, held: Held) -> None:
    """Undo `give_back`."""
    for path, tables in held.items():
        home = owner.get_submodule(path)
        for table, before in zip((home._parameters, home._modules), tables, strict=True):
            table.clear()  # type: ignore[attr-defined]
            table.update(before)  # type: ignore[attr-defined]


def made(owner: nn.Module, new: Iterable[NewTensor | NewModule]) -> list[Tensor | nn.Module]:
    """New tensors and modules as they start; the owner still has what they replace."""
    device = next((t.device for t in (*owner.parameters(), *owner.buffers())), None)
    return [
        item.made().to(device).train(owner.training)
        if isinstance(item, NewModule)
        else filled(item, owner, device)
        for item in new
    ]


def put(
    owner: nn.Module, new: Iterable[NewTensor | NewModule], values: Iterable[Tensor | nn.Module]
) -> None:
    """Register new tensors and modules where they belong."""
    for item, value in zip(new, values, strict=True):
        if isinstance(value, nn.Module):
            owner.register_module(item.name, value)
            continue
        assert isinstance(item, NewTensor)
        home = owner.get_submodule(item.home or "")
        if item.trained:
            home.register_parameter(item.name, nn.Parameter(value))
        else:
            home.register_buffer(item.name, value)


def drop(owner: nn.Module, new: Iterable[NewTensor | NewModule]) -> None:
    """Take new tensors and modules out again."""
    for item in new:
        home = item.home if isinstance(item, NewTensor) else None
        delattr(owner.get_submodule(home or ""), item.name)


def _above(path: str) -> str:
    return path.rpartition(".")[0]


def _homes(path: str) -> Iterator[str]:
    """The modules between an owner and what lies at a path."""
    while path := _above(path):
        yield path


def _place(owner: nn.Module, path: str) -> tuple[nn.Module, str]:
    return owner.get_submodule(_above(path)), path.rpartition(".")[2]


def _table(home: nn.Module, name: str) -> dict[str, Any]:
    return home._modules if name in home._modules else home._parameters


# ---------------------------------------------------------------- shapes without numbers


def emptied(item: Taken) -> Taken:
    """The same without memory."""
    return _copied(item, lambda t: torch.empty_like(t, device="meta"))


def shaped(item: Taken, like: Tensor) -> Taken:
    """The same with memory again, on a device and in a dtype, the numbers arbitrary."""

    def change(tensor: Tensor) -> Tensor:
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype, device=like.device)

    return _copied(item, change)


def _copied(item: Taken, change: Callable[[Tensor], Tensor]) -> Taken:
    memo: dict[int, Any] = {}
    held = [item.value] if isinstance(item.value, nn.Parameter) else _tensors(item.value)
    for tensor in held:
        made = change(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = made
    return replace(item, value=copy.deepcopy(item.value, memo))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


# ---------------------------------------------------------------- what may be taken


def obstacle(
    model: nn.Module, owner: nn.Module, paths: Sequence[str], tensors: Iterable[NewTensor]
) -> tuple[str, str] | None:
    """Why these cannot be swapped: a code and a text; None if they can.

    A weight that another module holds as well stays in use there, and training would part the
    two. Codes: rewrite.shared_weight, rewrite.name_taken.
    """
    modules, parameters = _going(owner, paths)
    homes = {id(owner.get_submodule(home)) for path in paths for home in _homes(path)}
    inside = {id(module) for module in owner.modules()}
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            if id(child) in modules and modules[id(child)] != (id(module), name):
                return _shared(f"{path}.{name}")
            if id(child) in homes and id(module) not in inside:
                return _shared(f"{path}.{name}")
        for name, parameter in module._parameters.items():
            if id(parameter) in parameters and (id(module), name) not in parameters[id(parameter)]:
                return _shared(f"{path}.{name}")
    for tensor in tensors:
        home = owner.get_submodule(tensor.home or "")
        if hasattr(home, tensor.name) and tensor.path not in paths:
            text = f"{tensor.path} is there already, and is the name of a new parameter"
            return "rewrite.name_taken", text
    return None


def _shared(path: str) -> tuple[str, str]:
    text = f"a weight that would be replaced is also {path.lstrip('.')}, which stays"
    return "rewrite.shared_weight", text


def _going(
    owner: nn.Module, paths: Iterable[str]
) -> tuple[dict[int, tuple[int, str]], dict[int, set[tuple[int, str]]]]:
    """By identity: modules and their one place, parameters and all their places."""
    modules: dict[int, tuple[int, str]] = {}
    parameters: dict[int, set[tuple[int, str]]] = {}
    for path in paths:
        home, name = _place(owner, path)
        value = _table(home, name)[name]
        if not isinstance(value, nn.Module):
            parameters.setdefault(id(value), set()).add((id(home), name))
            continue
        modules[id(value)] = id(home), name
        for inner in value.modules():
            for key, parameter in inner._parameters.items():
                if parameter is not None:
                    parameters.setdefault(id(parameter), set()).add((id(inner), key))
    return modules, parameters
