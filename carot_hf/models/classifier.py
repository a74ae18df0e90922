"""CLIP's image tower with a linear head: the baseline that is fine-tuned, and what a zero-shot model is exported to.

Importing this module makes the model known to ``AutoConfig``, ``AutoModelForImageClassification`` and
``pipeline("image-classification")``.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    CLIPModel,
    CLIPPreTrainedModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from ..basics.escape import guarded
from ..basics.fingerprint import tower_fingerprint
from ..basics.precision import at_least_float32, wide_dtype
from ..calibration.density import DensityCalibrator
from ..calibration.density_file import numbers_flaw

logger = guarded(logging.getLogger(__name__))

_MOST_ROWS = 10**6  # of a bank
_LENGTH_TOLERANCE = 1e-3  # of rows of length 1; rounding to bfloat16 stays below it


class CLIPClassifierConfig(PreTrainedConfig):
    """Configuration of a `CLIPClassifier`.

    Args:
        vision_config: The image tower's ``CLIPVisionConfig``, or its dict; ``None``: the default one.
        projection_dim: ``D``, size of the projected features.
        initializer_factor: Multiplies the spread of random weights, as in ``CLIPConfig``.
        density: Numbers of a density calibrator whose bank the model holds; ``None``: it has none.
        **kwargs: As for ``PreTrainedConfig``; ``num_labels`` or ``id2label`` says how many classes there are.
    Raises:
        ValueError: If there are fewer than two labels, or the problem is not one label an image.
    """

    model_type = "clip_classifier"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": CLIPVisionConfig}
    sub_configs_defaults: ClassVar[dict[str, Any]] = dict(sub_configs)  # what newer versions of transformers read

    vision_config: dict[str, Any] | CLIPVisionConfig | None = None
    projection_dim: int = 512
    initializer_factor: float = 1.0
    density: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, CLIPVisionConfig):
            self.vision_config = CLIPVisionConfig(**(self.vision_config or {}))
        super().__post_init__(**kwargs)
        if self.num_labels < 2:
            raise ValueError(f"Expected at least 2 labels, got {self.num_labels}. Set `num_labels` or `id2label`.")
        _check_density(self.density)
        if self.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"Expected `problem_type` None or 'single_label_classification', got {self.problem_type!r}. "
                "The probabilities of this model are a softmax."
            )


@dataclass
class CLIPClassifierOutput(ImageClassifierOutput):
    """``ImageClassifierOutput``, and ``image_embeds`` ``(b, D)`` of length 1 where they were asked for."""

    image_embeds: Tensor | None = None


class CLIPClassifier(CLIPPreTrainedModel):
    r"""Image tower, projection and a linear head on the normalised features: ``logits = head(normalize(features))``.

    Normalisation, head and loss are at least float32, also under autocast and in half precision. For training keep the
    whole model float32: transformers loads in the stored dtype, so pass ``dtype=torch.float32``.

    Args:
        config: A `CLIPClassifierConfig`.
    Attributes:
        vision_model: The ``CLIPVisionModel``.
        visual_projection: Linear without bias, width to ``D``.
        head: Linear, ``D`` to ``K`` classes. ``config.id2label`` names them.
        density_bank: ``(M, D)``, of a density calibrator; its temperature of each image divides the logits. ``None``
            unless :meth:`attach_density` was called.
    Source:
        The FT baseline of CaRot (2023), appendix A.1, and WiSE-FT (arXiv 2109.01903).
    """

    config: CLIPClassifierConfig
    config_class = CLIPClassifierConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer divides it by the accumulation steps
    _no_split_modules = ("CLIPVisionEmbeddings", "CLIPEncoderLayer")
    _keep_in_fp32_modules_strict = ("head", "density_bank")
    density_bank: Tensor | None

    def __init__(self, config: CLIPClassifierConfig) -> None:
        super().__init__(config)
        vision_config: Any = config.vision_config
        self.vision_model = CLIPVisionModel._from_config(vision_config)
        self.visual_projection = nn.Linear(vision_config.hidden_size, config.projection_dim, bias=False)
        self.head = _WideLinear(config.projection_dim, config.num_labels)
        rows = None if config.density is None else int(config.density["rows"])
        self.register_buffer("density_bank", None if rows is None else torch.zeros(rows, config.projection_dim))
        self.post_init()

    @classmethod
    def from_clip(
        cls, model: CLIPModel, class_embeddings: Tensor, class_names: Sequence[str] | None = None
    ) -> CLIPClassifier:
        r"""Start a classifier from a CLIP model: ``head.weight = exp(logit_scale) * class_embeddings``, bias 0.

        Weights are copied, in at least float32, to the device and into the mode (training or not) of the model, which
        stays as it is. A temperature baked into ``logit_scale`` acts on in the head, but its record is dropped, for
        this is the start of a training; `export_classifier` keeps it.

        Args:
            model: The ``CLIPModel``, unwrapped.
            class_embeddings: ``(K, D)`` float, rows of length 1, e.g. of
                :func:`~carot_hf.data.captions.class_embeddings`.
            class_names: ``K`` names for ``config.id2label``, made different by `label_names`; ``None``: LABEL_0, ...
        Raises:
            TypeError: If the model is not a ``CLIPModel``.
            ValueError: If shape, dtype, values or lengths of the embeddings, or the number of names, do not fit.
        """
        if not isinstance(model, CLIPModel):
            raise TypeError(
                f"Expected a transformers.CLIPModel, got {type(model).__name__}. Unwrap the model "
                "(`accelerator.unwrap_model`), or load it with CLIPModel.from_pretrained."
            )
        _check_class_embeddings(class_embeddings, model.visual_projection.out_features)
        n_classes = len(class_embeddings)
        if class_names is not None and (isinstance(class_names, str) or len(class_names) != n_classes):
            got = repr(class_names) if isinstance(class_names, str) else len(class_names)
            raise ValueError(
                f"Expected {n_classes} `class_names`, got {got}. Pass one name for each row of `class_embeddings`."
            )
        names = None if class_names is None else dict(enumerate(label_names(class_names)))
        config = CLIPClassifierConfig(
            vision_config=copy.deepcopy(model.config.vision_config),
            projection_dim=model.visual_projection.out_features,
            initializer_factor=model.config.initializer_factor,
            num_labels=n_classes,
            id2label=names,
            label2id=None if names is None else {name: index for index, name in names.items()},
            name_or_path=model.config.name_or_path,
        )
        attention = model.vision_model.config._attn_implementation
        with torch.random.fork_rng(devices=[]):  # the random weights are overwritten; leave the caller's generator
            classifier = cls._from_config(config, dtype=wide_dtype(model.dtype), attn_implementation=attention)
        classifier.vision_model.load_state_dict(model.vision_model.state_dict())
        classifier.visual_projection.load_state_dict(model.visual_projection.state_dict())
        multiplier = model.logit_scale.detach().cpu().double().exp()
        with torch.no_grad():
            classifier.head.weight.copy_(multiplier * class_embeddings.detach().cpu().double())
            classifier.head.bias.zero_()
        placed: CLIPClassifier = classifier.to(model.device).train(model.training)
        return placed

    def attach_density(self, calibrator: DensityCalibrator) -> None:
        """Let a temperature of each image divide the logits; the bank goes along when the model is saved or exported.

        Args:
            calibrator: Of the logits as they are now.
        Raises:
            ValueError: If it is of another image tower, or of a sigmoid.
        """
        check_tower(calibrator, self, self.config.projection_dim)
        if calibrator.link != "softmax":
            raise ValueError(f"Expected a calibrator of a softmax, got one of the {calibrator.link}. It is another's.")
        self.density_bank = calibrator.bank.to(self.head.weight.device, torch.float32)
        self.config.density = {"rows": len(calibrator.bank), **calibrator.numbers}

    def drop_density(self) -> None:
        """Take out what :meth:`attach_density` put in."""
        self.density_bank = self.config.density = None

    @property
    def density(self) -> DensityCalibrator | None:
        """The calibrator that divides the logits, if there is one."""
        if self.config.density is None or self.density_bank is None:
            return None
        return DensityCalibrator(self.density_bank, **{k: v for k, v in self.config.density.items() if k != "rows"})

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch embedding."""
        embedding: nn.Module = self.vision_model.embeddings.patch_embedding
        return embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Linear):
            super()._init_weights(module)
            return
        # Projection or head (the tower draws its own weights), each as it comes: transformers calls this function for
        # the whole model only if its class is one of the library's own.
        init.normal_(module.weight, std=module.in_features**-0.5 * self.config.initializer_factor)
        if module.bias is not None:
            init.zeros_(module.bias)

    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Embed images as ``CLIPModel.get_image_features`` does.

        Args:
            pixel_values: ``(b, 3, h, w)`` float, from the model's image processor.
            interpolate_pos_encoding: Let images of another size than the model's through.
            output_hidden_states: Return the tower's hidden states; ``None``: as its config says.
            output_attentions: The same for attentions; they need the ``eager`` implementation.
            return_dict: ``False``: return a tuple; ``None``: as the config says.
        Returns:
            The tower's output; its ``pooler_output`` is ``(b, D)``, projected and **not** normalised.
        """
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **{name: value for name, value in wanted.items() if value is not None},
        )
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return self._returned(outputs, return_dict)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        output_image_embeds: bool = False,
    ) -> CLIPClassifierOutput | tuple[Any, ...]:
        """Classify images.

        Args:
            pixel_values: As for `get_image_features`, like the options below.
            labels: ``(b,)`` integer class indices in ``[0, K)``; -100 leaves a row out of the loss.
            interpolate_pos_encoding: See there.
            output_hidden_states: See there.
            output_attentions: See there.
            return_dict: See there.
            output_image_embeds: Give the normalised features as ``image_embeds``, too.
        Returns:
            ``logits`` ``(b, K)`` in at least float32; with labels ``loss``, their mean cross-entropy in nats.
        Raises:
            ValueError: If shape or dtype of the labels is not as said. (torch raises for one out of range.)
        """
        outputs: Any = self.get_image_features(
            pixel_values, interpolate_pos_encoding, output_hidden_states, output_attentions, return_dict=True
        )
        embeds = F.normalize(at_least_float32(outputs.pooler_output), dim=-1)
        logits = self.head(embeds)  # (b, K)
        if (density := self.density) is not None:
            with torch.autocast(logits.device.type, enabled=False):
                logits = logits / density.divisor(embeds)
        loss = None
        if labels is not None:
            check_labels(labels, len(logits))
            loss = F.cross_entropy(logits, labels.to(logits.device, torch.int64))
        output = CLIPClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_embeds=embeds if output_image_embeds else None,
        )
        returned: CLIPClassifierOutput | tuple[Any, ...] = self._returned(output, return_dict)
        return returned

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()


AutoConfig.register(CLIPClassifierConfig.model_type, CLIPClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(CLIPClassifierConfig, CLIPClassifier, exist_ok=True)


def export_classifier(
    model: CLIPModel, class_embeddings: Tensor, class_names: Sequence[str] | None = None
) -> CLIPClassifier:
    """Copy a zero-shot model and its head into a classifier that gives the same probabilities.

    A baked temperature is part of ``logit_scale`` and so of the head. Its record ``config.calibration`` goes along:
    :func:`~carot_hf.unbake_temperature` works on the classifier, and a second baking is refused.

    Args:
        model: The ``CLIPModel``, unwrapped; it stays as it is.
        class_embeddings: ``(K, D)`` float, rows of length 1, those that the temperature was fitted with.
        class_names: ``K`` names; see `CLIPClassifier.from_clip`, also for the errors.
    Returns:
        A classifier in evaluation mode, float32 or, of a float64 model, float64.
    """
    classifier = CLIPClassifier.from_clip(model, class_embeddings, class_names)
    classifier.eval()
    record = getattr(model.config, "calibration", None)
    if record is not None:
        record = {key: value for key, value in record.items() if key != "logit_scale_before"}
        classifier.config.calibration = copy.deepcopy(record)
    return classifier


def _check_density(numbers: Any) -> None:
    """Refuse numbers of a density calibrator that are none: they may come out of a stranger's ``config.json``."""
    if numbers is None:
        return
    rows: Any = numbers.get("rows") if isinstance(numbers, Mapping) else None
    known = isinstance(rows, int) and not isinstance(rows, bool) and 1 <= rows <= _MOST_ROWS
    flaw = numbers_flaw(numbers, rows) if known else f"`rows` is {rows!r:.40}"
    if flaw or numbers.keys() != {"rows", "k", "mu", "sigma", "a", "b"}:
        raise ValueError(
            f"Expected numbers of a calibrator as `density` of config.json, got {numbers!r:.120}: {flaw or 'others'}. "
            "Delete it there."
        )


def check_tower(calibrator: DensityCalibrator, model: Any, size: int) -> None:
    """Refuse a density calibrator of another image tower.

    Raises:
        ValueError: Then.
    """
    if calibrator.bank.shape[1] != size:
        raise ValueError(
            f"Expected a calibrator with a bank of {size} numbers an image, as the model embeds them, got "
            f"{calibrator.bank.shape[1]}. It is another model's: calibrate this one with `calibrate('density')`."
        )
    if calibrator.tower is not None and calibrator.tower != tower_fingerprint(model):
        raise ValueError(
            "Expected a calibrator of this model's image tower, got one of other weights. The model was trained on, "
            "merged or rounded to half precision since: load it in float32, or calibrate it by density again."
        )


def label_names(class_names: Sequence[str]) -> list[str]:
    """Return the class names, those that occur twice with their index: labels and indices then map one to one.

    The OpenAI names of ImageNet have two such pairs; "missile" becomes "missile (657)" and "missile (744)".
    """
    names = list(class_names)
    while len(set(names)) < len(names):  # more than once only if a name with an index was there before
        counts = Counter(names)
        names = [f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(names)]
    return names


class _WideLinear(nn.Linear):
    """A linear layer in at least float32, whatever the caller's autocast and the dtype its weights are kept in."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return F.linear(*map(at_least_float32, (inputs, self.weight, self.bias)))


def _check_class_embeddings(class_embeddings: Tensor, size: int) -> None:
    shape = tuple(class_embeddings.shape)
    if len(shape) != 2 or shape[0] < 2 or shape[1] != size or not class_embeddings.is_floating_point():
        raise ValueError(
            f"Expected `class_embeddings` of a float dtype and shape (K, {size}) with K >= 2, got "
            f"{class_embeddings.dtype} of shape {shape}. Pass one text embedding of this model for each class."
        )
    check_lengths("class_embeddings", class_embeddings)


def check_lengths(name: str, rows: Tensor) -> None:
    """Raise a ValueError unless all rows are finite and of length 1."""
    lengths = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=wide_dtype(rows.dtype))
    wrong = ~((lengths - 1).abs() <= _LENGTH_TOLERANCE)  # so that nan is wrong
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"Expected finite rows of length 1 in `{name}`, got length {float(lengths[row]):.6g} in row {row}. "
            "Pass `torch.nn.functional.normalize(rows, dim=-1)`."
        )


def check_labels(labels: Tensor, rows: int) -> None:
    """Raise a ValueError unless labels are ``(rows,)`` integers."""
    if labels.shape != (rows,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"Expected integer `labels` of shape ({rows},), got {labels.dtype} of shape {tuple(labels.shape)}. "
            "Pass class indices; for one-hot rows use `labels.argmax(-1)`."
        )
