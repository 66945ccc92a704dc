"""Learners by name, and whatever else finds a direction, called alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone, is_classifier

from lenskit.recipes import Recipe
from lenskit.vectors.learner import Direction, Labels, Rows
from lenskit.vectors.logistic import Logistic
from lenskit.vectors.mean_difference import MeanDifference, SoftCovariance
from lenskit.vectors.pca import PrincipalComponent
from lenskit.vectors.rfm.machine import RecursiveFeatureMachine
from lenskit.vectors.ridge import Ridge

FitFunction = Callable[[Rows, Labels, Rows, Labels], Direction]

LEARNERS: Mapping[str, Callable[[], object]] = MappingProxyType(
    {
        "rfm": RecursiveFeatureMachine,
        "ridge": Ridge,
        "logistic": Logistic,
        "covariance": SoftCovariance,
        "mean difference": MeanDifference,
        "pca": PrincipalComponent,
    }
)


def learners_of(recipe: Recipe) -> Mapping[str, Callable[[], object]]:
    """``LEARNERS`` with the settings of a recipe."""
    if not recipe.scale_validation:
        return LEARNERS
    rfm = partial(RecursiveFeatureMachine, scale_validation=True)
    return MappingProxyType({**LEARNERS, "rfm": rfm})


def find_learner(learner: Any | FitFunction | str | None, recipe: Recipe) -> Any | FitFunction:
    """An estimator or a function from one, from its class, or from a name; ``None``: the recipe's.

    Raises ``ValueError`` for a name that is not known, ``TypeError`` for what is neither.
    """
    learner = recipe.learner if learner is None else learner
    if isinstance(learner, str):
        known = learners_of(recipe)
        if learner not in known:
            close = get_close_matches(learner, known, 1)
            raise ValueError(
                f"learner {learner!r} is not one of {', '.join(known)}"
                + (f"; did you mean {close[0]!r}?" if close else "")
            )
        return known[learner]()
    if isinstance(learner, type):
        learner = learner()
    if not (hasattr(learner, "fit") or callable(learner)):
        raise TypeError(
            f"learner must be one of {', '.join(LEARNERS)}, an estimator with fit, or a function "
            f"(X, y, X_val, y_val) -> direction; got {type(learner).__name__}"
        )
    return learner


def direction_of(learner: Any | FitFunction, parts: tuple[np.ndarray, ...], seed: int) -> Direction:
    """What a learner finds in one block: ``X``, ``y``, ``X_val`` and ``y_val``."""
    if not hasattr(learner, "fit"):
        return np.asarray(learner(*parts), dtype=np.float64)
    estimator = clone(learner, safe=False)
    parameters = estimator.get_params(deep=False) if hasattr(estimator, "get_params") else {}
    if parameters.get("random_state", 0) is None:
        estimator.set_params(random_state=seed)
    X, y, X_val, y_val = parts
    if _takes_validation(estimator):
        estimator.fit(X, y, X_val=X_val, y_val=y_val)
    else:
        if hasattr(estimator, "__sklearn_tags__") and is_classifier(estimator):
            y = _classes(y, estimator)
        estimator.fit(X, y)
    return _found(estimator, X.shape[1])


def _takes_validation(estimator: Any) -> bool:
    taken = signature(estimator.fit).parameters.values()
    if any(each.name == "X_val" for each in taken):
        return True
    # A pipeline of scikit-learn takes any keyword and refuses this one.
    return not isinstance(estimator, BaseEstimator) and any(p.kind is p.VAR_KEYWORD for p in taken)


def _classes(y: Labels, estimator: Any) -> np.ndarray:
    if not np.isin(y, (0, 1)).all():
        raise ValueError(
            f"{type(estimator).__name__} is a classifier, and the labels are soft; give hard "
            "labels, or a regressor"
        )
    return y.astype(int)


def _found(estimator: Any, width: int) -> Direction:
    for name in ("direction_", "coef_"):
        if (found := getattr(estimator, name, None)) is not None:
            found = np.asarray(found.toarray() if hasattr(found, "toarray") else found, np.float64)
            if found.size != width:
                raise ValueError(
                    f"{name} of {type(estimator).__name__} has shape {found.shape}; one direction "
                    f"of {width} numbers was expected"
                )
            return found.reshape(width)
    raise ValueError(
        f"{type(estimator).__name__} has neither direction_ nor coef_ after fit, so no direction "
        "can be read from it; wrap it in a function (X, y, X_val, y_val) -> direction"
    )
