"""Groups of rollouts on a terminal: how one is drawn, and the keys that lead from one to the next."""

from __future__ import annotations

import os
import re
import shutil
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from utils.log.files import Row
from utils.log.terminal import visible

COLUMN_WIDTH = 44  # characters that a response takes at least, side by side with others
KEYS = "n next  p previous  w next with a wrong answer  f prompt  space b j k scroll  q quit"
KEY = re.compile(r"\x1b\[[\d;]*[A-Za-z~]|.", re.DOTALL)  # of what was typed: an escape sequence, or a character
ARROWS = {"\x1b[A": "k", "\x1b[B": "j", "\x1b[C": "n", "\x1b[D": "p", "\x1b[6~": " ", "\x1b[5~": "b"}
OTHER_SCREEN, THIS_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # as less does, and without a cursor
HOME, END_OF_LINE, REST = "\x1b[H", "\x1b[K", "\x1b[J"

Group = Sequence[Row]


def groups_of(rollouts: Sequence[Row]) -> list[list[Row]]:
    """Rollouts of one split, step and group together, in the order in which they come."""
    groups: dict[tuple, list[Row]] = {}
    for row in rollouts:
        groups.setdefault((row["split"], row["grpo_step"], row["group"]), []).append(row)
    return list(groups.values())


def folded(groups: Sequence[Group]) -> list[bool]:
    """For each group, whether its prompt equals an earlier one apart from the question."""
    seen: set[str] = set()
    repeats = []
    for group in groups:
        row = group[0]
        template = row["prompt"].replace(row["question"], "{question}")
        repeats.append(template in seen)
        seen.add(template)
    return repeats


def is_wrong(row: Row) -> bool:
    return row["answer_reward"] <= 0


def colour_of(row: Row) -> str:
    return "yellow" if is_wrong(row) and row["format_reward"] > 0 else "red" if is_wrong(row) else "green"


def group_parts(group: Group, place: str, fold: bool, columns: int) -> Iterator[Text | Table]:
    """What is drawn of a group: its heading, question, prompt and truth, then its responses in so many columns."""
    first, n_wrong = group[0], sum(map(is_wrong, group))
    heading = f"{first['split']}  step {first['grpo_step']}  group {first['group']}  ({place})"
    mean = sum(row["reward"] for row in group) / len(group)
    rewards = f"{len(group) - n_wrong} of {len(group)} right, mean reward {mean:.3f}"
    yield Text(visible(f"{heading}  {rewards}"), style="bold reverse")
    yield Text.assemble(("question: ", "bold"), visible(first["question"]))
    prompt = "the same as before, but for the question" if fold else first["prompt"]
    yield Text.assemble(("prompt: ", "bold"), (visible(prompt), "dim"))
    truth = first["truth"] if isinstance(first["truth"], str) else " or ".join(map(str, first["truth"]))
    yield Text.assemble(("truth: ", "bold"), visible(truth))
    if columns == 1:
        yield from map(response_text, group)
        return
    for i in range(0, len(group), columns):
        table = Table.grid(padding=(0, 2), expand=True)
        cells = [response_text(row) for row in group[i : i + columns]]
        for _ in range(columns):
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*cells)
        yield table


def response_text(row: Row) -> Text:
    """A response below its reward, advantage and length."""
    advantage = "" if row["advantage"] is None else f"  advantage {row['advantage']:+.3f}"
    heading = f"#{row['index']}  reward {row['reward']:g}{advantage}"
    length = f"{row['response_length']} tokens" + (", truncated" if row["finish_reason"] == "length" else "")
    details = f"format {row['format_reward']:g}, answer {row['answer_reward']:g}, {length}"
    colour = colour_of(row)
    return Text.assemble(
        (f"{visible(heading)}\n", f"bold {colour}"),
        (f"{visible(details)}\n", "dim"),
        (visible(row["response"]) + "\n", colour),
    )


class Pager:
    """Which group is on the screen, how far it is scrolled, and what each key does to that."""

    def __init__(self, groups: Sequence[Group], draw: Callable[[int, bool], list[str]], height: int) -> None:
        """`draw(i, fold)` gives the lines of group i; `height` lines fit, one of which is for the keys."""
        self.groups, self.draw, self.height = groups, draw, height
        self.at, self.top = 0, 0
        self.folds = folded(groups)

    def press(self, key: str) -> bool:
        """Do what a key asks for; returns False for the key that ends."""
        page = self.height - 2
        if key in ("q", "Q", "\x1b", "\x04"):
            return False
        if key in ("n", "p"):
            self._go(self.at + (1 if key == "n" else -1))
        elif key == "w":
            later = range(self.at + 1, len(self.groups))
            self._go(next((i for i in later if any(map(is_wrong, self.groups[i]))), self.at))
        elif key == "f":
            self.folds[self.at] = not self.folds[self.at]
        self.top += {" ": page, "b": -page, "j": 1, "k": -1}.get(key, 0)
        self.top = max(0, min(self.top, len(self.lines()) - page))
        return True

    def _go(self, group: int) -> None:
        if 0 <= group < len(self.groups) and group != self.at:
            self.at, self.top = group, 0

    def lines(self) -> list[str]:
        return self.draw(self.at, self.folds[self.at])

    def screen(self) -> list[str]:
        """The visible lines: a part of the group, and the keys below."""
        lines = self.lines()
        below = len(lines) - self.top - (self.height - 1)
        more = f"{below} lines below  " if below > 0 else ""
        return [*lines[self.top : self.top + self.height - 1], f"\x1b[7m{more}{KEYS}\x1b[0m"]


def drawn(group: Group, place: str, fold: bool, width: int) -> list[str]:
    """A group as lines with colours, its responses side by side as far as the width allows."""
    console = Console(width=width, highlight=False, force_terminal=True)
    columns = max(1, min(len(group), width // COLUMN_WIDTH))
    with console.capture() as capture:
        for part in group_parts(group, place, fold, columns):
            console.print(part, soft_wrap=False)
    return capture.get().rstrip("\n").split("\n")


def browse(groups: Sequence[Group]) -> None:
    """Show one group after another on this terminal, by keys, until q."""

    def draw(i: int, fold: bool) -> list[str]:
        width = shutil.get_terminal_size().columns
        return drawn(groups[i], f"{i + 1} of {len(groups)}", fold, width)

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    pager = Pager(groups, draw, 0)
    try:
        tty.setcbreak(descriptor)
        sys.stdout.write(OTHER_SCREEN)
        goes_on = True
        while goes_on:
            pager.height = shutil.get_terminal_size().lines
            lines = f"{END_OF_LINE}\r\n".join(pager.screen())
            sys.stdout.write(f"{HOME}{lines}{REST}")
            sys.stdout.flush()
            pressed = os.read(descriptor, 16).decode(errors="replace")
            goes_on = bool(pressed) and all(pager.press(ARROWS.get(key, key)) for key in KEY.findall(pressed))
    except KeyboardInterrupt:
        pass
    finally:
        sys.stdout.write(THIS_SCREEN)
        sys.stdout.flush()
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
