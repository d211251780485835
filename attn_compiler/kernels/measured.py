"""What was the fastest when it was measured: by device, template, program and class of shapes.

    fastest(call, "forward")   ->   Choice("triton", (Tile(128, 64, 8, 3),)),   None if not measured

One small file for each class in the cache folder. `kernels.measure` writes them, when a graph is
compiled with the option `measure_top`; every later call of the class on this machine reads them
once and never measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from attn_compiler.cost import store
from attn_compiler.cost.at_hand import name_of
from attn_compiler.kernels.frame import Inputs
from attn_compiler.kernels.gpu_tiles import problem_of
from attn_compiler.kernels.launch import Tile

_KIND = "fastest"


@dataclass(frozen=True, slots=True)
class Choice:
    """Who computes a call.

    Attributes:
        name: of an implementation: "cudnn", "flash", "triton", or of a way on a CPU.
        tiles: of the generated kernels.
    """

    name: str
    tiles: tuple[Tile, ...] = ()

    def __str__(self) -> str:
        tiles = ", ".join(f"{t.rows}x{t.keys} {t.warps} {t.stages}" for t in self.tiles)
        return f"{self.name} {tiles}".rstrip()


def fastest(given: Inputs, template: str) -> Choice | None:
    """The measured choice of a call's class, None where there is none."""
    where = store.folder("measured")
    if not _any(where):
        return None
    return known(place(given, template))


def place(given: Inputs, template: str, device: torch.device | None = None) -> Path:
    """The file of a call's class.

    Args:
        device: where the call runs, by default that of its tensors.
    """
    name = name_of_device(device or given.q.device)
    about = (template, str(given.q.dtype), given.program, repr(problem_of(given).bucketed()))
    return store.place(_KIND, name, *about)


def keep(path: Path, choice: Choice, seconds: Mapping[Choice, float]) -> None:
    """Write what was measured, and know it from now on."""
    found = {
        "way": choice.name,
        "tiles": [astuple(tile) for tile in choice.tiles],
        "seconds": {str(way): taken for way, taken in seconds.items()},
    }
    store.put(path, json.dumps(found, indent=1))
    forget()


def forget() -> None:
    """Read every file again."""
    _any.cache_clear()
    known.cache_clear()


name_of_device = lru_cache(maxsize=16)(name_of)


@lru_cache(maxsize=16)
def _any(where: Path) -> bool:
    """Was anything ever measured? Most processes ask no more than this."""
    return next(where.glob(f"{_KIND}_*.json"), None) is not None


@lru_cache(maxsize=4096)
def known(path: Path) -> Choice | None:
    """What a file says, None where it is not there or says nothing."""
    found = store.read(path)
    try:
        tiles = tuple(Tile(*tile) for tile in found["tiles"])
        return Choice(str(found["way"]), tiles)
    except (KeyError, TypeError) as error:
        if found:
            store.log.warning("%s is ignored, measure again: %r", path, error)
        return None
