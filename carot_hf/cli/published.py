"""Figures as they stand in the papers: CLIP ViT-B/16 fine-tuned on ImageNet. Compare within one paper only."""

from __future__ import annotations

# CaRot, NeurIPS 2023 workshop, Table 1: accuracy at home, under shift; ECE at home, under shift; both with temperature.
CAROT = {
    "zero-shot": (0.6832, 0.5840, 0.0571, 0.0836, 0.0561, 0.0748),
    "ft": (0.8153, 0.5750, 0.0884, 0.2186, 0.0629, 0.1629),
    "ft-ls": (0.8223, 0.5833, 0.0460, 0.1147, 0.0481, 0.1282),
    "wise-ft": (0.8043, 0.6350, 0.2129, 0.1764, 0.0872, 0.1533),
    "wise-ft-ls": (0.8068, 0.6405, 0.5231, 0.3601, 0.3382, 0.2425),
    "flyp": (0.8258, 0.5946, 0.0643, 0.1831, 0.0392, 0.1217),
    "flyp-ls": (0.8271, 0.5975, 0.0459, 0.1295, 0.0427, 0.1145),
    "carot": (0.8319, 0.6197, 0.0395, 0.1093, 0.0380, 0.0980),
}
# Its Table 2: accuracy at home, under shift; ECE at home, under shift.
CAROT_INTERVALS = {
    "every-1": (0.8261, 0.5956, 0.0630, 0.1824),
    "carot": (0.8319, 0.6197, 0.0395, 0.1093),
    "every-2x": (0.8303, 0.6266, 0.0511, 0.0781),
    "never": (0.7848, 0.6199, 0.1257, 0.0936),
}
# TRACER (arXiv 2605.29380), Table 2: accuracy at home; mean of V2, R, A and Sketch (without ObjectNet). Three seeds.
TRACER = {
    "zero-shot": (0.6833, 0.5946),
    "ft": (0.8283, 0.5708),
    "l2-sp": (0.8287, 0.5734),
    "never": (0.8207, 0.5955),
    "lp-ft": (0.8214, 0.5938),
    "flyp": (0.8272, 0.6061),
    "car-ft": (0.8327, 0.6298),
    "lipsum": (0.8333, 0.6270),
    "model-stock": (0.8407, 0.6240),
    "carot-2024": (0.8316, 0.6403),
    "tracer": (0.8276, 0.6546),
}
# DiVE (arXiv 2511.09973): accuracy at home; mean of V2, R, A, Sketch and ObjectNet. Read in notes on the paper.
DIVE = {
    "zero-shot": (0.683, 0.587),
    "ft": (0.813, 0.549),
    "lp-ft": (0.817, 0.603),
    "flyp": (0.822, 0.595),
    "dive": (0.825, 0.632),
}
LATER = {
    "TRACER (arXiv 2605.29380), Table 2; shifted: mean of V2, R, A, Sketch": TRACER,
    "DiVE (arXiv 2511.09973); shifted: mean of V2, R, A, Sketch, ObjectNet": DIVE,
}
