"""The input expansion of generate(): encoder states stay [B, n, D] where the library copies them.

    encoder_outputs.last_hidden_state.repeat_interleave(beams, 0)   ->   Repeated(states, beams)

generate() copies the states of an encoder once for each beam, keeps the copies for the whole
generation and hands them to every step. In a model whose cross-attention holds hidden states
nothing reads them after the first step, so the model gets a subclass of its class: the states stay
as they are, and a step is handed a tensor that has the rows of all beams and no storage. Whoever
does read it gets the copy that the library makes.

Source: EL-Attention (arXiv 2105.04779), where beams are rows of one sample.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from attn_compiler.cache.states import Repeated, whole
from attn_compiler.installed import base_of, rewritten

_classes: dict[type[nn.Module], type[nn.Module]] = {}
_STATES = "last_hidden_state"


def keep_unexpanded(model: nn.Module) -> None:
    """Let models with an encoder, whose sites hold hidden states, generate without copies of them.

    Args:
        model: what was rewritten; changed in place, and so are the models in it.
    """
    library = sys.modules.get("transformers")
    if library is None:
        return
    owners = [path for path, _, site in rewritten(model) if site.decision.variant == "el"]
    for path, module in list(model.named_modules()):
        inside = any(not path or owner.startswith(f"{path}.") for owner in owners)
        if inside and _generates(module, library) and base_of(module) is type(module):
            module.__class__ = unexpanded_class(type(module))


def _generates(module: nn.Module, library: Any) -> bool:
    return isinstance(module, library.GenerationMixin) and bool(
        getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    )


def unexpanded_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a model's class that keeps encoder states as they are; one per class."""
    if base not in _classes:
        body = {
            "_expand_inputs_for_generation": _expand(base),
            "prepare_inputs_for_generation": _prepare(base),
            "__reduce_ex__": _reduce,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_attn_base": base,
        }
        _classes[base] = type(base)(base.__name__, (base,), body)  # type: ignore[misc]
    return _classes[base]


def _expand(base: Any) -> Callable[..., Any]:
    original = base._expand_inputs_for_generation

    @functools.wraps(original)
    def expand(self: Any, *args: Any, **kwargs: Any) -> Any:
        # in some versions of the library it is a static method
        static = isinstance(
            inspect.getattr_static(base, "_expand_inputs_for_generation"), staticmethod
        )
        given = () if static else (self,)
        outputs = kwargs.get("encoder_outputs")
        if not _only_states(outputs):
            return original(*given, *args, **kwargs)
        others = {k: v for k, v in kwargs.items() if k != "encoder_outputs"}
        others["is_encoder_decoder"] = False  # it would look for what was taken out
        ids, rest = original(*given, *args, **others)
        return ids, {**rest, "encoder_outputs": outputs}

    return expand


def _only_states(outputs: Any) -> bool:
    """Are the last states all that the library would copy?"""
    if not isinstance(outputs, dict):
        return False
    tensors = [name for name, value in outputs.items() if isinstance(value, Tensor)]
    return tensors == [_STATES]


def _prepare(base: Any) -> Callable[..., Any]:
    original = base.prepare_inputs_for_generation

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = original(self, *args, **kwargs)
        outputs = given.get("encoder_outputs")
        first = given.get("decoder_input_ids", given.get("decoder_inputs_embeds"))
        if _only_states(outputs) and first is not None:
            states, rows = outputs[_STATES], first.shape[0]
            if rows != states.shape[0] and rows % states.shape[0] == 0:
                wide = Repeated(states, rows // states.shape[0])
                given["encoder_outputs"] = type(outputs)(**{**outputs, _STATES: wide})
        return given

    return prepare


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    # the class is made, not imported: name the class it was made from
    function, arguments, *rest = type(self)._attn_base.__reduce_ex__(self, protocol)
    return _restore, (type(self)._attn_base, function, arguments[1:]), *rest


def _restore(
    base: type[nn.Module], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    return function(unexpanded_class(base), *arguments)


def materialised(values: Any) -> Any:
    """Arguments of a call with ordinary tensors in the place of those without storage."""
    return tree_map_only(Repeated, whole, values)
