"""What a study knows a judge or a learner by: the same in every process, another for other code."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import pytest
import tiny
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from lenskit.scoring import grammar_judge, phrase_judge
from lenskit.study.identity import identity
from lenskit.vectors import RecursiveFeatureMachine, Ridge


def made(source: str, name: str = "judge", **names):
    """What ``source`` defines, as a cell of a notebook would."""
    space = {"__name__": "__main__", **names}
    exec(source, space)
    return space[name]


JUDGE = "def judge(concept, question, answer):\n    return helper(answer) > LIMIT\n"
HELPER = "def helper(text):\n    return text.count('x')\n"


@pytest.mark.parametrize(
    "other",
    [
        "LIMIT = 3\n" + HELPER + JUDGE.replace(">", ">="),
        "LIMIT = 4\n" + HELPER + JUDGE,
        "LIMIT = 3\n" + HELPER.replace("'x'", "'y'") + JUDGE,
        "LIMIT = 3\n" + HELPER + JUDGE.replace("answer):", "answer, more=1):"),
        "LIMIT = 3\n" + HELPER.replace("text.count", "text.find") + JUDGE,
    ],
    ids=["code", "global", "constant of a helper", "default", "method"],
)
def test_a_redefined_function_is_another(other):
    source = "LIMIT = 3\n" + HELPER + JUDGE
    first = identity(made(source))
    assert first == identity(made(source)) == identity(made("# remark\n\n" + source))
    assert first == identity(made(source.replace("    return", "    'A docstring.'\n    return")))
    assert first != identity(made(other))


def test_lambdas_closures_and_partials_are_told_by_what_they_hold():
    def holding(limit):
        return lambda concept, question, answer: len(answer) > limit

    one, two = (lambda c, q, a: 0), (lambda c, q, a: 1)
    assert identity(one) != identity(two)
    assert identity(holding(1)) == identity(holding(1)) != identity(holding(2))
    made_partial = [partial(len, key=k) for k in (1, 1, 2)]
    found = [identity(each) for each in made_partial]
    assert found[0] == found[1] != found[2]
    assert identity(partial(one)) == identity(partial(one)) != identity(partial(two))


@pytest.mark.slow
def test_sets_in_code_are_the_same_in_every_process():
    source = "def judge(c, q, a):\n    return a in {'one', 'two', 'three'}\n"
    script = (
        "import json; from lenskit.study.identity import identity\n"
        + source
        + "print(json.dumps(identity([judge, {'x', 'y', 'z'}])))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        check=True,
    ).stdout
    assert json.loads(found) == identity([made(source), {"x", "y", "z"}])


@dataclass(frozen=True)
class Hiding:
    rubric: str = field(repr=False)


class Plain:
    def __init__(self, rubric: str) -> None:
        self.rubric = rubric

    def __repr__(self) -> str:
        return "Plain()"

    def judge(self, concept, question, answer):
        return self.rubric in answer


class Slotted:
    __slots__ = ("rubric",)

    def __init__(self, rubric: str) -> None:
        self.rubric = rubric


@pytest.mark.parametrize("kind", [Hiding, Plain, Slotted, lambda r: Plain(r).judge])
def test_what_an_object_holds_counts_whatever_its_repr_says(kind):
    assert identity(kind("a")) == identity(kind("a")) != identity(kind("b"))


def test_an_object_may_say_itself_what_identifies_it():
    class Judge:
        def __init__(self, rubric, budget):
            self.rubric, self.budget = rubric, budget

        @property
        def identity(self):
            return {"rubric": self.rubric}

    class Asked(Judge):
        def identity(self):
            return [self.rubric]

    for kind in (Judge, Asked):
        assert identity(kind("a", 1)) == identity(kind("a", 2)) != identity(kind("b", 1))


def test_a_setting_is_the_same_after_it_was_sent_to_another_process():
    setting = Ridge()
    before = identity(setting)
    pickle.dumps(setting, protocol=2)
    assert "__slotnames__" in vars(Ridge)
    assert identity(setting) == before


def test_learners_are_told_by_their_parameters_and_code():
    assert identity(Ridge()) == identity(Ridge())
    assert identity(RecursiveFeatureMachine()) != identity(RecursiveFeatureMachine(iterations=3))
    assert identity(SklearnRidge(alpha=1.0)) != identity(SklearnRidge(alpha=2.0))
    assert identity(Ridge) == identity(Ridge) != identity(RecursiveFeatureMachine)
    learner = "class Mine:\n    def fit(self, X, y):\n        self.direction_ = X[{}]\n"
    one, again, other = (made(learner.format(i), "Mine") for i in (0, 0, 1))
    assert identity(one) == identity(again) != identity(other)
    assert identity(one()) == identity(again()) != identity(other())
    base = "class Base:\n    def fit(self, X, y):\n        return {}\nclass Mine(Base):\n    pass\n"
    one, other = (made(base.format(i), "Mine") for i in (0, 1))
    assert identity(one) != identity(other)


def test_arrays_tensors_and_models_are_told_by_their_numbers():
    for one, other in (
        (np.arange(3), np.arange(3) + 1),
        (torch.arange(3).bfloat16(), torch.arange(3).half()),
        (tiny.shared_model(), tiny.shared_model("llama")),
        (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
        (float("nan"), float("inf")),
        (b"a", b"b"),
    ):
        assert identity(one) == identity(one) != identity(other)
    assert identity(float("nan")) == identity(float("nan"))


def test_every_identity_is_json_and_ends():
    @cache
    def kept(n):
        return kept(n - 1) if n else pong(n)

    def pong(n):
        return kept(n)

    loop: list = []
    loop.append(loop)
    found = identity(
        [kept, loop, grammar_judge, phrase_judge(["web"]), len, os, int, ..., object()]
    )
    assert json.loads(json.dumps(found)) == found
    assert found == identity(
        [kept, loop, grammar_judge, phrase_judge(["web"]), len, os, int, ..., object()]
    )
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        identity(deep)
