"""The options of a run, checked before any model is loaded, and the presets of the papers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from inspect import get_annotations
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from .argument_checks import EVAL_SETS, ON_BAD_IMAGE, TEACHERS, check_ranges
from .basics.redaction import SECRET, public
from .basics.sharding import sharding
from .calibration.names import DEFAULT_BEST_METRIC, HOME, SHIFTED, SPLIT, check_selection, greater_is_better
from .data.augment import AUGMENTATIONS
from .data.loaders import images_at_once
from .models.lora import check_lora_options, check_penalties
from .objective.losses import SAME_CLASS
from .objective.terms import MOVED, START, TEACHER, needed, weight_fields
from .presets import loss_preset, preset_arguments

_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules
_SCALED_STEPS = ("warmup_steps", "teacher_update_every", "logging_steps")
PUBLISHED_STEPS = 500  # of the papers
_SHORT_RUN, _PARTS = 5_000, 50
_STOCK = ("max_steps", "gradient_accumulation_steps", "bf16", "fp16", "tf32", "optim", "label_smoothing_factor", "seed")


class Published(int):
    """A number of steps of the papers, of ImageNet's 25,030, that nobody has named: a short run takes its share."""


def _option(default: Any, help: str, **metadata: Any) -> Any:
    """Return a field with its help, which is the one place where an argument is described."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(repr=False)  # the one of TrainingArguments hides tokens
class CaRotTrainingArguments(TrainingArguments):
    r"""Arguments of :class:`~carot_hf.CaRotTrainer`: those of ``TrainingArguments`` and the ones below.

    The defaults are CaRot's for ViT-B/16 on ImageNet. ``label_smoothing_factor`` is the epsilon of the methods.
    Others that differ say why in their help; a table of all is on the site. ``warmup_steps``, ``teacher_update_every``
    and ``logging_steps`` are 500, as published for ImageNet's 25,030 steps; where nobody named them, `scale_constants`
    makes them the share of a run of fewer than 5,000 steps: 2 % of the steps, 50 updates, 50 lines, unless ``parity``.
    """

    learning_rate: float = _option(1e-5, "Peak learning rate of AdamW.")
    weight_decay: float = _option(0.1, "Weight decay of AdamW; tensors of fewer than two dimensions are exempt.")
    warmup_steps: float = _option(
        Published(500),
        "Steps of linear warm-up; below 1: a share of all steps. Not given, and fewer than 5,000 steps: 1/50 of them.",
    )
    logging_steps: float = _option(
        Published(500), "Steps between lines of the log. Not given, and fewer than 5,000 steps: 50 lines a run."
    )
    lr_scheduler_type: str = _option("cosine", "Shape of the learning rate after warm-up.")
    num_train_epochs: float = _option(10.0, "Passes over the training images.")
    per_device_train_batch_size: int = _option(
        512, "Training pairs a device and micro-batch. The published batch is 512 in all: divide it by the devices."
    )
    per_device_eval_batch_size: int = _option(0, "Images a device in evaluation; 0: 256, on a CPU 32, faster there.")
    max_grad_norm: float = _option(0.0, "Gradient clipping; 0: none, as published.")
    remove_unused_columns: bool = _option(False, "Leave it off: it would drop images and labels.")
    dataloader_drop_last: bool = _option(
        True,
        "Drop the last partial training batch: filled up it would bring repeated samples, false negatives. Off: "
        "several processes share its samples, each once. Evaluation sees every sample once.",
    )
    ddp_find_unused_parameters: bool | None = _option(False, "Off: every parameter of CLIP is used in each step.")
    logging_nan_inf_filter: bool = _option(
        False, "Off: a loss that is not finite stops the run instead of being hidden."
    )
    eval_do_concat_batches: bool = _option(False, "Off: embeddings are joined once after the last batch.")
    hub_strategy: str = _option("end", "When to push. 'end': nothing uncalibrated is published during training.")
    metric_for_best_model: str | None = _option(
        None,
        "Metric that chooses the best checkpoint, e.g. eval_validation_nll (taken where one is needed and "
        "none is given), or with eval_sets 'all' eval_id_accuracy. Metrics of shifted sets are refused.",
    )
    greater_is_better: bool | None = _option(
        None, "Whether a larger metric is better; follows from the metric's name if not given."
    )
    resume_from_checkpoint: str | None = _option(
        None,
        "Checkpoint folder to go on from; without a value the newest complete one in output_dir.",
        nargs="?",
        const="latest",
    )
    objective: str = _option(
        "contrastive",
        "'contrastive': image-caption pairs. 'cross_entropy': a linear head on the image tower.",
        choices=["contrastive", "cross_entropy"],
    )
    linear_probe: bool = _option(False, "With 'cross_entropy': fit the head on frozen features first (LP-FT).")
    same_class: str = _option(
        "negative",
        "What other samples of the same class in the batch are: 'negative' (as published), 'positive' "
        "(they share the target) or 'ignore' (left out).",
        choices=list(SAME_CLASS),
    )
    augment: str = _option(
        "crop",
        "How training images vary. 'none': not at all, as in evaluation. 'crop' (as published): random crops of 0.9 to "
        "1 of the area. 'light': of 0.6 to 1, and brightness, contrast, saturation x 0.8 to 1.2. 'strong': of 0.35 to "
        "1, x 0.6 to 1.4, one in ten grey, one in ten blurred. None of them flips: mirrored digits and text are "
        "others, and captions name left and right.",
        choices=list(AUGMENTATIONS),
    )
    class_balanced: bool = _option(
        False,
        "Draw every class as often as every other, in epochs as long as before: images of rare classes repeat within "
        "an epoch, those of frequent ones take turns over the epochs. Needs the labels of all training images.",
    )
    freeze: str | None = _option(None, "Tower that is not trained, with its projection.", choices=["vision", "text"])
    lora_rank: int = _option(
        0,
        "Rank of LoRA adapters (peft) on the linear layers of both towers; only they are trained, and averaged by the "
        "teacher, and the saved model has them merged. 0: no adapters, all weights are trained.",
    )
    lora_alpha: int | None = _option(None, "LoRA's scale is lora_alpha / lora_rank. Default: twice the rank.")
    distillation_weight: float = _option(
        0.75, "Weight (lambda) of the distillation from the EMA teacher. 0: no teacher."
    )
    feature_distillation_weight: float = _option(
        0.0, "Weight of the squared distance to the teacher's embeddings (TRACER)."
    )
    energy_gap_weight: float = _option(
        0.0, "Weight of the squared difference to the start model's energies with random texts (Lipsum-FT)."
    )
    context_distillation_weight: float = _option(
        0.0, "Weight of the divergence from the start model's distribution over the templates (CAR-FT)."
    )
    difference_vector_weight: float = _option(
        0.0, "Weight of how unlike the moves of the embeddings since the start are, to their mean and in a pair (DiVE)."
    )
    l2_sp_weight: float = _option(
        0.0,
        "Weight of the squared distance of the trained weights to those of the start; with LoRA of the adapters' "
        "products (L2-SP).",
    )
    orthogonality_weight: float = _option(
        0.0, "Weight of the orthogonality penalty on the visual projection (CaRot-2024)."
    )
    cross_norm_weight: float = _option(0.0, "Weight of the cross-norm penalty on the two projections (CaRot-2024).")
    teacher: str = _option(
        "ema",
        "How the teacher follows the student: 'ema' (CaRot), 'frozen' (never) or 'beta' (TRACER).",
        choices=list(TEACHERS),
    )
    teacher_beta: float = _option(0.5, "b of the 'beta' teacher's kernel Beta(b, b).")
    teacher_update_every: int = _option(
        Published(500),
        "Optimizer steps between updates of the teacher. 0: it is never updated. Not given, and fewer than "
        "5,000 steps: 50 updates a run.",
    )
    teacher_momentum_start: float = _option(
        0.05, "Momentum m0 at step 0, in [0, 1]; it is the weight of the old teacher."
    )
    teacher_momentum_end: float = _option(0.9, "Momentum m1 after the ramp, in [0, 1].")
    teacher_momentum_ramp: float = _option(
        0.2, "Share of the run, in [0, 1], over which the momentum rises from m0 to m1."
    )
    max_logit_multiplier: float = _option(100.0, "exp(logit_scale) is clamped to this during training. 0: no clamp.")
    parity: bool = _option(False, "Do as the published code: decay all parameters and never clamp the logit scale.")
    n_bins: int = _option(10, "Confidence bins of the calibration errors.")
    calibration_criterion: str = _option(
        "nll", "What the temperature minimises on the validation split.", choices=["nll", "ece"]
    )
    calibration_method: str = _option(
        "temperature",
        "'temperature': the best one for the validation split. 'perturbed': for perturbed copies of its images, too. "
        "'density': that of 'temperature', and one for each image by how near it is to those of the training. "
        "Evaluations measure the methods up to this one.",
    )
    calibration_bounds: list[float] | None = _option(  # noqa: RUF009  # makes a field
        None, "Lowest and highest temperature that is looked for. Default: 0.5 10, for SigLIP 0.05 20."
    )
    overwrite_output_dir: bool = _option(
        False, "Train into an output_dir that holds a finished model, metrics.json or a card."
    )
    contrastive_batch_size: int = _option(
        0,
        "Pairs in the contrastive loss of a step, over all devices, embedded per_device_train_batch_size "
        "at a time, twice: the gradient of the large batch in the memory of the small one. 0: no such cache.",
    )
    float32_weights: bool = _option(
        True,
        "Train a half-precision checkpoint in float32. Off: in bfloat16, as it comes, with the optimizer's moments; "
        "half the memory, but a step that changes a weight by less than 1/256 is mostly lost, and at the published "
        "learning rate that is nearly every step. The teacher stays float32. With LoRA only the frozen network stays "
        "bfloat16.",
    )
    on_bad_image: str = _option(
        "raise",
        "An image that cannot be decoded: stop with its set and index ('raise'), or take the next one "
        "of the set in its place and list the replaced ones in the end ('skip').",
        choices=list(ON_BAD_IMAGE),
    )
    dataloader_persistent_workers: bool | None = _option(
        None, "Keep the workers of the training loader from epoch to epoch. Default: if there are any."
    )
    eval_sets: str = _option(
        "validation",
        "What an evaluation during training measures (see eval_strategy): 'validation', the held-out set alone, or "
        "'all' sets of the suite, whose shifted ones can cost more than the epoch. Afterwards all are measured. Sets "
        "that are passed as `eval_dataset` are all measured.",
        choices=list(EVAL_SETS),
    )
    early_stopping_patience: int = _option(
        0,
        "Stop after so many evaluations during training (see eval_strategy) in which metric_for_best_model, default "
        "eval_validation_nll, has not become better. 0: train all steps.",
    )
    early_stopping_threshold: float = _option(
        0.0, "With early_stopping_patience: a metric that is better by no more than this has not become better."
    )
    reliability_diagrams: bool = _option(
        True,
        "After each evaluation outside of training write reliability diagrams into output_dir and send "
        "them to TensorBoard, W&B or trackio if among the reporters; after a training write learning_curves.png. Needs "
        "matplotlib.",
    )

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> CaRotTrainingArguments:
        """Make arguments from a method's name.

        Args:
            preset: A key of ``PRESETS``: "ft", "ft-ls", "lp-ft", "flyp", "flyp-ls", "carot", "carot-2024", "tracer",
                "static", "fd", "l2-sp", "dive", "lipsum", "car-ft".
            **overrides: Any argument, ``output_dir`` first of all; they go before the preset. For a suite pass
                ``**{**suite.recommended, ...}``.
        Raises:
            ValueError: If there is no such preset.
        """
        return cls(**{**preset_arguments(preset), **overrides})

    def __post_init__(self) -> None:
        # Workaround, transformers 5.23: TrainingArguments makes plain numbers of the defaults, which then look like
        # numbers that a user named. So this is looked at first. Until: it remembers what was passed.
        self._unnamed: dict[str, float] = {
            name: float(getattr(self, name)) for name in _SCALED_STEPS if isinstance(getattr(self, name), Published)
        }
        check_ranges(self)
        if (kind := sharding(self)) is not None:
            raise ValueError(
                f"Expected DDP or one device, got {kind}. It shards weights: CLIP's logit_scale has no dimension to "
                "shard, and the teacher follows the others by name. Launch with `accelerate launch --multi_gpu` (DDP)."
            )
        self._set_best_metric()
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        self._join_processes()
        super().__post_init__()
        self._check_adapters()
        self._set_accumulation()
        self._check_batch()
        config = self.accelerator_config
        for name in ("split_batches", "dispatch_batches"):
            if getattr(config, name, None):
                raise ValueError(
                    f"Expected `{name}` of `accelerator_config` unset, got {getattr(config, name)}. Each process loads "
                    "its own `per_device_train_batch_size` pairs: the whole batch is part of the method."
                )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("Expected a GPU for `fp16`, got none. Use `bf16`, which works on a CPU too, or neither.")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        self.per_device_eval_batch_size = self.per_device_eval_batch_size or images_at_once(self.device)

    def recheck(self) -> None:
        """Check the arguments anew, after a hyperparameter search or somebody by hand has set some of them.

        Raises:
            ValueError: As when they were made.
        """
        check_ranges(self)
        self._set_best_metric()
        self._check_adapters()
        self._set_accumulation(before=self._of_cache)
        self._check_batch()

    def scale_constants(self, steps: int) -> dict[str, Any]:
        """Bring the published numbers of steps that nobody has named to their share of a short run.

        Args:
            steps: Optimizer steps of the run.
        Returns:
            What was set; nothing if the run has 5,000 steps or more, or with ``parity``.
        """
        short = steps < _SHORT_RUN and not self.parity
        share = max(1, round(steps / _PARTS))
        return self.take_constants(dict.fromkeys(self.unnamed(), share if short else PUBLISHED_STEPS))

    def take_constants(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set numbers of steps that nobody has named, and say which of them changed."""
        changed = {}
        for name in self.unnamed() & values.keys():
            if values[name] != getattr(self, name):
                setattr(self, name, values[name])
                changed[name] = values[name]
            self._unnamed[name] = float(values[name])
        return changed

    def unnamed(self) -> set[str]:
        """The numbers of steps that nobody has named: neither when the arguments were made nor since."""
        return {name for name, value in self._unnamed.items() if getattr(self, name) == value}

    def _check_adapters(self) -> None:
        if self.lora_rank:
            check_lora_options(self)
            check_penalties(None, self)

    def _join_processes(self) -> None:
        """Start the process group on CPUs, with ``ddp_timeout``: transformers passes that on for other devices only."""
        on_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the token out of pickles: transformers publishes one if a run pushes while it trains."""
        return {**self.__dict__, "hub_token": None}

    def changed(self) -> dict[str, Any]:
        """The arguments of the method that differ from the defaults, for the card of a model; no folder, no token."""
        own = set(_STOCK)
        for kind in type(self).__mro__[: type(self).__mro__.index(TrainingArguments)]:
            own |= get_annotations(kind).keys()
        found = {}
        ours = {item.name: item for item in fields(CaRotTrainingArguments)}
        for item in fields(self):
            known = ours.get(item.name, item)  # a subclass may have another default
            default = known.default if known.default_factory is MISSING else known.default_factory()
            value = getattr(self, item.name)
            published = item.name != "resume_from_checkpoint" and not SECRET.search(item.name)
            if item.name in own and value != default and published:
                found[item.name] = value
        return found

    def to_json_string(self) -> str:
        """Return the arguments as they stand in event files: no token, password or folder of the machine."""
        return json.dumps(public(self.to_dict()), indent=2)

    @property
    def order_seed(self) -> int:
        """Seed of the order of the training samples, of their crops and templates."""
        return int(self.seed if self.data_seed is None else self.data_seed)

    @property
    def skips_bad_images(self) -> bool:
        """Whether an image that cannot be decoded is replaced."""
        return self.on_bad_image == "skip"

    @property
    def moves_every(self) -> int:
        """Optimizer steps between updates of the teacher; 0: it never moves."""
        return 0 if self.teacher == "frozen" else self.teacher_update_every

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the loss reads a teacher."""
        return needed(self, TEACHER)

    @property
    def needs_start(self) -> bool:
        """Whether a term of the loss reads the model that the run started from."""
        return needed(self, START, MOVED)

    @property
    def loss_preset(self) -> str | None:
        """Name of the preset whose loss and kind of teacher these arguments give; ``None``: no preset's."""
        defaults = {item.name: item.default for item in fields(CaRotTrainingArguments)}
        return loss_preset(vars(self), defaults, weight_fields())

    @property
    def clamps_logit_scale(self) -> bool:
        """Whether ``exp(logit_scale)`` is clamped during training."""
        return self.max_logit_multiplier > 0 and not self.parity and self.objective == "contrastive"

    def _set_accumulation(self, before: int = 0) -> None:
        """Let Trainer collect the micro-batches of one contrastive batch; ``before``: of another one."""
        whole, at_once = self.contrastive_batch_size, self.per_device_train_batch_size * self.world_size
        self._of_cache = 0
        if before:
            self.gradient_accumulation_steps: int = 1
        if whole == 0:
            return
        if self.objective != "contrastive":
            raise ValueError(
                f"Expected `contrastive_batch_size` 0 with the objective '{self.objective}', got {whole}. Its "
                "loss is a mean over samples: use `gradient_accumulation_steps`."
            )
        if whole < at_once or whole % at_once:
            raise ValueError(
                f"Expected `contrastive_batch_size` to be a multiple of the {at_once} pairs that the devices hold "
                f"at once (`per_device_train_batch_size` x processes), got {whole}. Change one of them."
            )
        if self.gradient_accumulation_steps not in (1, whole // at_once):
            raise ValueError(
                f"Expected `gradient_accumulation_steps` 1 with `contrastive_batch_size`, got "
                f"{self.gradient_accumulation_steps}. The cache sets it."
            )
        self.gradient_accumulation_steps = whole // at_once
        self._of_cache = self.gradient_accumulation_steps  # not the user's own

    def _check_batch(self) -> None:
        """Refuse a contrastive loss of one pair: it is 0 whatever the model does, and only the decay would act."""
        pairs = max(self.contrastive_batch_size, self.per_device_train_batch_size * self.world_size)
        if self.objective == "contrastive" and pairs < 2:
            raise ValueError(
                f"Expected two pairs or more in the contrastive loss, got {pairs}. Raise "
                "`per_device_train_batch_size`, or set `contrastive_batch_size`, which embeds them a few at a time."
            )

    def _set_best_metric(self) -> None:
        if self.metric_for_best_model is None and (
            self.load_best_model_at_end
            or self.save_strategy == "best"
            or self.lr_scheduler_type in _BY_METRIC
            or self.early_stopping_patience
        ):
            self.metric_for_best_model = DEFAULT_BEST_METRIC
        metric = self.metric_for_best_model
        if metric is None:
            return
        # the names of other sets are known to the trainer, which checks the rest
        check_selection(metric, self.greater_is_better, homes=(SPLIT, HOME), shifts=(SHIFTED,), all_sets=False)
        if self.greater_is_better is None:
            self.greater_is_better = greater_is_better(metric)
        if self.lr_scheduler_type in _BY_METRIC:
            self._set_direction()

    def _set_direction(self) -> None:
        """Let a schedule that follows a metric know which direction is better: it takes any for one of a loss."""
        given = self.lr_scheduler_kwargs
        options: dict[str, Any] = json.loads(given) if isinstance(given, str) else dict(given or {})
        better = "max" if self.greater_is_better else "min"
        if options.setdefault("mode", better) != better:
            raise ValueError(
                f"Expected `mode` '{better}' in `lr_scheduler_kwargs` for `metric_for_best_model` "
                f"{self.metric_for_best_model!r}, got {options['mode']!r}. Leave it out."
            )
        self.lr_scheduler_kwargs: Any = options
