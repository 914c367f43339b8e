"""
What --help prints: a script's docstring and its commented defaults, in 80 columns. Each script
imports this first, so that its help is there before torch, which takes seconds, is imported.
"""

import ast
import re
import sys
import textwrap
from itertools import groupby


def show_help(path):
    """Prints the help of a script whose options common.configure reads, and ends; of others the
    import goes on."""
    with open(path, encoding="utf-8") as f:
        source = f.read()
    if "configure(globals())" not in source:
        return
    keys = re.split(r"(?m)^# ---.*\bdefaults\b.*$", source, maxsplit=1)[-1]
    keys = re.split(r"(?m)^(?:# ---|def |class |@|if )", keys)[0].replace("  # fmt: skip", "")
    fold((ast.get_docstring(ast.parse(source)) or "").strip(), "", "        ")
    fold(keys.rstrip(), "# ", "    # ")
    raise SystemExit(0)


def fold(text, head, indent):
    """Prints a text in 80 columns: lines that begin with `head` and no space flow together, others
    go on indented."""
    for flows, lines in groupby(text.splitlines(), lambda x: bool(re.match(head + r"\S", x))):
        if flows:
            print(fill(head + " ".join(x.removeprefix(head) for x in lines), head))
        else:
            print(*(fill(x, indent) for x in lines), sep="\n")


def fill(text, indent=""):
    """One line of text -> as many of 80 columns as it takes, the others indented."""
    return textwrap.fill(
        text, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if sys.argv[0].endswith(".py") and {"-h", "--help"} & set(sys.argv[1:]):
    show_help(sys.argv[0])
