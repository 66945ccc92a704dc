"""What is named on the command line, read strictly: a mistake raises ValueError or KeyError."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lenskit.concepts.concept import Concept, concepts
from lenskit.concepts.reading import read_toml

BLOCKS = re.compile(r"all|increments|look|(top|bottom|random|from)[1-9]\d*|\d+(,\d+)*")
TOKENS = re.compile(r"attention|each|look|-[1-9]\d*")


def spread(name: str, number: int | None) -> list[Concept]:
    """``number`` concepts of a class, evenly spaced over it; all of them with ``None``."""
    members = list(concepts[name].values())
    number = len(members) if number is None else number
    if not 1 <= number <= len(members):
        raise ValueError(f"class {name} has 1 to {len(members)} concepts to choose, not {number}")
    return [members[i * len(members) // number] for i in range(number)]


def number_wanted(which: Sequence[str]) -> int | None:
    """How many concepts of every class are wanted, 0 for "all"; None where they are named."""
    counts = [one for one in which if one == "all" or one.lstrip("-").isdecimal()]
    if not counts:
        return None
    if len(which) > 1:
        raise ValueError(f"--concepts takes one number or names, not {', '.join(which)}")
    if counts[0] == "all":
        return 0
    number = int(counts[0])
    if number < 1:
        raise ValueError(f"--concepts takes a number from 1 on, all, or names, not {counts[0]}")
    return number


def choose_concepts(which: Sequence[str], classes: Sequence[str] = ()) -> list[Concept]:
    """From a number for each class, "all", or names such as "fears/spiders"."""
    number = number_wanted(which)
    if number is not None:
        names = dict.fromkeys(classes or concepts)
        return [one for name in names for one in spread(name, number or None)]
    if classes:
        raise ValueError("--class goes with a number of concepts, not with their names")
    chosen = {}
    for one in which:
        name, slash, concept = one.partition("/")
        if not slash:
            raise ValueError(f"--concepts {one!r} is neither a number nor a name: fears/spiders")
        chosen[one] = concepts[name][concept]
    return list(chosen.values())


def read_shard(text: str) -> slice:
    """ "1/3" is every third one from the second."""
    first, slash, step = text.partition("/")
    if not (slash and first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise ValueError(f"--shard must be i/n with i from 0 to n - 1, such as 0/2; got {text!r}")
    return slice(int(first), None, int(step))


def read_numbers(text: str) -> tuple[float, ...]:
    """ "0.1,0.2" is two coefficients, which must differ and be finite."""
    try:
        numbers = tuple(float(one) for one in text.split(","))
    except ValueError:
        numbers = ()
    finite = all(abs(one) < float("inf") for one in numbers)
    if not numbers or not finite or len(set(numbers)) < len(numbers):
        raise ValueError(f"--coefficients must be different numbers like 0.1,0.2; got {text!r}")
    return numbers


def read_phrases(file: Path, chosen: Iterable[Concept]) -> dict[str, list[str]]:
    """The phrases that show each concept, from lines like ``spiders = ["web", "eight legs"]``."""
    found = read_toml(file)
    for concept in chosen:
        own = found.get(concept.name)
        if not (isinstance(own, list) and own and all(isinstance(p, str) and p for p in own)):
            given = "nothing" if own is None else repr(own)
            raise ValueError(
                f"--phrases {file} gives {given} for {concept.name!r}; add a line such as "
                f"\"{concept.name}\" = ['web', 'eight legs']"
            )
    return found


def among(option: str, given: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The values of a repeated option, each once; all must be known."""
    given, known = tuple(dict.fromkeys(given)), tuple(known)
    for one in given:
        if one not in known:
            raise ValueError(f"--{option} {one!r} is not one of {', '.join(known)}")
    return given


def read_tokens(given: Iterable[str]) -> tuple[str, ...]:
    """ "attention", "each", "look", or offsets from the end such as "-1"."""
    given = tuple(dict.fromkeys(given))
    for one in given:
        if not TOKENS.fullmatch(one):
            raise ValueError(
                f"--token must be attention, each, look, or an offset such as -1; got {one!r}"
            )
    return given


def read_blocks(given: Iterable[str]) -> tuple[str, ...]:
    """ "all", "from1", "increments", "look", "top4", "bottom4", "random4", or numbers "4,5,6"."""
    given = tuple(dict.fromkeys(given))
    for one in given:
        if not BLOCKS.fullmatch(one):
            raise ValueError(
                "--blocks must be all, top4, bottom4, random4, from1, increments, look or numbers "
                f"like 4,5,6; got {one!r}"
            )
    return given
