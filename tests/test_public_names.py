"""``import lenskit as lk``: cheap, complete, and with functions that share a module's name."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
import tiny

import lenskit as lk

PACKAGE = Path(lk.__file__).parent
ROOMS = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}


def in_a_new_process(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_importing_the_package_and_its_concepts_does_not_load_torch():
    code = (
        "import sys, lenskit as lk; lk.concepts['fears']['spiders']; print('torch' in sys.modules)"
    )
    assert in_a_new_process(code).strip() == "False"


def test_every_public_name_is_there_and_listed():
    for name in lk.__all__:
        assert getattr(lk, name) is not None and name in dir(lk)
    assert lk.__all__ == sorted(set(lk.__all__))
    with pytest.raises(AttributeError, match="attribute captures"):
        _ = lk.captures


def test_capture_is_the_function_though_its_module_was_imported_first():
    code = """
import lenskit.capture
import lenskit as lk
from lenskit import capture, concepts
from lenskit.capture import Capture
print(type(lk.capture).__name__, capture is lk.capture, "fears" in concepts)
"""
    assert in_a_new_process(code).split() == ["function", "True", "True"]


def test_the_steps_of_the_method_run_from_the_public_names_alone():
    model = tiny.shared_model()
    concept = lk.concepts["fears"]["spiders"]
    prompts = lk.build_prompts(model, concept, number=40)
    capture = lk.capture(model, prompts, progress=False)
    tokens = lk.select_tokens(capture)
    labels = lk.soft_labels(capture, tokens)
    learner = lk.RecursiveFeatureMachine()
    vectors = lk.fit_vectors(capture, tokens, labels, learner=learner, progress=False)
    blocks = lk.enrich(model, prompts, tokens, progress=False).top(2)
    question = concept.questions[0]
    with lk.steer(model, vectors, coefficient=0.7, relative=True, blocks=blocks):
        steered = lk.generate(model, question, max_new_tokens=8)
    assert isinstance(lk.capture, FunctionType)
    assert steered != lk.generate(model, question, max_new_tokens=8)


@pytest.mark.parametrize("room", sorted(ROOMS - {"embedded"}))
def test_completion_in_a_room_shows_its_face_alone(room):
    module = importlib.import_module(f"lenskit.{room}")
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in dir(module))
    assert dir(lk.views) == sorted(lk.views.__all__)


def test_completion_on_the_package_and_on_results_shows_no_helpers():
    assert set(dir(lk)) - {"__version__"} == set(lk.__all__) - {"__version__"}
    shown = {name for name in dir(lk.Capture) if not name.startswith("_")}
    assert shown == {"candidates", "layers", "rows"}
    shown = {name for name in dir(lk.ConceptVectors) if not name.startswith("_")}
    fields = {"displacement", "unit"}
    assert shown - fields == {"candidates", "check_model", "closing", "load", "save", "terms"}
