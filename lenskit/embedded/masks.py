"""What the answer of a narrow dialogue may see of its prompt.

In a *narrow* dialogue the last answer sees the first token, the template's closing tokens and
itself, and no text of the prompt: what it needs of the prompt has to be carried by the closing
tokens. With *tokens hidden* it sees only some of these, so that what is carried has to be held by
several of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# End of the user's turn, start of header, «assistant», end of header, blank line.
CLOSING = 5


@dataclass(frozen=True)
class Sight:
    """What a narrow answer sees: ``closing[i]`` says whether the i-th closing token is seen.

    ``begins`` is the closing token from which on nothing else of the prompt is seen: the last
    (``CLOSING - 1``), or none of them (``CLOSING``: from the answer's first token on).
    """

    begins: int = CLOSING
    closing: tuple[bool, ...] = (True,) * CLOSING


@dataclass(frozen=True)
class Narrowing:
    """The shares in which dialogues are narrow and closing tokens hidden.

    ``narrow``: of the dialogues that may be. ``hidden``: of the narrow ones, those in which token
    -1 and what follows it see no text of the prompt and each other closing token with probability
    one half (at least one of them). ``forgotten``: of these, those in which the answer does not
    see token -1 either.
    """

    narrow: float = 0.5
    hidden: float = 0.6
    forgotten: float = 0.4

    def draw(self, random: Random) -> Sight | None:
        """What the answer of one dialogue sees, None being everything."""
        if random.random() >= self.narrow:
            return None
        if random.random() >= self.hidden:
            return Sight()
        others = [False] * (CLOSING - 1)
        while not any(others):
            others = [random.random() < 0.5 for _ in others]
        return Sight(CLOSING - 1, (*others, random.random() >= self.forgotten))


def closing_tokens(ids: Int[Tensor, "row pos"], header: int) -> Int[Tensor, "row closing"]:
    """Positions of the closing tokens of each row's last turn; ``header`` opens a message."""
    place = torch.arange(ids.shape[1], device=ids.device)
    opens = torch.where(ids == header, place, -1).amax(1)
    return opens[:, None] + torch.arange(-1, CLOSING - 1, device=ids.device)


def sight_mask(
    closing: Int[Tensor, "row closing"], width: int, sights: list[Sight | None]
) -> Bool[Tensor, "row 1 pos pos"] | None:
    """Which keys each query may see; None where that is all keys up to the query, in all rows."""
    if not any(sights):
        return None
    place = torch.arange(width)
    mask = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(sights), 1, 1)
    for row, sight in enumerate(sights):
        if sight is None:
            continue
        first = int(closing[row, 0])
        seen = place == 0
        seen[first : first + CLOSING] = torch.tensor(sight.closing)
        seen[first + CLOSING :] = True
        begins = first + sight.begins
        mask[row, begins:] &= seen | (place == place[begins:, None])
    return mask[:, None]
