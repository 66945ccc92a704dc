"""Interactive views of tokens and attention: circuitsvis in a page that needs no network.

Each view stands alone: its output carries its data, the part of circuitsvis that draws it (packed,
170 kB) and a still picture, which stays where scripts do not run. Views on one page share what the
first of them has loaded.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.figures.stills import attention_still, tokens_still
from lenskit.figures.style import BLUE, RED

__all__ = ["Html", "attention_view", "script", "tokens_view"]

_BUNDLE = "dist/cdn/iife.js"
_SCRIPT = Path(__file__).with_name("views.js")
# A light card, so that colours mean the same on a dark page.
_CARD = (
    "background:#fff;color:#262626;color-scheme:light;padding:10px 12px;border-radius:6px;"
    "font-family:system-ui,sans-serif;font-size:13px;line-height:1.5"
)
# circuitsvis writes names over its small patterns, in colours that mean nothing.
_STYLE = """<style>
[data-lenskit] img { max-width: 100% }
[data-lenskit] h2 { display: none }
[data-lenskit] h3 { font-size: 13px !important; margin: 8px 0 4px !important; color: #262626 }
[data-lenskit] h4 { position: static !important; font-size: 11px; font-weight: normal;
  background: none !important; color: #262626 !important }
[data-lenskit] .lenskit-heads > div > div { max-width: none !important }
[data-lenskit] .colored-tokens { font-family: monospace; color: #262626 }
[data-lenskit] .colored-tokens span { line-height: 1.3em !important }
</style>"""


@dataclass(frozen=True, repr=False)
class Html:
    """A piece of a page. A notebook shows it; ``a + b`` stacks two; ``save_html`` writes it.

    ``picture``: a PNG that stands for it where no HTML is shown.
    """

    body: str
    picture: bytes = b""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        shown = {"text/plain": repr(self), "text/html": self.body}
        if self.picture:
            shown["image/png"] = base64.b64encode(self.picture).decode("ascii")
        return shown

    def _repr_html_(self) -> str:
        return self.body

    def __repr__(self) -> str:
        # A notebook stores this beside the body.
        return f"Html({len(self.body):,} characters)"

    def __add__(self, other: Html) -> Html:
        return Html(f"{self.body}\n{other.body}")

    def save_html(self, path: str | Path, *, title: str = "lenskit") -> Path:
        """Write a page of its own that needs no network, and return its path."""
        path = Path(path)
        page = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f"<title>{html.escape(title)}</title>\n"
            "<style>body { font-family: sans-serif; margin: 2em }</style>\n</head>\n"
            f"<body>\n{self.body}\n</body>\n</html>\n"
        )
        path.write_text(page, encoding="utf-8")
        return path


def script() -> Html:
    """Nothing: views once needed a script in a cell of its own, and now each brings it along."""
    return Html("")


def tokens_view(
    tokens: Sequence[str],
    values: Float[Tensor, "token"] | Float[Tensor, "token series"] | Sequence[float],
    *,
    labels: Sequence[str] | None = None,
    bound: float | None = None,
    unit: str = "",
) -> Html:
    """The tokens as running text, coloured by their values: blue above zero, red below.

    With several series the one to colour by is chosen by hovering over its label. Colours are
    full at ``bound`` and ``-bound``; by default that is the largest magnitude. ``unit``: what the
    values are, in words, beside the colour key. Raises ``ValueError`` when tokens, values and
    labels differ in number or a value is not finite.
    """
    data = _finite("values", values)
    if data.ndim not in (1, 2) or data.shape[0] != len(tokens):
        raise ValueError(
            f"values has shape {tuple(data.shape)}; {len(tokens)} tokens need "
            f"({len(tokens)},) or ({len(tokens)}, series)"
        )
    if data.ndim == 1 and labels is not None:
        raise ValueError("labels name the columns of values, and values has none")
    series = data[:, None] if data.ndim == 1 else data
    names = list(labels) if labels is not None else list(map(str, range(series.shape[1])))
    if len(names) != series.shape[1]:
        raise ValueError(f"labels has {len(names)} names for {series.shape[1]} columns of values")
    largest = float(data.abs().max())
    bound = _bound(largest if bound is None else float(bound))
    signed = bool((data < 0).any())
    props = dict(
        kind="tokens",
        tokens=_visible(tokens),
        values=_nested(series.T),
        labels=[_line(name) for name in names],
        bound=bound,
        largest=largest,
        signed=signed,
        unit=unit,
    )
    many = f" ({names[0]})" if len(names) > 1 else ""
    alt = f"{len(tokens)} tokens coloured by {unit or 'value'}{many}"
    picture = tokens_still(list(map(_line, tokens)), series[:, 0].tolist(), bound, alt, signed)
    return _view(props, picture, alt)


def attention_view(
    tokens: Sequence[str],
    attention: Float[Tensor, "block head query key"]
    | Float[Tensor, "head query key"]
    | Float[Tensor, "query key"],
    *,
    blocks: Sequence[int] | None = None,
    block: int | None = None,
    heads: Literal["mean", "max"] | int = "mean",
    bound: float | None = None,
) -> Html:
    """One prompt's attention patterns: every head of a chosen block, and the tokens coloured.

    The queries are the last tokens of the prompt: the candidate tokens, whose rows alone are kept.
    ``blocks``: the numbers of the blocks given, and ``block`` the one that is shown first (by
    default the first). The tokens are coloured by the attention they receive from one query, from
    ``heads``: their mean or maximum, or one head by number; block, query and head are chosen in
    the view. Colours are full at ``bound``, by default the largest attention to any token but the
    first, on which many models rest their idle attention. Raises ``ValueError`` on shapes that do
    not fit the tokens, and on a head or block that is not there.
    """
    data = _finite("attention", attention)
    data = data[(None,) * max(0, 4 - data.ndim)]
    if data.ndim != 4 or data.shape[3] != len(tokens) or data.shape[2] > len(tokens):
        raise ValueError(
            f"attention has shape {tuple(data.shape)}; {len(tokens)} tokens need "
            f"(block, head, query, {len(tokens)}) with at most {len(tokens)} queries"
        )
    number, count, queries, _ = data.shape
    numbers = list(range(number) if blocks is None else blocks)
    if len(numbers) != number:
        raise ValueError(f"blocks names {len(numbers)} blocks for {number} in attention")
    first = numbers[0] if block is None else block
    if first not in numbers:
        raise ValueError(f"block is {block!r}; {numbers} are given")
    pooled = {"mean": 0, "max": 1} | {head: head + 2 for head in range(count)}
    if heads not in pooled:
        raise ValueError(
            f"heads is {heads!r}; 'mean', 'max' and the numbers 0 to {count - 1} would work"
        )
    others = data[..., 1:] if len(tokens) > 1 else data
    full = _bound(float(others.max()) if bound is None else float(bound))
    names = [f"{query - queries} {_line(tokens[query - queries])}" for query in range(queries)]
    props = dict(
        kind="attention",
        tokens=_visible(tokens),
        plain=[_line(token) for token in tokens],
        attention=_nested(data),
        queries=names,
        blocks=[str(one) for one in numbers],
        start=numbers.index(first),
        heads=pooled[heads],
        bound=full,
        largest=float(data.max()),
        fixed=bound is not None,
        signed=False,
        unit="attention",
    )
    own = data[numbers.index(first)]
    shown = own.mean(0) if heads == "mean" else own.amax(0) if heads == "max" else own[int(heads)]
    how = {"mean": "mean over heads", "max": "maximum over heads"}.get(str(heads), f"head {heads}")
    where = f"block {first}, " if number > 1 or blocks is not None else ""
    alt = f"attention from {queries} candidate tokens to {len(tokens)} tokens ({where}{how})"
    still_bound = _bound(float(shown[:, -others.shape[-1] :].max())) if bound is None else full
    picture = attention_still(list(map(_line, tokens)), names, shown.numpy(), still_bound, alt)
    return _view(props, picture, alt)


def _view(props: dict[str, Any], picture: bytes, alt: str) -> Html:
    packed = _pack(json.dumps(props | {"positive": BLUE, "negative": RED}, allow_nan=False))
    key = hashlib.sha256(packed.encode()).hexdigest()[:12]
    still = base64.b64encode(picture).decode("ascii")
    return Html(
        f'{_STYLE}<div class="lenskit-view" data-lenskit="{key}" style="{_CARD}">'
        f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{still}"></div>\n'
        f'<script>(async () => {{const key = "{key}", props = "{packed}", bundle = "{_bundle()}";\n'
        f"{_SCRIPT.read_text(encoding='utf-8')}}})();</script>",
        picture,
    )


def _pack(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


@cache
def _bundle() -> str:
    """circuitsvis' own script, fitted to patterns of few rows and without what no view uses."""
    spec = find_spec("circuitsvis")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders if (file := Path(folder) / _BUNDLE).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{_BUNDLE} is not in the installed circuitsvis; circuitsvis 1.43.3 has it"
        )
    return _pack(_fitted(_slim(files[0].read_text(encoding="utf-8"))))


def _slim(source: str) -> str:
    """Without TensorFlow.js, two thirds of the script, which stand in one piece."""
    inside = source.find("dataMover")  # of the library's first class
    ends = [found.end() for found in re.finditer(r"for\(let (\w+) of \w+\)\w+\(\1\);", source)]
    start, ends = source.rfind("var ", 0, inside), [end for end in ends if end > inside > 0]
    return source[:start] + source[ends[-1] :] if ends else source


def _fitted(source: str) -> str:
    """With patterns that show the rows that are given (others are empty) and are no squares."""
    given = re.search(r"attention:(\w+),maxValue:\w+=1,minValue:\w+=-1", source)
    rows = f"{given[1]}.filter(row=>row.length).length" if given else ""
    changes = {
        r"(\.chartArea\.height/)\w+\.length": rf"\g<1>{rows}",
        r"labels:\[\.\.\.(\w+)\]\.reverse\(\)": rf"labels:[...\1].slice(-{rows}).reverse()",
        r'(width:(\w+)\?"initial":"100%"),aspectRatio:"1/1"': (
            rf'\1,height:\2?24*{rows}+130+"px":"64px"'
        ),
        r"animation:\{duration:0\},plugins:\{tooltip:": (
            r"maintainAspectRatio:!1,animation:{duration:0},plugins:{tooltip:"
        ),
        r'yAlign:"bottom",(callbacks)': r"\1",
    }
    for old, new in changes.items():
        source, found = re.subn(old, new, source)
        if found != 1 or not given:
            raise RuntimeError(
                "the installed circuitsvis is not one that views are made for; 1.43.3 is"
            )
    return source


def _finite(name: str, values: Any) -> Tensor:
    given = values if isinstance(values, Tensor) else torch.tensor(np.array(values, np.float32))
    data = given.detach().to("cpu", torch.float32)
    if data.numel() == 0 or not data.isfinite().all():
        raise ValueError(f"{name} needs finite numbers, at least one; got {tuple(data.shape)}")
    return data


def _bound(value: float) -> float:
    # A bound of zero would divide by zero in the browser.
    return float(f"{value:.2g}") if value > 0 else 1.0


def _nested(data: Tensor) -> list[Any]:
    if data.ndim == 1:
        return [float(f"{value:.3g}") for value in data.tolist()]
    return [_nested(row) for row in data]


def _line(text: str) -> str:
    return text.replace("\n", "↵")


def _visible(tokens: Sequence[str]) -> list[str]:
    # circuitsvis sets some texts as HTML and others as text. A word joiner, which has no width,
    # behind "<" and "&" makes both show the same: "<bos>" is neither a tag nor swallowed.
    safe = [_line(token.replace("<", "<\u2060").replace("&", "&\u2060")) for token in tokens]
    # Text goes on in a new line after a token that ends one, but for the last.
    return [one + "\n" * ("\n" in t) for one, t in zip(safe[:-1], tokens, strict=False)] + safe[-1:]


def __dir__() -> list[str]:
    return __all__
