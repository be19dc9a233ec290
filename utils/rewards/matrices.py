"""Matrices in LaTeX, cell by cell. Text in, text out."""

from __future__ import annotations

import re

from utils.rewards.structure import split_top

MATRIX = re.compile(
    r"\\begin ?\{(?P<kind>[a-zA-Z]*matrix|array)\} ?(?:\{[^{}]*\})?(?P<body>.*)\\end ?\{(?P=kind)\}", re.S
)


def is_determinant(matrix: re.Match[str]) -> bool:
    return "vmatrix" in matrix["kind"].lower()


def matrix_rows(matrix: re.Match[str]) -> list[list[str]]:
    return [split_top(row, {"&"})[0] for row in split_top(matrix["body"], {"\\\\"})[0] if row]
