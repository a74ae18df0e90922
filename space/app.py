"""The Space of the metric: paste or upload predictions, read the numbers, see the reliability diagram.

    pip install -r space/requirements.txt
    python space/app.py  # then open http://127.0.0.1:7860

In a Space the files of this folder and of the metric's, carot_hf/ece, lie flat beside each other. The metric and the
picture are those of the installed package, here as there.
"""

from __future__ import annotations

import html
import io
import json
import warnings
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import gradio as gr
from numpy.typing import NDArray
from PIL import Image
from reading import check_size, parse_labels, parse_predictions, parse_temperature, read_file

from carot_hf import load_ece
from carot_hf.evaluation.plots import CONFIDENCE, FORECAST, reliability_diagram

MAX_FILE = "100mb"
MAX_BINS, MAX_DRAWS = 100, 1000  # as the page offers them; the API is held to the same
MAX_WAITING, AT_ONCE = 20, 2  # requests
MEANINGS = {
    "ece": "mean distance between accuracy and mean confidence over the bins, weighted by their rows",
    "rmsce": "the root mean square of these distances",
    "mce": "the largest of them",
    "ece_debiased": "`ece` less a part of what noise adds to it; may be just below 0",
    "adaptive_ece": "`ece` on bins of equal mass",
    "ece_low": "lower end of the 95 % bootstrap interval of `ece`",
    "ece_high": "upper end of it",
    "ece_floor": "mean `ece` of a perfectly calibrated model with these confidences",
    "p_value": "how often such a model has at least this `ece`",
    "accuracy": "share of rows that are right",
    "avg_confidence": "mean confidence",
    "overconfidence": "`avg_confidence` - `accuracy`",
    "nll": "mean of -ln p of the label; inf if a label had probability 0",
    "brier": "mean squared distance to the one-hot label, summed over the classes, in [0, 2]",
    "n": "rows",
    "n_bins": "bins made",
}
FORECASTS = {  # with `mode` positive
    "accuracy": "",  # the share of class 1, which has a name of its own
    "positive_rate": "share of rows of class 1",
    "avg_confidence": "mean probability of class 1",
    "overconfidence": "`avg_confidence` - `positive_rate`",
    "brier": "mean of (probability - label)^2, in [0, 1]",
}
INTRODUCTION = """\
# Expected calibration error

Of all predictions made with confidence 0.8, are 80 % right? Paste a classifier's predictions and the labels, or upload
a file, and see how far off it is.
"""
HINT = "<p>The numbers and the reliability diagram appear here.</p>"
HOW_TO = """\
**Text.** One row a line, one number for each class, separated by commas, tabs or spaces; or a JSON list. Probabilities,
or logits with `from_logits` on: nothing is turned into probabilities by guess. Labels are class indices from 0.

**One number a row.** Say what it is with `mode`: the confidence of the predicted class, with labels 1 (right) and 0
(wrong), or the probability of class 1, with labels 0 and 1.

**CSV.** The same rows with the label in the column named `label`, `labels`, `target` or `y_true`, or in the last one.
Columns that number the rows are left out: `id`, `index`, one without a name, or a first one of consecutive integers.
Cells may be quoted, and separated by `;` with decimal commas. **NPZ.** The arrays `predictions`
and `references`.

**Reading it.** Errors are fractions, never percent. They depend on the bins, so say `n_bins` and `strategy` with each
value. Noise alone makes ECE positive: with `n_bootstrap` on, compare it with `ece_floor`.
"""
CSS = """
#examples { gap: 0.5em }
#examples button { flex: 1 1 auto; min-width: 0 }
#summary > div { padding: 0 }
[role="alert"] { border-left: 4px solid #d55e00; padding-left: 0.8em }
#table table { width: 100% }
#table td, #table th { padding: 0.35em 0.6em; word-break: normal }
#table :is(td, th):nth-child(-n + 2) { white-space: nowrap; width: 1% }
#table td:nth-child(2) { text-align: right }
"""


def build() -> Any:
    """The page, a `gr.Blocks`; the endpoint of its API is ``/measure``."""
    with gr.Blocks(title="ECE", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(min_width=320):
                with gr.Row(elem_id="examples"):
                    examples = {name: gr.Button(name, size="sm") for name in EXAMPLES}
                predictions = gr.Textbox(
                    label="predictions", lines=7, max_lines=7, placeholder="0.7, 0.2, 0.1\n0.1, 0.3, 0.6"
                )
                references = gr.Textbox(label="labels", lines=2, max_lines=4, placeholder="0\n2")
                file = gr.File(label="or a file, read in place of the text", file_types=[".csv", ".npz"], height=140)
                from_logits = gr.Checkbox(label="from_logits", info="the predictions are logits; take a softmax")
                with gr.Accordion("Options", open=False):
                    options = build_options()
                button = gr.Button("Compute", variant="primary")
            with gr.Column(min_width=320):
                summary = gr.HTML(HINT, elem_id="summary")
                diagram = gr.Image(
                    show_label=False,
                    format="png",
                    interactive=False,
                    visible=False,
                    buttons=["download", "fullscreen"],
                    alt_text="Reliability diagram: accuracy against confidence, bin by bin, above a histogram",
                )
        with gr.Column(visible=False) as details:
            table = gr.Markdown(elem_id="table")
            with gr.Accordion("All numbers as JSON", open=False):
                numbers = gr.JSON(show_label=False)
        with gr.Accordion("What to paste, and how to read it", open=False):
            gr.Markdown(HOW_TO)

        inputs = [predictions, references, file, from_logits, *options]
        outputs = [summary, diagram, details, table, numbers]
        button.click(show, inputs, outputs, api_visibility="private")
        for name, values in EXAMPLES.items():
            filled = examples[name].click(partial(list, values), None, inputs, api_visibility="private")
            filled.then(show, inputs, outputs, api_visibility="private")
        gr.Button(visible=False).click(respond, inputs, [numbers, diagram], api_name="measure")  # the API only
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=AT_ONCE, api_open=True)


def build_options() -> list[Any]:
    """The fields of the options that few change, in the order of `compute`."""
    n_bins = gr.Slider(1, MAX_BINS, value=10, step=1, precision=0, label="n_bins")
    strategy = gr.Radio(
        ["uniform", "quantile"],
        value="uniform",
        label="strategy",
        info="bins of equal width, or of equal mass",
    )
    mode = gr.Radio(
        ["rows", "top_label", "positive"],
        value="rows",
        label="mode",
        info="rows of class scores; confidences with 0/1 hits; or P(class 1) with 0/1 labels",
    )
    temperature = gr.Textbox(value="", label="temperature", info="divides the logits; empty for none", max_lines=1)
    n_bootstrap = gr.Slider(
        0,
        MAX_DRAWS,
        value=0,
        step=100,
        precision=0,
        label="n_bootstrap",
        info="draws for the interval, the floor and the p-value",
    )
    check_sums = gr.Checkbox(value=True, label="check_sums", info="refuse rows that do not sum to 1")
    return [n_bins, strategy, mode, temperature, n_bootstrap, check_sums]


def compute(
    predictions: str,
    references: str,
    file: str | None = None,
    from_logits: bool = False,
    n_bins: int = 10,
    strategy: str = "uniform",
    mode: str = "rows",
    temperature: str = "",
    n_bootstrap: int = 0,
    check_sums: bool = True,
) -> tuple[dict[str, Any], Image.Image]:
    """From the inputs of the page to the numbers and the picture.

    Raises:
        ValueError: If an input is unreadable, or the metric refuses it.
    """
    check_number("n_bins", n_bins, 1, MAX_BINS)
    check_number("n_bootstrap", n_bootstrap, 0, MAX_DRAWS)
    if file:
        scores, labels, notes = read_file(file)
    else:
        scores, labels, notes = parse_predictions(predictions), parse_labels(references), []
    check_size(scores.shape)
    divisor = parse_temperature(temperature)
    result = measure(
        scores,
        labels,
        from_logits=from_logits,
        n_bins=n_bins,
        strategy=strategy,
        mode=None if mode == "rows" else mode,
        temperature=divisor,
        n_bootstrap=n_bootstrap,
        check_sums=check_sums,
    )
    if notes:
        result["notes"] = [*notes, *result.get("notes", [])]
    return result, draw(result, divisor)


def check_number(name: str, value: Any, least: int, most: int) -> None:
    """Raise a ValueError unless an option is a whole number in a range: time and memory grow with it."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"Expected `{name}` as a whole number from {least} to {most}, got {value!r:.40}. Lower it.")


def show(*values: Any) -> tuple[Any, ...]:
    """What the page shows after a click: the results, or what is wrong; never old results beside a message."""
    try:
        result, picture = compute(*values)
    except ValueError as error:
        message = f'<p role="alert"><strong>Not computed.</strong> {html.escape(str(error))}</p>'
        return message, gr.Image(None, visible=False), gr.Column(visible=False), None, None
    source = Path(values[2]).name if values[2] else "the text"
    summary, table = as_summary(result, source), as_table(result)
    return summary, gr.Image(picture, visible=True), gr.Column(visible=True), table, as_json(result)


@wraps(compute)  # the names of its arguments are those of the endpoint
def respond(*values: Any) -> tuple[dict[str, Any], Image.Image]:
    """What the API answers: all numbers and the picture, or an error with the message."""
    try:
        result, picture = compute(*values)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    return as_json(result), picture


def measure(predictions: NDArray[Any], references: NDArray[Any], **options: Any) -> dict[str, Any]:
    """All numbers of the metric, the table of the bins among them.

    Raises:
        ValueError: If an input or an option is not as the metric describes it.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result: dict[str, Any] = load_ece().compute(
            predictions=predictions, references=references, bins=True, **options
        )
    said = [str(warning.message) for warning in caught if "look like probabilities" in str(warning.message)]
    return {**result, "notes": said} if said else result


def draw(result: dict[str, Any], temperature: float | None = None) -> Image.Image:
    """The reliability diagram of the bins in `result`."""
    buffer = io.BytesIO()
    figure = reliability_diagram(result, title="Reliability diagram", temperature=temperature)
    figure.savefig(buffer, format="png", dpi=150)
    return Image.open(buffer)


def as_summary(result: dict[str, Any], source: str) -> str:
    """The ECE, the sign of the miscalibration and where the rows are from, in HTML."""
    gap = round(result["overconfidence"], 4)
    words, neither = CONFIDENCE, "neither over- nor under-confident"
    if "positive_rate" in result:
        words, neither = FORECAST, "as high as they should be"
    verdict = words.over if gap > 0 else words.under if gap < 0 else neither
    notes = "".join(f'<p role="note">{html.escape(note)}</p>' for note in result.get("notes", []))
    return (
        f"<h2>ECE {result['ece']:.4f}</h2>"
        f"<p>{result['n']:,} rows from {html.escape(source)}. {words.mean.capitalize()} "
        f"{result['avg_confidence']:.4f}, {words.accuracy} {result['accuracy']:.4f}: on the whole {verdict}.</p>{notes}"
    )


def as_table(result: dict[str, Any]) -> str:
    """Each number with what it says, in Markdown."""
    lines = ["| number | value | what it is |", "|---|--:|---|"]
    meanings = {**MEANINGS, **FORECASTS} if "positive_rate" in result else MEANINGS
    for name, meaning in meanings.items():
        if name in result and meaning:
            value = result[name]
            lines.append(f"| {name} | {f'{value:,}' if isinstance(value, int) else f'{value:.4f}'} | {meaning} |")
    return "\n".join(lines)


def as_json(result: dict[str, Any]) -> dict[str, Any]:
    """The result with None for what JSON has no number for: nan in empty bins, an infinite NLL."""
    plain: dict[str, Any] = json.loads(json.dumps(result), parse_constant=lambda name: None)
    return plain


def _example(rows: list[list[float]], labels: list[int], **options: Any) -> tuple[Any, ...]:
    """What the inputs of the page are set to."""
    text = "\n".join(", ".join(f"{value:g}" for value in row) for row in rows)
    given = signature(compute).bind(text, " ".join(map(str, labels)), **options)
    given.apply_defaults()
    return given.args


def _levels(too_confident: int) -> tuple[list[list[float]], list[int]]:
    """Twenty rows at each of five confidences; of the hits that would be fit, so many are missing."""
    confidences = (0.55, 0.65, 0.75, 0.85, 0.95)
    rows = [[confidence, 1 - confidence] for confidence in confidences for _ in range(20)]
    labels = [int(i >= round(20 * confidence) - too_confident) for confidence in confidences for i in range(20)]
    return rows, labels


_TEN_LOGITS = [[5.0 * (i == k) for k in range(10)] for i in range(10)]
_SEVEN_RIGHT = [0, 1, 2, 3, 4, 5, 6, 8, 9, 0]
_SIX_ROWS = [[0.31, 0.32, 0.27], [0.37, 0.33, 0.30], [0.30, 0.31, 0.39], [0.61, 0.38, 0.01], [0.10, 0.65, 0.25]]
_SIX_ROWS += [[0.91, 0.05, 0.04]]
EXAMPLES = {
    "calibrated": _example(*_levels(0), n_bootstrap=1000),
    "over-confident": _example(*_levels(4), n_bootstrap=1000),
    "logits": _example(_TEN_LOGITS, _SEVEN_RIGHT, from_logits=True),
    "logits, scaled": _example(_TEN_LOGITS, _SEVEN_RIGHT, from_logits=True, temperature="1.6422936938"),
    "six rows by hand": _example(_SIX_ROWS, [1, 0, 0, 1, 0, 0], check_sums=False),  # the first sums to 0.9
}

demo = build()

if __name__ == "__main__":
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no downloads
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    demo.launch(
        theme=theme,
        css=CSS,
        footer_links=["api", "gradio"],
        max_file_size=MAX_FILE,
        share=False,
        ssr_mode=False,
    )
