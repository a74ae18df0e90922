"""A second CLIP in plain torch, with the names and shapes of OpenAI's checkpoints: the oracle of the conversion.

Pre-norm transformers on ``nn.MultiheadAttention`` and ``F.layer_norm``; the image tower reads the class token, the text
tower the token with the largest id. It shares nothing with transformers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x))}


class Block(nn.Module):
    def __init__(self, width, heads, inner, act):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})
        self.act = ACTIVATIONS[act]

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](self.act(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, act, ratio):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, ratio * width, act) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, layers, heads, patch, side, embed, act):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(side * side + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, act, 4)
        self.proj = nn.Parameter(torch.randn(width, embed) / math.sqrt(width))

    def forward(self, pixels):
        patches = self.conv1(pixels)  # (n, width, rows, columns)
        n, width = patches.shape[:2]
        tokens = patches.reshape(n, width, -1).transpose(1, 2)  # row by row
        first = self.class_embedding.reshape(1, 1, width).repeat(n, 1, 1)
        x = self.ln_pre(torch.cat([first, tokens], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class Text(nn.Module):
    """What stands at the root in OpenAI's layout and under ``text.`` in open_clip's models with a text tower."""

    def __init__(self, width, layers, heads, vocabulary, context, embed, act):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width))
        self.transformer = Transformer(width, layers, heads, act, 2)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed) / math.sqrt(width))

    def encode(self, ids):
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)  # True: not seen
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask))
        return torch.stack([row[row_ids.argmax()] for row, row_ids in zip(x, ids, strict=True)]) @ self.text_projection


class OpenAIClip(Text):
    """OpenAI's layout: the text tower's tensors at the root, beside ``visual`` and ``logit_scale``."""

    def __init__(self, *, vision, text, embed=24, patch=4, side=3, vocabulary=70, context=12, act="quick_gelu"):
        super().__init__(*text, vocabulary, context, embed, act)
        self.visual = Visual(*vision, patch, side, embed, act)
        self.logit_scale = nn.Parameter(torch.tensor(1.7))

    def encode_image(self, pixels):
        return self.visual(pixels)

    def encode_text(self, ids):
        return self.encode(ids)

    def logits(self, pixels, ids):
        return self.logit_scale.exp() * F.normalize(self.encode_image(pixels)) @ F.normalize(self.encode_text(ids)).T


class CustomTextClip(nn.Module):
    """open_clip's layout with a text tower of its own: the same tensors under ``text.``."""

    def __init__(self, plain):
        super().__init__()
        self.visual, self.logit_scale = plain.visual, plain.logit_scale
        self.text = Text.__new__(Text)
        nn.Module.__init__(self.text)
        for name in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"):
            setattr(self.text, name, getattr(plain, name))


class FlypEncoder(nn.Module):
    """FLYP's CLIPEncoder: the whole CLIP as ``model``."""

    def __init__(self, plain):
        super().__init__()
        self.model = plain


class FlypClassifier(nn.Module):
    """FLYP's ImageClassifier: an encoder and a linear head."""

    def __init__(self, plain, classes=5):
        super().__init__()
        self.image_encoder = FlypEncoder(plain)
        self.classification_head = nn.Linear(plain.visual.proj.shape[1], classes)


def reference_clip(seed=0, **options):
    """A random CLIP whose every tensor matters: norms and biases are not 1 and 0."""
    torch.manual_seed(seed)
    model = OpenAIClip(**{"vision": (128, 3, 2), "text": (64, 2, 1), **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name != "logit_scale":
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()
