"""The command line: attn-compiler explain | plan | calibrate | bench | doctor.

    attn-compiler explain model.py:make --hardware h200
        ->   sites, what they compute, what would be done and why

Exit status 0 for done, 1 for could not, 2 for badly asked. Errors are one paragraph on standard
error; `--debug` adds the traceback. `--json` prints one JSON object on standard output.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from attn_compiler.errors import AttnCompilerError, BadOption

if TYPE_CHECKING:
    from attn_compiler.planning import Plan
    from attn_compiler.variants.base import VariantSpec

Command = Callable[[argparse.Namespace], int]
_WIDTH = 100
_TYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    options = _parser().parse_args(argv)
    run: Command = options.run
    options.out = sys.stdout
    # what a model prints is no part of an object
    aside = sys.stderr if options.json else sys.stdout
    try:
        with _quiet(options.debug), redirect_stdout(aside):
            return run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except AttnCompilerError as error:
        return _say(error, options)
    except Exception as error:
        wrapped = AttnCompilerError(
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            do="--debug shows the traceback; if it is not yours, please report it",
        )
        wrapped.__cause__ = error
        return _say(wrapped, options)


def _say(error: AttnCompilerError, options: argparse.Namespace) -> int:
    """One paragraph of an error, and its exit status."""
    if options.debug:
        traceback.print_exception(error)
    do = f"To do: {error.do}." if error.do else ""
    head = f"attn-compiler {options.command}: {error.what}"
    head += f" at {error.where}" if error.where else ""
    why = f" ({'; '.join(error.why)})" if error.why else ""
    paragraph = f"{head}{why}. {do}".strip()
    print(textwrap.fill(paragraph, _WIDTH, break_on_hyphens=False), file=sys.stderr)
    if options.json:
        parts = {"what": error.what, "where": error.where, "why": error.why, "do": error.do}
        _put(options, json.dumps({"error": parts}))
    return 2 if isinstance(error, BadOption) else 1


def _put(options: argparse.Namespace, text: str) -> None:
    """One JSON object, with null where Python would write NaN or Infinity, which JSON lacks."""
    strict = json.loads(text, parse_constant=lambda _: None)
    print(json.dumps(strict, indent=2, allow_nan=False), file=options.out)


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """PyTorch's own log lines and warnings about a model that fails would bury the paragraph."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        if not debug and not os.environ.get("TORCH_LOGS"):
            logging.disable(logging.ERROR)
            warnings.filterwarnings("ignore", module=r"torch\._(dynamo|inductor)\b")
        try:
            yield
        finally:
            logging.disable(before)


# ---------------------------------------------------------------- what can be asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attn-compiler",
        description="Find the attention in a PyTorch model, and say what can be done about it.",
        epilog="Exit status: 0 done, 1 could not, 2 badly asked.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _explain_parser(commands)
    _plan_parser(commands)
    _calibrate_parser(commands)
    _bench_parser(commands)
    _command(
        commands, "doctor", doctor, "versions, devices, and what works here", "attn-compiler doctor"
    )
    return parser


def _command(commands: Any, name: str, run: Command, text: str, *examples: str) -> Any:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _given(parser: Any) -> None:
    parser.add_argument(
        "given", metavar="FILE:FUNCTION", help="a function that returns (model, args, kwargs)"
    )
    parser.add_argument(
        "--to",
        action="append",
        default=[],
        metavar="[GLOB=]SPEC",
        help='what to rewrite to: fastest (the default), Flash, "SPION(alpha=0.96)"; '
        "with a glob over module paths as often as needed",
    )


def _hardware(parser: Any) -> None:
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help="a device by name: h200, l4, cpu; it need not be there. Or the path of a .json file: "
        "what Hardware.to_json() wrote, with your own numbers",
    )


def _explain_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "explain",
        explain,
        "what is found in a model, what would be done, and why not",
        "attn-compiler explain model.py:make",
        "attn-compiler explain model.py:make --hardware h200 --html report.html",
        "attn-compiler explain model.py:make --to \"encoder.*=Selective(start='gate')\"",
    )
    _given(parser)
    _hardware(parser)
    parser.add_argument("--html", metavar="PATH", help="also write a page for a browser")


def _plan_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        plan,
        "what a variant would cost at a shape or in a model, and whether it pays",
        "attn-compiler plan fastest --shape batch=1,query=8192,heads=16,head_dim=64 "
        "--hardware h200",
        "attn-compiler plan SwitchHead --shape batch=8,query=2048,heads=16,head_dim=64,"
        "training=true --hardware l4",
        "attn-compiler plan fastest --model model.py:make --hardware h200",
    )
    parser.add_argument(
        "spec", metavar="SPEC", help='fastest, Flash, GAU, "SPION(alpha=0.96)", ...'
    )
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument(
        "--model",
        metavar="FILE:FUNCTION",
        help="plan every attention of a model: a function that returns (model, args, kwargs)",
    )
    sizes.add_argument(
        "--shape",
        metavar="SIZES",
        help="batch, query, key, heads, head_dim, kv_heads, value_dim, width, layers, beams, "
        "causal, training; key is query where it is left out",
    )
    _hardware(parser)
    parser.add_argument("--dtype", choices=_TYPES, help=f"of a shape's tensors ({_TYPES[0]})")


def _calibrate_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "calibrate",
        calibrate,
        "fit the cost model to the device at hand and keep the result",
        "attn-compiler calibrate",
    )
    _hardware(parser)


def _bench_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        bench,
        "time a model under torch.compile without and with the rewriting, in turns",
        "attn-compiler bench model.py:make",
        "attn-compiler bench model.py:make --rounds 30 --json",
    )
    _given(parser)
    parser.add_argument("--rounds", type=int, default=15, help="calls of each way (15)")


# ---------------------------------------------------------------- the commands


def explain(options: argparse.Namespace) -> int:
    """Sites, decisions and near misses of a model."""
    from attn_compiler import api, given
    from attn_compiler.terminal import show

    to, found = given.target(options.to), given.load(options.given)
    with given.called(found):
        report = api.explain(
            found.model, found.args, found.kwargs, to=to, hardware=options.hardware
        )
    if options.html:
        report.to_html(options.html)
    if options.json:
        _put(options, report.to_json())
    else:
        show(report, options.out)
        if options.html:
            print(f"\nwritten to {options.html}", file=options.out)
    return 0


def plan(options: argparse.Namespace) -> int:
    """What a variant costs."""
    import torch

    from attn_compiler import given, planning

    spec = given.spec(options.spec)
    if options.model:
        return _plan_of_model(options, spec)
    found = planning.plan(
        spec,
        given.shape(options.shape),
        hardware=options.hardware,
        dtype=getattr(torch, options.dtype or _TYPES[0]),
    )
    if options.json:
        _put(options, json.dumps(_plain(found)))
    else:
        print(found, file=options.out)
    return 0


def _plan_of_model(options: argparse.Namespace, spec: VariantSpec | Literal["fastest"]) -> int:
    """The same for every site of a model."""
    from attn_compiler import api, given
    from attn_compiler.cost.hardware import resolve
    from attn_compiler.site_plans import site_plans

    if options.dtype:
        raise BadOption("a model has numbers of its own type", do="leave --dtype out")
    hardware, found = resolve(options.hardware), given.load(options.model)
    with given.called(found):
        report = api.explain(found.model, found.args, found.kwargs, hardware=hardware)
    plans = list(site_plans(report, spec, hardware))
    if options.json:
        parts = [{"site": p.site, "plan": _plain(p.plan) if p.plan else None} for p in plans]
        _put(options, json.dumps({"sites": parts}))
    else:
        print("\n\n".join(map(str, plans)) or "no attention is found")
    return 0


def _plain(found: Plan) -> dict[str, Any]:
    """A plan, with its spec in words."""
    others = [_plain(other) for other in found.alternatives]
    return asdict(found) | {"spec": str(found.spec), "alternatives": others}


def calibrate(options: argparse.Namespace) -> int:
    """Fit the constants of the cost model."""
    from attn_compiler.calibrating import calibrate

    found = calibrate(options.hardware)
    if options.json:
        _put(options, found.to_json())
    else:
        print(f"the cost model was fitted to {found.name}", file=options.out)
    return 0


def bench(options: argparse.Namespace) -> int:
    """Stock torch.compile and ours in turns."""
    from attn_compiler import bench, given

    if options.rounds < 1:
        raise BadOption(f"--rounds is {options.rounds}", do="give a whole number from 1")
    to, found = given.target(options.to), given.load(options.given)
    result = bench.compare(found, to, options.rounds)
    if options.json:
        _put(options, json.dumps(result.plain()))
    else:
        print(result, file=options.out)
    return 0


def doctor(options: argparse.Namespace) -> int:
    """What works here."""
    from attn_compiler import doctor

    checks = doctor.examine()
    if options.json:
        _put(options, json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        print(doctor.table(checks), file=options.out)
    return 1 if any(check.state == "missing" for check in checks) else 0
