"""Slow second opinions: plain Python loops in float64 for what the library computes with tensors."""

from __future__ import annotations

import math

import numpy as np


def softmax(row):
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]


def cross_entropy(logits, targets, ignore=None):
    """Mean over rows of -sum_j target_j log p_j; ignored columns are not there at all."""
    total = 0.0
    for i, row in enumerate(logits):
        kept = [j for j in range(len(row)) if ignore is None or not ignore[i][j]]
        probabilities = softmax([row[j] for j in kept])
        total -= sum(targets[i][j] * math.log(p) for j, p in zip(kept, probabilities, strict=True))
    return total / len(logits)


def smoothed(targets, epsilon, ignore=None):
    rows = []
    for i, row in enumerate(targets):
        kept = [j for j in range(len(row)) if ignore is None or not ignore[i][j]]
        rows.append([(1 - epsilon) * row[j] + epsilon / len(kept) if j in kept else 0.0 for j in range(len(row))])
    return rows


def contrastive(per_image, per_text, targets, epsilon=0.0, ignore=None):
    rows = smoothed(targets, epsilon, ignore)
    return (cross_entropy(per_image, rows, ignore) + cross_entropy(per_text, rows, ignore)) / 2


def kl(teacher, student):
    total = 0.0
    for p_row, q_row in zip(teacher, student, strict=True):
        for p, q in zip(softmax(p_row), softmax(q_row), strict=True):
            total += p * (math.log(p) - math.log(q))
    return total / len(teacher)


def distillation(student_image, student_text, teacher_image, teacher_text):
    return (kl(teacher_image, student_image) + kl(teacher_text, student_text)) / 2


def feature_distillation(image, text, teacher_image, teacher_text):
    total = 0.0
    for pair in ((image, teacher_image), (text, teacher_text)):
        for row, other in zip(*pair, strict=True):
            total += sum((a - b) ** 2 for a, b in zip(row, other, strict=True))
    return total / len(image)


def orthogonality(weight):
    """``weight`` is (embed, width); W_v = weight.T, so W_v^T W_v has entries over pairs of rows of ``weight``."""
    total = 0.0
    for i, row in enumerate(weight):
        for j, other in enumerate(weight):
            total += (sum(a * b for a, b in zip(row, other, strict=True)) - (i == j)) ** 2
    return math.sqrt(total + 1e-12)


def cross_norm(visual, text):
    total = 0.0
    for i in range(len(visual[0])):
        for j in range(len(text[0])):
            total += sum(visual[e][i] * text[e][j] for e in range(len(visual))) ** 2
    return math.sqrt(total + 1e-12)


def gradient(function, point, step=1e-6):
    """Central differences of a function of one array, in float64."""
    point = np.asarray(point, dtype=np.float64)
    result = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        up, down = point.copy(), point.copy()
        up[index] += step
        down[index] -= step
        result[index] = (function(up.tolist()) - function(down.tolist())) / (2 * step)
    return result


def log_sigmoid(value):
    return -math.log1p(math.exp(-value)) if value > 0 else value - math.log1p(math.exp(value))


def sigmoid_cross_entropy(logits, targets, ignore=None):
    """Mean over rows of the sum of -y log p - (1 - y) log(1 - p); ignored pairs are not there."""
    total = 0.0
    for i, row in enumerate(logits):
        for j, value in enumerate(row):
            if ignore is None or not ignore[i][j]:
                total -= targets[i][j] * log_sigmoid(value) + (1 - targets[i][j]) * log_sigmoid(-value)
    return total / len(logits)


def sigmoid_kl(teacher, student):
    """Mean over rows of the sum of the divergences of two-sided coins."""
    total = 0.0
    for teacher_row, student_row in zip(teacher, student, strict=True):
        for t, s in zip(teacher_row, student_row, strict=True):
            for sign in (1, -1):
                total += math.exp(log_sigmoid(sign * t)) * (log_sigmoid(sign * t) - log_sigmoid(sign * s))
    return total / len(teacher)
