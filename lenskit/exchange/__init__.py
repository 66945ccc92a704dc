"""Concept vectors leave and enter: llama.cpp, repeng, steering-vectors.

All of these number decoder blocks from 0 and add a vector to the output of a block, which is our
``resid_post``. So **our block l is layer l in each of them**:

- llama.cpp adds the tensor ``direction.N`` of a control vector to the output of block N, counted
  from 0. It has no place for block 0: its loader refuses a file with ``direction.0``, and the
  first vector in its memory is that of layer 1. So our block 0 cannot leave this way, and the last
  block of a model with L blocks is ``direction.{L-1}``; a higher N would be left out silently.
  (llama.cpp's own generator measures after block N - 1 what it names N, and what is then added
  after block N. We read such a file as llama.cpp applies it.)
- repeng's ``ControlVector.directions`` is ``{layer: array}``. It learns no vector for layer 0
  unless asked, and its GGUF export names layer l ``direction.{l}``.
- steering-vectors' ``SteeringVector.layer_activations`` is ``{layer: tensor}``, with
  ``layer_type="decoder_block"`` for the output of a block; layer 0 is one like the others.

Strength: our directions have unit norm. They leave multiplied by ``coefficient`` (and by each
block's mean residual norm with ``relative=True``), and the other side's factor multiplies that:
``--control-vector-scaled FILE:S``, ``set_control(vector, S)`` and ``apply(model, multiplier=S)`` do
what ``steer(model, vectors, coefficient=S * coefficient, relative=relative, blocks=...)`` does with
the same blocks. What enters is split into a direction and its norm, and the norm becomes
``resid_norm``: ``steer(model, read, coefficient=S, relative=True)`` adds S times the file. A block
that is not in the file gets a row of zeros, which adds nothing.

The learner's validation and the residual norms do not travel; ``ConceptVectors.save`` keeps all.
Vectors with a direction for each closing token do not travel either: the others add one vector at
every token.
"""

from __future__ import annotations

from lenskit.exchange.layers import from_layers, read_layers, to_layers, write_layers
from lenskit.exchange.llama_cpp import read_gguf, write_gguf

__all__ = ["from_layers", "read_gguf", "read_layers", "to_layers", "write_gguf", "write_layers"]


def __dir__() -> list[str]:
    return __all__
