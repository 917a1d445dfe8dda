"""`python -m looplab.recipes` lists the recipes."""

import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("*.py")):
    tree = ast.parse(path.read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if path.stem in functions:  # a recipe has a function of its name
        print(f"{path.stem:18} {(ast.get_docstring(tree) or '').partition(chr(10))[0]}")
