"""A view to play with: coefficient and blocks are moved, and the answer changes."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import pandas as pd

from lenskit.concepts import Concept
from lenskit.generation import SteeringRow, generate, generate_steered
from lenskit.scoring import Judge, as_verdict
from lenskit.steering import steer
from lenskit.vectors import ConceptVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_CARD = (
    "background:#fff;color:#262626;color-scheme:light;padding:10px 12px;border-radius:6px;"
    "font-family:system-ui,sans-serif;font-size:13px;line-height:1.5"
)
# The table of settings stands there for those without scripts; a script puts controls above it.
_SCRIPT = """
(async () => {
  const find = () => document.querySelector('[data-lenskit-play="KEY"]:not([data-drawn])');
  for (let tries = 0; tries < 1200 && !find(); tries++) await new Promise((r) => setTimeout(r, 50));
  const view = find();
  if (!view) return;
  view.dataset.drawn = "";
  const rows = JSON.parse(view.querySelector("script").textContent);
  const names = Object.keys(rows[0]).filter((name) => !["answer", "verdict"].includes(name));
  const at = {}, controls = document.createElement("div"), answer = document.createElement("p");
  answer.style.cssText = "min-height:4.5em;margin:8px 0;font-size:15px";
  const show = () => {
    const row = rows.find((one) => names.every((name) => one[name] === at[name]));
    answer.textContent = row.answer + (row.verdict ? `  (${row.verdict})` : "");
  };
  for (const name of names) {
    const values = [...new Set(rows.map((row) => row[name]))];
    const label = document.createElement("label"), shown = document.createElement("span");
    label.style.cssText = "display:inline-block;margin-right:1.4em";
    label.append(`${name} `);
    const slide = values.every((value) => typeof value === "number");
    const control = document.createElement(slide ? "input" : "select");
    if (slide) Object.assign(control, { type: "range", min: 0, max: values.length - 1, step: 1 });
    else values.forEach((value, place) => control.append(new Option(value, place)));
    const start = slide ? Math.floor(values.length / 2) : 0;
    const move = () => {
      at[name] = values[Number(control.value)];
      shown.textContent = slide ? ` ${at[name]}` : "";
    };
    control.value = start;
    control.style.cssText = "vertical-align:middle;max-width:24em";
    control.oninput = () => { move(); show(); };
    move();
    label.append(control, shown);
    controls.append(label);
  }
  view.prepend(controls, answer);
  view.querySelector("details").open = false;
  show();
})();
"""


@dataclass(frozen=True, repr=False)
class Play:
    """Answers under every setting of a grid; a notebook shows them with controls to move.

    ``table``: a row for each setting: question, blocks, coefficient, answer and, with a judge, its
    verdict. Shown without a kernel, and as a plain table where scripts do not run; ``live()``
    gives controls for any coefficient and any blocks, which need the model and a kernel.
    """

    table: pd.DataFrame
    model: TransformerBridge = field(repr=False)
    vectors: ConceptVectors = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        return f"Play({len(self.table)} settings)"

    def _repr_html_(self) -> str:
        data = json.dumps(self.table.to_dict("records"), allow_nan=False).replace("<", "\\u003c")
        key = hashlib.sha256(data.encode()).hexdigest()[:12]
        rows = self.table.to_html(index=False, border=0)
        return (
            f'<div data-lenskit-play="{key}" style="{_CARD}">'
            f'<script type="application/json">{data}</script>'
            f"<details open><summary>all {len(self.table)} settings</summary>{rows}</details></div>"
            f"<script>{_SCRIPT.replace('KEY', key)}</script>"
        )

    def answer(self, question: str, coefficient: float, blocks: Sequence[int] | None = None) -> str:
        """The answer at any one setting, generated now."""
        relative = self.settings["relative"]
        with steer(
            self.model, self.vectors, coefficient=coefficient, blocks=blocks, relative=relative
        ):
            found = generate(self.model, [question], max_new_tokens=self.settings["max_new_tokens"])
        return str(found[0])

    def live(self) -> Any:
        """Controls of ipywidgets: a question to write, a coefficient, blocks. Needs a kernel."""
        import ipywidgets as widgets

        # A place for further controls: attention steering will add its α and its heads.
        most = float(self.table["coefficient"].abs().max())
        start = float(self.table["coefficient"].iloc[len(self.table) // 2])
        question = widgets.Combobox(
            value=self.table["question"].iloc[0],
            options=list(dict.fromkeys(self.table["question"])),
            description="question",
            continuous_update=False,
        )
        coefficient = widgets.FloatSlider(
            value=start,
            min=-most,
            max=2 * most,
            step=most / 50,
            readout_format=".3g",
            description="coefficient",
            continuous_update=False,
        )
        every = range(self.model.cfg.n_layers)
        blocks = widgets.SelectMultiple(
            options=list(every), value=tuple(every), description="blocks"
        )
        shown = widgets.HTML()

        def update(change: Any = None) -> None:
            if blocks.value:
                found = self.answer(question.value, coefficient.value, list(blocks.value))
                shown.value = f"<p style='font-size:15px'>{html.escape(found)}</p>"

        for control in (question, coefficient, blocks):
            control.observe(update, "value")
        update()
        return widgets.VBox([question, coefficient, blocks, shown])


def play(
    model: TransformerBridge,
    vectors: ConceptVectors,
    questions: Sequence[str],
    *,
    coefficients: Sequence[float],
    blocks: Mapping[str, Sequence[int] | None] | None = None,
    relative: bool = True,
    concept: Concept | None = None,
    judge: Judge | None = None,
    max_new_tokens: int = 50,
) -> Play:
    """Steered answers at every question, coefficient and choice of blocks, to be moved through.

    ``blocks``: by name, ``{"all": None, "the top four": (0, 1, 3, 7)}``. With a ``concept`` and
    a ``judge`` each answer has its verdict. Raises ValueError for an empty choice.
    """
    choices = {"all": None} if blocks is None else dict(blocks)
    if isinstance(questions, str) or not questions or not len(coefficients) or not choices:
        raise ValueError("questions, coefficients and blocks must each be a list of one at least")
    rows = []
    for name, chosen in choices.items():
        grid = list(product(questions, coefficients))
        planned = [SteeringRow(question, vectors, value) for question, value in grid]
        texts = generate_steered(
            model, planned, blocks=chosen, relative=relative, max_new_tokens=max_new_tokens
        )
        for (question, value), text in zip(grid, texts, strict=True):
            row = {"question": question, "blocks": name, "coefficient": float(value)}
            rows.append(row | {"answer": str(text)})
            if judge is not None and concept is not None:
                rows[-1]["verdict"] = as_verdict(judge(concept, question, text)).reason
    settings = {"relative": relative, "max_new_tokens": max_new_tokens}
    return Play(pd.DataFrame(rows), model, vectors, settings)
