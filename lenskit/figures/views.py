"""Interactive views of tokens and attention: circuitsvis in a page that needs no network.

circuitsvis draws in the browser with a script of 1.3 MB, which it fetches from a network or
repeats in every output. Here a view is a few kilobytes that name the component and its data, and
``script()`` is one output of half a megabyte that draws every view of its page, above or below.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

_BUNDLE = "dist/cdn/iife.js"

# Draws the views that are not drawn yet. Both this script and each view call it, so that it does
# not matter which of them comes first, or that JupyterLab attaches outputs late.
_DRAW = """
window.lenskitDraw = () => {
  if (!window.CircuitsVis) return;
  for (const view of document.querySelectorAll(".lenskit-view:not([data-drawn])")) {
    window.lenskitViews = (window.lenskitViews ?? 0) + 1;
    view.id = "lenskit-view-" + window.lenskitViews;
    view.dataset.drawn = "";
    const { component, props } = view.dataset;
    CircuitsVis.render(view.id, CircuitsVis[component], JSON.parse(props));
  }
};
"""
# The names of module systems are hidden from the bundle: exported notebooks load RequireJS, and
# libraries inside the bundle would register with it instead of with each other.
_LOAD = """
if (window.CircuitsVis) return window.lenskitDraw();
const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
const source = await new Response(stream).text();
const script = document.createElement("script");
script.text = "(function (define, module, exports, require) {" + source +
  "\\nwindow.CircuitsVis = CircuitsVis;})()";
document.head.append(script);
window.lenskitDraw();
"""


@dataclass(frozen=True, repr=False)
class Html:
    """A piece of a page. A notebook shows it; ``a + b`` stacks two; ``save_html`` writes it."""

    body: str

    def _repr_html_(self) -> str:
        return self.body

    def __repr__(self) -> str:
        # A notebook stores this beside the body.
        return f"Html({len(self.body):,} characters)"

    def __add__(self, other: Html) -> Html:
        return Html(f"{self.body}\n{other.body}")

    def save_html(self, path: str | Path, *, title: str = "lenskit") -> Path:
        """Write a page of its own, script included, that needs no network; return its path."""
        path = Path(path)
        page = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f"<title>{html.escape(title)}</title>\n"
            "<style>body { font-family: sans-serif; margin: 2em }</style>\n</head>\n"
            f"<body>\n{self.body}\n{_script()}\n</body>\n</html>\n"
        )
        path.write_text(page, encoding="utf-8")
        return path


def script() -> Html:
    """What draws the views of a page: show it in one cell of a notebook.

    Half a megabyte, circuitsvis' own script in compressed form. Raises ``FileNotFoundError`` when
    the installed circuitsvis does not carry it.
    """
    return Html(f"{_script()}<div>The views on this page are drawn by circuitsvis.</div>")


def tokens_view(
    tokens: Sequence[str],
    values: Float[Tensor, "token"] | Float[Tensor, "token series"] | Sequence[float],
    *,
    labels: Sequence[str] | None = None,
    bound: float | None = None,
) -> Html:
    """The tokens as running text, coloured by their values: blue above zero, red below.

    With several series the one to colour by is chosen by hovering over its label. Colours are
    full at ``bound`` and ``-bound``; by default that is the largest magnitude. Raises
    ``ValueError`` when tokens, values and labels differ in number or a value is not finite.
    """
    data = _finite("values", values)
    if data.ndim not in (1, 2) or data.shape[0] != len(tokens):
        raise ValueError(
            f"values has shape {tuple(data.shape)}; {len(tokens)} tokens need "
            f"({len(tokens)},) or ({len(tokens)}, series)"
        )
    bound = float(data.abs().max()) if bound is None else float(bound)
    # A bound of zero would divide by zero in the browser.
    bound = _short(bound) if bound > 0 else 1.0
    shown = [_visible(token) for token in tokens]
    if data.ndim == 1:
        if labels is not None:
            raise ValueError("labels name the columns of values, and values has none")
        props = dict(tokens=shown, values=_nested(data), minValue=-bound, maxValue=bound)
        return _view("ColoredTokens", props, tokens)
    names = list(labels) if labels is not None else list(map(str, range(data.shape[1])))
    if len(names) != data.shape[1]:
        raise ValueError(f"labels has {len(names)} names for {data.shape[1]} columns of values")
    bounds = [bound] * len(names)
    props = dict(
        tokens=shown,
        values=_nested(data),
        labels=[_visible(name).rstrip("\n") for name in names],
        positiveBounds=bounds,
        negativeBounds=[-bound for bound in bounds],
    )
    return _view("ColoredTokensMulti", props, tokens)


def attention_view(
    tokens: Sequence[str],
    attention: Float[Tensor, "head query key"] | Float[Tensor, "query key"],
    *,
    heads: Literal["mean", "max"] | int = "mean",
    bound: float | None = None,
) -> Html:
    """The prompt, coloured by the attention it receives from the token one hovers over.

    The queries are the last tokens of the prompt: the candidate tokens. ``heads``: their mean or
    maximum, or one head by number (``tokens_view`` compares the heads of one query: give it
    ``attention[:, -1].T``). Colours are full at ``bound``, by default the largest attention shown
    to any token but the first, on which many models rest their idle attention. Raises
    ``ValueError`` on shapes that do not fit the tokens, and on a head that is not there.
    """
    data = _finite("attention", attention)
    data = data[None] if data.ndim == 2 else data
    if data.ndim != 3 or data.shape[2] != len(tokens) or data.shape[1] > len(tokens):
        raise ValueError(
            f"attention has shape {tuple(data.shape)}; {len(tokens)} tokens need "
            f"(head, query, {len(tokens)}) with at most {len(tokens)} queries"
        )
    count, queries, _ = data.shape
    names = [f"{query - queries} {tokens[query - queries]}" for query in range(queries)]
    if heads == "mean":
        shown = data.mean(0)
    elif heads == "max":
        shown = data.amax(0)
    elif isinstance(heads, int) and 0 <= heads < count:
        shown = data[heads]
    else:
        raise ValueError(
            f"heads is {heads!r}; 'mean', 'max' and the numbers 0 to {count - 1} would work"
        )
    if bound is None:
        bound = float((shown[:, 1:] if len(tokens) > 1 else shown).max())
    return tokens_view(tokens, shown.T, labels=names, bound=bound)


@cache
def _script() -> str:
    spec = find_spec("circuitsvis")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders if (file := Path(folder) / _BUNDLE).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{_BUNDLE} is not in the installed circuitsvis; circuitsvis 1.43.3 has it"
        )
    packed = base64.b64encode(gzip.compress(files[0].read_bytes(), 9, mtime=0)).decode("ascii")
    return f'<script>\n(async () => {{{_DRAW}const packed = "{packed}";{_LOAD}}})();\n</script>'


def _view(component: str, props: dict[str, Any], tokens: Sequence[str]) -> Html:
    data = html.escape(json.dumps(props, ensure_ascii=False, allow_nan=False))
    return Html(
        f'<div class="lenskit-view" data-component="{component}" data-props="{data}">'
        f"An interactive view of {len(tokens)} tokens. It is drawn once a cell of this notebook "
        "shows <code>lenskit.views.script()</code>; a notebook from elsewhere has to be trusted "
        "first.</div><script>window.lenskitDraw?.()</script>"
    )


def _finite(name: str, values: Any) -> Tensor:
    data = torch.as_tensor(values).detach().to("cpu", torch.float32)
    if data.numel() == 0 or not data.isfinite().all():
        raise ValueError(f"{name} needs finite numbers, at least one; got {tuple(data.shape)}")
    return data


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _nested(data: Tensor) -> list[Any]:
    if data.ndim == 1:
        return [_short(value) for value in data.tolist()]
    return [_nested(row) for row in data]


def _visible(token: str) -> str:
    # circuitsvis sets some texts as HTML and others as text. A word joiner, which has no width,
    # behind "<" and "&" makes both show the same: "<bos>" is neither a tag nor swallowed.
    shown = token.replace("<", "<\u2060").replace("&", "&\u2060").replace("\n", "↵")
    return shown + "\n" if "\n" in token else shown
