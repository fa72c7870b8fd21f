"""Retrieval tasks: passkey, needle in a haystack, associative recall.

A prompt is solved if every token of the answer is the model's likeliest. Accuracy is reported with that of chance (a
guess among the possible answers) and of the bigram's likeliest tokens.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from fusiontree.console import progress_bar
from fusiontree.errors import UserError
from fusiontree.evaluate.ngram import Bigram
from fusiontree.evaluate.subject import Subject
from fusiontree.inference.decoder import Decoder
from fusiontree.inference.loading import check_positions
from fusiontree.model.lm import HybridLM

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the needle; 0 is the start of the prompt, 1 its end
PAIRS = (4, 16, 64)  # key-value pairs in a recall prompt
_FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_CITIES = ("Lisbon", "Oslo", "Quito", "Nairobi", "Kyoto", "Perth", "Lima", "Riga", "Tunis", "Hanoi")
_THINGS = ("apple", "ladder", "violin", "candle", "rocket", "pillow", "hammer", "lemon", "mirror", "basket")
_SYLLABLES = ("ba", "do", "fi", "gu", "ke", "lo", "mi", "na", "pu", "ra", "si", "to", "vu", "we", "zo")


class Probe(NamedTuple):
    """A prompt and its correct answer, as token ids."""

    prompt: list[int]
    answer: list[int]


def passkey(subject: Subject) -> dict[str, Any]:
    """Measure retrieval of a number hidden among repeated sentences (arXiv 2305.16300)."""
    filler = subject.ids(_FILLER)

    def make_probe(length: int, depth: float, draw: random.Random) -> Probe:
        key = str(draw.randint(10_000, 99_999))
        fact = subject.ids(f" The pass key is {key}. Remember it. {key} is the pass key.")
        question, answer = subject.ids(" What is the pass key? The pass key is"), subject.ids(f" {key}")
        room = length - len(fact) - len(question) - len(answer)
        hay = list(itertools.islice(itertools.cycle(filler), max(0, room)))
        return _hide(hay, fact, depth, question, answer)

    return _over_length_and_depth(subject, "passkey", make_probe, chance=1 / 90_000)


def needle(subject: Subject) -> dict[str, Any]:
    """Measure retrieval of a sentence hidden in held-out text."""
    hay_text = subject.text.tolist()

    def make_probe(length: int, depth: float, draw: random.Random) -> Probe:
        city, thing = draw.choice(_CITIES), draw.choice(_THINGS)
        fact = subject.ids(f" The secret thing of {city} is the {thing}.")
        question, answer = subject.ids(f" The secret thing of {city} is the"), subject.ids(f" {thing}")
        room = max(0, length - len(fact) - len(question) - len(answer))
        start = draw.randrange(max(1, len(hay_text) - room))
        return _hide(hay_text[start : start + room], fact, depth, question, answer)

    return _over_length_and_depth(subject, "needle", make_probe, chance=1 / len(_THINGS))


def recall(subject: Subject) -> dict[str, Any]:
    """Measure associative recall: pairs of invented words, then one of the keys again (arXiv 2312.04927)."""
    words = ["".join(parts) for parts in itertools.product(_SYLLABLES, repeat=2)]

    def probes(pairs: int) -> Iterator[Probe]:
        for sample in range(subject.samples):
            draw = random.Random(f"recall {pairs} {sample}")
            drawn = draw.sample(words, 2 * pairs)
            keys, values = drawn[:pairs], drawn[pairs:]
            asked = draw.randrange(pairs)
            facts = "".join(f"{key} is {value}.\n" for key, value in zip(keys, values, strict=True))
            yield Probe(subject.ids(f"{facts}{keys[asked]} is"), subject.ids(f" {values[asked]}"))

    figures = {}
    with progress_bar() as bar:
        task = bar.add_task("recall", total=len(PAIRS) * subject.samples, note="")
        for pairs in PAIRS:
            figures[f"{pairs} pairs"] = _score(subject, probes(pairs), 1 / pairs, lambda: bar.update(task, advance=1))
    return {"samples": subject.samples, "by_pairs": figures}


def _hide(hay: list[int], fact: list[int], depth: float, question: list[int], answer: list[int]) -> Probe:
    at = round(depth * len(hay))
    return Probe([*hay[:at], *fact, *hay[at:], *question], answer)


def _over_length_and_depth(
    subject: Subject, name: str, make_probe: Callable[[int, float, random.Random], Probe], chance: float
) -> dict[str, Any]:
    cells = []
    with progress_bar() as bar:
        task = bar.add_task(name, total=len(subject.lengths) * len(DEPTHS) * subject.samples, note="")
        for length, depth in itertools.product(subject.lengths, DEPTHS):
            draws = (random.Random(f"{name} {length} {depth} {sample}") for sample in range(subject.samples))
            probes = [make_probe(length, depth, draw) for draw in draws]
            if len(probes[0].prompt) + len(probes[0].answer) > length:
                raise UserError(
                    f"--lengths {length} is too short for {name}, which needs at least "
                    f"{len(probes[0].prompt) + len(probes[0].answer)} tokens; give a longer length"
                )
            bar.update(task, note=f"{length:,} tokens")
            scored = _score(subject, probes, chance, lambda: bar.update(task, advance=1))
            cells.append({"length": length, "depth": depth, **scored})
    return {
        "accuracy": sum(cell["accuracy"] for cell in cells) / len(cells),
        "bigram_accuracy": sum(cell["bigram_accuracy"] for cell in cells) / len(cells),
        "chance": chance,
        "samples": subject.samples,
        "cells": cells,
    }


def _score(subject: Subject, probes: Iterable[Probe], chance: float, tick: Callable[[], object]) -> dict[str, float]:
    """Return accuracy and mean answer loss (nats per token) of the model, the bigram and chance.

    Args:
        chance: accuracy of a guess.
        tick: called after each probe.
    """
    solved, solved_by_bigram, losses, bigram_losses = 0, 0, [], []
    count = 0
    for count, probe in enumerate(probes, 1):  # noqa: B007 - used after the loop
        right, loss = _solve(subject.model, probe)
        solved += right
        solved_by_bigram += _bigram_solves(subject.bigram, probe)
        losses.append(loss)
        before, after = np.array([probe.prompt[-1], *probe.answer[:-1]]), np.array(probe.answer)
        bigram_losses.append(float(subject.bigram.losses(before, after).mean()))
        tick()
    return {
        "accuracy": solved / count,
        "bigram_accuracy": solved_by_bigram / count,
        "chance": chance,
        "answer_loss": sum(losses) / count,
        "bigram_answer_loss": sum(bigram_losses) / count,
        "chance_answer_loss": subject.chance_loss,
    }


@torch.inference_mode()
def _solve(model: HybridLM, probe: Probe) -> tuple[bool, float]:
    """Return whether every token of the answer is the model's likeliest, and the answer's mean loss in nats."""
    device, length = model.embedding.weight.device, len(probe.prompt) + len(probe.answer)
    check_positions(model.config, length)
    decoder = Decoder(model, 1, room=length)
    logits = decoder.prefill(torch.tensor([probe.prompt], device=device))
    right, loss = True, 0.0
    for token in probe.answer:
        right = right and int(logits[0].argmax()) == token
        loss -= float(logits[0].float().log_softmax(0)[token])
        logits = decoder.step(torch.tensor([token], device=device))
    return right, loss / len(probe.answer)


def _bigram_solves(bigram: Bigram, probe: Probe) -> bool:
    before = [probe.prompt[-1], *probe.answer[:-1]]
    return all(bigram.likeliest(previous) == token for previous, token in zip(before, probe.answer, strict=True))
