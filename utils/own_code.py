"""Functions of your own, named in a config as `path/to/file.py:function`. Standard library only.

A mistake in such a file raises ValueError, which begins with the file and the line.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

OWN = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


def is_own(name: str) -> bool:
    """Whether a name in a config is that of a function in a file: `path/to/file.py:function`."""
    return OWN.fullmatch(name) is not None


def file_and_function(name: str) -> tuple[Path, str]:
    match = OWN.fullmatch(name)
    return Path(match["file"]), match["function"]


def unusable_own(name: str) -> str | None:
    """Why a function cannot be used, as far as that shows without running its file; None if nothing shows."""
    file, function = file_and_function(name)
    if not file.is_file():
        return f"no file {str(file)!r}; give path/to/file.py:function, from the folder that you run from"
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        return f"{file}:{getattr(error, 'lineno', None) or 1}: not Python: {error}"
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in (*defined, *(name for node in tree.body for name in _other_names(node))):
        return f"{file} defines no function {function!r}; it defines: {', '.join(defined) or 'none'}"
    return None


def _other_names(node: ast.stmt) -> list[str]:
    """Names that a statement gives to something else than a function of its own: by assignment or import."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@functools.cache
def load_own(name: str) -> Callable[..., Any]:
    """Run the file once per process, and return its function. Raises ValueError."""
    reason = unusable_own(name)
    if reason is not None:
        raise ValueError(reason)
    file, function = file_and_function(name)
    spec = importlib.util.spec_from_file_location(f"own_{file.stem}_{digest(name)[:8]}", file.resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    with told_with_file_and_line(name):
        spec.loader.exec_module(module)
    loaded = getattr(module, function, None)
    if not callable(loaded):
        raise ValueError(f"{file}: {function} is no function")
    return loaded


@contextlib.contextmanager
def told_with_file_and_line(name: str) -> Iterator[None]:
    """Whatever goes wrong in the function's file raises ValueError with the line of that file."""
    file, function = file_and_function(name)
    try:
        yield
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if _same(frame.filename, file)]
        place = f"{file}:{lines[-1]}" if lines else place_of(name)
        raise ValueError(f"{place}: {function} raised {type(error).__name__}: {error}") from error


def _same(filename: str, file: Path) -> bool:
    return Path(filename).resolve() == file.resolve()


def place_of(name: str) -> str:
    """file:line of a function, for a complaint about how it is called or what it returns."""
    file, function = file_and_function(name)
    tree = ast.parse(file.read_bytes())
    lines = [node.lineno for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return f"{file}:{lines[-1] if lines else 1}"


def digest(name: str) -> str:
    """SHA-256 of the file."""
    return hashlib.sha256(file_and_function(name)[0].read_bytes()).hexdigest()


def digests(names: Iterable[str]) -> dict[str, str]:
    """The digests of those names that are functions of your own."""
    return {name: digest(name) for name in names if is_own(name)}
