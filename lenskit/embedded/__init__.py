"""The embedded model: a grammar whose truth is known, and a small chat model trained on it.

``grammar`` reads the data files, ``judge`` parses answers, ``corpus`` writes dialogues,
``tokenizer`` and ``train`` make the model, ``evaluate`` measures how well it follows the grammar.
"""
