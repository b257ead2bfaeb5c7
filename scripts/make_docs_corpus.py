"""Make training text that every machine has: ``python scripts/make_docs_corpus.py [--out data/python-docs]``.

Questions and answers come from the documentation that Python carries with it: the docstrings of the standard library
(by ``inspect``) and the language reference (``pydoc_data.topics``). Two files are written:

- ``train.jsonl``: ``{"prompt": "What does json.dumps do in Python?", "completion": "…"}``, a few thousand rows
- ``text.jsonl``: ``{"text": …}``, sections of the language reference, for continued pre-training

The same Python gives the same files, byte for byte: nothing is random, names are sorted, and each file appears by a
rename when it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

DEFAULT_OUT = Path("data/python-docs")
SHORTEST, LONGEST = 30, 600  # characters of an answer; 600 are about 150 tokens
TEXT_LENGTH = 1500

MODULES = """
    abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath cmd code codecs collections
    collections.abc colorsys compileall concurrent.futures configparser contextlib copy csv ctypes curses.ascii
    dataclasses datetime decimal difflib dis doctest email.message email.utils enum errno faulthandler filecmp
    fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html
    html.parser http.client http.cookies http.server imaplib importlib importlib.metadata importlib.resources
    importlib.util inspect io ipaddress itertools json keyword linecache locale logging logging.config
    logging.handlers lzma mailbox math mimetypes mmap multiprocessing netrc numbers operator os os.path pathlib pdb
    pickle pkgutil platform plistlib poplib pprint profile pstats py_compile queue quopri random re reprlib sched
    secrets select selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics
    string stringprep struct subprocess symtable sys sysconfig tarfile tempfile textwrap threading time timeit token
    tokenize trace traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.parse urllib.request
    uuid venv warnings wave weakref webbrowser wsgiref.util xml.dom.minidom xml.etree.ElementTree xmlrpc.client
    zipapp zipfile zlib zoneinfo
""".split()

# Modules whose functions say that they come from another one.
ALIASES = {"os": ("posix", "posixpath", "genericpath", "nt"), "io": ("builtins",), "hashlib": ("_blake2", "_sha3")}

QUESTIONS = {
    "module": "What is the Python module {name} for?",
    "class": "What is {name} in Python?",
    "exception": "When is {name} raised in Python?",
    "function": "What does {name} do in Python?",
    "method": "What does the method {name} do in Python?",
    "property": "What does the attribute {name} hold in Python?",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder to write (default: {DEFAULT_OUT})")
    args = parser.parse_args()
    out: Path = args.out
    files = {out / "train.jsonl": questions_and_answers, out / "text.jsonl": sections}
    if all(path.is_file() and path.stat().st_size for path in files):
        print(f"training text: {out} is there already")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for path, make in files.items():
        rows = list(make())
        part = path.with_name(path.name + ".part")
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.rename(path)
        print(f"training text: {path}, {len(rows)} rows")
    return 0


def questions_and_answers() -> Iterator[dict[str, str]]:
    """One row for each documented module, class, function, method and property; no prompt and no answer comes twice."""
    prompts: set[str] = set()
    answers: set[str] = set()
    for kind, name, doc in documented():
        prompt, answer = QUESTIONS[kind].format(name=name), first_paragraphs(doc)
        key = answer.casefold()
        if len(answer) < SHORTEST or prompt in prompts or key in answers:
            continue
        prompts.add(prompt)
        answers.add(key)
        yield {"prompt": prompt, "completion": answer}


def documented() -> Iterator[tuple[str, str, str]]:
    """(kind, dotted name, raw docstring) of everything public in MODULES, in sorted order."""
    seen: set[int] = set()
    for module_name in MODULES:
        module = import_quietly(module_name)
        if module is None:
            continue
        if module.__doc__:
            yield "module", module_name, module.__doc__
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or id(value) in seen or inspect.ismodule(value):
                continue
            seen.add(id(value))
            full = name if module_name == "builtins" else f"{module_name}.{name}"
            if not is_home(module_name, value):
                continue
            if inspect.isclass(value):
                yield from of_class(full, value)
            elif inspect.isroutine(value) and value.__doc__:
                yield "function", full, value.__doc__


def is_home(module: str, value: object) -> bool:
    """Whether ``value`` was made in this module (or its C half), not imported into it from another."""
    root = module.split(".")[0]
    made_in = (getattr(value, "__module__", None) or root).split(".")[0]
    return made_in in {root, f"_{root}", *ALIASES.get(root, ())}


def of_class(full: str, value: type) -> Iterator[tuple[str, str, str]]:
    """The class itself and what it defines (not what it inherits)."""
    own_doc = value.__dict__.get("__doc__")
    if isinstance(own_doc, str):
        yield ("exception" if issubclass(value, BaseException) else "class"), full, own_doc
    for name, member in sorted(vars(value).items()):
        doc: Any = getattr(member, "__doc__", None)
        if name.startswith("_") or not isinstance(doc, str):
            continue
        if isinstance(member, staticmethod | classmethod) or inspect.isroutine(member):
            yield "method", f"{full}.{name}", doc
        elif isinstance(member, property):
            yield "property", f"{full}.{name}", doc


def import_quietly(name: str) -> ModuleType | None:
    """The module, or None on a Python that was built without it."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def first_paragraphs(doc: str) -> str:
    """The beginning of a docstring as plain prose: whole paragraphs, LONGEST characters at most.

    Left out are a signature on the first line, and everything from the first list, example or table on.
    """
    lines = inspect.cleandoc(doc).splitlines()
    if lines and re.match(r"^[\w.]+\(.*\)(\s*->.*)?$", lines[0].strip()):
        lines = lines[1:]
    taken: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip()):
        if not is_prose(paragraph):
            break
        text = " ".join(paragraph.replace("``", "`").split())
        if sum(map(len, taken)) + len(text) > LONGEST:
            break
        taken.append(text)
    answer = "\n".join(taken)
    if answer.endswith(":"):  # it announces what was left out
        answer = answer[: answer.rfind(". ") + 1] if ". " in answer else ""
    return answer


def is_prose(paragraph: str) -> bool:
    first = paragraph.lstrip()
    indented = any(line[:1].isspace() for line in paragraph.splitlines())  # code, or a list of arguments
    ruled = re.search(r"(^|\n)\s*([-=*~]{3,}|\||>>>|[-*•] |\d+\. |\w+ -- |@|:param|\$)", paragraph)
    if re.match(r"\w+ = |\w+\(.*\)$", first):  # grammar, such as "operator = Add | Sub", or a bare call
        return False
    return bool(first) and not indented and not ruled and not first.startswith(("Copyright", "Written by", "Author"))


def sections() -> Iterator[dict[str, str]]:
    """Pieces of the language reference of about TEXT_LENGTH characters, cut between paragraphs."""
    from pydoc_data import topics

    for name in sorted(topics.topics):
        piece = ""
        for paragraph in topics.topics[name].strip().split("\n\n"):
            if piece and len(piece) + len(paragraph) > TEXT_LENGTH:
                yield {"text": piece.strip()}
                piece = ""
            piece += textwrap.dedent(paragraph) + "\n\n"
        if len(piece.strip()) >= SHORTEST:
            yield {"text": piece.strip()}


if __name__ == "__main__":
    sys.exit(main())
