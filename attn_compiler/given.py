"""What a user names on the command line: a model in a file, specs, a shape; and where a model
fails.

    model.py:make              ->   (model, args, kwargs), whatever make() returns
    SPION(alpha=0.96)          ->   the spec
    batch=1,query=8192,...     ->   a Shape
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from attn_compiler.errors import AttnCompilerError, BadOption
from attn_compiler.variants import Flash
from attn_compiler.variants.base import Shape, VariantSpec

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s+([^\n]+)')
_INSIDE = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class CouldNot(AttnCompilerError):
    """What was asked for on the command line is well said and cannot be done."""


@dataclass(frozen=True)
class Given:
    """A model with an example call."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def device(self) -> torch.device:
        """Of its parameters, else of the example."""
        parameters = getattr(self.model, "parameters", lambda: ())()
        tensors = [*parameters, *(x for x in self.args if isinstance(x, torch.Tensor))]
        return tensors[0].device if tensors else torch.device("cpu")


def load(target: str) -> Given:
    """Run the file and call its function.

    Raises:
        BadOption: no such file or function, or it returns something else.
        CouldNot: the file or the function raises an error.
    """
    name, _, function = target.rpartition(":")
    if not name or not function.isidentifier():
        raise BadOption(f'"{target}" is not FILE:FUNCTION', do="write it like model.py:make")
    path = Path(name)
    if not path.is_file():
        raise BadOption(f"there is no file {path}", do="give the path of a Python file")
    module = _module(path)
    make = getattr(module, function, None)
    if not callable(make):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(function, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadOption(
            f"{path.name} has no function {function}",
            do=f"{hint}define it to return (model, args, kwargs)",
        )
    _check_no_arguments(make, target)
    try:
        made = make()
    except AttnCompilerError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(f"{function} fails", error) from error
    return _checked(made, target)


def _check_no_arguments(make: Callable[..., Any], target: str) -> None:
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise BadOption(
            f"{target} cannot be called without arguments",
            why=[str(error)],
            do="name a function without any, that returns (model, args, kwargs)",
        ) from error
    except ValueError:
        return  # a builtin without a signature: the call itself will tell


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"given_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BadOption(f"{path.name} is not Python", do="give the path of a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # as `python FILE` does
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # as a script does that reads its own options
        raise _failed(f"{path.name} cannot be run", error) from error
    return module


def _checked(found: Any, target: str) -> Given:
    parts = list(found) if isinstance(found, tuple | list) else []
    if not 2 <= len(parts) <= 3 or not callable(parts[0]):
        kind = f"type {type(found).__name__}"
        raise BadOption(
            f"{target} returns a value of {f'{len(parts)} parts' if parts else kind}",
            do="return (model, args, kwargs), args a tuple and kwargs a dict",
        )
    model, args, kwargs = (*parts, None)[:3]
    if isinstance(model, type):
        name = model.__name__
        raise BadOption(f"{target} returns a class, {name}", do=f"return a model, {name}(...)")
    for name, value, kinds in (("args", args, (tuple, list)), ("kwargs", kwargs or {}, Mapping)):
        if not isinstance(value, kinds):
            raise BadOption(
                f"{target} returns {name} as a {type(value).__name__}",
                do="return (model, (x,), {}), args a tuple and kwargs a dict",
            )
    return Given(model, tuple(args), dict(kwargs or {}))


# ---------------------------------------------------------------- where a model fails


@contextmanager
def called(given: Given) -> Iterator[None]:
    """Around whatever runs a model: its errors as one of ours.

    Raises:
        CouldNot: the model fails, or cannot be traced.
    """
    try:
        yield
    except AttnCompilerError:
        raise
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from error
    except (Exception, SystemExit) as error:
        raise _failure(given, error) from error


def _failure(given: Given, error: BaseException) -> CouldNot:
    """Why a model could not be traced: its own error, or something that the tracer cannot do."""
    try:
        with torch.no_grad():
            given.model(*given.args, **given.kwargs)
    except (Exception, SystemExit) as own:
        what = "the model fails on its example, also without a compiler,"
        return _failed(what, own, _innermost(given.model, own))
    found = _FRAME.findall(str(error).partition("from user code:")[2])
    users = [frame for frame in found if not frame[0].startswith(_INSIDE)]
    file, number, line = (users or found or [("", "", "")])[-1]
    return CouldNot(
        "the model runs by itself, and torch.compile cannot trace it",
        where=f"{Path(file).name}:{number}" if file else "",
        why=[*([line] if line else []), f"{type(error).__name__}: {_first(error)}"],
        do="keep that line out of the trace with torch.compiler.disable, or write it otherwise"
        if file
        else "give a model that torch.compile accepts; --debug shows the whole traceback",
    )


def _innermost(model: Any, error: BaseException) -> str:
    """The submodule that was running: its path and class."""
    names = {id(m): p for p, m in model.named_modules()} if isinstance(model, nn.Module) else {}
    frames = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    inner = [module for module in frames if names.get(id(module))]
    return f"in {names[id(inner[-1])]}, a {type(inner[-1]).__name__}" if inner else ""


def _failed(what: str, error: BaseException, inside: str = "") -> CouldNot:
    if isinstance(error, SyntaxError):
        return _not_python(what, error)
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith(_INSIDE)]
    last = [f for f in users if "importlib" not in f.filename][-1:] or list(frames[-1:])
    return CouldNot(
        what,
        where=f"{Path(last[0].filename).name}:{last[0].lineno}" if last else "",
        why=[
            *(f.line for f in last if f.line),
            *filter(None, [inside]),
            f"{type(error).__name__}: {_first(error)}",
        ],
        do="mend that line, then try again; --debug shows the whole traceback",
    )


def _not_python(what: str, error: SyntaxError) -> CouldNot:
    """The line that is wrong was never run, so that no frame names it."""
    line = (error.text or "").strip()
    return CouldNot(
        what,
        where=f"{Path(error.filename).name}:{error.lineno}" if error.filename else "",
        why=[*([line] if line else []), f"{type(error).__name__}: {error.msg}"],
        do="mend that line, then try again" if error.filename else "give a file of Python",
    )


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


# ---------------------------------------------------------------- values in words


def spec(words: str) -> VariantSpec | Literal["fastest"]:
    """`fastest`, `Flash`, `SPION(alpha=0.96)`.

    Raises:
        BadOption: no such spec, or a field of it is wrong.
    """
    if words == "fastest":
        return "fastest"
    known = {cls.__name__: cls for cls in _specs()}
    try:
        tree = ast.parse(words, mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        name = call.func.id if isinstance(call.func, ast.Name) and not call.args else ""
        options = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError):
        name, options = "", {}
    if name not in known:
        raise BadOption(
            f'"{words}" is not a spec',
            do=f"give fastest or one of {', '.join(known)}, with options as in SPION(alpha=0.96)",
        )
    try:
        made: VariantSpec = known[name](**options)
    except TypeError:
        fit = ", ".join(f.name for f in fields(known[name])) or "none"
        raise BadOption(f"{name} has no such option: {words}", do=f"its options: {fit}") from None
    return made


def _specs() -> list[type[VariantSpec]]:
    # a dataclass with slots is made anew: what it was made from is a subclass still
    found = [
        cls
        for cls in VariantSpec.__subclasses__()
        if cls.__module__.startswith("attn_compiler.")
        and getattr(sys.modules[cls.__module__], cls.__name__) is cls
    ]
    return sorted(found, key=lambda cls: (cls is not Flash, cls.__name__))


def target(words: Iterable[str]) -> Any:
    """`--to` once without, or several times with a glob: `encoder.*=Flash`."""
    found: dict[str, Any] = {}
    for word in words:
        glob, equals, rest = word.partition("=")
        plain = not equals or "(" in glob
        found["*" if plain else glob] = spec(word if plain else rest)
    return found or "fastest"


def shape(words: str) -> Shape:
    """`batch=1,query=8192,heads=16,head_dim=64`; `key` is `query` where it is left out.

    Raises:
        BadOption: an unknown name, a missing size, or a wrong value.
    """
    names = {f.name: f for f in fields(Shape)}
    needed = [n for n, f in names.items() if f.default is MISSING]
    found: dict[str, Any] = {}
    for word in filter(None, words.split(",")):
        name, _, value = (part.strip() for part in word.partition("="))
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise BadOption(f'"{name}" is no size', do=f"{hint}sizes: {', '.join(names)}")
        found[name] = _value(name, value, yes_or_no=names[name].type == "bool")
    if "query" in found:
        found.setdefault("key", found["query"])
    missing = [name for name in needed if name not in found]
    if missing:
        raise BadOption(
            f"the shape has no {', '.join(missing)}",
            do="write it like batch=1,query=8192,heads=16,head_dim=64",
        )
    return Shape(**found)


def _value(name: str, value: str, yes_or_no: bool) -> int | bool:
    if yes_or_no and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not yes_or_no and value.isdecimal():
        return int(value)
    do = "give true or false" if yes_or_no else "give a whole number"
    raise BadOption(f'the shape has {name}="{value}"', do=do)
