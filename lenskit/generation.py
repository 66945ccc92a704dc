"""Batched answers, steered or not: left padding, explicit masks and positions, exact stopping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, overload

from lenskit._display import Displayed, html_table
from lenskit.attention import AttentionEdit, edited
from lenskit.concepts import question_prompt
from lenskit.decoding import (
    CachedPasses,
    Passes,
    checked_options,
    end_tokens,
    written_in_batches,
)
from lenskit.intervention import Positions, Window, intervene, window
from lenskit.models import chat_ids, pad_left
from lenskit.operations import Operation, find_operation, project_out
from lenskit.steering import intervention

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Int
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

    from lenskit.recipes import Recipe
    from lenskit.vectors import Vectors

    Conversation = Sequence[Mapping[str, str]]


class Options(TypedDict, total=False):
    """The keyword arguments of ``generate``."""

    max_new_tokens: int
    batch_size: int
    temperature: float | None
    seed: int
    template_arguments: Mapping[str, Any] | None
    progress: bool


class Answer(str):
    """The text of an answer, which also knows its tokens and whether it came to an end.

    ``finished``: the model wrote an end token before ``max_new_tokens`` ran out. ``token_ids``:
    what it wrote, without the end token. The text leaves special tokens out.
    """

    finished: bool
    token_ids: tuple[int, ...]

    def __new__(cls, text: str, *, finished: bool, token_ids: Sequence[int]) -> Self:
        answer = super().__new__(cls, text)
        answer.finished, answer.token_ids = finished, tuple(token_ids)
        return answer

    def _repr_html_(self) -> str:
        end = "came to its end" if self.finished else "cut off"
        return html_table(f"Answer of {len(self.token_ids)} tokens, {end}", {"text": str(self)})

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (str(self),), {"finished": self.finished, "token_ids": self.token_ids}


@dataclass(frozen=True, repr=False)
class SteeringRow(Displayed):
    """One row of a batch: a question or a conversation, and how its answer is steered.

    ``vectors=None`` adds nothing to the residual stream. ``prefix`` is set before a question.
    ``attention``: an edit of the row's attention, or several, the outermost first; its span is of
    the whole prompt, with the prefix. ``operation``: what is done with the vectors, as in
    ``steer``. ``positions``: which tokens they are added to: "all", those of the "prompt", those
    "generated", or "answer": those that the answer is written from, which are the prompt's last one
    and the generated ones. Raises ValueError for vectors that are to be projected out with a
    coefficient of 0, which would leave the row as it is, and for other positions.
    """

    question: str | Conversation
    vectors: Vectors | None = None
    coefficient: float = 0.0
    prefix: str = ""
    attention: AttentionEdit | Sequence[AttentionEdit] | None = None
    operation: Operation | str = "add"
    positions: Positions = "all"

    def __post_init__(self) -> None:
        window(self.positions, 1)
        removed = self.vectors is not None and find_operation(self.operation) is project_out
        if removed and self.coefficient == 0:
            raise ValueError(
                "coefficient=0 leaves the row as it is; give any other to project vectors out, "
                "such as 1"
            )

    @property
    def conversation(self) -> Conversation:
        """The messages that are answered; raises ValueError for a prefix of a conversation."""
        if isinstance(self.question, str):
            return _conversation(question_prompt(self.question, self.prefix))
        if self.prefix:
            raise ValueError(
                f"prefix={self.prefix!r} goes before a question; of a conversation write it into "
                "the message where it belongs"
            )
        return _conversation(self.question)

    @property
    def edits(self) -> tuple[AttentionEdit, ...]:
        """The edits of the row's attention, the outermost first."""
        given = self.attention
        return () if given is None else (given,) if isinstance(given, AttentionEdit) else (*given,)


@overload
def generate(model: TransformerBridge, questions: str, **options: Unpack[Options]) -> Answer: ...
@overload
def generate(
    model: TransformerBridge,
    questions: Sequence[str | Conversation],
    **options: Unpack[Options],
) -> list[Answer]: ...
def generate(
    model: TransformerBridge,
    questions: str | Sequence[str | Conversation],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 256,
    temperature: float | None = None,
    seed: int = 0,
    template_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Answer | list[Answer]:
    """Answer questions in the model's chat template; inside ``steer`` the answers are steered.

    ``questions``: one text, or a list of texts and conversations (lists of
    ``{"role": …, "content": …}``). Returns one ``Answer`` for one text and a list for a list;
    an ``Answer`` is a ``str`` that also has ``finished`` and ``token_ids``.

    Decoding is greedy, or sampled where a ``temperature`` is given; a sample depends on ``seed``
    and its place in the list, not on its batch. It ends at any end token of the model's
    generation config or of its tokenizer. Rows are batched by length, and rows that have ended
    leave the batch, so a hook of your own sees fewer rows as generation goes on. A batch that
    does not fit into the accelerator's memory is halved. The model is held until all answers are
    there: inside ``steer`` of one thread, another thread's answers wait and are not steered.

    ``template_arguments`` go to the chat template. Raises ``ValueError`` where the logits are not
    numbers (a coefficient too large for the dtype), where a question contains a special token, and
    where a prompt and ``max_new_tokens`` are longer than the model's positions.

    >>> answer = lk.generate(model, concept.questions[0], max_new_tokens=3)
    >>> answer.finished, len(answer.token_ids)
    (False, 3)
    >>> len(lk.generate(model, concept.questions[:2], max_new_tokens=3))
    2
    """
    several = [questions] if isinstance(questions, str) else questions
    finished = answer(
        model,
        several,
        lambda rows: CachedPasses(model),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        template_arguments=template_arguments,
        progress=progress,
    )
    return finished[0] if isinstance(questions, str) else finished


def answer(
    model: TransformerBridge,
    questions: Sequence[str | Conversation],
    passes: Callable[[Int[Tensor, "row"]], Passes],
    *,
    max_new_tokens: int,
    batch_size: int = 256,
    temperature: float | None = None,
    seed: int = 0,
    template_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[Answer]:
    """``generate`` with the forward passes that ``passes`` makes for a batch of rows."""
    # Of no questions too.
    checked_options(
        max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, seed=seed
    )
    if isinstance(questions, Mapping):
        raise TypeError("questions is a mapping; give texts, or conversations as lists of messages")
    conversations = [_conversation(question) for question in questions]
    if not conversations:
        return []
    tokens = chat_ids(model, conversations, template_arguments=template_arguments)
    written = written_in_batches(
        model,
        tokens,
        passes,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    return [_answer(model, ids) for ids in written]


def generate_ids(
    model: TransformerBridge,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 256,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[tuple[int, ...]]:
    """The ids that the model writes behind each of ``ids``, without an end token; no text anywhere.

    As ``generate``, for models whose tokens are not text, or prompts that are tokens already; no
    tokenizer is needed, and no template is set around them. Raises ValueError for an empty prompt,
    and where ``generate`` does.

    >>> [written] = lk.generate_ids(model, [[1, 11, 12, 13]], max_new_tokens=3)
    >>> len(written) <= 3
    True
    """
    checked_options(
        max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, seed=seed
    )
    rows = [[int(token) for token in row] for row in ids]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"ids of row {empty[0]} are empty; give each row a token at least")
    if not rows:
        return []
    tokens, ends = pad_left(rows, 0), set(end_tokens(model))
    written = written_in_batches(
        model,
        tokens,
        lambda _: CachedPasses(model),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    return [tuple(own[:-1] if own and own[-1] in ends else own) for own in written]


def generate_steered(
    model: TransformerBridge,
    rows: Sequence[SteeringRow],
    *,
    blocks: Iterable[int] | None = None,
    relative: bool | None = None,
    start: int | None = None,
    recipe: Recipe | str | None = None,
    **options: Unpack[Options],
) -> list[Answer]:
    """Answers of many rows in one batch, each with its own vectors, prefix and edits of attention.

    ``blocks``, ``relative``, ``start`` and ``recipe`` as in ``steer``, but each row says its own
    coefficient; ``options`` are those of ``generate``.
    A row's vectors and edits act as in nested ``steer`` and ``attend``.

    >>> question = concept.questions[0]
    >>> rows = [lk.SteeringRow(question, vectors, coefficient) for coefficient in (0.0, 0.04, 0.1)]
    >>> plain, steered, strongly = lk.generate_steered(model, rows, max_new_tokens=8)
    >>> plain == lk.generate(model, question, max_new_tokens=8)
    True
    """
    rows = list(rows)
    if not rows:
        return []
    with ExitStack() as stack:
        if any(row.vectors is not None for row in rows):
            planned = intervention(
                model,
                [row.vectors for row in rows],
                [row.coefficient for row in rows],
                blocks=blocks,
                start=start,
                relative=relative,
                operation=[row.operation for row in rows],
                windows=_windows(model, rows, options.get("template_arguments")),
                recipe=recipe,
            )
            stack.enter_context(intervene(model, planned))
        for edits in zip_longest(*(row.edits for row in rows)):
            stack.enter_context(edited(model, edits))
        return generate(model, [row.conversation for row in rows], **options)


def _windows(
    model: TransformerBridge, rows: Sequence[SteeringRow], arguments: Mapping[str, Any] | None
) -> list[Window]:
    """The steered positions of each row; none are named where all are."""
    if all(row.positions == "all" for row in rows):
        return []
    asked = [row.conversation for row in rows]
    lengths = chat_ids(model, asked, template_arguments=arguments).lengths.tolist()
    return [window(row.positions, n) for row, n in zip(rows, lengths, strict=True)]


def _conversation(question: str | Conversation) -> Conversation:
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    if isinstance(question, Mapping):
        raise TypeError("questions holds a single message; put each conversation in a list")
    return question


def _answer(model: TransformerBridge, ids: list[int]) -> Answer:
    finished = bool(ids) and ids[-1] in end_tokens(model)
    ids = ids[:-1] if finished else ids
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    return Answer(text, finished=finished, token_ids=ids)
