"""Slow second opinions, loops in plain Python, for the terms that hold a student to the model it started from."""

from __future__ import annotations

import math

from reference import kl


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def energy_gap(image, start, texts, log_scale):
    scale, total = math.exp(log_scale), 0.0
    for now, then in zip(image, start, strict=True):
        gaps = [(scale * dot(text, now) - scale * dot(text, then)) ** 2 for text in texts]
        total += sum(gaps) / (2 * len(texts))
    return total / len(image)


def contexts(captions):
    """``captions[k][m]``: of each template the mean over the classes, brought to length 1."""
    found = []
    for template in range(len(captions[0])):
        rows = [by_template[template] for by_template in captions]
        mean = [sum(values) / len(rows) for values in zip(*rows, strict=True)]
        length = math.sqrt(dot(mean, mean))
        found.append([value / length for value in mean])
    return found


def context_distillation(image, start, contexts, log_scale):
    scale = math.exp(log_scale)
    rows = [[[scale * dot(context, row) for context in contexts] for row in side] for side in (start, image)]
    return kl(*rows)


def difference_vectors(image, text, image_start, text_start, mean):
    total = 0.0
    for now, words, then, words_then in zip(image, text, image_start, text_start, strict=True):
        u = [a - b for a, b in zip(now, then, strict=True)]
        v = [a - b for a, b in zip(words, words_then, strict=True)]
        for one, other in ((u, mean), (v, mean), (u, v)):
            total += sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
    return total / len(image)


def squared_distance(weights, start):
    """Of two mappings from names to nested lists."""

    def flat(value):
        return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]

    return sum((a - b) ** 2 for name in weights for a, b in zip(flat(weights[name]), flat(start[name]), strict=True))
