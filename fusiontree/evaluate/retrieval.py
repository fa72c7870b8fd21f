"""Whether the model finds again what stands far back: passkeys, needles in haystacks, associative recall.

A prompt counts as solved when every token of the answer is the likeliest. Beside it stand chance, a guess among the
possible answers, and the bigram's own likeliest tokens.
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

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the needle: 0 is the prompt's beginning, 1 its end
PAIRS = (4, 16, 64)  # keys and values to recall from
_FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_CITIES = ("Lisbon", "Oslo", "Quito", "Nairobi", "Kyoto", "Perth", "Lima", "Riga", "Tunis", "Hanoi")
_THINGS = ("apple", "ladder", "violin", "candle", "rocket", "pillow", "hammer", "lemon", "mirror", "basket")
_SYLLABLES = ("ba", "do", "fi", "gu", "ke", "lo", "mi", "na", "pu", "ra", "si", "to", "vu", "we", "zo")


class Probe(NamedTuple):
    """A prompt and the only right answer, as token ids."""

    prompt: list[int]
    answer: list[int]


def passkey(subject: Subject) -> dict[str, Any]:
    """A number told once among sentences that repeat (arXiv 2305.16300)."""
    filler = subject.ids(_FILLER)

    def make(length: int, depth: float, draw: random.Random) -> Probe:
        key = str(draw.randint(10_000, 99_999))
        told = subject.ids(f" The pass key is {key}. Remember it. {key} is the pass key.")
        asked, answer = subject.ids(" What is the pass key? The pass key is"), subject.ids(f" {key}")
        room = length - len(told) - len(asked) - len(answer)
        hay = list(itertools.islice(itertools.cycle(filler), max(0, room)))
        return _hidden(hay, told, depth, asked, answer)

    return _over_length_and_depth(subject, "passkey", make, chance=1 / 90_000)


def needle(subject: Subject) -> dict[str, Any]:
    """A sentence told once inside held-out text."""
    hay_text = subject.text.tolist()

    def make(length: int, depth: float, draw: random.Random) -> Probe:
        city, thing = draw.choice(_CITIES), draw.choice(_THINGS)
        told = subject.ids(f" The secret thing of {city} is the {thing}.")
        asked, answer = subject.ids(f" The secret thing of {city} is the"), subject.ids(f" {thing}")
        room = max(0, length - len(told) - len(asked) - len(answer))
        start = draw.randrange(max(1, len(hay_text) - room))
        return _hidden(hay_text[start : start + room], told, depth, asked, answer)

    return _over_length_and_depth(subject, "needle", make, chance=1 / len(_THINGS))


def recall(subject: Subject) -> dict[str, Any]:
    """Pairs of made-up words, then one's key again: associative recall (arXiv 2312.04927)."""
    words = ["".join(parts) for parts in itertools.product(_SYLLABLES, repeat=2)]

    def probes(pairs: int) -> Iterator[Probe]:
        for sample in range(subject.samples):
            draw = random.Random(f"recall {pairs} {sample}")
            drawn = draw.sample(words, 2 * pairs)
            keys, values = drawn[:pairs], drawn[pairs:]
            asked = draw.randrange(pairs)
            told = "".join(f"{key} is {value}.\n" for key, value in zip(keys, values, strict=True))
            yield Probe(subject.ids(f"{told}{keys[asked]} is"), subject.ids(f" {values[asked]}"))

    figures = {}
    with progress_bar() as bar:
        task = bar.add_task("recall", total=len(PAIRS) * subject.samples, note="")
        for pairs in PAIRS:
            figures[f"{pairs} pairs"] = _score(subject, probes(pairs), 1 / pairs, lambda: bar.update(task, advance=1))
    return {"samples": subject.samples, "by_pairs": figures}


def _hidden(hay: list[int], told: list[int], depth: float, asked: list[int], answer: list[int]) -> Probe:
    place = round(depth * len(hay))
    return Probe([*hay[:place], *told, *hay[place:], *asked], answer)


def _over_length_and_depth(
    subject: Subject, name: str, make: Callable[[int, float, random.Random], Probe], chance: float
) -> dict[str, Any]:
    cells = []
    with progress_bar() as bar:
        task = bar.add_task(name, total=len(subject.lengths) * len(DEPTHS) * subject.samples, note="")
        for length, depth in itertools.product(subject.lengths, DEPTHS):
            draws = (random.Random(f"{name} {length} {depth} {sample}") for sample in range(subject.samples))
            probes = [make(length, depth, draw) for draw in draws]
            if len(probes[0].prompt) + len(probes[0].answer) > length:
                raise UserError(
                    f"--lengths {length} is too short for {name}, whose question takes "
                    f"{len(probes[0].prompt) + len(probes[0].answer)} tokens; give a longer one"
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
    """Shares of the probes that the model and the bigram solve, and their losses of the answers' tokens.

    Args:
        chance: share that a guess solves.
    """
    solved, solved_by_bigram, losses, bigram_losses = 0, 0, [], []
    count = 0
    for count, probe in enumerate(probes, 1):  # noqa: B007 - how many there were
        right, loss = _answer(subject.model, probe)
        solved += right
        solved_by_bigram += _answered_by(subject.bigram, probe)
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
def _answer(model: HybridLM, probe: Probe) -> tuple[bool, float]:
    """Whether every token of the answer is the likeliest, and their mean loss in nats."""
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


def _answered_by(bigram: Bigram, probe: Probe) -> bool:
    before = [probe.prompt[-1], *probe.answer[:-1]]
    return all(bigram.likeliest(one) == token for one, token in zip(before, probe.answer, strict=True))
