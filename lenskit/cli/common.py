"""What all commands share: mistakes in one line, output that any terminal takes, options."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

# Modules that load torch are imported inside the commands that need them.
EMBEDDED = "lenskit-mini"

app = typer.Typer(
    name="lenskit",
    help="Find out how a language model carries a concept, and steer it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
ModelName = Annotated[
    str, typer.Option("--model", help="a local folder, a hub id, or the embedded model")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …")]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="lenskit, paper, or the defaults without it")
]
Classes = Annotated[
    list[str] | None, typer.Option("--class", help="a concept class; repeat for more")
]
ConceptFileName = Annotated[
    str | None, typer.Option("--concept-file", help="TOML file of concepts of your own")
]
Prefix = Annotated[
    str | None, typer.Option(help="a concept of your own: the text that activates it")
]
Questions = Annotated[
    list[str] | None, typer.Option("--question", help="with --prefix: a test question; repeat")
]
ConceptNames = Annotated[
    list[str] | None,
    typer.Option("--concepts", help="a number for each class, all, or names such as fears/spiders"),
]
NamedBlocks = Annotated[str, typer.Option("--blocks", help="all, from1, or numbers 4,5,6")]
Relative = Annotated[
    bool | None,
    typer.Option("--relative/--absolute", help="coefficients in units of the residual norm"),
]
_settings = {"traceback": False}
_PLAIN = {"±": "+/-", "…": "...", "−": "-", "–": "-", "’": "'", "“": '"', "”": '"', "×": "x"}


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    part = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in part), error.end


codecs.register_error("lenskit.plain", _in_plain_letters)


@app.callback()
def _main(
    traceback: Annotated[bool, typer.Option(help="show where in the code a mistake arose")] = False,
) -> None:
    _settings["traceback"] = traceback
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows fewer letters shows others, instead of ending the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="lenskit.plain")


@contextmanager
def mistakes(again: str = "") -> Iterator[None]:
    """A user's mistake is one line, and so is what to do after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped. {again}".strip(), err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # Who read the output went away (``| head``). What Python flushes at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except Exception as error:
        from lenskit.models import ModelCheckError
        from lenskit.study import CellsFailed

        mistake = ValueError | LookupError | OSError | ImportError | ModelCheckError | CellsFailed
        known = isinstance(error, mistake)
        if _settings["traceback"] or not known:
            raise
        # The text of a KeyError is the repr of its message.
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        typer.echo(f"Error: {' '.join(text.split())}", err=True)
        raise typer.Exit(1) from None


def show(*what: Any) -> None:
    """Print tables and texts now; raises OSError where they cannot be written."""
    # The console would end the process by itself when nobody reads.
    console = Console()
    with console.capture() as captured:
        for each in what:
            console.print(each, markup=not isinstance(each, str), highlight=False)
    try:
        sys.stdout.write(captured.get())
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        # What is left in the buffer would fail once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def terminal() -> bool:
    """Whether somebody watches, so that progress is worth showing."""
    return Console().is_terminal
