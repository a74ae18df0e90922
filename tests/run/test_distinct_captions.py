"""Captions that samples of a batch share go through the text tower once: the same loss and gradients, fewer rows."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import a_caption_each, assert_same, first_batches
from tolerances import EXACT
from toys import CLASSES, TEMPLATES, tiny_clip, tiny_processor

from carot_hf.data.captions import CaptionTable
from carot_hf.data.shared_captions import share_captions
from carot_hf.models.backbones import has_text_dropout, pair_inputs
from carot_hf.models.lora import add_lora

FAMILIES = ("clip", *families.FAMILIES)


def parts_of(family):
    """Processor and model of a family, in float64."""
    processor = tiny_processor() if family == "clip" else families.processor_of(family)
    make = tiny_clip if family == "clip" else lambda tokenizer, seed=0: families.model_of(family, tokenizer, seed)
    return processor, make(processor.tokenizer).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_a_caption_each(make_trainer, family):
    processor, model = parts_of(family)
    trainer = make_trainer(model, processing_class=processor, per_device_train_batch_size=16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in trainer.teacher.model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    (batch,) = first_batches(trainer, 1)
    assert len(batch["input_ids"]) < len(batch["pixel_values"]) == len(batch["caption_index"]) == 16
    found = []
    for inputs in (batch, a_caption_each(batch)):
        trainer.model.train().zero_grad()
        terms, _ = trainer.loss_terms(trainer.model, inputs)
        trainer.method.weighted(terms).backward()
        found.append((terms, {name: value.grad for name, value in trainer.model.named_parameters()}))
    for (name, term), other in zip(found[0][0].items(), found[1][0].values(), strict=True):
        torch.testing.assert_close(term, other, rtol=EXACT, atol=EXACT, msg=name)
        assert term.item() > 1e-3, f"{name} says nothing"
    largest = max(value.abs().max().item() for value in found[1][1].values() if value is not None)
    for name, gradient in found[1][1].items():
        if gradient is None:
            assert found[0][1][name] is None, name
        else:
            torch.testing.assert_close(found[0][1][name], gradient, rtol=EXACT, atol=EXACT * largest, msg=name)


KEPT = (
    {"teacher_update_every": 4},
    {"teacher": "frozen"},
    {"teacher_update_every": 4, "contrastive_batch_size": 24},
    {"teacher_update_every": 4, "freeze": "text"},
)


@pytest.mark.parametrize(
    "options", [{}, {"contrastive_batch_size": 24}, {"freeze": "text"}, {"preset": "tracer"}, *KEPT]
)
def test_a_run_is_that_of_a_caption_each(make_trainer, processor, options, monkeypatch):
    """Student and teacher after some steps; with the gradient cache the micro-batches share theirs."""
    runs, rows = [], []
    for share in (True, False):
        if not share:
            monkeypatch.setattr(CaptionTable, "lookup_once", CaptionTable.lookup)
        size = 8 if "contrastive_batch_size" in options else 24
        trainer = make_trainer(
            tiny_clip(processor.tokenizer).double(), per_device_train_batch_size=size, max_steps=9, optim="sgd",
            **options,
        )  # fmt: skip
        seen = []
        if share:
            assert trainer._step._taught._keeps() == (options in KEPT)
        trainer.model.text_model.register_forward_hook(lambda *parts, seen=seen: seen.append(len(parts[2][0])))
        trainer.train()
        runs.append(trainer)
        rows.append(sum(seen))
    assert_same(*runs, EXACT)
    assert rows[0] < rows[1], "fewer rows"
    if "contrastive_batch_size" in options:  # 24 pairs in 3 micro-batches, each embedded twice
        most = len(CLASSES) * len(TEMPLATES) + 2  # of a micro-batch without a new caption one stands in
        assert rows[0] <= 9 * 2 * most, "each once a step, not once a micro-batch"


def test_what_the_teacher_keeps_is_of_its_weights_of_now(make_trainer, model):
    """After an update, a restored checkpoint, and weights that somebody changed by hand."""
    trainer = make_trainer(model.double(), teacher="frozen", per_device_train_batch_size=16)
    network, taught = trainer.teacher.model, trainer._step._taught
    rows = []
    network.text_model.register_forward_hook(lambda *parts: rows.append(len(parts[2][0])))
    (batch,) = first_batches(trainer, 1)
    state = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}

    def check():
        before = len(rows)
        for _ in range(2):
            image, text = taught(batch)
            assert not image.is_inference()
            assert not text.is_inference()
        counted = sum(rows[before:])
        with torch.no_grad():
            outputs = network(**pair_inputs(a_caption_each(batch)))
        torch.testing.assert_close(text, F.normalize(outputs.text_embeds, dim=-1), rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(image, F.normalize(outputs.image_embeds, dim=-1), rtol=EXACT, atol=EXACT)
        return counted, text

    first = check()
    assert first[0] == len(CLASSES) * len(TEMPLATES), "each caption once"
    assert check()[0] == 0, "they are kept"
    with torch.no_grad():
        network.text_projection.weight.mul_(torch.linspace(0.5, 2, 16))
    second = check()
    assert (second[1] - first[1]).abs().max() > 1e-3
    trainer.teacher.load_state_dict(state)
    assert torch.equal(check()[1], first[1])
    other = tiny_clip(trainer.processing_class.tokenizer, seed=5).double()
    trainer.teacher.update(other, 0.5)
    assert (check()[1] - first[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"teacher": "frozen"}, True),
        ({"teacher": "frozen", "max_steps": 1}, False),
        ({"teacher_update_every": 500}, True),
        ({"teacher_update_every": 1}, False),
        ({"teacher_update_every": 0}, True),
    ],
)
def test_all_captions_are_embedded_where_that_is_less(make_trainer, options, kept):
    """12 captions: 16 draws see 8.9 of them on average, so that it takes 3 steps until it is half the work."""
    trainer = make_trainer(per_device_train_batch_size=16, **{"max_steps": 3, **options})
    assert trainer._step._taught._keeps() == kept


def drawn(seed, sizes, classes=4):
    """Classes and templates of micro-batches, of few captions."""
    rng = np.random.default_rng(seed)
    return [tuple(torch.from_numpy(rng.integers(0, most, size)) for most in (classes, 3)) for size in sizes]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("sizes", "classes"), [((4, 4, 4), 4), ((6, 3, 1, 1), 4), ((40, 2, 2), 4), ((2, 2, 2), 2), ((3, 3), 1)]
)
def test_micro_batches_share_their_captions(processor, sizes, classes, masked):
    """Against a loop over the samples: the captions are those of each sample, and none is there twice."""
    table = CaptionTable(processor.tokenizer, CLASSES, TEMPLATES, 32, masked=masked)
    for seed in range(20):
        pairs = drawn(seed, sizes, classes)
        batches = [{**table.lookup_once(*pair), "labels": pair[0]} for pair in pairs]
        before = [dict(batch) for batch in batches]
        shared, index = share_captions(batches, table)
        assert [batch.keys() for batch in batches] == [batch.keys() for batch in before], "they stay as they were"
        rows = [row[:stop] for batch in shared for row, stop in zip(batch["input_ids"], stops(batch), strict=True)]
        numbers = [int(number) for batch in shared for number in batch["caption_number"]]
        assert [len(batch["labels"]) for batch in shared] == list(sizes)
        samples = [(int(one), int(other)) for pair in pairs for one, other in zip(*pair, strict=True)]
        for (label, template), place in zip(samples, index.tolist(), strict=True):
            wanted = table.input_ids[label, template, : table.lengths[label, template]]
            assert torch.equal(rows[place][: len(wanted)], wanted.long())
            assert numbers[place] == 3 * label + template
        assert all("caption_index" not in batch for batch in shared)
        used = index.unique().tolist()
        assert len(used) == len(set(samples)), "each caption once"
        spare = [batch for batch in shared if len(batch["input_ids"]) == 1]
        assert len(rows) - len(used) <= len(spare), "one is there again where a micro-batch has no new one"


def stops(batch):
    """Where each row of tokens ends."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return mask.sum(dim=1).tolist()


def test_what_is_not_of_the_table_or_drops_out_is_not_shared(processor):
    pairs = drawn(0, (8, 8))
    table = CaptionTable(processor.tokenizer, CLASSES, TEMPLATES, 32)
    alone = CaptionTable(processor.tokenizer, CLASSES, TEMPLATES, 32, share=False)
    for captions, batches in (
        (alone, [alone.lookup_once(*pair) for pair in pairs]),
        (table, [table.tokenize_once(["a dog", "a cat", "a dog"]) for _ in pairs]),
        (table, [{**batch, "caption_number": torch.tensor([0, 1])} for batch in [table.tokenize(["a", "b"])] * 2]),
    ):
        shared, index = share_captions(batches, captions)
        assert index is None
        assert all(one is other for one, other in zip(shared, batches, strict=True))


def test_with_dropout_each_sample_draws_for_itself(make_trainer, caplog):
    """Two samples of one caption would else drop the same: another method."""
    processor = families.processor_of("chinese_clip")
    model = families.model_of("chinese_clip", processor.tokenizer)
    assert not has_text_dropout(model)
    for rate in ("dropout.p", "attention.self.dropout.p"):
        part = model.text_model.encoder.layer[0]
        assert not has_text_dropout(model)
        *path, leaf = rate.split(".")
        found = next(module for name, module in part.named_modules() if name.endswith(".".join(path)))
        setattr(found, leaf, 0.1)
        assert has_text_dropout(model), rate
        (batch,) = first_batches(make_trainer(model, processing_class=processor, per_device_train_batch_size=16), 1)
        assert "caption_index" not in batch
        assert len(batch["input_ids"]) == 16
        setattr(found, leaf, 0.0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_what_counts_as_dropout(model):
    assert not has_text_dropout(model)
    model.text_model.encoder.layers[1].self_attn.dropout = 0.1
    assert has_text_dropout(model), "CLIP's attention has a number, no module"
    model.text_model.encoder.layers[1].self_attn.dropout = 0.0
    model.vision_model.encoder.layers[1].self_attn.dropout = 0.1
    assert not has_text_dropout(model), "the image tower's is no matter"
    pytest.importorskip("peft")
    adapted = add_lora(model, 2, None, 0)
    assert not has_text_dropout(adapted.base_model.model)
    adapted.base_model.model.text_model.encoder.layers[0].mlp.fc1.lora_dropout["default"] = torch.nn.Dropout(0.1)
    assert has_text_dropout(adapted.base_model.model)


def test_captions_are_there_once(processor):
    table = CaptionTable(processor.tokenizer, CLASSES, TEMPLATES, 32)
    classes, templates = torch.tensor([2, 0, 2, 2, 1]), torch.tensor([1, 0, 1, 0, 2])
    each, once = table.lookup(classes, templates), table.lookup_once(classes, templates)
    assert len(once["input_ids"]) == 4
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(once[name][once["caption_index"]], each[name])
    distinct = table.lookup_once(classes[1:], templates[1:])
    assert distinct.keys() - each.keys() == {"caption_number"}, "nothing is shared: in the samples' order"
    assert distinct["caption_number"].tolist() == [0, 7, 6, 5]
    assert torch.equal(distinct["input_ids"], table.lookup(classes[1:], templates[1:])["input_ids"])
    texts = ["a dog", "a cat on a sofa", "a dog"]
    each, once = table.tokenize(texts), table.tokenize_once(texts)
    assert len(once["input_ids"]) == 2
    assert torch.equal(once["input_ids"][once["caption_index"]], each["input_ids"])
    assert table.tokenize_once(texts[:2]).keys() == each.keys()
    alone = CaptionTable(processor.tokenizer, CLASSES, TEMPLATES, 32, share=False)
    assert "caption_index" not in alone.lookup_once(classes, templates) | alone.tokenize_once(texts)
