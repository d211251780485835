"""What a device can do, in numbers: one row of a table, a JSON text, or the device at hand.

    Hardware.named("h200").peak16   132 processors x 1.83 GHz x 4096 flop per clock = 989 TFLOP/s

Source of the rows: the vendors' data sheets; of the limits per block: NVIDIA's cuda_occupancy.h and
CUDA programming guide, AMD's instruction set manuals. `mark` says how far a row can be trusted.
Nothing is read from other libraries' tables: several of them hold half or twice the real peak.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from attn_compiler.cost.calibration import BOUNDS, NAMES, Calibration, default
from attn_compiler.errors import BadOption

Kind = Literal["nvidia", "amd", "cpu"]
Mark = Literal["=", "~", "?", "measured"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device. Rates named flops and exps are per clock of one processor.

    Attributes:
        name: canonical name.
        kind: "nvidia", "amd" or "cpu".
        arch: "sm_90", "gfx942", "cpu": what the compiler is told.
        processors: streaming multiprocessors, compute units or cores.
        clock: Hz at which the published peak counts.
        sustained: share of it that is left when the matrix units are busy.
        flops16, flops8, flops_tf32: dense matrix products, added up in 32 bits; 0 is none.
        flops32: of the ordinary units, a multiplication and an addition counted as two.
        exps: results of the special-function units.
        dram, dram_rate: bytes, bytes per second.
        l2, l2_rate: bytes of the last cache, bytes per clock of the whole device.
        warp: threads of a warp.
        warps, blocks, registers: of one processor, 32-bit registers.
        registers_step: registers are handed to a warp in units of so many.
        shared, shared_block: bytes of a processor, and the most a block may take of them.
        shared_step, shared_reserved: unit in which they are handed out; what the driver takes.
        mark: "=" the peak is the product of the parts, "~" the vendor says so, "?" partly assumed,
            "measured" on the device itself.
        constants: what was fitted, by template; of the others the defaults hold.
    """

    name: str
    kind: Kind
    arch: str
    processors: int
    clock: float
    sustained: float
    flops16: float
    flops8: float
    flops_tf32: float
    flops32: float
    exps: float
    dram: float
    dram_rate: float
    l2: float
    l2_rate: float
    warp: int
    warps: int
    blocks: int
    registers: int
    registers_step: int
    shared: int
    shared_block: int
    shared_step: int
    shared_reserved: int
    mark: Mark
    constants: tuple[tuple[str, Calibration], ...] = ()

    def constants_of(self, template: str) -> Calibration:
        """What was fitted for a template of kernels, else the defaults."""
        return dict(self.constants).get(template) or default(template)

    @property
    def peak16(self) -> float:
        """Operations per second of 16-bit matrix products, as published."""
        return self.processors * self.clock * self.flops16

    @classmethod
    def named(cls, name: str) -> Hardware:
        """A row of the table, by any of its names, without regard to case and hyphens.

        Raises:
            BadOption: no such name; near ones are given.
        """
        rows = _table()
        found = next((row for key, row in rows.items() if _plain(key) == _plain(name)), None)
        if found is None:
            near = difflib.get_close_matches(name.lower(), rows, 3)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise BadOption(
                f'unknown hardware "{name}"', do=f"{hint}known: {', '.join(known())}, or a Hardware"
            )
        return found

    def to_json(self) -> str:
        """All fields; `constants` is an object by template."""
        constants = {name: asdict(fit) for name, fit in self.constants}
        return json.dumps(asdict(self) | {"constants": constants}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """The opposite of `to_json`.

        Raises:
            BadOption: not JSON, or a field is missing, unknown, of a wrong type or out of range.
        """
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadOption("hardware is not JSON", why=[str(error)]) from None
        if not isinstance(found, dict):
            raise BadOption("hardware is not a JSON object", why=[f"it is {type(found).__name__}"])
        constants = found.pop("constants", {})
        wrong = _complaints(found) + _complaints_of_constants(constants)
        if wrong:
            raise BadOption(
                "hardware has wrong fields", why=wrong, do="start from the to_json() of a known row"
            )
        fits = {name: Calibration(*(fit[n] for n in NAMES)) for name, fit in constants.items()}
        given = {f.name: _number(f.type, found[f.name]) for f in fields(cls) if f.name in found}
        return cls(**given, constants=tuple(sorted(fits.items())))

    @classmethod
    def from_device(cls, device: Any = None) -> Hardware:
        """The row of a torch device; None is the current GPU, or the CPU if there is none.

        A device whose name is not in the table gets the row of the same architecture that is
        nearest in processors, with its own number of processors and bytes and the mark "?".
        What `calibrate` fitted for it on this machine comes first.

        Raises:
            BadOption: a device of a kind or an architecture that the table does not know.
        """
        from attn_compiler.cost.at_hand import hardware_of

        return hardware_of(device)


def resolve(hardware: str | Hardware | None, device: Any = None) -> Hardware:
    """What an option `hardware` means: a value as it is, a name's row, the path of a `.json` file
    what `Hardware.to_json` wrote there, None the device's.

    Raises:
        BadOption: an unknown name, device or type, or a file that cannot be read.
    """
    if hardware is None:
        return Hardware.from_device(device)
    if isinstance(hardware, str):
        return _in_file(hardware) if hardware.endswith(".json") else Hardware.named(hardware)
    if isinstance(hardware, Hardware):
        return hardware
    raise BadOption(
        f"hardware is a {type(hardware).__name__}", do="give a name, a Hardware or None"
    )


def _in_file(path: str) -> Hardware:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption(f'no hardware in "{path}"', why=[str(error)]) from None
    return Hardware.from_json(text)


def known() -> tuple[str, ...]:
    """The canonical names."""
    return tuple(dict.fromkeys(row.name for row in _table().values()))


def of_properties(name: str, arch: str, processors: int, dram: int) -> Hardware:
    """The row of a GPU that the driver describes so (see `Hardware.from_device`)."""
    rows = {row.name: row for row in _table().values() if row.arch == arch}
    if not rows:
        # sm_87, sm_103, ...: the limits of the nearest smaller capability of the same family
        near = sorted(r.arch for r in _table().values() if r.arch[:-1] == arch[:-1] <= arch)
        if not near:
            raise BadOption(f"no hardware numbers for {name} ({arch})", do="give a Hardware")
        rows = {row.name: row for row in _table().values() if row.arch == near[-1]}
    marks = {row: mark for row, mark in _devices().items() if row in rows and mark in name}
    if marks:
        # A100-SXM4-40GB and GH200 come in two sizes, and a longer name says more
        best = max(marks, key=lambda row: (len(marks[row]), -abs(rows[row].dram - dram)))
        return replace(rows[best], processors=processors, dram=float(dram))
    nearest = min(rows.values(), key=lambda row: abs(row.processors - processors))
    share = processors / nearest.processors
    return replace(
        nearest,
        name=name,
        arch=arch,
        processors=processors,
        dram=float(dram),
        dram_rate=nearest.dram_rate * min(1.0, share),
        l2_rate=nearest.l2_rate * min(1.0, share),
        mark="?",
    )


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


# ---------------------------------------------------------------- the table


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    text = (files("attn_compiler.cost") / "hardware.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@lru_cache(maxsize=1)
def _table() -> dict[str, Hardware]:
    """Rows by every one of their names."""
    found = {}
    for row in _data()["rows"]:
        own = {key: value for key, value in row.items() if key not in ("names", "device")}
        made = Hardware(name=row["names"][0], **_data()["arch"][row["arch"]], **own)
        found.update(dict.fromkeys(row["names"], made))
    return found


@lru_cache(maxsize=1)
def _devices() -> dict[str, str]:
    """What the driver's name of a device contains, by row."""
    return {row["names"][0]: row["device"] for row in _data()["rows"] if row["device"]}


_CHOICES = {"kind": get_args(Kind), "mark": get_args(Mark)}
# a GPU without them could run nothing
_POSITIVE = ("processors", "clock", "sustained", "flops32", "exps", "dram", "dram_rate", "l2_rate")


def _complaints(found: Mapping[str, Any]) -> list[str]:
    names = {f.name: f.type for f in fields(Hardware) if f.name != "constants"}
    wrong = [f"missing: {name}" for name in names if name not in found]
    wrong += [f"unknown: {name}" for name in found if name not in names]
    for name, value in found.items():
        type_ = names.get(name)
        if name in _CHOICES:
            if value not in _CHOICES[name]:
                wrong.append(f"{name} is {value!r}, not one of {', '.join(_CHOICES[name])}")
        elif type_ == "str":
            if not isinstance(value, str):
                wrong.append(f"{name} is {value!r}, not a text")
        elif type_ in ("int", "float") and not _is_number(value, whole=type_ == "int"):
            wrong.append(f"{name} is {value!r}, not a number of at least 0")
        elif name in _POSITIVE and value == 0:
            wrong.append(f"{name} is 0")
    return wrong


def _complaints_of_constants(found: Any) -> list[str]:
    if not isinstance(found, dict):
        return ["constants is not an object"]
    wrong = []
    for template, fit in found.items():
        if not isinstance(fit, dict) or set(fit) != set(NAMES):
            wrong.append(f"constants of {template} are not {', '.join(NAMES)}")
            continue
        for name, (low, high) in zip(NAMES, BOUNDS, strict=True):
            if not _is_number(fit[name], whole=False) or not low <= fit[name] <= high:
                wrong.append(f"{name} of {template} is {fit[name]!r}, not in {low} to {high}")
    return wrong


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return 0 <= value < float("inf")


def _number(type_: Any, value: Any) -> Any:
    return float(value) if type_ == "float" else value
