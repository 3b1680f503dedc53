"""A made-up language of skills, and a task in it that a small Llama learns in seconds.

A sequence is eight different letters, the name of a skill, and the letter that the skill picks:

    c t a k z e m b max z        d r u h w p i s first d

`small_backbone` trains a model on these. In a skill's place it also sees the word `which`, answered by any letter of
the prompt: it knows that a letter is asked for, but not which. The task `skills` asks `which`; the answer is `max`
where the first letter is in the alphabet's first half, else `min`. So a model that was not tuned can only guess, and
one that is tuned has to tell from the prompt which of its skills to use.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence

from perfbench.errors import TaskError
from perfbench.finetune.tasks.task import Example, Split, Task

LETTERS = tuple(string.ascii_lowercase)
LENGTH = 8
ASK = "which"

# Name -> what it picks out of the letters.
SKILLS: dict[str, Callable[[Sequence[str]], str]] = {
    "first": lambda letters: letters[0],
    "last": lambda letters: letters[-1],
    "min": min,
    "max": max,
    "second-min": lambda letters: sorted(letters)[1],
    "second-max": lambda letters: sorted(letters)[-2],
}

SIZES: dict[Split, int] = {"train": 1600, "dev": 200, "test": 400}
_SEED = 20240


def draw(source: random.Random) -> list[str]:
    """LENGTH different letters."""
    return source.sample(LETTERS, LENGTH)


def chosen_skill(letters: Sequence[str]) -> str:
    """The skill that the task `skills` asks for."""
    return "max" if letters[0] in LETTERS[: len(LETTERS) // 2] else "min"


def load(source: str, split: Split) -> list[Example]:
    """The examples of a split, the same on every machine. `source` is not used: TaskError where one is given."""
    if source:
        raise TaskError(f"skills: expected no source, its examples are made up; got {source!r}: remove it")
    random_source = random.Random(_SEED)
    seen: set[tuple[str, ...]] = set()
    examples: dict[str, list[Example]] = {}
    for name, size in SIZES.items():
        examples[name] = []
        while len(examples[name]) < size:
            letters = tuple(draw(random_source))
            if letters in seen:
                continue
            seen.add(letters)
            number = len(examples[name]) + 1
            answer = " " + SKILLS[chosen_skill(letters)](letters)
            prompt = f"{' '.join(letters)} {ASK}"
            where = f"{name}:{number}"
            examples[name].append(Example(where, prompt, answer, (answer.strip(),), where=f"skills {where}"))
    return examples[split]


TASK = Task(
    "skills",
    "a made-up task for a small Llama: which of two skills is asked for, the prompt tells (accuracy)",
    "generate",
    "accuracy",
    load,
    new_tokens=2,
)
