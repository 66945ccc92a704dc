"""``python -m lenskit`` is the command ``lenskit``."""

from lenskit.cli import app

# Worker processes import this module under another name.
if __name__ == "__main__":
    app(prog_name="lenskit")
