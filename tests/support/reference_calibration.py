"""Slow second opinions on calibration: plain Python loops over rows, classes and bins in float64."""

from __future__ import annotations

import math


def uniform_inner_edges(n_bins):
    return [i / n_bins for i in range(1, n_bins)]


def quantile_inner_edges(confidences, n_bins):
    """For each i the smallest confidence that i / n_bins of the rows do not exceed; the largest of all ends no bin."""
    edges = []
    for i in range(1, n_bins):
        for value in sorted(set(confidences)):
            if sum(c <= value for c in confidences) * n_bins >= i * len(confidences):
                if value not in edges and value != max(confidences):
                    edges.append(value)
                break
    return edges


def groups(confidences, correct, inner_edges):
    """Rows of each bin as (confidence, hit); a bin ends at its edge and holds it."""
    rows = [[] for _ in range(len(inner_edges) + 1)]
    for confidence, hit in zip(confidences, correct, strict=True):
        index = 0
        while index < len(inner_edges) and confidence > inner_edges[index]:
            index += 1
        rows[index].append((float(confidence), float(hit)))
    return rows


def gaps(confidences, correct, inner_edges):
    """(share of the rows, confidence - accuracy) of each bin that holds a row."""
    return [
        (len(rows) / len(confidences), (math.fsum(c for c, _ in rows) - math.fsum(h for _, h in rows)) / len(rows))
        for rows in groups(confidences, correct, inner_edges)
        if rows
    ]


def ece(confidences, correct, inner_edges):
    return math.fsum(share * abs(gap) for share, gap in gaps(confidences, correct, inner_edges))


def softmax(row, temperature):
    weights = [math.exp((value - max(row)) / temperature) for value in row]
    return [weight / math.fsum(weights) for weight in weights]


def negative_log_likelihood(row, label, temperature):
    top = max(row)
    total = math.fsum(math.exp((value - top) / temperature) for value in row)
    return math.log(total) - (row[label] - top) / temperature


def kept_errors(confidences, correct):
    """Errors among the 1, 2, ... most confident rows; rows of equal confidence each have their mean share of them."""
    found, errors, order = [], 0.0, sorted(confidences, reverse=True)
    for value in order:
        ties = [hit for other, hit in zip(confidences, correct, strict=True) if other == value]
        errors += ties.count(False) / len(ties)
        found.append(errors)
    return found


def metrics(logits, labels, n_bins, temperature, batch=512):
    logits, labels = [list(map(float, row)) for row in logits], list(map(int, labels))
    n, classes = len(logits), len(logits[0])
    probabilities = [softmax(row, temperature) for row in logits]
    inner = uniform_inner_edges(n_bins)
    confidences = [max(row) for row in probabilities]
    ranked = [sorted(range(classes), key=lambda k, row=row: (-row[k], k)) for row in logits]
    correct = [order[0] == label for order, label in zip(ranked, labels, strict=True)]
    batches = [
        (len(confidences[i : i + batch]), ece(confidences[i : i + batch], correct[i : i + batch], inner))
        for i in range(0, n, batch)
    ]
    pairs = [
        1.0 if right > wrong else 0.5 if right == wrong else 0.0
        for right, hit in zip(confidences, correct, strict=True)
        if hit
        for wrong, other in zip(confidences, correct, strict=True)
        if not other
    ]
    accuracy = sum(correct) / n
    errors = kept_errors(confidences, correct)
    return {
        "accuracy": accuracy,
        "top5_accuracy": sum(label in order[:5] for order, label in zip(ranked, labels, strict=True)) / n,
        "ece": ece(confidences, correct, inner),
        "ece_batch_mean": sum(rows * value for rows, value in batches) / n,
        "adaptive_ece": ece(confidences, correct, quantile_inner_edges(confidences, n_bins)),
        "classwise_ece": sum(
            ece([row[k] for row in probabilities], [label == k for label in labels], inner) for k in range(classes)
        )
        / classes,
        "mce": max(abs(gap) for _, gap in gaps(confidences, correct, inner)),
        "nll": sum(negative_log_likelihood(row, y, temperature) for row, y in zip(logits, labels, strict=True)) / n,
        "brier": sum(
            (p - (k == label)) ** 2 for row, label in zip(probabilities, labels, strict=True) for k, p in enumerate(row)
        )
        / n,
        "auroc": sum(pairs) / len(pairs) if pairs else math.nan,
        "augrc": math.fsum(errors) / n / n,
        "aurc": math.fsum(value / kept for kept, value in enumerate(errors, start=1)) / n,
        "overconfidence": math.fsum(confidences) / n - accuracy,
        "macro_f1": macro_f1(labels, [order[0] for order in ranked]),
    }


def squared_distance(one, other):
    """Of two vectors of any length, between the points at which they leave the unit sphere."""
    lengths = [math.sqrt(math.fsum(value * value for value in vector)) for vector in (one, other)]
    return math.fsum((a / lengths[0] - b / lengths[1]) ** 2 for a, b in zip(one, other, strict=True))


def vrf_weight(embed, failures, k, a, b):
    """Of the fine-tuned model: 1 / (1 + exp((d - a) / b)), d to the k-th nearest by sorting all."""
    d = sorted(squared_distance(embed, other) for other in failures)[k - 1]
    return 1 / (1 + math.exp((d - a) / b))


def vrf(zero_shot, fine_tuned, weight, temperatures):
    """The mixed probabilities of one row."""
    pairs = zip(softmax(zero_shot, temperatures[0]), softmax(fine_tuned, temperatures[1]), strict=True)
    return [(1 - weight) * first + weight * second for first, second in pairs]


def macro_f1(labels, predicted):
    """Precision and recall of one class after the other; their harmonic mean, over the classes that have rows."""
    scores = []
    for k in sorted(set(labels)):
        true = sum(a == b == k for a, b in zip(labels, predicted, strict=True))
        recall, taken = true / labels.count(k), predicted.count(k)
        precision = true / taken if taken else 0.0
        scores.append(2 * precision * recall / (precision + recall) if true else 0.0)
    return math.fsum(scores) / len(scores)
