"""The made-up language, its task, and the small Llama that is trained on it once."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from perfbench.errors import TaskError
from perfbench.finetune import small_backbone
from perfbench.finetune.encoding import encode
from perfbench.finetune.tasks import skills
from perfbench.finetune.tasks.registry import find, load_splits
from perfbench.finetune.tasks.task import SPLITS
from perfbench.runtimes import backbone

TINY = replace(small_backbone.SMALL_BACKBONES["small-llama"], layers=1, hidden=16, intermediate=16, heads=2, steps=3)
QUIET = Console(quiet=True)


def test_the_sets_are_the_same_everywhere_and_do_not_leak() -> None:
    splits = load_splits(find("skills"), "")
    assert {split: len(examples) for split, examples in splits.items()} == skills.SIZES
    again = skills.load("", "test")
    assert again == splits["test"]
    assert again[0].prompt.split()[-1] == skills.ASK


def test_the_prompt_tells_which_skill_is_asked_for() -> None:
    asked = Counter()
    for example in skills.load("", "train"):
        letters = example.prompt.split()[: skills.LENGTH]
        name = skills.chosen_skill(letters)
        asked[name] += 1
        assert example.answer == " " + skills.SKILLS[name](letters)
    assert len(asked) == 2
    assert min(asked.values()) > 0.4 * sum(asked.values()), "always one of the two would be a good guess"


def test_a_guess_is_rarely_right() -> None:
    """The best answer that does not look at which skill is asked for, and a letter of the prompt at random."""
    examples = skills.load("", "test")
    letters = [example.prompt.split()[: skills.LENGTH] for example in examples]
    source = random.Random(0)
    right = sum(source.choice(row) == example.references[0] for row, example in zip(letters, examples, strict=True))
    assert right / len(examples) < 0.2


def test_a_source_is_refused() -> None:
    with pytest.raises(TaskError, match="skills: expected no source"):
        skills.load("somewhere", "train")


@pytest.mark.parametrize("split", SPLITS)
def test_every_word_is_one_token(split: skills.Split) -> None:
    tokenizer = small_backbone.make_tokenizer()
    for example in skills.load("", split)[:20]:
        encoded = encode(example, tokenizer, end=True)
        assert encoded.prompt_tokens == 1 + skills.LENGTH + 1
        assert len(encoded.ids) == encoded.prompt_tokens + 2
        assert tokenizer.unk_token_id not in encoded.ids
        assert tokenizer.decode(encoded.ids[-2:-1]) == example.references[0]


def test_the_loss_of_the_small_backbone_is_on_answers_and_ends() -> None:
    tokenizer = small_backbone.make_tokenizer()
    ids, labels = small_backbone.batch_of(TINY, tokenizer, random.Random(0))
    assert ids.shape == labels.shape == (TINY.batch, 1 + skills.LENGTH + 3 * TINY.queries)
    words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    letters, rest = words[1 : 1 + skills.LENGTH], words[1 + skills.LENGTH :]
    for name, answer, end in zip(rest[0::3], rest[1::3], rest[2::3], strict=True):
        assert answer in (letters if name == skills.ASK else [skills.SKILLS[name](letters)])
        assert end == small_backbone.END
    counted = labels[0] != -100
    assert torch.equal(labels[0][counted], ids[0][counted])
    assert counted.sum() == 2 * TINY.queries


def test_it_is_trained_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(small_backbone.SMALL_BACKBONES, "small-llama", TINY)
    folder = Path(small_backbone.resolve("small-llama", QUIET))
    assert folder.parent == tmp_path / "perfbench"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing half-made is left"
    monkeypatch.setattr(small_backbone, "train", lambda *args: pytest.fail("trained again"))
    assert small_backbone.ensure("small-llama", QUIET) == folder
    found = backbone.load(str(folder), "fp32", "cpu", 0)
    assert found.shape.layers == 1
    assert found.tokenizer()("a max").input_ids == small_backbone.make_tokenizer()("a max").input_ids
    assert small_backbone.resolve("owner/model") == "owner/model"


def test_another_recipe_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = set()
    for steps in (1, 2):
        monkeypatch.setitem(small_backbone.SMALL_BACKBONES, "small-llama", replace(TINY, steps=steps))
        folders.add(small_backbone.ensure("small-llama", QUIET))
    assert len(folders) == 2


def test_it_comes_out_the_same_each_time_and_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    one, other = (small_backbone.train(TINY, QUIET, "").state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(small_backbone, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        small_backbone.ensure("small-llama", QUIET)
    assert not list((tmp_path / "perfbench").iterdir())


def test_it_learns() -> None:
    """A few steps halve the loss of a model that was not trained."""
    recipe = replace(TINY, layers=2, hidden=32, intermediate=64, steps=60, batch=32)
    ids, labels = small_backbone.batch_of(recipe, small_backbone.make_tokenizer(), random.Random(1))
    losses = []
    for steps in (1, recipe.steps):
        model = small_backbone.train(replace(recipe, steps=steps), QUIET, "")
        with torch.inference_mode():
            losses.append(model(ids, labels=labels).loss.item())
    assert losses[1] < losses[0] / 2
