"""One module's forward as a graph of torch functions: run once on fake tensors, every call written
down.

    forward(self, x)   ->   qkv = self.c_attn(x);  split = qkv.split(64, 2);  ...

Submodules stay calls, so that their hooks, adapters, dtypes and training mode go on working, except
those on the way to the attention, which are traced through. What the code read of *them* (numbers,
flags) is written down as well, to be checked before the graph is used. Tensors may be arguments,
parameters and buffers; anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import sympy
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch.amp import autocast_mode
from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode

from attn_compiler.constants import RealConstants
from attn_compiler.ir.affine import is_listened_to
from attn_compiler.listen import patched, watched
from attn_compiler.opaque import CONSTANTS, Assumption, made, unwrap
from attn_compiler.snapshot import Snapshot, likeness
from attn_compiler.symbols import CaptureError, Mismatch, Symbols, answered, exactly, oblivious
from attn_compiler.writer import Writer, attribute_of, holds_tensor

# of the layout, not of the sizes: the trace may have branched on them
_LAYOUT = frozenset({"is_contiguous", "stride", "storage_offset", "data_ptr", "is_set_to"})
# where the sign of a number decides: without an answer the size of the result is unknown
_SLICES = frozenset({"__getitem__", "__setitem__", "narrow", "slice", "select", "split", "chunk"})
# of a tensor's place in a derivative, which its fake does not have
_AUTOGRAD = frozenset({"requires_grad", "grad", "grad_fn", "is_leaf"})


class Recorder(PreDispatchTorchFunctionMode):
    """The trace of one call.

    Attributes:
        root: the module that is called.
        inline: which of its submodules are traced through.
        symbols: sizes, fake mode, and the graph.
        writer: writes the graph; `prefix` and `home` are for it.
        assumptions: branches taken on what opaque objects said.
        reads: simple attributes of modules that the traced code read, by module path and name.
        forms: the outlines of lists, tuples and dicts there, as `reads`.
        stores: what the traced code has set there, with its `_key`.
        kinds: classes of the modules that are traced through, by path.
        made: modules that the traced code has made, by identity.
        layout_read: did the code ask how a tensor lies in memory?
        grad_read: did it ask whether gradients are enabled?
    """

    make = made

    def __init__(
        self,
        root: nn.Module,
        inline: Callable[[str, nn.Module], bool],
        symbols: Symbols,
        *,
        prefix: str = "",
        home: str = "",
        guide: Recorder | None = None,
    ) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # the class by which autocast knows a trace
        self.root = root
        self.inline = inline
        self.symbols = symbols
        self.graph = symbols.graph
        self.writer = Writer(root, symbols, prefix, home)
        self.argument, self.learn = self.writer.argument, self.writer.learn
        self._guide = guide
        self.assumptions: list[Assumption] = []
        self.reads: dict[tuple[str, str], Any] = {}
        self.forms: dict[tuple[str, str], str] = {}
        self.stores: dict[tuple[str, str], tuple[Any, Any]] = {}
        self.kinds: dict[str, type[nn.Module]] = {}
        self.made: dict[int, nn.Module] = {}
        self.layout_read = False
        self.grad_read = False
        self.leaves: list[str] = []
        self._modules = {id(m): path for path, m in root.named_modules(remove_duplicate=True)}
        self._busy = 0
        self._entered: list[Any] = []
        self._inside = False
        self._idle: set[sympy.Basic] = set()
        self.asked: list[sympy.Basic] = []

    # ------------------------------------------------------------ running

    def run(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace `forward(root, *args, **kwargs)` on fakes whose nodes exist already.

        Raises:
            CaptureError: why it cannot be traced.
        """
        held = Snapshot(self.root)
        try:
            with ExitStack() as stack:
                stack.enter_context(oblivious())
                stack.enter_context(patched(self))
                stack.enter_context(watched(self._watched(), self))
                stack.enter_context(self._listening())
                stack.enter_context(enable_python_dispatcher())
                stack.enter_context(self.symbols.mode)
                stack.enter_context(RealConstants(self.symbols.mode, lambda: self._busy > 0))
                self._ambient = _ambient()
                stack.enter_context(self)
                result = forward(self.root, *args, **kwargs)
            self.symbols.arrive()
            self._check_held(held)
        except (CaptureError, Mismatch):
            raise
        except Exception as error:  # the trace runs the user's code
            text = (str(error).strip() or "no message").splitlines()[0]
            raise CaptureError(
                "owner.untraceable", f"{type(error).__name__}: {text[:160]}"
            ) from error
        finally:
            held.put_back()  # tensors of the trace have no numbers
        return result

    def _check_held(self, before: Snapshot) -> None:
        """All holds what it held, but for what was written down and what calls do themselves."""
        late = (at for at, (value, key) in self.stores.items() if self._key(value) != key)
        changed = (at for at in before.changed() if at not in self.stores)
        called = tuple(f"{path}." for path in self.leaves)
        for path, name in (*late, *changed):
            if not f"{path}.".startswith(called) and not self._keep(before, (path, name)):
                raise CaptureError("owner.not_pure", f"it changes what {name} holds", path)

    def _keep(self, before: Snapshot, at: tuple[str, str]) -> bool:
        """Write down which tensors a module's dict has got, if that is all that was changed."""
        home = self.root.get_submodule(at[0])
        added = before.added(*at, home.__dict__.get(at[1]))
        if not all(isinstance(value, torch.Tensor) for value in added.values()):
            return False
        for key, value in added.items():
            if not self.symbols.static and re.search(r"\b[suz]\d+\b", str(key)):
                raise CaptureError("owner.untraceable", f"a size stands in the key {key}")
            self.symbols.produce(("keep", at, key, self._key(value)), lambda: None)
            self.writer.keep(at, key, value)
        return bool(added)

    def store(self, at: tuple[str, str], value: Any, register: dict[str, bool]) -> None:
        """The forward sets an attribute, or registers a buffer with these options."""
        if not self.busy:
            self.stores[at] = value, self._key(value)
            self.symbols.produce(("store", at, self._key(value)), lambda: None)
            self.writer.store(at, value, register)

    def _watched(self) -> dict[nn.Module, str]:
        self.kinds = {
            path: type(module)
            for path, module in self.root.named_modules()
            if path == "" or self.inline(path, module)
        }
        found = {module: path for path, module in self.root.named_modules()}
        return {m: p for m, p in found.items() if not isinstance(m, torch.jit.ScriptModule)}

    @property
    def busy(self) -> bool:
        """Is what runs now no code of the user's?"""
        return self._inside or self._busy > 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run code without writing it down."""
        self._busy += 1
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self._busy -= 1

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Write down what the code itself asks about sizes, even where the answer is known."""
        env = self.symbols.env
        evaluate = env.evaluate_expr

        def evaluate_expr(expr: Any, *args: Any, **kwargs: Any) -> Any:
            value = evaluate(expr, *args, **kwargs)
            if not self.busy and isinstance(expr, sympy.Basic):
                self.asked.append(answered(expr, value))
                if self._guide is not None and self.asked[-1] not in self._guide.asked:
                    raise Mismatch
            return value

        env.evaluate_expr = evaluate_expr  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            del env.evaluate_expr

    # ------------------------------------------------------------ functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._busy:
            return func(*args, **kwargs)
        if func in (autocast_mode._enter_autocast, autocast_mode._exit_autocast):
            return self._autocast(func, args)
        if func is torch._C._set_grad_enabled:
            self.symbols.produce((func, args), lambda: None)
            self.graph.call_function(func, args)
            return func(*args)
        self._check(func)
        value = self._execute(func, args, kwargs)
        if not self._is_written(args, value):
            return value
        self.writer.function(func, args, kwargs, value)
        return value

    def _execute(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one operation on fakes, or take its result from the call that is followed."""
        token = ("call", func, self._key(args), self._key(kwargs))
        if self.symbols.following and self.symbols.next_token() == token:
            return self.symbols.produce(token, lambda: None)
        value = self._compute(func, args, kwargs)
        if self._is_written(args, value):
            self.symbols.produce(token, lambda: value)  # Mismatch, if another call is followed
        return value

    def _compute(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run it. An operation often asks whether a size is 1 though nothing hangs on it."""
        before = len(self.symbols.env.guards)
        self._inside = True
        try:
            with exactly() if getattr(func, "__name__", "") in _SLICES else nullcontext():
                value = func(*self.writer.fakes(args), **self.writer.fakes(kwargs))
        finally:
            self._inside = False
        if "squeeze" not in getattr(func, "__name__", ""):
            asked = self.symbols.env.guards[before:]
            self._idle |= {g.expr for g in asked if isinstance(g.expr, sympy.Ne)}
        return value

    def _is_written(self, args: Any, value: Any) -> bool:
        """Does a call with this result become a node?"""
        return holds_tensor(value) or (value is None and holds_tensor(args))

    def _key(self, value: Any) -> Any:
        """Arguments by value: fakes by identity, parameters by path and type."""
        if isinstance(value, torch.Tensor):
            path = self.writer.paths.get(id(value))
            return id(value) if path is None else (path, value.shape, value.dtype, value.device)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return value.node._expr  # as it was then, whatever was learnt later
        if isinstance(value, tuple | list):
            return type(value), tuple(self._key(item) for item in value)
        if isinstance(value, dict):
            return tuple((key, self._key(item)) for key, item in value.items())
        if isinstance(value, slice):
            return self._key((value.start, value.stop, value.step))
        return type(value), value

    def demands(self) -> list[sympy.Basic]:
        """What the sizes must fulfil for the trace to hold: of the operations, and of the code's
        own questions.
        """
        if self._guide is not None:
            return self._guide.demands()
        found = [guard for guard in self.symbols.guards() if guard not in self._idle]
        return [guard for guard in dict.fromkeys((*found, *self.asked)) if guard is not sympy.true]

    def _autocast(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """autocast has been entered or left; keeping copies of weights is off only in the trace."""
        self.symbols.produce((func, args), lambda: None)
        self._ambient = _ambient()
        if func is autocast_mode._enter_autocast:
            self._entered.append(self.graph.call_function(func, (*args[:3], True)))
        elif self._entered:
            self.graph.call_function(func, (self._entered.pop(),))
        else:
            raise CaptureError("owner.autocast", "it leaves an autocast that it did not enter")

    def _check(self, func: Callable[..., Any]) -> None:
        name = getattr(func, "__name__", "")
        self.layout_read |= name in _LAYOUT
        if name == "__set__":
            raise CaptureError("owner.not_pure", "it sets an attribute of a tensor")
        if name == "__get__" and attribute_of(func) in _AUTOGRAD:
            raise CaptureError("owner.not_pure", f"it reads {attribute_of(func)} of a tensor")
        if _ambient() != self._ambient:
            raise CaptureError("owner.autocast", "it changes the autocast mode")

    def inspect(self, paths: Iterable[str]) -> None:
        """Check these modules as if they had been traced through: their calls are replaced."""
        self.kinds |= {path: type(self.root.get_submodule(path)) for path in paths}

    def forget(self) -> None:
        """Let go of the module: what is left can guide the traces of others."""
        del self.root
        self._modules.clear()
        self.writer.stack.clear()

    # ------------------------------------------------------------ modules

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `module(*args, **kwargs)` does while the trace runs."""
        path = self._modules.get(id(module))
        own = id(module) in self.made and is_bare(module) and not is_listened_to(module)
        if self._busy or own:  # nn.Softmax(dim=-1)(scores) is softmax(scores, -1)
            return module.forward(*args, **kwargs)
        if path is None:
            text = f"it calls a {type(module).__name__} that is not its submodule"
            raise CaptureError("owner.not_pure", text)
        if path in self.kinds:
            if is_listened_to(module):
                raise CaptureError("owner.hooks", f"{path} has hooks or a forward of its own", path)
            self.writer.stack.append((path, module))
            try:
                return module.forward(*args, **kwargs)
            except CaptureError as refusal:
                refusal.inside = refusal.inside or path
                raise
            finally:
                self.writer.stack.pop()
        return self._leaf(path, module, args, kwargs)

    def _leaf(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        node = self.writer.module(path, args, kwargs)
        self.leaves.append(path)
        with torch._C.DisableTorchFunction():
            alike = likeness(module)
        token = ("module", path, alike, self._key(unwrap(args)), self._key(unwrap(kwargs)))
        value = self.symbols.produce(token, lambda: self._run_leaf(module, args, kwargs))
        if not _plain(value):
            raise CaptureError("owner.value", f"{path} returns a {type(value).__name__}", path)
        self.writer.results(value, node)
        return value

    def _run_leaf(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.paused(), RealConstants(self.symbols.mode):
            value = module.forward(
                *self.writer.fakes(unwrap(args)), **self.writer.fakes(unwrap(kwargs))
            )
            return self._known_sizes(value)

    def _known_sizes(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.symbols.fresh(value)
        return type(value)(map(self._known_sizes, value)) if type(value) in (tuple, list) else value


# ---------------------------------------------------------------- what the trace may read


def is_bare(module: nn.Module) -> bool:
    """Has it nothing of its own: a dropout, a softmax, a reshape?"""
    return not module._parameters and not module._buffers and not module._modules


def _ambient() -> Any:
    return tuple(
        (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")
    )


# ---------------------------------------------------------------- values


def _plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_plain, value))
    return isinstance(value, (torch.Tensor, torch.SymInt, int, *CONSTANTS))
