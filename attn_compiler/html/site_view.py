"""What the page says of one site, or of sites that differ in nothing but their path."""

from __future__ import annotations

from dataclasses import dataclass

from attn_compiler.html import (
    mask_picture,
    pattern_picture,
    roofline_picture,
    usage_picture,
    words,
)
from attn_compiler.html.mask_picture import MaskPicture
from attn_compiler.html.pattern_picture import PatternPicture
from attn_compiler.html.roofline_picture import RooflinePicture
from attn_compiler.html.usage_picture import UsagePicture
from attn_compiler.html.ways import Way, drawn, formulas, ways
from attn_compiler.ir.site import AttentionSite, told
from attn_compiler.kernels.shown import Call

# of a picture where the example's sizes are not known
_ROWS, _KEYS = 32, 32


@dataclass(frozen=True, slots=True)
class WayView:
    """A way to compute the site; `chosen` is what runs, `bars` are shares of the longest part."""

    way: Way
    chosen: bool
    meaning: str
    bars: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True, slots=True)
class SiteView:
    """A site.

    Attributes:
        number: on the page, from 1.
        site: the first of those that are alike.
        paths: of all.
        picture: of its mask.
        call: what the cost model was asked, None where no device was named.
        ways: the fastest first.
        roofline: None without ways.
        kernels: numbers of its generated kernels on the page, with their names.
        pattern: of blocks that are kept, where a variant has one.
        usage: of experts by router, where somebody looked.
        formulas: what it costs in letters, by what is counted.
        gone, come: names of the operations before and of those that took their place; empty where
            no graph tells.
    """

    number: int
    site: AttentionSite
    paths: tuple[str, ...]
    picture: MaskPicture
    call: Call | None
    ways: tuple[WayView, ...]
    roofline: RooflinePicture | None
    kernels: tuple[tuple[int, str], ...]
    pattern: PatternPicture | None
    usage: tuple[UsagePicture, ...]
    formulas: tuple[tuple[str, str], ...] = ()
    gone: tuple[str, ...] = ()
    come: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        return "rewritten" if self.site.decision.accepted else "kept"

    @property
    def chosen(self) -> WayView | None:
        return next((view for view in self.ways if view.chosen), None)

    @property
    def keep(self) -> WayView | None:
        """The code as it is written."""
        return next((view for view in self.ways if view.way.name == "keep"), None)

    @property
    def runs_on(self) -> str:
        return told(self.site.facts.get("kernel", ""))

    @property
    def done(self) -> str:
        """What the variant says was done, where it says something."""
        return told(self.site.facts.get(self.site.decision.variant, ""))

    @property
    def searched(self) -> str:
        """What a search looks through."""
        site, reasons = self.site, self.site.decision.reasons
        found = (
            *self.paths, site.owner, site.location, str(site.mask), site.score, str(site.kind),
            *map(str, site.phases), site.decision.variant, self.runs_on, self.verdict,
            *map(str, reasons),
        )  # fmt: skip
        return " ".join(found).lower()


def view(number: int, sites: tuple[AttentionSite, ...], kernels: dict[str, int]) -> SiteView:
    """Gather all that is said of sites that are alike.

    Args:
        kernels: number of each generated kernel on the page by its name in the report.
    """
    site = sites[0]
    call = site.decision.call
    found = ways(call.problem, call.hardware) if isinstance(call, Call) else ()
    runs = told(site.facts.get("kernel", ""))
    own = {
        n: name
        for name, n in kernels.items()
        if runs == "triton" and name.endswith(f": {site.program}")
    }
    return SiteView(
        number=number,
        site=site,
        paths=tuple(s.path for s in sites),
        picture=_picture(site, call),
        call=call,
        ways=_way_views(found, site),
        roofline=roofline_picture.picture(drawn(call.problem, call.hardware, found))
        if found
        else None,
        kernels=tuple((n, name.partition(":")[0]) for n, name in sorted(own.items())),
        pattern=pattern_picture.picture(site.facts.get(site.decision.variant)),
        usage=usage_picture.pictures(site.facts.get("experts")),
        formulas=tuple(
            (name, text.replace("**", "^").replace("*", " · "))
            for name, text in formulas(site, call.problem if found else None).items()
        ),
    )


def _picture(site: AttentionSite, call: Call | None) -> MaskPicture:
    heads = site.query_heads or 1
    if call is not None:
        p = call.problem
        return mask_picture.picture(site.mask, p.rows, p.keys, p.batch, heads, example=True)
    rows, keys = (site.length, site.length) if site.length else (_ROWS, _KEYS)
    known = site.length is not None
    return mask_picture.picture(site.mask, rows, keys, 1, heads, example=known)


def _way_views(found: tuple[Way, ...], site: AttentionSite) -> tuple[WayView, ...]:
    runs = told(site.facts.get("kernel", "")).partition(":")[0]
    if not site.decision.accepted:
        runs = "keep"
    first = next((way for way in found if way.name == runs), None)
    return tuple(
        WayView(way, way is first, words.WAYS.get(way.name, ""), _bars(way)) for way in found
    )


def _bars(way: Way) -> tuple[tuple[str, float, float], ...]:
    longest = max(seconds for _, seconds in way.time.parts) or 1.0
    return tuple((name, seconds, seconds / longest) for name, seconds in way.time.parts)
