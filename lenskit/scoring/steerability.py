"""Does an answer show the concept, is it still language, and how steerable is the concept?

A judge is any callable ``(concept, question, answer) -> Verdict``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenskit._display import Displayed
from lenskit.concepts import Concept, question_prompt
from lenskit.embedded.judge import Verdict
from lenskit.models import chat_ids, position_ids, using

__all__ = [
    "Judge",
    "PhraseJudge",
    "Steerability",
    "Verdict",
    "as_verdict",
    "fluency",
    "phrase_judge",
    "repetition",
    "steerability",
]

Judge = Callable[[Concept, str, str], "Verdict | float"]


def as_verdict(judged: Verdict | float) -> Verdict:
    """What a judge returned, as a verdict: a Verdict, a bool, or a number from 0 to 1.

    Raises ``ValueError`` for NaN and other numbers, ``TypeError`` for anything else.

    >>> as_verdict(True)
    Verdict(score=1, reason='on concept')
    """
    if isinstance(judged, Verdict):
        return judged
    try:
        score = float(judged)
    except (TypeError, ValueError):
        raise TypeError(
            f"a judge must return a Verdict, a bool or a number from 0 to 1, got {judged!r}"
        ) from None
    if not 0 <= score <= 1:
        raise ValueError(f"a judge's score must be from 0 to 1, got {judged!r}")
    whole = int(score) if score.is_integer() else score
    return Verdict(whole, "on concept" if score >= 0.5 else "off concept")  # type: ignore[arg-type]


@dataclass(frozen=True)
class PhraseJudge:
    """A judge that looks for phrases; make one with ``phrase_judge``."""

    phrases: Mapping[str, Sequence[str]] | Sequence[str]
    most_repetition: float = 0.5

    def __call__(self, concept: Concept, question: str, answer: str) -> Verdict:
        """1 if the answer holds one of the concept's phrases as whole words."""
        given = self.phrases
        own = given.get(concept.name, ()) if isinstance(given, Mapping) else given
        if not own or isinstance(own, str) or not all(p.strip() for p in own):
            raise ValueError(
                f"phrases for concept {concept.name!r} are {own!r}; give a list such as "
                "['web', 'eight legs']"
            )
        if not answer.strip():
            return Verdict(0, "unfinished")
        if repetition(answer) > self.most_repetition:
            return Verdict(0, "repeating")
        # A question that names the concept must not score by being echoed.
        text = answer.lower()
        if question.strip():
            text = text.replace(question.strip().lower(), " ")
        shown = any(re.search(rf"(?<!\w){re.escape(p.lower())}(?!\w)", text) for p in own)
        return Verdict(int(shown), "on concept" if shown else "off concept")


def phrase_judge(
    phrases: Mapping[str, Sequence[str]] | Sequence[str], *, most_repetition: float = 0.5
) -> PhraseJudge:
    """A judge for any model: 1 if the answer holds one of the concept's phrases as whole words.

    ``phrases``: by concept name, or one list for all. An answer whose ``repetition`` exceeds
    ``most_repetition`` scores 0. The judge raises ValueError for a concept without phrases.

    >>> judge = lk.phrase_judge({"spiders": ["web", "eight legs"]})
    >>> judge(concept, "What is scary?", "Anything with eight legs.")
    Verdict(score=1, reason='on concept')
    """
    return PhraseJudge(phrases, most_repetition)


def repetition(answer: str, words: int = 3) -> float:
    """Share of the answer's runs of ``words`` words that stood in it before (0 to 1).

    >>> lk.repetition("tea and tea and tea and tea")
    0.6
    """
    tokens = re.findall(r"\w+", answer.lower())
    runs = [tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@torch.no_grad()
def fluency(
    model: TransformerBridge,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    prefixes: Sequence[str] | None = None,
    batch_size: int = 64,
) -> Float[Tensor, " answer"]:
    """Negative log-likelihood of each answer under the unsteered model, in nats a token.

    With ``prefixes`` the model reads each prefix before its question: how natural the answer is
    for somebody who was told the concept. NaN for an empty answer. Raises ValueError when the
    lengths differ. Call it outside ``steer``.

    >>> question = concept.questions[0]
    >>> answers = [lk.generate(model, question), "tea tea tea"]
    >>> own, odd = lk.fluency(model, [question] * 2, answers)
    >>> bool(own < odd)
    True
    """
    prefixes = [""] * len(questions) if prefixes is None else prefixes
    if not len(questions) == len(answers) == len(prefixes):
        raise ValueError(
            f"questions, answers and prefixes must be as many: {len(questions)}, "
            f"{len(answers)} and {len(prefixes)}"
        )
    conversations = [
        [{"role": "user", "content": question_prompt(q, p)}]
        for q, p in zip(questions, prefixes, strict=True)
    ]
    ids = [
        torch.tensor(model.tokenizer(a, add_special_tokens=False)["input_ids"], dtype=torch.long)
        for a in answers
    ]
    out = torch.full((len(answers),), float("nan"))
    order = sorted((i for i in range(len(ids)) if len(ids[i])), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompts = chat_ids(model, [conversations[i] for i in rows])
        tail = torch.nn.utils.rnn.pad_sequence([ids[i] for i in rows], batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids[i]) for i in rows], True)
        device = model.cfg.device
        # Padding after the answer is never looked back at, and its own targets are left out.
        tokens = torch.cat([prompts.input_ids.cpu(), tail], dim=1).to(device)
        mask = torch.cat([prompts.attention_mask.cpu(), torch.ones_like(tail)], dim=1).to(device)
        with using(model):
            logits = model.original_model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position_ids(mask),
                use_cache=False,
            ).logits[:, -tail.shape[1] - 1 : -1]
        loss = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), tail.to(device), reduction="none"
        ).cpu()
        out[rows] = (loss * real).sum(1) / real.sum(1)
    return out


@dataclass(frozen=True)
class Steerability(Displayed):
    """``best``: mean over questions of the best over coefficients, AGS's optimistic figure.

    ``held_out``: the coefficient chosen on some questions and scored on the others, averaged over
    all such choices. ``coefficient``: place of the one that is best over all questions.
    """

    best: float
    held_out: float
    coefficient: int


def steerability(
    scores: Float[Tensor, "coefficient question"],
    coefficients: Sequence[float] | None = None,
    *,
    chosen_on: int = 2,
) -> Steerability:
    """Both figures of steerability from a table of 0/1 scores (method: AGS; held out: ours).

    ``held_out`` chooses on every ``chosen_on`` of the questions in turn; of equal coefficients
    the smallest in size is taken. Raises ValueError with no question left to score, or NaN.

    >>> lk.steerability([[0, 1, 0], [1, 1, 1]], coefficients=[0.02, 0.04])
    Steerability(best=1.0, held_out=1.0, coefficient=1)
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    if scores.ndim != 2 or not scores.numel() or bool(scores.isnan().any()):
        raise ValueError(
            f"scores must be a table [coefficient, question] without NaN, not {tuple(scores.shape)}"
        )
    number, questions = scores.shape
    if questions <= chosen_on or chosen_on < 1:
        raise ValueError(
            f"chosen_on={chosen_on} of {questions} questions leaves none to score; "
            "give more questions or choose on fewer"
        )
    size = torch.arange(number) if coefficients is None else torch.tensor(list(coefficients)).abs()
    if len(size) != number:
        raise ValueError(f"coefficients are {len(size)}, scores have {number} rows")
    by_size = torch.argsort(size, stable=True)

    def choose(values: Tensor) -> int:
        return int(by_size[values[by_size].argmax()])

    held_out = []
    for picked in combinations(range(questions), chosen_on):
        rest = [q for q in range(questions) if q not in picked]
        held_out.append(scores[choose(scores[:, list(picked)].mean(1)), rest].mean().item())
    return Steerability(
        best=scores.amax(0).mean().item(),
        held_out=sum(held_out) / len(held_out),
        coefficient=choose(scores.mean(1)),
    )
