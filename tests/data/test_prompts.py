"""Captions and class heads: trimming changes nothing, the head is the mean it says it is."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, model_of, processor_of
from tolerances import EXACT
from toys import CLASSES, TEMPLATES, tiny_clip, tiny_processor

from carot_hf.data.captions import CaptionTable, check_templates, class_embeddings, fill_template
from carot_hf.models.backbones import caption_options


@pytest.fixture
def table(processor):
    return CaptionTable(processor, CLASSES, TEMPLATES, 32)


def test_tokens_are_the_tokenizers(table, processor):
    for k, name in enumerate(CLASSES):
        for m, template in enumerate(TEMPLATES):
            tokens = table.lookup(torch.tensor([k]), torch.tensor([m]))
            assert tokens["input_ids"][0].tolist() == processor.tokenizer(template.replace("{}", name))["input_ids"]
            assert tokens["attention_mask"].all()


def test_lookup_pads_to_the_longest_of_the_batch_as_the_tokenizer_does(table, processor):
    classes, templates = torch.tensor([3, 0, 1]), torch.tensor([1, 1, 2])
    tokens = table.lookup(classes, templates)
    captions = [fill_template(TEMPLATES[m], CLASSES[k]) for k, m in zip(classes, templates, strict=True)]
    expected = processor.tokenizer(captions, padding=True, return_tensors="pt")
    assert torch.equal(tokens["input_ids"], expected["input_ids"])
    assert torch.equal(tokens["attention_mask"], expected["attention_mask"])
    assert tokens["input_ids"].shape[1] < table.input_ids.shape[-1]


@torch.no_grad()
def test_trimmed_text_features_equal_features_padded_to_the_maximum(table, model, processor):
    model.double().eval()
    classes, templates = torch.tensor([3, 0, 1, 2]), torch.tensor([1, 1, 1, 1])
    trimmed = table.lookup(classes, templates)
    captions = [fill_template(TEMPLATES[1], CLASSES[k]) for k in classes]
    padded = processor.tokenizer(captions, padding="max_length", max_length=32, return_tensors="pt")
    assert trimmed["input_ids"].shape[1] < padded["input_ids"].shape[1] == 32
    ours = model.get_text_features(**trimmed).pooler_output
    full = model.get_text_features(**padded).pooler_output
    torch.testing.assert_close(ours, full, atol=EXACT, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 5, 1024])
def test_head_is_the_normalised_mean_of_normalised_embeddings(table, model, processor, batch_size):
    model.double().eval()
    head = class_embeddings(model, table, batch_size=batch_size)
    assert head.shape == (len(CLASSES), 12)
    for k, name in enumerate(CLASSES):
        rows = []
        for template in TEMPLATES:
            tokens = processor.tokenizer([template.replace("{}", name)], return_tensors="pt")
            row = model.get_text_features(**tokens).pooler_output[0]
            rows.append(row / row.norm())
        mean = torch.stack(rows).mean(dim=0)
        torch.testing.assert_close(head[k], mean / mean.norm(), atol=EXACT, rtol=0)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "at least one"),
        ("a photo of a {}", "Expected a list"),
        (["a photo of a {}", "a photo"], r"Expected `\{\}` in every template, got 'a photo'"),
    ],
)
def test_bad_templates_are_refused(templates, message):
    with pytest.raises(ValueError, match=message):
        check_templates(templates)


def test_braces_elsewhere_are_left_alone():
    assert fill_template("a {photo} of {}", "cat") == "a {photo} of cat"


def test_captions_must_fit_the_context(processor):
    with pytest.raises(ValueError, match=r"at most 4 tokens .*, got \d+ for '.*'. Shorten"):
        CaptionTable(processor, CLASSES, TEMPLATES, 4)
    with pytest.raises(ValueError, match="at least one class name"):
        CaptionTable(processor, [], TEMPLATES, 32)


# ---- tokens that the model does not know ----


@pytest.mark.parametrize("preset", ["carot", "ft"])
def test_added_tokens_need_embeddings(make_trainer, preset):
    """It was an IndexError out of the embedding; on a GPU an assertion of the device."""
    processor = tiny_processor()
    model = tiny_clip(processor.tokenizer)
    known = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["two"])
    message = (
        rf"tokens below {known}, the embeddings that the text tower has, got {known} \('two'\)\. Pass the tokenizer"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(model, processing_class=processor, preset=preset)
    model.text_model.resize_token_embeddings(known + 1)
    trainer = make_trainer(model, processing_class=processor, preset=preset, max_steps=1)
    trainer.train()
    assert int(trainer.captions.input_ids.max()) == known


def test_so_does_the_padding(processor):
    tokenizer = tiny_processor().tokenizer
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(ValueError, match=r"got \d+ \('<pad>'\)"):
        CaptionTable(tokenizer, CLASSES, TEMPLATES, 32, vocab_size=size)


def test_captions_of_ones_own_are_checked_too(processor):
    tokenizer = tiny_processor().tokenizer
    size = len(tokenizer)
    table = CaptionTable(tokenizer, CLASSES, TEMPLATES, 32, vocab_size=size)
    tokenizer.add_tokens(["quagga"])
    table.tokenize(["a photo of two"])
    with pytest.raises(ValueError, match=rf"tokens below {size}, .* got {size} \('quagga'\)"):
        table.tokenize(["a photo of a quagga"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_how_many_tokens_it_knows(family):
    tokenizer = processor_of(family).tokenizer
    model = model_of(family, tokenizer)
    assert caption_options(model.config, tokenizer)["vocab_size"] == len(tokenizer)
    model.text_model.resize_token_embeddings(len(tokenizer) + 3)
    assert caption_options(model.config, tokenizer)["vocab_size"] == len(tokenizer) + 3


def test_duplicate_class_names_keep_their_own_rows(processor, model):
    table = CaptionTable(processor, ["one", "two", "one"], TEMPLATES, 32)
    head = class_embeddings(model.eval(), table)
    torch.testing.assert_close(head[0], head[2])
    assert not torch.allclose(head[0], head[1])
