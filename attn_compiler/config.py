"""What a run of the compiler is allowed to do, checked once at the door."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from attn_compiler.cost.hardware import Hardware, resolve
from attn_compiler.errors import BadOption
from attn_compiler.variants import VARIANTS
from attn_compiler.variants.base import Fidelity, Scope, Variant, VariantSpec

Target = VariantSpec | Literal["fastest"]
_OPTIONS = ("to", "hardware", "on_reject", "measure_top", "then", "mode", "inductor")


@dataclass(frozen=True)
class CompileConfig:
    """Allowed variants and behaviour.

    Attributes:
        to: pairs of a glob over module paths and what may be put there; the first match wins, no
            match keeps.
        on_reject: "keep" leaves a site that cannot be rewritten as it is, "raise" raises
            NoLegalVariant.
        then: who compiles the rest of the graph: "inductor" or "eager".
        mode: mode of torch.compile for Inductor.
        inductor: options for Inductor.
        keep_graphs: keep the text of the graphs before and after for the report.
        installs: a module is at hand that new tensors can be put into.
        hardware: what costs are predicted for, None for the device of the tensors.
        measure_top: so many candidates of each call are timed on its device, 0 for none.
    """

    to: tuple[tuple[str, Target], ...] = (("*", "fastest"),)
    on_reject: Literal["keep", "raise"] = "keep"
    then: Literal["inductor", "eager"] = "inductor"
    mode: str | None = None
    inductor: tuple[tuple[str, Any], ...] = ()
    keep_graphs: bool = False
    installs: bool = False
    hardware: Hardware | None = None
    measure_top: int = 0

    def exact(self) -> CompileConfig:
        """The same for calls in which there is no cache to change: the same function."""
        to = ((glob, _exactly(target)) for glob, target in self.to)
        return replace(self, to=tuple(to))

    @property
    def beyond_cores(self) -> bool:
        """Is a variant wanted that replaces more than softmax and its products, such as a cache?"""
        return any(variant_of(target).scope is not Scope.CORE for _, target in self.to)

    @property
    def looks_around(self) -> bool:
        """May something replace more than an attention, with modules beside it?"""
        wide = (Scope.BLOCK, Scope.SITE_AND_NET)
        return any(variant_of(target).scope in wide for _, target in self.to)

    def wanted(self, path: str) -> Target | None:
        """What the user wants at this module path, None to keep it."""
        return next((target for glob, target in self.to if fnmatch.fnmatchcase(path, glob)), None)


def make_config(options: Mapping[str, Any] | None = None) -> CompileConfig:
    """Check options of a door.

    Raises:
        BadOption: an unknown key or a wrong value.
    """
    options = dict(options or {})
    for key in options:
        if key not in _OPTIONS:
            near = difflib.get_close_matches(str(key), _OPTIONS, 1)
            hint = f'did you mean "{near[0]}"? ' if near else ""
            raise BadOption(
                f'unknown option "{key}"', do=f"{hint}known options: {', '.join(_OPTIONS)}"
            )
    inductor = options.get("inductor") or {}
    if not isinstance(inductor, Mapping):
        raise BadOption(f"option inductor is {inductor!r}", do="give a dict of Inductor options")
    return CompileConfig(
        to=_targets(options.get("to", "fastest")),
        on_reject=_one_of("on_reject", options.get("on_reject", "keep"), ("keep", "raise")),
        then=_one_of("then", options.get("then", "inductor"), ("inductor", "eager")),
        mode=options.get("mode"),
        inductor=tuple(sorted(inductor.items())),
        hardware=None if options.get("hardware") is None else resolve(options["hardware"]),
        measure_top=_number("measure_top", options.get("measure_top")),
    )


def _number(name: str, value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadOption(f"option {name} is {value!r}", do="give a whole number from 0")
    return value


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise BadOption(
            f"option {name} is {value!r}", do=f"give one of {', '.join(map(repr, allowed))}"
        )
    return value


def _targets(to: Any) -> tuple[tuple[str, Target], ...]:
    pairs = to.items() if isinstance(to, Mapping) else [("*", to)]
    found: list[tuple[str, Target]] = []
    for glob, target in pairs:
        if not isinstance(glob, str):
            raise BadOption(
                f"a key of option to is {glob!r}", do="use globs over module paths as keys"
            )
        if target != "fastest" and _served(target) is None:
            names = ", ".join(dict.fromkeys(v.spec.__name__ for v in VARIANTS))
            raise BadOption(
                f"option to is {target!r}", do=f'give "fastest", a spec ({names}) or a dict of them'
            )
        found.append((glob, target))
    return tuple(found)


def _exactly(target: Target) -> Target:
    variant = variant_of(target)
    return "fastest" if variant.fidelity is Fidelity.EXACT else target


def variant_of(target: Target) -> Variant:
    """The variant that serves a spec; "fastest" is the exact one."""
    found = VARIANTS[0] if target == "fastest" else _served(target)
    assert found is not None  # `make_config` has asked
    return found


def _served(target: Any) -> Variant | None:
    """A variant of this package, or the one that a spec of another package names."""
    own = next((v for v in VARIANTS if isinstance(target, v.spec) and v.serves(target)), None)
    return own or (target.variant() if isinstance(target, VariantSpec) else None)
