"""The gradient cache equals one large batch: gradients, weights, logs; in one process and in two."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from launching import launch
from tolerances import EXACT, LOGGED
from toys import tiny_clip

from carot_hf.objective.gradient_cache import RandomState, cache_gradients, surrogate

CASES = {
    "flyp": {},
    "flyp-ls": {},
    "carot": {"teacher_update_every": 1},
    "carot-2024": {"teacher_update_every": 1},
    "tracer": {"teacher_update_every": 1},
    "same class left out": {"preset": "carot", "same_class": "ignore", "teacher_update_every": 1},
    "same class positive": {"preset": "flyp", "same_class": "positive"},
    "a frozen tower": {"preset": "carot", "freeze": "text", "teacher_update_every": 1},
}


def test_the_parts_add_up_to_the_gradient_of_the_whole():
    """A loss that couples all rows, two linear maps as towers; against autograd on the whole batch, float64."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = [torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def loss_of(images, texts, scale):
        return (scale.exp() * images @ texts.T).logsumexp(1).mean() + (images.sum(0) * texts.sum(0)).sum().sin()

    whole = loss_of(left @ weights[0], right @ weights[1], scale)
    expected = torch.autograd.grad(whole, (*weights, scale))
    with torch.no_grad():
        embeds = [(a @ weights[0], b @ weights[1]) for a, b in zip(left.split(5), right.split(5), strict=True)]
    cached = cache_gradients(embeds, [scale], loss_of)
    for index, (a, b) in enumerate(zip(left.split(5), right.split(5), strict=True)):
        surrogate(cached, index, a @ weights[0], b @ weights[1], [scale]).backward()
    assert float(cached.loss) == pytest.approx(whole.item(), rel=1e-12)
    for value, gradient in zip((*weights, scale), expected, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_cache_trains_as_the_large_batch_does(make_trainer, case, processor):
    options = {"preset": case, **CASES[case]}
    largest = []
    runs = []
    for batch, whole in ((12, 0), (4, 12), (2, 12)):
        trainer = make_trainer(
            tiny_clip(processor.tokenizer).double(), **options,
            per_device_train_batch_size=batch, contrastive_batch_size=whole, max_steps=5, optim="sgd",
            learning_rate=1e-2, max_grad_norm=0.0,
        )  # fmt: skip
        sizes = []
        network = trainer.model.vision_model
        handle = network.register_forward_hook(lambda module, args, output, sizes=sizes: sizes.append(len(output[0])))
        trainer.train()
        handle.remove()
        largest.append(max(sizes))
        runs.append(trainer)
    assert largest == [12, 4, 2]
    for run in runs[1:]:
        for name, value in runs[0].model.state_dict().items():
            torch.testing.assert_close(run.model.state_dict()[name], value, rtol=EXACT, atol=EXACT, msg=name)
        logs = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (runs[0], run)]
        assert len(logs[0]) == len(logs[1]) == 5
        for plain, cached in zip(*logs, strict=True):
            assert plain.keys() == cached.keys()
            for key in plain.keys() - {"input_wait"}:
                bound = LOGGED if key == "loss" else EXACT
                assert cached[key] == pytest.approx(plain[key], rel=bound, abs=bound), key
    if runs[0].teacher is not None:
        for name, value in runs[0].teacher.state_dict().items():
            torch.testing.assert_close(runs[2].teacher.state_dict()[name], value, rtol=EXACT, atol=EXACT, msg=name)


def test_an_epoch_has_whole_contrastive_batches(make_trainer):
    """26 samples: two batches of 12, and 2 left out; the same samples as without the cache."""
    runs = [
        make_trainer(preset="flyp", per_device_train_batch_size=batch, contrastive_batch_size=whole, max_steps=-1,
                     num_train_epochs=2)
        for batch, whole in ((12, 0), (4, 12))
    ]  # fmt: skip
    for trainer in runs:
        trainer.train()
        assert trainer.state.global_step == 4
    drawn = [list(trainer.get_train_dataloader().batch_sampler) for trainer in runs]
    assert [draw for batch in drawn[0] for draw in batch] == [draw for batch in drawn[1] for draw in batch]


def test_the_second_pass_drops_out_what_the_first_did(make_trainer, processor, monkeypatch):
    model = tiny_clip(processor.tokenizer)
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers:
            layer.self_attn.dropout = 0.5
    trainer = make_trainer(model, preset="flyp", per_device_train_batch_size=4, contrastive_batch_size=12, max_steps=2)
    passes = {False: [], True: []}
    handle = model.register_forward_hook(
        lambda module, args, output: passes[torch.is_grad_enabled()].append(output.image_embeds.detach().clone())
    )
    trainer.train()
    handle.remove()
    assert len(passes[True]) == len(passes[False]) == 6
    for first, second in zip(passes[False], passes[True], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(passes[True][0][:2], passes[True][3][:2])


def test_random_states_are_put_back():
    state = RandomState(torch.device("cpu"))
    first = torch.rand(3)
    torch.rand(5)
    state.restore()
    assert torch.equal(torch.rand(3), first)


def test_a_run_with_the_cache_resumes_bit_for_bit(make_trainer):
    options = {
        "per_device_train_batch_size": 4,
        "contrastive_batch_size": 12,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make_trainer(**options, max_steps=4)
    whole.train()
    resumed = make_trainer(**options, max_steps=4)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    for first, second in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrastive_batch_size": 10}, r"a multiple of the 4 pairs that the devices hold at once .*, got 10"),
        ({"contrastive_batch_size": 2}, r"a multiple of the 4 pairs .*, got 2"),
        ({"contrastive_batch_size": 12, "gradient_accumulation_steps": 2}, "Expected `gradient_accumulation_steps` 1"),
        ({"contrastive_batch_size": 12, "preset": "ft"}, r"Expected `contrastive_batch_size` 0 with the objective"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_a_copy_of_the_arguments_keeps_the_accumulation(make_trainer):
    args = make_trainer(contrastive_batch_size=12).args
    assert args.gradient_accumulation_steps == 3
    assert dataclasses.replace(args, learning_rate=1.0).gradient_accumulation_steps == 3


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["carot-2024", "tracer"])
def test_two_processes_with_the_cache_equal_one_without(tmp_path, preset):
    plain = launch(tmp_path, 1, 8, preset, {"teacher_update_every": 2})
    cached = launch(tmp_path, 2, 2, preset, {"teacher_update_every": 2, "contrastive_batch_size": 8})
    for kind in ("student", "teacher"):
        for name, value in plain[kind].items():
            torch.testing.assert_close(cached[kind][name], value, atol=EXACT, rtol=EXACT, msg=f"{kind} {name}")
