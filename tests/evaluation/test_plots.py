"""The artists of the pictures against the bin table they were drawn from."""

from __future__ import annotations

import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from carot_hf.ece.binning import CalibrationBins, calibration_bins
from carot_hf.ece.ece import ECE
from carot_hf.evaluation.plots import (
    BAR,
    OVER,
    OVER_FACE,
    OVER_HATCH,
    UNDER,
    UNDER_FACE,
    UNDER_HATCH,
    accuracy_intervals,
    confidence_histogram,
    ece_by_set,
    reliability_diagram,
    reliability_grid,
)


@pytest.fixture
def bins():
    """Five bins: an empty one, one over-confident, one exact, two under-confident."""
    return CalibrationBins(
        edges=np.linspace(0, 1, 6),
        count=np.array([0, 10, 40, 50, 100]),
        confidence=np.array([np.nan, 0.3, 0.5, 0.7, 0.9]),
        accuracy=np.array([np.nan, 0.1, 0.5, 0.8, 0.95]),
    )


@pytest.fixture
def quantiles():
    generator = np.random.default_rng(0)
    confidences = generator.beta(4, 1, 500)
    return calibration_bins(confidences, generator.random(500) < confidences - 0.1, 8, strategy="quantile")


def bars(ax, label):
    """(left, bottom, width, height) of each bar drawn under that label."""
    found = [container for container in ax.containers if container.get_label() == label]
    assert len(found) <= 1
    return [(*bar.get_xy(), bar.get_width(), bar.get_height()) for container in found for bar in container]


def texts(ax):
    return "\n".join(text.get_text() for text in ax.texts)


def lines(ax):
    return {line.get_label(): tuple(line.get_xdata()) for line in ax.lines}


def test_bars_are_accuracies_and_gaps_end_at_the_mean_confidence(bins):
    top, _ = reliability_diagram(bins).axes
    np.testing.assert_allclose(
        bars(top, "accuracy"), [(0.2, 0, 0.2, 0.1), (0.4, 0, 0.2, 0.5), (0.6, 0, 0.2, 0.8), (0.8, 0, 0.2, 0.95)]
    )
    np.testing.assert_allclose(bars(top, "over-confident"), [(0.2, 0.1, 0.2, 0.2)])
    np.testing.assert_allclose(bars(top, "under-confident"), [(0.6, 0.8, 0.2, -0.1), (0.8, 0.95, 0.2, -0.05)])


def test_bars_are_as_wide_as_their_bins(quantiles):
    top, bottom = reliability_diagram(quantiles).axes
    edges = np.r_[quantiles.span[0], quantiles.edges[1:-1], quantiles.span[1]]
    expected = np.stack([edges[:-1], np.diff(edges)], axis=1)
    assert expected[:, 1].max() > 2 * expected[:, 1].min()
    np.testing.assert_allclose(np.array(bars(top, "accuracy"))[:, [0, 2]], expected)
    np.testing.assert_allclose([(bar.get_x(), bar.get_width()) for bar in bottom.patches], expected)


def test_over_and_under_confidence_differ_in_colour_and_hatch(bins):
    top = reliability_diagram(bins).axes[0]
    looks = {}
    for container in top.containers[:3]:
        patch = container[0]
        looks[container.get_label()] = to_hex(patch.get_edgecolor()), patch.get_hatch()
    assert looks["over-confident"] == (to_hex(OVER), OVER_HATCH)
    assert looks["under-confident"] == (to_hex(UNDER), UNDER_HATCH)
    assert (OVER, UNDER) == ("#D55E00", "#0072B2")
    assert OVER_HATCH != UNDER_HATCH
    face = next(c for c in top.containers if c.get_label() == "over-confident")[0].get_facecolor()
    assert face == to_rgba(OVER_FACE)
    legend = [text.get_text() for text in top.get_legend().get_texts()]
    assert legend == ["accuracy", "95 % interval", "over-confident", "under-confident"]


def test_a_side_that_does_not_occur_is_not_in_the_legend():
    top = reliability_diagram(calibration_bins([0.9] * 4, [1] * 4)).axes[0]
    legend = [text.get_text() for text in top.get_legend().get_texts()]
    assert "over-confident" not in legend
    assert "under-confident" in legend


def test_the_diagonal_and_the_unit_square(bins):
    top, bottom = reliability_diagram(bins).axes
    (diagonal,) = top.lines
    np.testing.assert_array_equal(diagonal.get_xydata(), [(0, 0), (1, 1)])
    assert top.get_xlim() == top.get_ylim() == bottom.get_xlim() == (0, 1)


def test_the_histogram_holds_shares_and_two_lines(bins):
    for figure in (reliability_diagram(bins), confidence_histogram(bins)):
        ax = figure.axes[-1]
        heights = [bar.get_height() for bar in ax.patches]
        np.testing.assert_allclose(heights, [0, 0.05, 0.2, 0.25, 0.5])
        assert lines(ax) == {
            "accuracy": pytest.approx((bins.avg_accuracy,) * 2),
            "mean confidence": pytest.approx((bins.avg_confidence,) * 2),
        }


def test_the_box_says_what_the_table_says(bins):
    box = texts(reliability_diagram(bins).axes[0])
    assert [line.split()[-1] for line in box.splitlines()] == ["0.0600", "0.7800", "0.7400", "200"]
    assert "ECE (5 bins)" in box
    box = texts(reliability_diagram(bins, temperature=1.2346).axes[0])
    assert box.splitlines()[-1].split() == ["T", "1.235"]
    many = CalibrationBins(bins.edges, bins.count * 1000, bins.confidence, bins.accuracy)
    assert "200,000" in texts(reliability_diagram(many).axes[0])


def test_the_intervals_hold_the_confidences_of_calibrated_samples():
    """In 95 of 100 samples; and exactly where the accuracy lies within the noise about the confidence."""
    generator = np.random.default_rng(0)
    confidences = np.repeat([0.15, 0.55, 0.85], [400, 900, 2500])
    inside = []
    for _ in range(400):
        bins = calibration_bins(confidences, generator.random(len(confidences)) < confidences)
        low, high = accuracy_intervals(bins)
        filled = bins.count > 0
        held = (low <= bins.confidence) & (bins.confidence <= high)
        noise = 1.959963984540054 * np.sqrt(bins.confidence * (1 - bins.confidence) / bins.count.clip(1))
        np.testing.assert_array_equal(held[filled], (np.abs(bins.gap) <= noise)[filled])
        inside.append(held[filled])
        assert np.isnan(low[~filled]).all()
    np.testing.assert_allclose(np.mean(inside, axis=0), 0.95, atol=0.035)


def test_the_intervals_by_hand_and_at_the_ends():
    """Wilson for 10 of 10: from 10 / (10 + z^2) to 1; for 50 of 100: 0.5 by 0.0962 of (1 + z^2 / 100)."""
    bins = calibration_bins([0.5] * 100 + [0.99] * 10, [0, 1] * 50 + [1] * 10)
    low, high = accuracy_intervals(bins)
    assert (low[9], high[9]) == pytest.approx((10 / 13.8414588, 1.0))
    assert (low[4], high[4]) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)


def test_error_bars_are_the_intervals_at_the_middle_of_the_bins(bins):
    low, high = accuracy_intervals(bins)
    top = reliability_diagram(bins).axes[0]
    (bars_,) = [container for container in top.containers if container.get_label() == "95 % interval"]
    segments = bars_.lines[2][0].get_segments()
    expected = [[((b + 0.5) / 5, low[b]), ((b + 0.5) / 5, high[b])] for b in range(1, 5)]
    np.testing.assert_allclose(segments, expected)


def test_bins_of_fewer_than_ten_rows_are_faded_whole():
    bins = CalibrationBins(
        edges=np.linspace(0, 1, 4),
        count=np.array([9, 10, 11]),
        confidence=np.array([0.3, 0.5, 0.9]),
        accuracy=np.array([0.1, 0.6, 0.8]),
    )
    top = reliability_diagram(bins).axes[0]
    shown = {container.get_label(): container for container in top.containers}
    opacity = {
        name: [patch.get_edgecolor()[3] for patch in shown[name]]
        for name in ("accuracy", "over-confident", "under-confident")
    }
    assert opacity == {"accuracy": [0.3, 1, 1], "over-confident": [0.3, 1], "under-confident": [1]}
    assert [patch.get_facecolor()[3] for patch in shown["accuracy"]] == [0.3, 1, 1]
    assert [color[3] for color in shown["95 % interval"].lines[2][0].get_colors()] == [0.3, 1, 1]
    assert "fewer than 10 rows" in [text.get_text() for text in top.get_legend().get_texts()]
    weighted = calibration_bins([0.4] * 40, [1] * 40, 1, sample_weight=[100.0] + [1.0] * 39)
    assert weighted.effective[0] < 10 < weighted.count[0]
    assert reliability_diagram(weighted).axes[0].containers[0][0].get_facecolor()[3] == 0.3


def linear(color):
    """Light of red, green and blue, of 0 to 1, of a colour in sRGB."""
    return np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgba(color)[:3]])


def lab(light):
    """CIE L*a*b* (white D65) of linear sRGB: L* is what a grey print keeps, a difference of 2.3 is just seen."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ light
    x, y, z = np.cbrt(np.clip(xyz / [0.9505, 1.0, 1.089], 0.008856, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira and Fernandes 2009: what those without one kind of cone see, in linear RGB.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def test_fills_are_told_apart_in_grey_print():
    levels = [lab(linear(color))[0] for color in ("white", BAR, OVER_FACE, UNDER_FACE)]
    assert min(-np.diff(levels)) > 7, levels
    assert levels[2] - levels[3] > 15, "the two sides most of all"


@pytest.mark.parametrize("kind", BLIND)
def test_the_two_sides_are_told_apart_by_the_colour_blind(kind):
    """Fills and edges, by at least ten times what is just seen."""
    for pair in ((OVER_FACE, UNDER_FACE), (OVER, UNDER)):
        first, second = (lab(np.array(BLIND[kind]) @ linear(color)) for color in pair)
        assert np.linalg.norm(first - second) > 23


def test_given_axes_are_drawn_into_and_their_figure_returned(bins):
    figure = Figure()
    axes = figure.subplots(1, 2)
    assert reliability_diagram(bins, ax=axes[0], title="left") is figure
    assert confidence_histogram(bins, ax=axes[1], title="right") is figure
    assert len(figure.axes) == 2
    assert [ax.get_title() for ax in axes] == ["left", "right"]
    assert [ax.get_xlabel() for ax in axes] == ["confidence"] * 2
    assert len(bars(axes[0], "accuracy")) == 4
    part = figure.subfigures()
    assert reliability_diagram(bins, ax=part.subplots()) is figure


def test_titles_and_labels(bins):
    top, bottom = reliability_diagram(bins, title="ImageNet-R").axes
    assert (top.get_title(), top.get_ylabel()) == ("ImageNet-R", "accuracy")
    assert (bottom.get_xlabel(), bottom.get_ylabel()) == ("confidence", "share of rows")


def test_a_grid_has_a_row_for_each_set_and_a_column_for_each_method(bins, quantiles):
    figure = reliability_grid({"home": {"FLYP": bins, "CaRot": quantiles}, "away": {"CaRot": bins}}, title="all")
    axes = np.array(figure.axes).reshape(2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["FLYP", "CaRot"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["home\naccuracy", "away\naccuracy"]
    assert [len(bars(ax, "accuracy")) for ax in axes.flat] == [4, 8, 0, 4]
    assert not axes[1, 0].axison
    assert texts(axes[0, 0]) == "ECE 0.060"
    assert figure.get_suptitle() == "all"
    with pytest.raises(ValueError, match="at least one cell"):
        reliability_grid({"home": {}})


def test_the_dictionary_of_a_metric_is_drawn_like_the_table(bins):
    for draw in (reliability_diagram, confidence_histogram):
        axes, others = draw(bins).axes, draw(bins.to_dict()).axes
        assert len(axes) == len(others)
        for ax, other in zip(axes, others, strict=True):
            assert [p.get_bbox().bounds for p in ax.patches] == [p.get_bbox().bounds for p in other.patches]
            assert texts(ax) == texts(other)


@pytest.mark.parametrize("rows", [([1.0], [1]), ([0.0] * 5 + [1.0] * 5, [0] * 5 + [1] * 5)])
@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_extreme_tables_are_drawn_to_a_file(rows, strategy, tmp_path):
    bins = calibration_bins(*rows, strategy=strategy)
    for figure in (reliability_diagram(bins, temperature=2.0), reliability_grid({"a": {"b": bins}})):
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1000


def test_no_global_state_is_touched(bins, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = dict(dict.items(mpl.rcParams))  # a plain look-up of "backend" would import pyplot
    reliability_diagram(bins)
    confidence_histogram(bins)
    assert dict(dict.items(mpl.rcParams)) == before
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_error_names_the_cure(bins, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (reliability_diagram, confidence_histogram):
        with pytest.raises(ImportError, match=r"pip install carot_hf\[plot\]"):
            draw(bins)


# ---- what is drawn of what ----


def test_bins_of_equal_mass_begin_and_end_where_rows_are():
    """A bar began at 0, where no row was."""
    confidences = np.linspace(0.61, 0.97, 100)
    bins = calibration_bins(confidences, np.arange(100) % 4 > 0, 5, strategy="quantile")
    assert bins.edges[0] == 0
    for table in (bins, bins.to_dict()):
        drawn = bars(reliability_diagram(table).axes[0], "accuracy")
        assert drawn[0][0] == pytest.approx(0.61)
        assert drawn[-1][0] + drawn[-1][2] == pytest.approx(0.97)
    assert calibration_bins(confidences, np.arange(100) % 4 > 0, 5).span is None


def test_the_rows_of_a_bin_are_written_on_it_and_named_in_the_legend(bins):
    ax = reliability_diagram(bins).axes[1]
    assert [text.get_text() for text in ax.texts] == ["", "10", "40", "50", "100"]
    assert "rows" in [text.get_text() for text in ax.get_legend().get_texts()]
    many = CalibrationBins(np.linspace(0, 1, 41), np.ones(40, int), np.full(40, 0.5), np.full(40, 0.5))
    assert not reliability_diagram(many).axes[1].texts


def test_a_grid_has_one_legend(bins, quantiles):
    figure = reliability_grid({"a": {"x": bins}, "b": {"x": quantiles}})
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["accuracy", "95 % interval", "over-confident", "under-confident"]


@pytest.mark.parametrize(
    ("rows", "columns", "shape"),
    [
        (1, 1, (1, 1)),
        (2, 2, (2, 2)),
        (3, 2, (3, 2)),
        (7, 2, (4, 4)),
        (9, 2, (5, 4)),
        (6, 4, (3, 8)),
        (5, 4, (5, 4)),
        (7, 1, (3, 3)),
    ],
)
def test_a_grid_is_about_as_wide_as_it_is_high(bins, rows, columns, shape):
    """That of a card with seven sets was 550 x 1,800; before and after stay side by side."""
    cells = {str(column): bins for column in range(columns)}
    figure = reliability_grid({f"set {row}": cells for row in range(rows)})
    axes = np.array(figure.axes).reshape(shape)
    drawn = [ax for ax in axes.flat if ax.axison]
    assert len(drawn) == rows * columns
    named = [ax.get_ylabel() for block in range(shape[1] // columns) for ax in axes[:, block * columns] if ax.axison]
    assert named == [f"set {row}\naccuracy" for row in range(rows)], "down, block by block"
    assert [ax.get_title() for ax in axes[0]] == [str(column) for column in range(columns)] * (shape[1] // columns)
    width, height = figure.get_size_inches()
    assert 0.6 < width / height < 2.7


def test_a_column_is_named_above_its_first_cell(bins):
    figure = reliability_grid({"validation": {"as trained": bins}, "home": {"as trained": bins, "T": bins}})
    axes = np.array(figure.axes).reshape(2, 2)
    assert [ax.get_title() for ax in axes.flat] == ["as trained", "", "", "T"]
    assert [ax.get_xlabel() for ax in axes.flat] == ["", "", "confidence", "confidence"]


def test_a_result_of_the_metric_is_drawn_like_its_bins():
    rows, labels = np.array([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]]), [0, 1, 1]
    result = ECE().compute(predictions=rows, references=labels, bins=True)
    whole, table = (reliability_diagram(part).axes[0] for part in (result, result["bins"]))
    assert bars(whole, "accuracy") == bars(table, "accuracy")
    with pytest.raises(ValueError, match=r"got the keys \['accuracy', .*\. Compute it with bins=True"):
        reliability_diagram(ECE().compute(predictions=rows, references=labels))


def test_forecasts_are_too_high_or_too_low():
    result = ECE(mode="positive", bins=True).compute(predictions=[0.9, 0.8, 0.1, 0.2], references=[0, 1, 1, 0])
    for figure in (reliability_diagram(result), reliability_diagram(result["bins"], mode="positive")):
        top, bottom = figure.axes
        labels = {text.get_text() for text in top.get_legend().get_texts()}
        assert {"share of class 1", "forecasts too high", "forecasts too low"} <= labels
        assert (top.get_ylabel(), bottom.get_xlabel()) == ("share of class 1", "probability of class 1")
        assert "mean probability" in texts(top)
    assert "confident" not in "".join(labels)
    confident = {text.get_text() for text in reliability_diagram(result["bins"]).axes[0].get_legend().get_texts()}
    assert {"over-confident", "under-confident"} <= confident
    with pytest.raises(ValueError, match="Expected `mode` to be None"):
        reliability_diagram(result, mode="binary")


def test_weighted_bins_are_drawn_by_weight():
    table = calibration_bins([0.3, 0.9], [0, 1], 2, sample_weight=[3.0, 1.0])
    ax = confidence_histogram(table).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [0.75, 0.25]
    assert ax.get_ylabel() == "share of weight"
    even = calibration_bins([0.4] * 4, [1] * 4, 1, sample_weight=[1.0, 1.0, 1.0, 5.0])
    assert even.effective.tolist() == [64 / 28]
    rows, z2 = 64 / 28, 1.959963984540054**2
    assert accuracy_intervals(even)[0, 0] == pytest.approx(rows / (rows + z2), rel=1e-9), "Wilson, all right"


def test_ece_by_set_marks_means_and_ranges_where_they_are_seen():
    ways = {"none": {"home": [0.02, 0.04], "far": [0.1]}, "density": {"home": [0.01], "far": [0.3, 0.5]}}
    figure = ece_by_set({"FT": ways, "ZS": {"none": {"home": [0.05], "far": [0.02]}}}, title="both")
    first, second = figure.axes
    assert [line.get_xdata().tolist() for line in first.lines] == [[0.03, 0.1], [0.01, 0.4]]
    spans = [collection.get_segments() for collection in first.collections]
    assert [[tuple(segment[:, 0]) for segment in part] for part in spans] == [
        [(0.02, 0.04), (0.1, 0.1)],
        [(0.01, 0.01), (0.3, 0.5)],
    ]
    for ax in (first, second):
        assert ax.get_xlim()[0] == 0
        assert ax.get_xlim()[1] >= 0.5, "the panels share what they show"
    assert [label.get_text() for label in first.get_yticklabels()] == ["home", "far"]
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["none"]
    with pytest.raises(ValueError, match="Expected at least one panel"):
        ece_by_set({})
