"""Vectors of a concept whose prefix is weak or missing: from answers, examples, or no labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.decomposition import MiniBatchDictionaryLearning
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenskit.capture import Capture, capture
from lenskit.concepts import statement_prompt, statements
from lenskit.embedded.dialogue import assistant, user
from lenskit.labels import explained_by_two_groups
from lenskit.models import RESID, Tokens, chat_ids, hooked, in_batches, pad_left, run_plain, using
from lenskit.prompts import build_prompts, prompts_from_ids
from lenskit.recipes import Recipe
from lenskit.scoring import Judge
from lenskit.study.experiments.bench import Bench
from lenskit.study.experiments.optimised import expressing
from lenskit.study.ways import Variant
from lenskit.vectors import ConceptVectors, fit_vectors

NEUTRAL = "Please look at the next line with care."
_SHOTS, _ATOMS = 3, 8
_HARD = Variant("attention", "hard")


@dataclass(frozen=True)
class OtherPrefix:
    """The recipe with another prefix than the concept's: its name alone, say."""

    prefix: str = "{name}."

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        concept = bench.concept
        weaker = replace(concept, prefix=self.prefix.format(name=concept.name))
        found = replace(bench, concept=weaker, other=None, coefficients={}, made={})
        vectors = found.steering(_HARD)
        return None if vectors is None else replace(vectors, concept=concept)


@dataclass(frozen=True)
class NeutralNegative:
    """Prompts with the prefix against prompts with one that asks for nothing.

    ``recipe``: another one than the experiment's.
    """

    neutral: str = NEUTRAL
    variant: Variant = _HARD
    recipe: Recipe | None = None

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        own = bench.capture.prompts
        about = list(statements("first") + statements("second"))
        given = about if bench.statements is None else list(bench.statements)
        # Turned round, so that the neutral prefix stands before the other half.
        half = len(given) // 2
        other = build_prompts(
            bench.model,
            replace(bench.concept, prefix=self.neutral),
            number=len(own),
            statements=given[half:] + given[:half],
            seed=bench.seed,
        )
        rows = [
            (prompts, row)
            for pair in zip(
                own.has_prefix.nonzero()[:, 0].tolist(),
                other.has_prefix.nonzero()[:, 0].tolist(),
                strict=True,
            )
            for prompts, row in zip((own, other), pair, strict=True)
        ]
        ids = [_own_ids(prompts.tokens, row) for prompts, row in rows]
        spans: list[tuple[int, int] | None] = []
        for prompts, row in rows:
            if prompts is other:
                spans.append(None)
                continue
            real = prompts.tokens.attention_mask[row].bool()
            places = prompts.prefix_mask[row, real].nonzero()[:, 0].tolist()
            spans.append((places[0], places[-1] + 1))
        made = prompts_from_ids(
            bench.model, bench.concept, ids, prefixes=spans, candidates=len(own.candidates)
        )
        beside = bench.of(self.recipe).fresh(capture(bench.model, made, progress=False))
        return beside.steering(self.variant)


@dataclass(frozen=True)
class FewShot:
    """Earlier turns whose answers show the concept, against the same turns with plain answers."""

    judge: Judge

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        told = expressing(bench, self.judge)
        model, own = bench.model, bench.capture.prompts
        number = len(own.candidates)
        ids: list[list[int]] = []
        spans: list[tuple[int, int] | None] = []
        for row, statement in enumerate(own.statements):
            shown = bool(own.has_prefix[row])
            said = told.shown if shown else told.plain
            shots = [(row + i) % len(told.questions) for i in range(_SHOTS)]
            turns = [
                turn
                for shot in dict.fromkeys(shots)
                for turn in (user(told.questions[shot]), assistant(said[shot]))
            ]
            asked = user(statement_prompt(statement))
            whole, bare = (
                _own_ids(chat_ids(model, [each]), 0) for each in ([*turns, asked], [asked])
            )
            ids.append(whole)
            # What stands before the last question, without what every prompt begins with.
            spans.append((1, len(whole) - len(bare) + 1) if shown else None)
        made = prompts_from_ids(
            model, bench.concept, ids, prefixes=spans, candidates=number, statements=own.statements
        )
        return _fitted(bench, capture(model, made, progress=False))


@dataclass(frozen=True)
class FromAnswers:
    """Mean of the stream over tokens of answers that show it, less that of plain answers."""

    judge: Judge

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        told = expressing(bench, self.judge)
        means = [
            _mean_resid(bench.model, *_with_answers(bench.model, told.questions, answers)).mean(
                dim=0
            )
            for answers in (told.shown, told.plain)
        ]
        made = bench.vectors(Variant())
        assert made is not None
        return replace(
            made,
            directions=torch.nn.functional.normalize(means[0] - means[1], dim=-1),
            validation=torch.full_like(made.validation, float("nan")),
            learner="mean difference of answers",
            selection="the answers' tokens",
            labels="answers",
        )


@dataclass(frozen=True)
class Dictionary:
    """Without labels: the atom of a dictionary whose codes fall into two groups most clearly.

    Of the stream at the attention-guided token, block by block (scikit-learn's dictionary
    learning). Only the sign is by the labels, since nothing else tells it.
    """

    atoms: int = _ATOMS

    def __call__(self, bench: Bench) -> ConceptVectors | None:
        def atom(X: np.ndarray, y: np.ndarray, *validation: np.ndarray) -> np.ndarray:
            learner = MiniBatchDictionaryLearning(
                min(self.atoms, len(X) // 2),
                alpha=0.05,
                max_iter=30,
                batch_size=32,
                random_state=bench.seed,
                transform_algorithm="lasso_lars",
            )
            codes = learner.fit_transform(X - X.mean(axis=0))
            used = np.flatnonzero(codes.std(axis=0) > 0)
            if not len(used):
                raise ValueError("no atom of the dictionary is used")
            clear = explained_by_two_groups(codes.T[used])
            return learner.components_[used[int(clear.argmax())]]

        return fit_vectors(
            bench.capture, "attention", "hard", learner=atom, seed=bench.seed, progress=False
        )


def _fitted(bench: Bench, captured: Capture) -> ConceptVectors:
    return fit_vectors(captured, "attention", "hard", seed=bench.seed, progress=False)


def _own_ids(tokens: Tokens, row: int) -> list[int]:
    return tokens.input_ids[row, tokens.attention_mask[row].bool()].tolist()


def _with_answers(
    model: TransformerBridge, questions: tuple[str, ...], answers: tuple[str, ...]
) -> tuple[Tokens, Bool[Tensor, "row pos"]]:
    """Questions followed by answers, and which tokens are the answers'."""
    prompts = chat_ids(model, [[user(each)] for each in questions])
    ids, lengths = [], []
    for row, answer in enumerate(answers):
        said = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids.append([*_own_ids(prompts, row), *said])
        lengths.append(len(said))
    tokens = pad_left(ids, model.tokenizer.pad_token_id)
    places = torch.arange(tokens.input_ids.shape[1], 0, -1)
    return tokens, places <= torch.tensor(lengths)[:, None]


@torch.no_grad()
def _mean_resid(
    model: TransformerBridge, tokens: Tokens, wanted: Bool[Tensor, "row pos"]
) -> Float[Tensor, "row layer d_model"]:
    """``resid_post`` of every block, the mean over the wanted tokens of each row."""
    found = torch.zeros(len(tokens), model.cfg.n_layers, model.cfg.d_model)

    def run(rows: Tensor) -> None:
        batch = tokens.rows(rows).trimmed()
        kept = wanted[rows, -batch.input_ids.shape[1] :]

        def reader(layer: int):
            def read(value: Tensor, hook: object) -> None:
                own = kept.to(value.device, torch.float32)
                sums = torch.einsum("rpd,rp->rd", value.float(), own)
                found[rows, layer] = (sums / own.sum(dim=1, keepdim=True)).cpu()

            return read

        hooks = [(f"blocks.{layer}.{RESID}", reader(layer)) for layer in range(model.cfg.n_layers)]
        with hooked(model, hooks):
            run_plain(model.original_model, batch, use_cache=False)

    with using(model):
        in_batches(tokens, 64, run, progress=False, description="Reading answers")
    return found
