"""The command line in this process, and a file of concepts for it."""

from __future__ import annotations

from typer.testing import CliRunner

from lenskit.cli import app

OWN = """
questions = ["Who?", "Why?", "Where to?"]
statements = ["Rain is wet.", "Maps are old.", "Tea is hot.", "Sundays are long.",
              "Sand is warm.", "Tea is cold.", "Rain is late.", "Maps are new."]
[concepts.tea]
prefix = "Take on the role of an expert tea taster."
phrases = ["a", "e", "i"]
[concepts.milk]
prefix = "Personify someone who is terrified of milk."
phrases = ["o"]
"""


def lenskit(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
