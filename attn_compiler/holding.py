"""What the text of a variant reads of its modules and sets on them, beside parameters and buffers.

self.mask = mask            ->   store(self, "", "mask", mask, {})
self.biases["cpu"] = bias   ->   keep(self, "", "biases", "cpu", bias)
self.biases["cpu"]          ->   held(self, "", "biases", "cpu")
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn


class _Self:
    """Stands in a graph for the module that its text runs on."""

    def __repr__(self) -> str:
        return "self"


SELF = _Self()


@fx.node.has_side_effect
def store(owner: nn.Module, path: str, name: str, value: Any, register: dict[str, bool]) -> None:
    """Set an attribute below a module, or register it as a buffer with these options."""
    home = owner.get_submodule(path) if path else owner
    if register:
        home.register_buffer(name, value, **register)
    else:
        setattr(home, name, value)


@fx.node.has_side_effect
def keep(owner: nn.Module, path: str, name: str, key: Any, value: Any) -> None:
    """Set an entry of a dict that a module below holds."""
    held(owner, path, name)[key] = value


def held(owner: nn.Module, path: str, name: str, *keys: Any) -> Any:
    """An attribute of a module below, or what a container that it holds has at these keys."""
    found = getattr(owner.get_submodule(path) if path else owner, name)
    for key in keys:
        found = found[key]
    return found
