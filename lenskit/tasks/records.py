"""Records of the public files: who is spoken of, in which words, and what is asked.

Read from their published formats, a JSON list, JSON lines or JSON objects one after the other:

- PASTA's and REMEDI's own records: ``id, entity, attribute, context, prompt, target_mediated,
  target_unmediated`` and ``source``;
- CounterFact (ROME): ``case_id, requested_rewrite, paraphrase_prompts, …``;
- Bias in Bios: ``raw, name, title``, as JSON. Its ``BIOS.pkl`` is a pickle, whose reading runs code
  of the file: open it where you trust it, and write its list with ``json.dump``.

The last two are brought to the form of the first. The published scripts split sentences with
spaCy; here a rule does, so that a few contexts differ. Their own records are read as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenskit._files import open_regular

_SPACE = re.compile(r"\s*")
_TITLES = "professor prof. prof dr. dr doctor mr. mr ms. ms mrs. mrs rev. rev pastor".split()
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Z]|Dr|Mr|Mrs|Ms|Prof|Rev|St|Jr|Sr|Inc|No|vs)\.$")
_CRUFT = (" (b. ", " (tr. ", " (min. ")
_NO_NAME = "Non-Residential"
_FEWEST_WORDS, _FEWEST_IN_A_SENTENCE = 10, 3


@dataclass(frozen=True)
class Record:
    """One record in PASTA's form; ``place`` is its file, line and number, for messages.

    ``paraphrases``: further prompts of the same fact, of CounterFact alone.
    """

    place: str
    id: str
    entity: str
    attribute: str
    context: str
    prompt: str
    target: str
    other: str
    paraphrases: tuple[str, ...] = ()


def read_records(path: str | Path) -> list[Record]:
    """Every usable record of a file, in its order.

    Biographies whose person is named twice, or that are short, are left out, as published. Raises
    FileNotFoundError, and ValueError naming file, line and record for what is damaged.
    """
    found = []
    for place, item in _items(Path(path)):
        if not isinstance(item, Mapping):
            raise ValueError(f"{place}: {item!r} is no record, which is a JSON object")
        if "requested_rewrite" in item:
            found.append(_counterfact(place, item))
        elif "raw" in item and "title" in item:
            biography = _biography(place, item)
            found += [] if biography is None else [biography]
        else:
            found.append(_own(place, item))
    if not found:
        raise ValueError(f"{path} holds no usable record")
    return found


def sentences(text: str) -> list[str]:
    """The sentences of a text, split after . ! or ? unless an abbreviation ends there."""
    found: list[str] = []
    for part in re.split(r"(?<=[.!?])\s+", text.strip()):
        if found and (_ABBREVIATION.search(found[-1]) or not re.match(r"[\W\dA-Z]", part)):
            found[-1] += f" {part}"
        else:
            found.append(part)
    return [part for part in found if part]


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """Each JSON value of the file with its place, from a list or one after the other."""
    with open_regular(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        advice = "; a pickle must be written as JSON first" if data[:1] == b"\x80" else ""
        raise ValueError(f"{path}: line {line}: not UTF-8{advice}") from None
    decoder, number, line, seen = json.JSONDecoder(), 0, 1, 0
    at = _after_space(text, 0)
    listed = text[at : at + 1] == "["
    at = _after_space(text, at + 1) if listed else at
    while at < len(text) and not (listed and text[at] == "]"):
        line, seen, number = line + text.count("\n", seen, at), at, number + 1
        place = f"{path}: line {line} (record {number})"
        try:
            item, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: {error.msg} at line {error.lineno}") from None
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{place}: cannot be read: {error}") from None
        yield place, item
        at = _after_space(text, at)
        if listed and text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif listed and at < len(text) and text[at] != "]":
            raise ValueError(f"{place}: neither a comma nor the end of the list follows it")
    if listed and at >= len(text):
        raise ValueError(f"{path}: the list does not end after record {number}; is the file cut?")
    if listed and (rest := text[at + 1 :].strip()):
        raise ValueError(f"{path}: {rest[:40]!r} stands after the end of the list")


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _text(place: str, item: Mapping[str, Any], *keys: str, empty: bool = False) -> str:
    value: Any = item
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, str) or not (value.strip() or empty):
        name = ".".join(keys)
        known = (
            "" if isinstance(item.get(keys[0]), str) else f"; it has {', '.join(map(str, item))}"
        )
        raise ValueError(f"{place}: {name} must be a text, got {value!r}{known}")
    return value


def _texts(place: str, item: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = item.get(key)
    if not isinstance(value, list) or not all(isinstance(t, str) and t.strip() for t in value):
        raise ValueError(f"{place}: {key} must be a list of texts, got {value!r}")
    return tuple(dict.fromkeys(value))


def _own(place: str, item: Mapping[str, Any]) -> Record:
    other = item.get("target_unmediated")
    source: Any = item.get("source")
    paraphrased = isinstance(source, Mapping) and "paraphrase_prompts" in source
    return Record(
        place,
        str(item.get("id", "")),
        _text(place, item, "entity"),
        _text(place, item, "attribute", empty=True),
        _text(place, item, "context"),
        _text(place, item, "prompt"),
        _text(place, item, "target_mediated"),
        "" if other is None else _text(place, item, "target_unmediated"),
        _texts(place, source, "paraphrase_prompts") if paraphrased else (),
    )


def _counterfact(place: str, item: Mapping[str, Any]) -> Record:
    new, true = (
        _text(place, item, "requested_rewrite", key, "str") for key in ("target_new", "target_true")
    )
    subject = _text(place, item, "requested_rewrite", "subject")
    template = _text(place, item, "requested_rewrite", "prompt")
    if template.count("{}") != 1:
        raise ValueError(f"{place}: requested_rewrite.prompt must hold one {{}}, got {template!r}")
    paraphrases = _texts(place, item, "paraphrase_prompts")
    if not paraphrases:
        raise ValueError(f"{place}: paraphrase_prompts is empty, and the first is the prompt")
    context = f"{template.replace('{}', subject)} {new}"
    return Record(
        place,
        str(item.get("case_id", "")),
        subject,
        context.split(subject)[-1].strip(",-;: "),
        context,
        bare_paraphrase(subject, paraphrases[0]),
        new,
        true,
        paraphrases,
    )


def bare_paraphrase(subject: str, paraphrase: str) -> str:
    """The sentence of a paraphrase that is about the subject, without the sentences before it."""
    text = paraphrase.split("\n")[-1].strip()
    if text.startswith("Category:") and subject in text:
        text = subject + text.split(subject)[-1]
    for cruft in _CRUFT:
        text = text.split(cruft)[-1]
    parts = sentences(text)
    while len(parts) > 1 and subject not in parts[-1]:
        parts[-2:] = [f"{parts[-2]} {parts[-1]}"]
    if not parts:
        return text
    about = f"{parts[-2]} {parts[-1]}" if len(parts) > 1 and "?" in parts[-2] else parts[-1]
    return about if subject in about else text


def _biography(place: str, item: Mapping[str, Any]) -> Record | None:
    name = item.get("name")
    if not isinstance(name, list) or not name or not all(isinstance(n, str | None) for n in name):
        raise ValueError(f"{place}: name must be a list of texts, got {name!r}")
    parts = [part for part in name if part]
    if not name[0] or not name[-1]:
        raise ValueError(f"{place}: name must begin and end with a text, got {name!r}")
    text = " ".join(
        sentence
        for sentence in sentences(_text(place, item, "raw"))
        if len(sentence.split()) >= _FEWEST_IN_A_SENTENCE
    )
    first, title = name[0], _text(place, item, "title").replace("_", " ")
    called = (" ".join(parts), f"{first} {name[-1]}", name[-1])
    titles = [form for one in _TITLES for form in (one, one.capitalize(), one.upper())]
    for form in [*(f"{one} {each}" for each in called for one in titles), *called]:
        text = text.replace(form, first)
    text = text.strip("*• ")
    if text.count(first) == 0:
        text = f"About {first}: {text}"
    if first == _NO_NAME or text.count(first) != 1 or len(text.split()) < _FEWEST_WORDS:
        return None
    opening = sentences(text)[0]
    attribute = opening.split(first, 1)[1].strip(".: ") if first in opening else opening
    return Record(
        place,
        "_".join(parts),
        first,
        attribute,
        text,
        f"{first} has the occupation of",
        title,
        "",
    )
