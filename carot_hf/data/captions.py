"""Class names x templates: captions for training, class heads for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..basics.modes import evaluating
from ..basics.precision import at_least_float32

PLACEHOLDER = "{}"
# In a batch: the number of each sample's caption in the table, class x templates + template, an array that stays on the
# host; and, where captions are there once each, which of these each sample has. Both (b,) int64.
CAPTION_NUMBER, CAPTION_INDEX = "caption_number", "caption_index"
_AT_ONCE = 4096  # captions; a fast tokenizer keeps kilobytes for each until it returns


def fill_template(template: str, class_name: str) -> str:
    """Return the caption of a class: ``{}`` in the template replaced by the class name."""
    return template.replace(PLACEHOLDER, class_name)


def check_templates(templates: Sequence[str]) -> None:
    """Raise a ValueError unless there is a template and each one has a place for the class name."""
    if isinstance(templates, str) or len(templates) == 0:
        raise ValueError(
            f"Expected a list of templates, got {templates!r}. Pass at least one, e.g. ['a photo of a {{}}.']."
        )
    for template in templates:
        if not isinstance(template, str) or PLACEHOLDER not in template:
            raise ValueError(
                f"Expected `{{}}` in every template, got {template!r}. Mark the place of the class name, "
                "e.g. 'a photo of a {}.'."
            )


def check_class_names(class_names: Sequence[str]) -> None:
    """Raise a ValueError unless there are at least two classes and each one has a name, which is a text."""
    if not isinstance(class_names, list | tuple):
        raise ValueError(f"Expected a list of class names, got {class_names!r}. Pass one for each label, in order.")
    for index, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"Expected a text as the name of class {index}, got {name!r}. Captions are made of the names: pass "
                "words, e.g. 'three' for 3."
            )
    if len(class_names) < 2:
        raise ValueError(
            f"Expected at least two classes, got {list(class_names)}. There is nothing to tell apart with one: name "
            "the others too, e.g. ['cat', 'no cat']."
        )


def check_distinct(class_names: Sequence[str]) -> None:
    """Raise a ValueError if two classes have the same name."""
    for index, name in enumerate(class_names):
        if name in class_names[:index]:
            raise ValueError(
                f"Expected a name of its own for each class, got {name!r} for the classes {class_names.index(name)} "
                f"and {index}. Their captions would be the same, and no model could tell them apart: rename one."
            )


class CaptionTable:
    """The tokens of every class in every template, made once and looked up for each batch.

    Args:
        tokenizer: The model's tokenizer, or a processor that has one.
        class_names: ``K`` names; duplicates are allowed (the ImageNet list has two), the index is what counts.
        templates: ``M`` strings with ``{}`` for the class name.
        max_length: The text model's context, in tokens.
        padded: Always pad to the context, on the tokenizer's side, for text towers that read the padding (SigLIP);
            else to the longest caption of the batch, on the right.
        masked: Give an ``attention_mask``; SigLIP's towers were trained without.
        vocab_size: Tokens that the text tower has an embedding of; ``None``: any.
        share: Give a caption that several samples of a batch have once; not for text towers with dropout, which draw
            for each sample.
    Attributes:
        input_ids: ``(K, M, L)`` int32, padded; ``L`` = the longest caption of all, or the context.
        lengths: ``(K, M)`` int64 tokens of each caption, begin and end markers included.
    Raises:
        ValueError: If a template has no ``{}``, there is no class name, or a caption does not fit the context or holds
            a token that the text tower does not know.
    """

    def __init__(
        self,
        tokenizer: Any,
        class_names: Sequence[str],
        templates: Sequence[str],
        max_length: int,
        *,
        padded: bool = False,
        masked: bool = True,
        vocab_size: int | None = None,
        share: bool = True,
    ) -> None:
        check_templates(templates)
        if len(class_names) == 0:
            raise ValueError("Expected at least one class name, got none. Pass one name for each label, in order.")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._tokenizer, self._max_length, self._padded, self._masked = tokenizer, max_length, padded, masked
        self._vocab_size, self._share = vocab_size, share
        self._plain: NDArray[np.int64] | None = None  # tokens that are no special ones
        self._own: dict[str, NDArray[np.int32]] = {}  # tokens of captions that are not made of class names
        captions = [fill_template(template, name) for name in class_names for template in templates]
        rows = [row for part in self._parts(captions, truncation=False, verbose=False) for row in part]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.argmax())
        if lengths[longest] > max_length:
            raise ValueError(
                f"Expected captions of at most {max_length} tokens (the model's context), got {int(lengths[longest])} "
                f"for {captions[longest]!r}. Shorten the class name or the template."
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        width = max_length if padded else int(lengths.max())
        table = torch.full((len(rows), width), pad, dtype=torch.int32)
        self._left = padded and tokenizer.padding_side == "left"
        for index, row in enumerate(rows):
            start = width - len(row) if self._left else 0
            table[index, start : start + len(row)] = torch.from_numpy(row)
        self._check_ids(table)
        shape = (len(class_names), len(templates))
        self.input_ids = table.view(*shape, -1)
        self.lengths = lengths.view(shape)
        self._check_alike(class_names)

    @property
    def shares(self) -> bool:
        """Whether a caption that several samples have is given once."""
        return self._share

    @property
    def n_templates(self) -> int:
        """Number of templates, ``M``."""
        return self.lengths.shape[1]

    def lookup(self, classes: Tensor, templates: Tensor) -> dict[str, Tensor]:
        """Return the captions of pairs of class and template, padded to the longest of them.

        Args:
            classes: ``(b,)`` int64 in ``[0, K)``.
            templates: ``(b,)`` int64 in ``[0, M)``.
        Returns:
            ``input_ids`` and, where the tower takes one, ``attention_mask``, each ``(b, l)`` int64. A text tower that
            is causal and pools at the end marker (CLIP), or that heeds the mask, embeds them as it would embed captions
            padded to the maximum.
        """
        lengths = self.lengths[classes, templates]  # (b,)
        longest = self._max_length if self._padded else int(lengths.max())
        tokens = {"input_ids": self.input_ids[classes, templates, :longest].long()}
        if self._masked:
            places = torch.arange(longest)
            tokens["attention_mask"] = ((places.flip(0) if self._left else places) < lengths[:, None]).long()
        return tokens

    def lookup_once(self, classes: Tensor, templates: Tensor) -> dict[str, Any]:
        """As `lookup`, with each distinct caption once, and which of them each sample has as ``caption_index``.

        Returns:
            ``input_ids`` and ``attention_mask`` ``(u, l)``, ``caption_index`` ``(b,)`` int64 in ``[0, u)``, and
            ``caption_number``, an array ``(b,)`` int64 in ``[0, K M)``. If all are distinct, or none are to be shared,
            the tokens are those of `lookup`, without an index.
        """
        numbers = classes * self.n_templates + templates
        once, index = numbers.unique(return_inverse=True)
        if not self._share or len(once) == len(numbers):
            return {**self.lookup(classes, templates), CAPTION_NUMBER: numbers.numpy()}
        tokens = self.lookup(once // self.n_templates, once % self.n_templates)
        return {**tokens, CAPTION_INDEX: index, CAPTION_NUMBER: numbers.numpy()}

    def tokenize_once(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """As `tokenize`, with each distinct caption once, and which of them each sample has; see `lookup_once`."""
        places = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
        if not self._share or len(places) == len(captions):
            return self.tokenize(captions)
        index = torch.tensor([places[caption] for caption in captions])
        return {**self.tokenize(list(places)), CAPTION_INDEX: index}

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Tokenise captions that are not made of class names, padded as in `lookup`, cut at the model's context.

        Those of `remember` are looked up.

        Returns:
            As `lookup`; the end marker stays.
        Raises:
            ValueError: If a token is one that the text tower does not know.
        """
        unknown = [caption for caption in dict.fromkeys(captions) if caption not in self._own]
        found = {**self._cut(unknown), **self._own} if unknown else self._own
        rows = self._tokenizer.pad(
            {"input_ids": [found[caption].tolist() for caption in captions]},
            padding="max_length" if self._padded else True,
            max_length=self._max_length if self._padded else None,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {name: rows[name] for name in ("input_ids", "attention_mask") if self._masked or name == "input_ids"}

    def remember(self, captions: Iterable[str]) -> int:
        """Tokenise captions once, for all batches in which they will be.

        Returns:
            How many of them are longer than the model's context, and cut.
        """
        texts = list(dict.fromkeys(captions))
        self._own = self._cut(texts)
        whole = self._parts(texts, truncation=False, verbose=False)
        return sum(len(row) > self._max_length for part in whole for row in part)

    def random(self, count: int, length: int, seed: Sequence[int]) -> dict[str, Tensor]:
        """Return strings of random tokens between the markers that captions have; special tokens are not drawn.

        Args:
            count: Strings.
            length: Tokens of each, without the markers.
            seed: What the draws are a function of.
        Returns:
            As `lookup`, ``(count, length + 2)``.
        """
        first = self.input_ids.numpy().reshape(-1, self.input_ids.shape[-1])[0, : int(self.lengths.numpy().flat[0])]
        if self._plain is None:
            special = [*self._tokenizer.all_special_ids, first[0], first[-1]]
            self._plain = np.setdiff1d(np.arange(self._vocab_size or len(self._tokenizer)), special)
        drawn = np.random.default_rng(list(seed)).choice(self._plain, size=(count, length))
        marked = np.pad(drawn, ((0, 0), (1, 1)), constant_values=((0, 0), (first[0], first[-1])))
        ids = torch.from_numpy(marked.astype(np.int64))
        return {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if self._masked else {})}

    def check_random(self, length: int) -> None:
        """Raise a ValueError where `random` cannot be: the tower reads the padding, or its context is too short."""
        if self._padded or length + 2 > self._max_length:
            raise ValueError(
                f"Expected a text tower of CLIP's kind, with a context of at least {length + 2} tokens, for "
                f"`energy_gap_weight`, got one of {self._max_length} tokens{', all of which it reads' * self._padded}. "
                "Its random texts are read from the published code, which has them for CLIP: set the weight to 0."
            )

    def _parts(self, captions: Sequence[str], **options: Any) -> Iterator[list[NDArray[np.int32]]]:
        """Tokens of each caption, not padded, some thousand captions at a time."""
        for start in range(0, len(captions), _AT_ONCE):
            part = list(captions[start : start + _AT_ONCE])
            encoded = self._tokenizer(part, padding=False, return_attention_mask=False, **options)
            yield [np.array(row, dtype=np.int32) for row in encoded["input_ids"]]

    def _cut(self, captions: Sequence[str]) -> dict[str, NDArray[np.int32]]:
        """Tokens of each caption, not padded, cut at the model's context."""
        rows: list[NDArray[np.int32]] = []
        for part in self._parts(captions, truncation=True, max_length=self._max_length):
            self._check_ids(torch.from_numpy(np.concatenate(part)))
            rows += part
        return dict(zip(captions, rows, strict=True))

    def _check_alike(self, class_names: Sequence[str]) -> None:
        """Refuse classes of different names whose captions are the same tokens: no model could tell them apart."""
        first: dict[bytes, int] = {}
        for index, row in enumerate(self.input_ids):
            other = first.setdefault(row.numpy().tobytes(), index)
            if class_names[other] != class_names[index]:
                raise ValueError(
                    f"Expected class names that the tokenizer tells apart, got {class_names[other]!r} and "
                    f"{class_names[index]!r} (classes {other} and {index}), which give the same tokens. Rename one, or "
                    "join the classes."
                )

    def _check_ids(self, ids: Tensor) -> None:
        """Refuse a token without an embedding: on a GPU it would be an assertion of the device, steps later."""
        largest = int(ids.max())
        if self._vocab_size is not None and largest >= self._vocab_size:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"Expected captions of tokens below {self._vocab_size}, the embeddings that the text tower has, got "
                f"{largest} ({token!r}). Pass the tokenizer of this checkpoint, or call "
                "`model.text_model.resize_token_embeddings(len(tokenizer))` before."
            )


@torch.no_grad()
def caption_embeddings(model: Any, captions: CaptionTable, *, batch_size: int = 1024) -> Tensor:
    """Embed all captions of a table, in large batches of similar length, which are the same at each call.

    Returns:
        ``(K M, D)`` in at least float32 on the model's device, rows of length 1, classes first.
    """
    order = captions.lengths.flatten().argsort(stable=True)  # (K M,)
    device = model.logit_scale.device
    parts = []
    with evaluating(model):
        for flat in order.split(batch_size):
            tokens = captions.lookup(flat // captions.n_templates, flat % captions.n_templates)
            tokens = {name: value.to(device) for name, value in tokens.items()}
            features = model.get_text_features(**tokens).pooler_output
            parts.append(F.normalize(at_least_float32(features), dim=-1))
    embeds = torch.empty(len(order), parts[0].shape[-1], dtype=parts[0].dtype, device=device)
    embeds[order.to(device)] = torch.cat(parts)
    return embeds


@torch.no_grad()
def class_embeddings(model: Any, captions: CaptionTable, *, batch_size: int = 1024) -> Tensor:
    r"""Embed the classes: the normalised mean over the templates of normalised caption embeddings.

    Args:
        model: A ``CLIPModel`` or one of its relatives, in whatever mode: dropout is off inside, and the mode is the
            same after. The autocast of the caller acts.
        captions: The table of captions.
        batch_size: Captions at a time.
    Returns:
        ``(K, D)`` in at least float32 on the model's device, rows of length 1: the zero-shot head. Logits are
        ``exp(logit_scale) * image_embeds @ head.T``, plus SigLIP's ``logit_bias``.
    Source:
        Radford et al. 2021, section 3.1.4 (prompt ensembling in embedding space).
    """
    embeds = caption_embeddings(model, captions, batch_size=batch_size)
    return F.normalize(embeds.view(*captions.lengths.shape, -1).mean(dim=1), dim=-1)
