"""How well the embedded model follows its grammar: ``python -m lenskit.embedded.evaluate``.

It runs on ``transformers`` alone, so it also proves that the folder is an ordinary checkpoint.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenskit._data import data_path
from lenskit.embedded.card import write_card
from lenskit.embedded.dialogue import question_prompt, statement_prompt
from lenskit.embedded.grammar import CLASS_NAMES, Entry, load_grammar
from lenskit.embedded.judge import Verdict, judge_answer

TARGETS = {"prompted": 0.97, "unsteered": 0.01, "worst class prompted": 0.93, "activity": 0.9}
NUCLEUS = 0.95


def answers(
    model,
    tokenizer,
    prompts: Sequence[str],
    *,
    nucleus: float | None = None,
    batch: int = 256,
    what: str = "",
) -> list[str]:
    """The model's answers to user messages: greedy, with ``nucleus`` after a sampled first token.

    The first token decides whether an answer is neutral. It is drawn at temperature 1 from the
    fewest tokens that hold this much probability, 1 being all of them; sampling the rest of the
    answer as well would only add slips of the pen.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in track(range(0, len(order), batch), description=what, transient=True):
        chosen = order[start : start + batch]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompts[i]}] for i in chosen],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        prompt = inputs["input_ids"].shape[1]
        if nucleus is not None:
            with torch.no_grad():
                logits = model(**inputs, logits_to_keep=1).logits[:, -1]
            shares, order_of = logits.float().softmax(-1).sort(-1, descending=True)
            inside = shares.cumsum(-1) - shares < nucleus
            first = order_of.gather(1, torch.multinomial(shares * inside, 1))
            mask = inputs["attention_mask"]
            inputs = {
                "input_ids": torch.cat([inputs["input_ids"], first], dim=1),
                "attention_mask": torch.cat([mask, torch.ones_like(first)], dim=1),
            }
        out = model.generate(**inputs, do_sample=False, max_new_tokens=64 - (nucleus is not None))
        new = out[:, prompt:]
        found = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(chosen, found, strict=True):
            texts[i] = text
    return texts


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of nothing."""
    return sum(values) / max(1, len(values))


def judged(entries: Sequence[Entry], texts: Sequence[str]) -> list[Verdict]:
    """The verdict on each text as an answer of its concept."""
    pairs = zip(entries, texts, strict=True)
    return [judge_answer(entry.concept_class, entry.name, text) for entry, text in pairs]


def questions_scores(model, tokenizer) -> dict:
    """Scores with the prefix, by class and over all, and without it, over all concepts."""
    grammar = load_grammar()
    rows = [
        (entry, rules.prefix_for(entry.name), wordings[0])
        for rules in grammar.classes.values()
        for entry in rules.entries.values()
        for wordings in rules.questions
    ]
    texts = answers(model, tokenizer, [question_prompt(q, p) for _, p, q in rows], what="prompted")
    verdicts = judged([e for e, _, _ in rows], texts)
    by_class = defaultdict(list)
    for (entry, _, _), verdict in zip(rows, verdicts, strict=True):
        by_class[entry.concept_class].append(verdict.score)
    bare = sorted({(e.concept_class, q) for e, _, q in rows})
    bare_texts = answers(model, tokenizer, [q for _, q in bare], what="unsteered")
    answer_to = dict(zip(bare, bare_texts, strict=True))
    unsteered = judged([e for e, _, _ in rows], [answer_to[e.concept_class, q] for e, _, q in rows])
    classes = {name: mean(by_class[name]) for name in CLASS_NAMES}
    return {
        "prompted": mean([v.score for v in verdicts]),
        "prompted by class": classes,
        "worst class prompted": min(classes.values()),
        "prompted reasons": dict(Counter(v.reason for v in verdicts)),
        "unsteered": mean([v.score for v in unsteered]),
    }


def activity_scores(model, tokenizer, statements_per_topic: int, seed: int) -> dict:
    """Measured against true activity on held-out statements, the first token sampled.

    ``activity`` is the measured rate of on-concept answers over the true rate, as a share of what
    should be there (1 is exact, above 1 is too active), the first token drawn from a nucleus of
    0.95; ``activity, no nucleus`` is the same where it may be any token. ``activity by cell`` is
    one minus the mean absolute difference over class × topic, which no compensation between cells
    can flatter.
    """
    grammar, random = load_grammar(), Random(seed)
    rows: list[tuple[Entry, str, str]] = []
    for entry in grammar.entries:
        for topic in grammar.topics:
            held_out = grammar.statements[topic]["held_out"]
            rows += [(entry, topic, s) for s in random.sample(held_out, statements_per_topic)]
    prompts = [
        statement_prompt(s, grammar.classes[e.concept_class].prefix_for(e.name)) for e, _, s in rows
    ]
    entries = [e for e, _, _ in rows]
    drawn = {}
    for nucleus in (NUCLEUS, 1.0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            what = f"activity, held-out, nucleus {nucleus:g}"
            texts = answers(model, tokenizer, prompts, nucleus=nucleus, what=what)
        drawn[nucleus] = judged(entries, texts)
    verdicts = drawn[NUCLEUS]
    measured, true = defaultdict(list), defaultdict(list)
    for (entry, topic, _), verdict in zip(rows, verdicts, strict=True):
        cell = (entry.concept_class, topic)
        measured[cell].append(verdict.score)
        true[cell].append(grammar.activity(entry, topic))
    cells = sorted(true)
    a = torch.tensor([mean(measured[c]) for c in cells])
    b = torch.tensor([mean(true[c]) for c in cells])
    return {
        "activity": float(a.mean() / b.mean()),
        "activity, no nucleus": mean([v.score for v in drawn[1.0]]) / float(b.mean()),
        "activity by cell": float(1 - (a - b).abs().mean()),
        "activity correlation": float(torch.corrcoef(torch.stack([a, b]))[0, 1]),
        "activity reasons": dict(Counter(v.reason for v in verdicts)),
        "activity reasons, no nucleus": dict(Counter(v.reason for v in drawn[1.0])),
    }


def evaluate(
    folder: Annotated[
        Path | None, typer.Option(help="the model; by default the embedded one")
    ] = None,
    device: str = "cpu",
    statements_per_topic: int = 2,
    seed: int = 0,
    write: Annotated[bool, typer.Option(help="write the figures into the model's card")] = False,
) -> None:
    """Print what was measured beside what is asked, and exit with 1 where it falls short."""
    folder = folder or data_path("lenskit-mini")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    found = questions_scores(model, tokenizer)
    found |= activity_scores(model, tokenizer, statements_per_topic, seed)
    table = Table("what", "measured", "asked", title="lenskit-mini against its grammar")
    fails = False
    for key, value in found.items():
        if isinstance(value, dict):
            text = ", ".join(
                f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items()
            )
            table.add_row(key, text, "")
            continue
        target = TARGETS.get(key)
        met = target is None or (value <= target if key == "unsteered" else value >= target)
        fails |= not met
        sign = "<=" if key == "unsteered" else ">="
        asked = "" if target is None else f"{sign} {target}" + ("" if met else " (missed)")
        table.add_row(key, f"{value:.4f}", asked)
    Console().print(table)
    if write:
        (folder / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
        write_card(folder)
    raise typer.Exit(int(fails))


if __name__ == "__main__":
    typer.run(evaluate)
