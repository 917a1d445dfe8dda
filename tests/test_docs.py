"""The README and the docstrings: their examples run, and the messages that they explain are those of the code."""

import ast
import doctest
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import looplab

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PUBLIC = [looplab, *(getattr(looplab, name) for name in looplab.__all__)]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_examples_in_docstrings(thing):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    module = None if inspect.ismodule(thing) else False  # of a module, without what it imports; of a class, everything
    for example in doctest.DocTestFinder().find(thing, thing.__name__, module, globs={}):
        runner.run(example)
    assert runner.failures == 0


def test_readme_is_one_program(tmp_path):
    """Its Python blocks run in a new process, one after the other."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    program = tmp_path / "readme.py"
    program.write_text("\n\n".join(blocks))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, program], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert ended.returncode == 0, ended.stdout.decode()


def test_readme_quotes_messages_of_the_code():
    """What the troubleshooting table quotes, with … for what varies, is part of a text in a source file."""
    texts = [text for path in (ROOT / "looplab").rglob("*.py") for text in _texts(path)]
    table = README.partition("## Troubleshooting")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE)
    quotes = [double or single for cell in cells for double, single in re.findall(r"`` (.*?) ``|`(.*?)`", cell)]
    assert len(quotes) >= 10
    for quote in quotes:
        pattern = ".*".join(map(re.escape, quote.split("…")))
        assert any(re.search(pattern, text) for text in texts), quote


def _texts(path):
    """All strings in a source file, with … for the values inside f-strings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
