"""What identifies a judge, a learner or another setting, the same in every process.

A function is its bytecode, constants, defaults, closure and the globals that it uses; an object is
its class and what it holds. So a judge that was redefined under its old name is another one. An
object may say itself what identifies it: an attribute or method ``identity``, whose JSON then
stands for it, with budgets, keys, caches and whatever else decides no result left out.

Bytecode and not source, since a file that was edited after it was imported shows a source that
does not run. Another minor version of Python makes other bytecode, and so another study.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge

from lenskit.models import model_fingerprint

_UNSAID = {
    *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__"),
    *("__firstlineno__", "__static_attributes__", "__abstractmethods__", "_abc_impl"),
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__slots__"),
    *("__annotate__", "__annotate_func__", "__annotations_cache__", "__parameters__"),
    "__slotnames__",  # which a class has once it was pickled
}
_DEEPEST = 60


def identity(value: Any) -> Any:
    """JSON that is equal for what gives equal results, and differs where the code or data does.

    Raises ValueError for what is nested too deeply; an ``identity`` of its own is the way out.
    """
    return _identity(value, (), _Told())


@dataclasses.dataclass(frozen=True)
class _Told:
    """``code``: functions and classes told already, by id; ``home``: the module that refers."""

    code: dict[int, str] = dataclasses.field(default_factory=dict)
    home: str | None = None


def _identity(value: Any, inside: tuple[int, ...], told: _Told) -> Any:
    """``inside``: ids of what encloses the value."""
    if value is None or isinstance(value, bool | int | str) and not isinstance(value, Enum):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if id(value) in inside:
        return f"enclosing {len(inside) - inside.index(id(value))}"
    if len(inside) > _DEEPEST:
        raise ValueError(
            f"a setting is nested too deeply, at a {type(value).__qualname__}: give its object an "
            "attribute `identity` that says in JSON what decides its results"
        )
    again = partial(_identity, inside=(*inside, id(value)), told=told)
    if isinstance(value, Mapping):
        return {str(key): again(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [again(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((again(item) for item in value), key=repr)
    if isinstance(value, Enum | PurePath | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return _hash(bytes(value))
    if isinstance(value, np.ndarray | np.generic):
        value = np.asarray(value)
        data = repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()
        return [str(value.dtype), list(value.shape), _hash(data)]
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return [str(value.dtype), list(value.shape), _hash(flat.numpy().tobytes())]
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, partial):
        return {"partial": again(value.func), "of": again([value.args, value.keywords])}
    if isinstance(value, MethodType):
        return {"method": value.__name__, "of": again(value.__self__)}
    if isinstance(value, staticmethod | classmethod):
        return again(value.__func__)
    if isinstance(value, property):
        return [again(value.fget), again(value.fset)]
    if isinstance(value, FunctionType | type):
        return _code(value, (*inside, id(value)), told)
    if isinstance(value, BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__wrapped__"):  # functools.cache
        return again(value.__wrapped__)
    return _object(value, again)


def _object(value: Any, again: Callable[[Any], Any]) -> Any:
    own = getattr(value, "identity", None)
    if own is not None:
        return [type(value).__qualname__, again(own() if callable(own) else own)]
    if isinstance(value, TransformerBridge):
        return model_fingerprint(value)
    if isinstance(value, torch.nn.Module):
        return [type(value).__qualname__, _weights(value)]
    named = {"class": again(type(value))}
    if callable(getattr(value, "get_params", None)):
        return named | {"parameters": again(value.get_params(deep=False))}
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return named | {"fields": again(fields)}
    if _installed(type(value)) or not (hasattr(value, "__dict__") or hasattr(value, "__slots__")):
        return named | {"repr": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))}
    held = dict(getattr(value, "__dict__", {}))
    for name in (slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())):
        if hasattr(value, name):
            held[name] = getattr(value, name)
    return named | {"holds": again(held)}


def _code(value: Any, inside: tuple[int, ...], told: _Told) -> Any:
    """A function or a class: by its code where it is somebody's own, by its name elsewhere."""
    name, module = value.__qualname__, str(value.__module__)
    if version := _installed(value):
        return f"{module}.{name} {version}".strip()
    # What lenskit's code calls in other modules of its own is told by name, or all would count.
    if told.home not in (None, module) and module.partition(".")[0] == "lenskit":
        return f"{module}.{name}"
    if id(value) in told.code:
        return told.code[id(value)]
    told.code[id(value)] = f"{name}, as number {len(told.code)}"
    again = partial(_identity, inside=inside, told=_Told(told.code, module))
    if isinstance(value, type):
        members = {
            key: again(item)
            for key, item in vars(value).items()
            if key not in _UNSAID and not _opaque(item)
        }
        return {"class": name, "bases": [again(b) for b in value.__bases__], "members": members}
    names = sorted({word for code in _codes(value.__code__) for word in code.co_names})
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    used = {word: value.__globals__[word] for word in names if word in value.__globals__}
    parts = {
        "defaults": [value.__defaults__, value.__kwdefaults__],
        "closure": {word: cell.cell_contents for word, cell in cells if _filled(cell)},
        "globals": used,
    }
    said = {"function": name, "code": _hash(_bytecode(value.__code__, value.__doc__).encode())}
    return said | {key: again(part) for key, part in parts.items()}


def _bytecode(code: CodeType, doc: str | None = None) -> str:
    constants = [_constant(None if doc and one == doc else one) for one in code.co_consts]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_argcount)
    names = (*names, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 0xFFFF)
    return repr((code.co_code, code.co_exceptiontable, constants, names))


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _bytecode(value)
    if isinstance(value, frozenset):
        return sorted(map(repr, value))  # whose own order is another in each process
    if isinstance(value, tuple):
        return [_constant(item) for item in value]
    return repr(value)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _installed(value: Any) -> str:
    """The version of the package that the class or function is from; empty for one's own code."""
    top = str(value.__module__).partition(".")[0]
    if top in ("lenskit", "__main__"):  # whose file is that of pytest or of the notebook's kernel
        return ""
    if top in sys.stdlib_module_names:
        return "-"
    module = sys.modules.get(top)
    where = getattr(module, "__file__", None) or ""
    if not re.search(r"(site|dist)-packages", where):
        return ""
    return str(getattr(module, "__version__", "") or "-")


def _weights(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(repr((name, tuple(weight.shape))).encode())
        entries = weight.detach().flatten()[:64].to("cpu").contiguous()
        digest.update(entries.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _opaque(value: Any) -> bool:
    """Descriptors of slots and the like, which say nothing that the code does not."""
    return type(value).__name__ in ("member_descriptor", "getset_descriptor")


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
