"""Arithmetic in several steps, with the steps worked out, and the single sums that a base may know beforehand; pure.

A problem is a chain from the left: "(((7+12)*3)-8)". Every value on the way lies in 0..199 and every operand in 2..12,
so that a small base can know all single sums. The same seed gives the same problems.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

LARGEST = 199
OPERANDS = range(2, 13)
FIRST = range(2, 100)
STEPS = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class Problem:
    """`steps` as they are worked: "7+12=19"."""

    expression: str
    steps: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        return f"Q: {self.expression} A:"

    @property
    def solution(self) -> str:
        """What follows the prompt, to the line's end."""
        return f" {'; '.join(self.steps)}; so {self.answer}\n"


def sum_of(value: int, draw: random.Random) -> tuple[str, int, int]:
    """(sign, operand, result) of a sum that starts at `value` and stays in range."""
    while True:
        sign, operand = draw.choice("+-*"), draw.choice(OPERANDS)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
        if 0 <= result <= LARGEST:
            return sign, operand, result


def problem(draw: random.Random) -> Problem:
    value = draw.choice(FIRST)
    expression, steps = str(value), []
    for _ in range(draw.choice(STEPS)):
        sign, operand, result = sum_of(value, draw)
        expression = f"({expression}{sign}{operand})"
        steps.append(f"{value}{sign}{operand}={result}")
        value = result
    return Problem(expression, tuple(steps), value)


def problems(count: int, seed: int, without: Iterable[Problem] = ()) -> list[Problem]:
    """Different ones, none of which is in `without`."""
    draw = random.Random(seed)
    taken, found = {p.expression for p in without}, []
    while len(found) < count:
        made = problem(draw)
        if made.expression not in taken:
            taken.add(made.expression)
            found.append(made)
    return found


def sums_line(draw: random.Random) -> str:
    """What a base knows: sums that have nothing to do with each other, or a question of one step with its answer."""
    if draw.random() < 0.2:
        value = draw.randrange(LARGEST + 1)
        sign, operand, result = sum_of(value, draw)
        return f"Q: ({value}{sign}{operand}) A: {result}\n"
    sums = []
    for _ in range(draw.randint(1, 6)):
        value = draw.randrange(LARGEST + 1)
        sign, operand, result = sum_of(value, draw)
        sums.append(f"{value}{sign}{operand}={result}")
    return "; ".join(sums) + "\n"


def chain_line(made: Problem) -> str:
    """The same chain in another notation, as a base may have seen it: "7 +12 *3 -> 7+12=19, 19*3=57"."""
    first, *others = re.findall(r"[-+*]?\d+", made.expression)
    return f"{first} {' '.join(others)} -> {', '.join(made.steps)}\n"


def known_lines(count: int, seed: int, with_chains: bool, without: Iterable[Problem]) -> list[str]:
    """What a base learns beforehand; with chains, every other line is one, of no problem in `without`."""
    draw = random.Random(seed)
    asked = {p.expression for p in without}
    lines: list[str] = []
    while len(lines) < count:
        if with_chains and len(lines) % 2:
            made = problem(draw)
            lines += [] if made.expression in asked else [chain_line(made)]
        else:
            lines.append(sums_line(draw))
    return lines


def answer_in(text: str) -> int | None:
    """The number after the last "so", or else the last number; None where there is none."""
    found = re.findall(r"so (\d+)", text) or re.findall(r"\d+", text)
    return int(found[-1]) if found else None
