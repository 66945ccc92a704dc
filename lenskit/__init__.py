"""lenskit: find out how a language model carries a concept, and steer it.

``import lenskit as lk`` is cheap: a name is loaded from its module when it is first used. The
public names and their modules are those of ``__init__.pyi``. The examples in their docstrings go on
from these lines:

>>> import lenskit as lk
>>> model = lk.load_model()  # the embedded model; or a folder, or a name on the Hugging Face hub
>>> concept = lk.concepts["fears"]["spiders"]
>>> prompts = lk.build_prompts(model, concept, number=40)
>>> capture = lk.capture(model, prompts, progress=False)
>>> vectors = lk.fit_vectors(capture, progress=False)
"""

from __future__ import annotations

import sys as _sys
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType
from typing import Any as _Any

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)

try:
    __version__ = _version(__name__)
except _PackageNotFoundError:  # a checkout that was never installed
    __version__ = "unknown"


class _Package(_ModuleType):
    """Importing the module ``lenskit.capture`` must not hide the function ``lenskit.capture``."""

    def __setattr__(self, name: str, value: _Any) -> None:
        if isinstance(value, _ModuleType) and name in __all__:
            value = getattr(value, name, value)
        super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package
