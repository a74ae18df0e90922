"""Foreign checkpoints: features of the converted model against an independent CLIP, names, options, safe reading."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from reference_layouts import CustomTextClip, FlypClassifier, FlypEncoder, reference_clip
from safetensors.torch import save_file
from tolerances import EXACT
from toys import ROOT
from transformers import CLIPModel

from carot_hf.models.convert import clip_from_state_dict, load_clip_checkpoint

END = 69  # last id of the reference's vocabulary


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ids():
    """Four captions of different lengths, filled up with 0 as OpenAI's code does; END is the largest id of each."""
    ids = torch.randint(1, END, (4, 12), generator=torch.Generator().manual_seed(2))
    for row, length in enumerate((3, 12, 7, 5)):
        ids[row, length - 1 :] = 0
        ids[row, length - 1] = END
    return ids


def layouts(plain):
    """All layouts of the same weights, by name."""
    bare = plain.state_dict()
    facts = {"input_resolution": 12, "context_length": 12, "vocab_size": 70}
    prefixed = {f"module.{name}": value for name, value in bare.items()}
    mask = torch.full((12, 12), float("-inf")).triu(1)
    return {
        "openai": {**bare, **{name: torch.tensor(value) for name, value in facts.items()}},
        "openai, fine-tuned": bare,
        "open_clip": {"epoch": 3, "name": "run", "state_dict": prefixed, "optimizer": {"state": {}}},
        "open_clip, old": {**bare, "attn_mask": mask},
        "open_clip, text tower": CustomTextClip(plain).state_dict(),
        "open_clip, text tower, scale of shape (1,)": {
            **CustomTextClip(plain).state_dict(),
            "logit_scale": plain.logit_scale.detach().reshape(1),
        },
        "flyp": FlypEncoder(plain).state_dict(),
        "flyp, parallel": {"model_state_dict": {f"module.{n}": v for n, v in FlypEncoder(plain).state_dict().items()}},
        "flyp, wrapped": {"model": FlypEncoder(plain).state_dict()},
    }


LAYOUTS = list(layouts(reference_clip()))


@torch.no_grad()
def assert_same_features(model, plain, pixels, ids, atol=EXACT):
    model, plain, pixels = copy.deepcopy(model).double(), copy.deepcopy(plain).double(), pixels.double()
    torch.testing.assert_close(
        model.get_image_features(pixel_values=pixels).pooler_output, plain.encode_image(pixels), atol=atol, rtol=0
    )
    torch.testing.assert_close(
        model.get_text_features(input_ids=ids).pooler_output, plain.encode_text(ids), atol=atol, rtol=0
    )
    output = model(pixel_values=pixels, input_ids=ids)
    torch.testing.assert_close(output.logits_per_image, plain.logits(pixels, ids), atol=atol, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_features_are_those_of_the_reference(layout, act, pixels, ids):
    plain = reference_clip(act=act)
    model = clip_from_state_dict(layouts(plain)[layout], hidden_act=act)
    assert isinstance(model, CLIPModel)
    assert not model.training
    assert_same_features(model, plain, pixels, ids)


def test_the_wrong_activation_shows_in_the_features(pixels):
    """Why it is asked for: it changes the features and nothing else."""
    plain = reference_clip(act="gelu")
    wrong = clip_from_state_dict(plain.state_dict(), hidden_act="quick_gelu")
    with torch.no_grad():
        gap = wrong.get_image_features(pixel_values=pixels).pooler_output - plain.encode_image(pixels)
    assert gap.abs().max() > 1e-3


def test_text_of_each_length_and_either_filling(ids):
    """Short rows alone, filled with 0 or with the end marker: the reference pools at the largest id each time."""
    plain = reference_clip()
    model = clip_from_state_dict(plain.state_dict(), hidden_act="quick_gelu").double()
    plain.double()
    with torch.no_grad():
        expected = plain.encode_text(ids)
        for row, length in enumerate((3, 12, 7, 5)):
            features = model.get_text_features(input_ids=ids[row : row + 1, :length]).pooler_output
            torch.testing.assert_close(features, expected[row : row + 1], atol=EXACT, rtol=0)
        filled = ids.masked_fill(ids == 0, END)
        mask = (ids != 0).long()
        features = model.get_text_features(input_ids=filled, attention_mask=mask).pooler_output
    torch.testing.assert_close(features, expected, atol=EXACT, rtol=0)


def test_config_follows_from_the_shapes():
    plain = reference_clip(vision=(128, 3, 2), text=(64, 2, 1), embed=24, patch=4, side=3, vocabulary=70, context=12)
    config = clip_from_state_dict(plain.state_dict(), hidden_act="gelu").config
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (128, 3, 2)
    assert (vision.intermediate_size, vision.patch_size, vision.image_size) == (512, 4, 12)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (64, 2, 1)
    assert (text.intermediate_size, text.vocab_size, text.max_position_embeddings) == (128, 70, 12)
    assert (text.eos_token_id, config.projection_dim) == (69, 24)
    assert {vision.hidden_act, text.hidden_act} == {"gelu"}
    assert {vision.layer_norm_eps, text.layer_norm_eps} == {1e-5}


@pytest.mark.parametrize(("vocabulary", "given", "expected"), [(49408, None, 49407), (49410, 49407, 49407)])
def test_end_of_text_of_the_standard_vocabulary(vocabulary, given, expected):
    state_dict = reference_clip(vocabulary=vocabulary).state_dict()
    model = clip_from_state_dict(state_dict, hidden_act="gelu", eos_token_id=given)
    assert model.config.text_config.eos_token_id == expected
    assert model.text_model.eos_token_id == expected


def test_heads_that_are_not_64_wide(pixels, ids):
    plain = reference_clip(vision=(80, 2, 5), text=(48, 2, 3))
    with pytest.raises(ValueError, match=r"Expected `text_heads` for a tower of width 48"):
        clip_from_state_dict(plain.state_dict(), hidden_act="quick_gelu", vision_heads=5)
    with pytest.raises(ValueError, match=r"Expected `vision_heads` to divide the width 80, got 3"):
        clip_from_state_dict(plain.state_dict(), hidden_act="quick_gelu", vision_heads=3, text_heads=3)
    model = clip_from_state_dict(plain.state_dict(), hidden_act="quick_gelu", vision_heads=5, text_heads=3)
    assert_same_features(model, plain, pixels, ids)


def test_a_wide_tower_asks_for_its_heads():
    """open_clip's ViT-H-14 is 1280 wide with 16 heads, not 20."""
    state_dict = reference_clip(vision=(1280, 1, 16)).state_dict()
    with pytest.raises(ValueError, match="Expected `vision_heads` for a tower of width 1280"):
        clip_from_state_dict(state_dict, hidden_act="gelu")


def test_half_precision_becomes_float32(pixels, ids):
    plain = reference_clip().half()
    model = clip_from_state_dict(plain.state_dict(), hidden_act="quick_gelu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_features(model, plain.float(), pixels, ids)


def test_the_model_keeps_nothing_of_what_was_given(pixels, ids):
    plain = reference_clip()
    before, state_dict = copy.deepcopy(plain), plain.state_dict()
    model = clip_from_state_dict(state_dict, hidden_act="quick_gelu")
    assert list(state_dict) == list(before.state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert_same_features(model, before, pixels, ids)


def test_a_converted_model_survives_saving(tmp_path, pixels, ids):
    plain = reference_clip(act="gelu")
    clip_from_state_dict(plain.state_dict(), hidden_act="gelu").save_pretrained(tmp_path)
    assert_same_features(CLIPModel.from_pretrained(tmp_path), plain, pixels, ids)


def test_activation_is_known_only_with_openais_numbers():
    state_dicts = layouts(reference_clip())
    assert clip_from_state_dict(state_dicts["openai"]).config.vision_config.hidden_act == "quick_gelu"
    for name in LAYOUTS[1:]:
        with pytest.raises(ValueError, match="no tensor tells the activation"):
            clip_from_state_dict(state_dicts[name])


def test_a_head_is_left_out_only_on_request(pixels, ids):
    plain = reference_clip()
    state_dict = FlypClassifier(plain).state_dict()
    with pytest.raises(ValueError, match=r"`classification_head.weight`, `classification_head.bias` as well"):
        clip_from_state_dict(state_dict, hidden_act="quick_gelu")
    model = clip_from_state_dict(state_dict, hidden_act="quick_gelu", ignore=("classification_head.",))
    assert_same_features(model, plain, pixels, ids)


def test_a_name_outside_the_prefix_is_refused_even_if_it_fits():
    """It would take the place of the model's own."""
    state_dict = {**FlypEncoder(reference_clip()).state_dict(), "logit_scale": torch.zeros(())}
    with pytest.raises(ValueError, match=r"Expected names that begin with `model\.`, got `logit_scale` as well"):
        clip_from_state_dict(state_dict, hidden_act="quick_gelu")


def without(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("text_projection"), "got none for `text_projection`. Pass the whole model"),
        (without("transformer.resblocks.0.ln_2.bias"), "got none for `transformer.resblocks.0.ln_2.bias`"),
        (without("visual.conv1.weight"), "Expected a tensor `visual.conv1.weight`"),
        (put("visual.transformer.resblocks.1.ls_1.gamma", torch.ones(128)), "`visual.transformer.resblocks.1.ls_1.gam"),
        (put("logit_bias", torch.zeros(())), "only tensors that CLIPModel has a place for, got `logit_bias`"),
        (put("visual.layer1.0.conv1.weight", torch.ones(1)), "Expected a vision transformer, got a ResNet"),
        (put("visual.positional_embedding", torch.ones(9, 128)), "patches of 4 x 4 and 9 positions"),
        (put("visual.ln_pre.weight", torch.ones(7)), r"`vision_model.pre_layrnorm.weight` of shape (128,)"),
        (put("visual.proj", torch.ones(128)), "Expected `visual.proj` with 2 dimensions, got shape (128,)"),
        (put("ln_final.bias", torch.ones(64, dtype=torch.int8)), "got torch.int8 as `ln_final.bias`"),
        (put("logit_scale", torch.ones(3)), "Expected `logit_scale` of shape ()"),
        (put("logit_scale", 4.6), "Expected tensors by name, got float as 'logit_scale'"),
        (put("attn_mask", torch.zeros(12, 12)), "Expected `attn_mask` to be a causal mask"),
        (put("context_length", torch.tensor(77)), "Expected `context_length` 12, as the shapes imply, got 77"),
        (put("other.visual.conv1.weight", torch.ones(1)), "got several with the prefixes ['', 'other.']"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    state_dict = dict(reference_clip().state_dict())
    change(state_dict)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        clip_from_state_dict(state_dict, hidden_act="quick_gelu")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "relu"}, r"Expected `hidden_act` of .*, got 'relu'"),
        ({"vision_heads": 0}, "Expected `vision_heads` >= 1, got 0"),
        ({"eos_token_id": 70}, r"Expected `eos_token_id` in \[1, 70\), got 70"),
        ({"ignore": "head."}, "Expected `ignore` as beginnings of names"),
        ({"ignore": [""]}, "Expected `ignore` as beginnings of names"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clip_from_state_dict(reference_clip().state_dict(), **{"hidden_act": "gelu", **options})


def test_other_contents_are_refused():
    bare = reference_clip().state_dict()
    with pytest.raises(ValueError, match="several under"):
        clip_from_state_dict({"state_dict": bare, "model": bare}, hidden_act="gelu")
    with pytest.raises(ValueError, match=r"CLIPModel\.from_pretrained"):
        clip_from_state_dict(CLIPModel.from_pretrained(ROOT / "carot_hf" / "suites" / "digits_clip").state_dict())
    with pytest.raises(TypeError, match=r"got list\. Pass"):
        clip_from_state_dict([1.0])
    with pytest.raises(ValueError, match="got no tensor at all"):
        clip_from_state_dict({})


# ---- files ----


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files_of_tensors_are_read(tmp_path, name, pixels, ids):
    plain = reference_clip()
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save({"epoch": 1, "state_dict": FlypEncoder(plain).state_dict()}, path)
    else:
        save_file(plain.state_dict(), path)
    model = load_clip_checkpoint(str(path), hidden_act="quick_gelu")
    assert_same_features(model, plain, pixels, ids)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path, zipped):
    path, mark = tmp_path / "weights.pt", tmp_path / "mark"
    content = {"state_dict": reference_clip().state_dict(), "args": Bomb(mark)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"needs code to be read .* torch\.save\(model\.state_dict\(\)"):
        load_clip_checkpoint(path, hidden_act="gelu")
    assert not mark.exists()


def test_flyps_pickled_module_is_refused_with_the_cure(tmp_path):
    path = tmp_path / "checkpoint_9.pt"
    path.write_bytes(pickle.dumps(FlypEncoder(reference_clip(act="gelu"))))
    with pytest.raises(ValueError, match=r"CLIPEncoder\.load\(path\)"):
        load_clip_checkpoint(path, hidden_act="gelu")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_archive_is_refused_with_the_cure_that_works(tmp_path, pixels, ids):
    plain = reference_clip()
    path, weights = tmp_path / "ViT.pt", tmp_path / "weights.pt"

    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = plain.visual

        def forward(self, pixels):
            return self.visual.conv1(pixels)

    torch.jit.trace(Archive(), pixels).save(str(path))
    with pytest.raises(ValueError, match=r"TorchScript program .* torch\.save\(torch\.jit\.load\(path, "):
        load_clip_checkpoint(path)
    torch.save(torch.jit.load(path, map_location="cpu").state_dict(), weights)
    content = torch.load(weights, weights_only=True)
    assert torch.equal(content["visual.conv1.weight"], plain.visual.conv1.weight)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got no such file"):
        load_clip_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.safetensors").write_text("not safetensors at all")
    with pytest.raises(ValueError, match="Expected a safetensors file"):
        load_clip_checkpoint(tmp_path / "text.safetensors")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or needs code"):
        load_clip_checkpoint(tmp_path / "empty.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"Expected a state_dict in .*, got list"):
        load_clip_checkpoint(tmp_path / "list.pt")
