"""The judge that a file of one's own concepts asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lenskit.concepts import ConceptFile
from lenskit.scoring.grammar import grammar_judge
from lenskit.scoring.judges import endpoint_judge, likelihood_judge
from lenskit.scoring.steerability import Judge, phrase_judge

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def file_judge(file: ConceptFile, model: TransformerBridge | None = None) -> Judge:
    """``phrase_judge``, ``likelihood_judge`` or ``endpoint_judge`` with the file's settings.

    ``model`` is the one whose likelihoods judge. Raises ValueError where it is needed and missing.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "tea.toml"
    >>> _ = file.write_text('''[concepts.tea]
    ... prefix = "Personify someone who loves tea."
    ... questions = ["What now?", "What is worth money?", "What makes a good day?"]
    ... phrases = ["earl grey"]''')
    >>> own = lk.load_concept_file(file)
    >>> lk.file_judge(own)(own["tea"], "What now?", "A cup of Earl Grey.").score
    1
    """
    if file.judge == "likelihood":
        if model is None:
            raise ValueError("judge = 'likelihood' needs the model: file_judge(file, model)")
        return likelihood_judge(model, **file.settings)
    if file.judge == "endpoint":
        return endpoint_judge(**file.settings)
    if file.judge == "grammar":
        return grammar_judge
    return phrase_judge({name: list(own) for name, own in file.phrases.items()}, **file.settings)
