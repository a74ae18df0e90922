"""Slow second opinions on merges: plain Python loops over lists of floats, in float64."""

from __future__ import annotations

import math


def model_stock(start, models):
    """One tensor as a list of numbers: the mean cosine over the pairs, one after the other, and the weighted mean."""
    vectors = [[value - origin for value, origin in zip(model, start, strict=True)] for model in models]
    cosines = []
    for i, one in enumerate(vectors):
        for other in vectors[i + 1 :]:
            lengths = math.sqrt(math.fsum(a * a for a in one)) * math.sqrt(math.fsum(b * b for b in other))
            dot = math.fsum(a * b for a, b in zip(one, other, strict=True))
            cosines.append(dot / lengths if lengths > 0 else 0.0)
    cosine, n = math.fsum(cosines) / len(cosines), len(models)
    t = 0.0 if cosine <= 0 else n * cosine / (1 + (n - 1) * cosine)
    means = [math.fsum(values) / n for values in zip(*models, strict=True)]
    return [t * mean + (1 - t) * origin for mean, origin in zip(means, start, strict=True)]
