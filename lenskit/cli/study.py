"""``lenskit study``: ways to make and to apply concept vectors, compared over concepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lenskit.cli.common import (
    EMBEDDED,
    Classes,
    ConceptFileName,
    ConceptNames,
    Device,
    ModelName,
    Prefix,
    Questions,
    RecipeName,
    Relative,
    app,
    mistakes,
    show,
    terminal,
)
from lenskit.concepts import (
    Concept,
    ConceptFile,
    among,
    choose_concepts,
    concepts,
    load_concept_file,
    number_wanted,
    read_blocks,
    read_numbers,
    read_phrases,
    read_shard,
    read_tokens,
)


@dataclass(frozen=True)
class Chosen:
    """The concepts named on the command line, with what shows them if that is said too."""

    concepts: list[Concept]
    phrases: dict[str, list[str]] | None = None
    file: ConceptFile | None = None


def choose(
    which: list[str] | None,
    classes: list[str] | None,
    concept_file: str | None,
    prefix: str | None,
    questions: list[str] | None,
    phrases: list[str] | None,
    default: str,
    model: str = EMBEDDED,
) -> Chosen:
    """The concepts of a grammar's class, of a file, or the one of ``--prefix``.

    A number of concepts is one of those that the model learnt, where that is known.
    """
    if prefix is not None:
        if which or classes or concept_file:
            raise ValueError("--prefix is one concept, without --concepts, --class, --concept-file")
        own = Concept(prefix, questions=tuple(questions or ()))
        return Chosen([own], {own.name: phrases} if phrases else None)
    if questions or phrases:
        raise ValueError("--question and --phrase go with --prefix, the concept of your own")
    if concept_file is None:
        wanted = which or [default]
        number = number_wanted(wanted)
        if number is not None and not classes and of_grammar(model):
            from lenskit.embedded.sizes import learnt_by_all

            return Chosen(learnt_by_all([Path(model)], number * len(concepts)))
        return Chosen(choose_concepts(wanted, classes or ()))
    if classes:
        raise ValueError("--class is one of lenskit's own; a --concept-file has --concepts NAME")
    file = load_concept_file(concept_file)
    return Chosen([file[name] for name in which] if which else list(file.values()), None, file)


def of_grammar(model: str) -> bool:
    """Whether this is a model's folder, not the embedded one, that speaks the embedded grammar."""
    if model == EMBEDDED or not Path(model).is_dir():
        return False
    from lenskit.embedded.sizes import speaks_grammar

    return speaks_grammar(model)


def refuse_judging_workers(named: Chosen, workers: int | None) -> None:
    """Raise ValueError where each worker would need the model that judges."""
    if workers is not None and named.file and named.file.judge == "likelihood":
        raise ValueError(
            "--workers and judge = 'likelihood' do not go together: each worker "
            "would need the judging model; leave --workers out"
        )


@app.command()
def study(
    model: ModelName = EMBEDDED,
    classes: Classes = None,
    which: ConceptNames = None,
    concept_file: ConceptFileName = None,
    prefix: Prefix = None,
    question: Questions = None,
    phrase: Annotated[
        list[str] | None, typer.Option(help="with --prefix: what shows the concept; repeat")
    ] = None,
    recipe: RecipeName = None,
    learner: Annotated[
        list[str] | None, typer.Option(help="rfm, ridge, …; repeat for more")
    ] = None,
    labels: Annotated[list[str] | None, typer.Option(help="soft or hard; repeat for both")] = None,
    token: Annotated[
        list[str] | None,
        typer.Option(help="attention, each, or a fixed one such as -1; repeat for more"),
    ] = None,
    blocks: Annotated[
        list[str] | None,
        typer.Option(help="all, from1, top4, bottom4, random4, or numbers 4,5,6; repeat for more"),
    ] = None,
    coefficients: Annotated[str | None, typer.Option(help="numbers such as 0.1,0.2,0.4")] = None,
    relative: Relative = None,
    prompts: Annotated[int, typer.Option(help="prompts for each concept")] = 400,
    controls: Annotated[bool, typer.Option(help="run the controls as well")] = True,
    phrases: Annotated[
        Path | None, typer.Option(help="TOML file: concept name = [phrases that show it]")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="i/n: every n-th concept from the i-th, for n processes")
    ] = "0/1",
    workers: Annotated[
        int | None, typer.Option(help="processes with a GPU each, or a core without")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder that keeps what is finished")] = None,
    batch_size: Annotated[int, typer.Option(help="answers generated at once")] = 256,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="draws prompts and controls")] = 0,
) -> None:
    """Compare ways to make and to apply concept vectors, over concepts.

    The concepts are lenskit's own, those of a --concept-file, or the one of --prefix. What is not
    given is the recipe's. With --out a study can be stopped and started again; the folder then
    also holds answers.csv and summary.csv once it is complete.
    """
    with mistakes("Run the same command again to go on." if out else ""):
        named = choose(which, classes, concept_file, prefix, question, phrase, "12", model)
        chosen = named.concepts
        own = chosen[read_shard(shard)]
        if len(own) < len(chosen) and out is None:
            raise ValueError("--shard needs --out, the folder in which the shards meet")
        if workers is not None and out is None:
            raise ValueError("--workers needs --out, the folder in which the workers meet")
        if not own:
            raise ValueError(f"--shard {shard} holds none of the {len(chosen)} concepts")
        judge = judge_of(named, phrases, model)
        refuse_judging_workers(named, workers)
        numbers = read_numbers(coefficients) if coefficients else None
        tokens = read_tokens(token) if token else None
        where = read_blocks(blocks) if blocks else None

        from transformers.utils import logging

        from lenskit.labels import LABELS
        from lenskit.models import load_model
        from lenskit.study import (
            CONTROLS,
            finished,
            read_study,
            run_on_workers,
            run_study,
            score_table,
            variants,
            write_tables,
        )
        from lenskit.vectors import LEARNERS

        ways = variants(
            recipe,
            tokens=tokens,
            labels=labels and among("labels", labels, LABELS),
            learners=learner and among("learner", learner, LEARNERS),
            blocks=where,
            controls=CONTROLS if controls else (),
        )
        options: dict[str, Any] = {
            "recipe": recipe,
            "coefficients": numbers,
            "relative": relative,
            "prompts": prompts,
            "batch_size": batch_size,
            "seed": seed,
            "progress": terminal(),
        }
        if named.file and named.file.statements:
            options["statements"] = named.file.statements
        logging.disable_progress_bar()
        load = partial(load_model, model, device=device)
        if workers is not None and out is not None:
            options["judge"] = judge(None)
            found = run_on_workers(load, own, ways, out=out, workers=workers, **options)
        else:
            loaded = load()
            options["judge"] = judge(loaded)
            found = run_study(loaded, own, ways, out=out, **options)
        left = len(chosen) - len(finished(out, chosen)) if out else 0
        if out and len(own) < len(chosen) and not left:
            found = read_study(out, chosen)
        # Before anything is printed, which may fail.
        written = write_tables(found, out) if out and not left else []
        went = [f"where the time went: {found.time}"] if found.seconds else []
        show(score_table(found.compare()), *went, *(f"wrote {path}" for path in written))
        if left:
            show(f"{left} of {len(chosen)} concepts are still to be done by other shards")


def judge_of(named: Chosen, phrases: Path | None, model: str) -> Callable[[Any], Any]:
    """What makes the judge of the answers, once the model is there (``None`` with workers)."""
    given = dict(named.phrases or {})
    if phrases is not None:
        if named.file is not None:
            raise ValueError("--phrases and --concept-file both say what shows a concept; keep one")
        given = read_phrases(phrases, named.concepts)
    if named.file is None and not given:
        own = [one.name for one in named.concepts if one.concept_class is None]
        if own:
            raise ValueError("--prefix needs --phrase, a word that shows the concept; repeat it")
        if model != EMBEDDED and not of_grammar(model):
            raise ValueError(
                f"--model {model} is not the embedded one, so its answers are judged by phrases: "
                "give --phrases FILE with lines such as spiders = ['web', 'eight legs'], or "
                "a --concept-file"
            )

    def make(loaded: Any) -> Any:
        from lenskit.scoring import file_judge, grammar_judge, phrase_judge

        if named.file is not None:
            return file_judge(named.file, loaded)
        return phrase_judge(given) if given else grammar_judge

    return make
