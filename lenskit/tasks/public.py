"""The tasks of PASTA (arXiv 2311.02262) from their public files, prompt by prompt as evaluated.

=============== ============================ ====================== ===========================
name            prompt                       emphasised             answers
=============== ============================ ====================== ===========================
json            context, instruction         the instruction        generated, 128 tokens
pronouns        context, instruction         the instruction        generated, 128 tokens
occupations     context, «… occupation of»   the first sentence,    ``choose`` among all labels
                                             behind the name
counterfact     «Previously …. Currently     the new attribute      ``choose`` of new and true
                …. {prompt}»
paraphrases     the same before each of the  the new attribute      the same, averaged in a
                case's paraphrases                                  case, then over cases
=============== ============================ ====================== ===========================

Evaluated are bare texts without any template: give ``bare(model)`` as ``template_arguments``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lenskit.embedded.dialogue import user
from lenskit.embedded.tasks import TaskPrompt
from lenskit.tasks.emphasis import nth_of
from lenskit.tasks.judges import judge_json, judge_label, judge_pronoun_change
from lenskit.tasks.records import Record, read_records, sentences
from lenskit.tasks.task import Task, TaskJudge
from lenskit.tasks.words import with_they

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# The backslashes are in the published prompt: there they fail to escape the braces.
_JSON = (
    "Answer the occupation of {} and generate the answer as json format. Here is an example: "
    "\\{{'name': , 'occupation': ,\\}}. Now generate the answer:"
)
_PRONOUNS = (
    "For the aforementioned text, substitute 'she' and 'he' with 'they' and generate the "
    "occupation of {} after changing pronouns:"
)

_ONE = "{% if messages|length != 1 %}{{ raise_exception('bare text is one message') }}{% endif %}"
_TEXT = "{{ messages[0]['content'] }}"


def _prompt(record: Record, text: str, span: str, start: int, **others: Any) -> TaskPrompt:
    target, otherwise = others.pop("target"), others.pop("otherwise", "")
    metadata = {"id": record.id, "entity": record.entity, "label": record.target, **others}
    try:
        nth = nth_of(text, span, start) if span else None
        return TaskPrompt(
            messages=(user(text),),
            emphasised=span,
            target=target,
            otherwise=otherwise,
            metadata=MappingProxyType({**metadata, "context": record.context}),
            nth=nth,
        )
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from None


def _instructed(template: str, record: Record, **answers: str) -> TaskPrompt:
    instruction = template.format(record.entity)
    text = f"{record.context}\n{instruction}\n"
    return _prompt(record, text, instruction, len(record.context) + 1, **answers)


def _json(record: Record) -> Iterator[TaskPrompt]:
    answer = json.dumps({"name": record.entity, "occupation": record.target})
    yield _instructed(_JSON, record, target=answer)


def _pronouns(record: Record) -> Iterator[TaskPrompt]:
    text = record.context
    yield _instructed(_PRONOUNS, record, target=with_they(text), otherwise=text)


def _occupations(record: Record) -> Iterator[TaskPrompt]:
    text = f"{record.context.rstrip('. ')}.\n\n{record.prompt}"
    # A few spans are empty as published: the first sentence ends with the name.
    span = record.attribute or sentences(record.context)[0].strip(". ")
    named = text.find(record.entity)
    start = text.find(span, named + len(record.entity) if record.attribute and named >= 0 else 0)
    yield _prompt(
        record, text, span, start if start >= 0 else text.find(span), target=record.target
    )


def _of_fact(record: Record, prompt: str, **others: str) -> TaskPrompt:
    if not record.other:
        raise ValueError(f"{record.place}: target_unmediated is missing, and this task needs it")
    before = f"Previously {record.context.replace(record.target, record.other)}. Currently "
    text = f"{before}{record.context.rstrip('. ')}. {prompt}"
    # A few spans are empty as published: the new attribute ends with the subject.
    span = record.attribute or record.target
    # The old fact comes first and may hold the same words.
    start = len(before) + record.context.rfind(span)
    answers = {"target": record.target, "otherwise": record.other}
    return _prompt(record, text, span, start, **answers, **others)


def _counterfact(record: Record) -> Iterator[TaskPrompt]:
    yield _of_fact(record, record.prompt)


def _paraphrases(record: Record) -> Iterator[TaskPrompt]:
    if not record.paraphrases:
        raise ValueError(
            f"{record.place}: source.paraphrase_prompts is missing; this task needs it"
        )
    for prompt in record.paraphrases:
        yield _of_fact(record, prompt, case=record.place)


_PUBLIC: dict[str, tuple[Callable[[Record], Iterator[TaskPrompt]], TaskJudge]] = {
    "json": (_json, judge_json),
    "pronouns": (_pronouns, judge_pronoun_change),
    "occupations": (_occupations, judge_label),
    "counterfact": (_counterfact, judge_label),
    "paraphrases": (_paraphrases, judge_label),
}
PUBLIC = tuple(_PUBLIC)
"""The tasks of PASTA that ``read_task`` makes from their files."""


def read_task(path: str | Path, name: str, records: slice = slice(None)) -> Task:
    """A task of PASTA, one of ``PUBLIC``, from a file of its records, with the mended judge.

    «json», «pronouns» and «occupations» are of Bias in Bios, the others of CounterFact; the formats
    are those of ``lenskit.tasks.records``. ``records``: which of the usable ones; published are
    results on ``slice(5000, 10000)``, with heads from the first 1,000. Labels are the occupations
    of the records that are used, as published. Raises FileNotFoundError, and ValueError naming file
    and line for what is damaged or is no record of this task.

    >>> import json, pathlib, tempfile
    >>> record = {"id": "1", "entity": "Ann", "attribute": "cares for the sick in Bath",
    ...     "context": "Ann cares for the sick in Bath. She likes it.",
    ...     "prompt": "Ann has the occupation of", "target_mediated": "nurse"}
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "biosbias.json"
    >>> _ = file.write_text(json.dumps(record))
    >>> lk.tasks.read_task(file, "occupations").prompts[0].messages[0]["content"]
    'Ann cares for the sick in Bath. She likes it.\\n\\nAnn has the occupation of'
    """
    if name not in _PUBLIC:
        raise ValueError(f"there is no public task {name!r}; there are {', '.join(PUBLIC)}")
    build, judge = _PUBLIC[name]
    found = read_records(path)
    prompts = tuple(prompt for record in found[records] for prompt in build(record))
    if not prompts:
        raise ValueError(f"records={records}: {path} has {len(found)} usable records, none of them")
    labels = sorted({prompt.target for prompt in prompts}) if name == "occupations" else ()
    generated = name in ("json", "pronouns")
    return Task(name, prompts, judge, 128 if generated else 1, tuple(labels))


def bare(model: TransformerBridge) -> dict[str, str]:
    """``template_arguments`` that give a message as bare text, without any chat template.

    The text comes after the BOS token if the model's tokenizer begins its texts with one. Prompts
    of several messages are refused: give ``few_shot`` a separator.

    >>> lk.tasks.bare(model)["chat_template"].endswith("{{ messages[0]['content'] }}")
    True
    """
    tokenizer = model.tokenizer
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return {"chat_template": _ONE + ("{{ bos_token }}" if begins else "") + _TEXT}
