"""What the page reads, measures and writes, without a server; in the environment of `make test-space`."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import math
import struct
import zipfile

import numpy as np
import pytest
from toys import ROOT

pytestmark = pytest.mark.space

SIX_ROWS = "0.31,0.32,0.27\n0.37,0.33,0.30\n0.30,0.31,0.39\n0.61,0.38,0.01\n0.10,0.65,0.25\n0.91,0.05,0.04"
EIGHT = ".51 .45 .39 .66 .68 .29 .81 .85".replace(" ", "\n")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The module, under a name of its own: nothing of the package imports it."""
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "space" / "app.py")
    module = importlib.util.module_from_spec(spec)

    async def load():  # without a running loop gradio makes some, and leaves them open
        spec.loader.exec_module(module)

    asyncio.run(load())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path_factory.mktemp("metrics")))
        yield module


# ---- text ----


@pytest.mark.parametrize(
    "text",
    [
        "0.7, 0.2, 0.1\n0.1,0.3,0.6",
        "0.7 0.2  0.1\n\n  0.1 0.3 0.6\n",
        "0.7\t0.2\t0.1\r\n0.1\t0.3\t0.6\r\n",
        "0.7;0.2;0.1\n1e-1;3e-1;.6",
        "[[0.7, 0.2, 0.1],\n [0.1, 0.3, 0.6]]",
    ],
)
def test_rows_in_every_spelling(app, text):
    found = app.parse_predictions(text)
    assert found.dtype == np.float64
    assert found.tolist() == [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]


@pytest.mark.parametrize("text", ["0.9\n0.6\n0.8", "[0.9, 0.6, 0.8]"])
def test_one_number_a_row(app, text):
    assert app.parse_predictions(text).tolist() == [0.9, 0.6, 0.8]


@pytest.mark.parametrize("text", ["1\n0\n2", "1 0 2", "1, 0, 2", "1.0\n0\n2.000e+00", "[1, 0, 2]", "1 0\n2"])
def test_labels_in_every_spelling(app, text):
    found = app.parse_labels(text)
    assert found.dtype.kind == "i"
    assert found.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"Expected predictions, got none\. Paste at least one row"),
        (" \n\n", r"Expected predictions, got none"),
        ("0.7 0.3\n\n0.7 x0.3", r"Expected a number in line 3, got 'x0\.3'\. Write numbers"),
        ("0.7,0.3\n0.6,,0.4", r"Expected 2 columns in line 2, as in the first row, got 3\. Give"),
        ("0.7,0.3\n0.6,", r"Expected a number in line 2, got ''"),
        ("0.7,0.3\n0.6", r"Expected 2 columns in line 2, as in the first row, got 1\."),
        ("0.7, 0.2 0.1", r"Expected a number in line 1, got '0\.2 0\.1'"),
        (
            "[[0.7, 0.3],\n [0.6, 0.4]",
            r"Expected a JSON list of predictions, .* line 2, column 12.*Close every bracket",
        ),
        ("[0.7 0.3]", r"Expected a JSON list of predictions, .* line 1, column 6"),
        ("[[0.7, 0.3], [0.6]]", r"Expected JSON rows of one length, got .*Give each row"),
        ('[["a", 1]]', r"Expected numbers only in the JSON list of predictions, got other values\. Leave quotes"),
        ("[[0.5, null]]", r"Expected numbers only"),
        ("[" * 100_000, r"Expected a JSON list of predictions, got one nested too deeply\."),
        ("y" * 1000, r"got 'y{40}'\. "),
    ],
)
def test_unreadable_predictions(app, text, message):
    with pytest.raises(ValueError, match=message):
        app.parse_predictions(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"Expected labels, got none"),
        ("0\n1.5", r"Expected a whole number as label in line 2, got '1\.5'\. Write class indices"),
        ("0 nan", r"Expected a whole number as label in line 1, got 'nan'"),
        ("0 inf", r"Expected a whole number as label in line 1, got 'inf'"),
        ("cat\ndog", r"Expected a number in line 1, got 'cat'"),
        ('["cat"]', r"Expected numbers only in the JSON list of labels"),
    ],
)
def test_unreadable_labels(app, text, message):
    with pytest.raises(ValueError, match=message):
        app.parse_labels(text)


# ---- files ----


@pytest.mark.parametrize(
    "text",
    [
        "a,b,label\n0.7,0.3,1\n0.4,0.6,0\n",
        "a,label,b\n0.7,1,0.3\n0.4,0,0.6\n",
        '"Label";"a";"b"\n1;0.7;0.3\n0;0.4;0.6\n',
        "0.7,0.3,1\n0.4,0.6,0",
        "a,b,target\n0.7,0.3,1\n0.4,0.6,0\n",
        "\ufefflabel,a,b\n1,0.7,0.3\n0,0.4,0.6\n",
        "7.0e-01 3.0e-01 1.000000e+00\n4.0e-01 6.0e-01 0.000000e+00\n",
    ],
)
def test_csv(app, tmp_path, text):
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    predictions, references, _ = app.read_file(str(tmp_path / "rows.csv"))
    assert predictions.tolist() == [[0.7, 0.3], [0.4, 0.6]]
    assert references.tolist() == [1, 0]
    assert references.dtype.kind == "i"


def test_csv_of_one_number_a_row(app, tmp_path):
    (tmp_path / "rows.CSV").write_text("confidence,label\n0.7,1\n0.4,0\n", encoding="utf-8")
    predictions, references, _ = app.read_file(str(tmp_path / "rows.CSV"))
    assert (predictions.tolist(), references.tolist()) == ([0.7, 0.4], [1, 0])


def test_files_of_other_kinds(app, tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(ValueError, match=r"Expected a CSV in UTF-8.*Save it as text"):
        app.read_file(str(tmp_path / "rows.csv"))
    with pytest.raises(ValueError, match=r"Expected a file \.csv or \.npz, got 'rows\.xlsx'"):
        app.read_file(str(tmp_path / "rows.xlsx"))


def test_an_index_column_is_left_out_and_said_on_the_page(app, tmp_path):
    """It gave ECE .661 for .119 without a word."""
    rows = ["0.7,0.2,0.1,0", "0.1,0.8,0.1,2", "0.3,0.3,0.4,2", "0.05,0.9,0.05,1"]
    (tmp_path / "plain.csv").write_text("a,b,c,label\n" + "\n".join(rows))
    (tmp_path / "index.csv").write_text(",a,b,c,label\n" + "\n".join(f"{i},{row}" for i, row in enumerate(rows)))
    (plain, _), (index, _) = (app.compute("", "", str(tmp_path / name)) for name in ("plain.csv", "index.csv"))
    assert index["ece"] == plain["ece"]
    assert "notes" not in plain
    assert "Left out, since they number the rows: the one without a name." in app.as_summary(index, "index.csv")


def test_probabilities_taken_for_logits_are_said_on_the_page(app):
    result, _ = app.compute("0.7 0.3\n0.2 0.8", "0 1", from_logits=True)
    assert "look like probabilities" in app.as_summary(result, "the text")


def test_forecasts_are_too_high_or_too_low(app):
    result = app.measure(np.array([0.9, 0.8]), np.array([0, 1]), mode="positive")
    assert "on the whole forecasts too high" in app.as_summary(result, "x")
    table = app.as_table(result)
    assert "| positive_rate | 0.5000 | share of rows of class 1 |" in table
    assert "| accuracy |" not in table
    low = app.as_summary(app.measure(np.array([0.1, 0.2]), np.array([0, 1]), mode="positive"), "x")
    assert "on the whole forecasts too low" in low
    assert "confident" not in low


def test_npz(app, tmp_path):
    rows = np.array([[0.7, 0.3], [0.4, 0.6]], dtype=np.float16)
    np.savez(tmp_path / "rows.npz", predictions=rows, references=np.array([1, 0]), more=np.zeros(3))
    predictions, references, _ = app.read_file(str(tmp_path / "rows.npz"))
    assert predictions.dtype == np.float16  # the metric's bin edges and tolerances are those of the dtype
    assert (predictions == rows).all()
    assert references.tolist() == [1, 0]


def test_unreadable_npz(app, tmp_path, monkeypatch):
    path = tmp_path / "rows.npz"
    cure = r"\. Write it with `np\.savez"
    path.write_text("0.7, 0.3")
    with pytest.raises(ValueError, match="Expected an .npz .* got File is not a zip file" + cure):
        app.read_file(str(path))
    np.savez(path, predictions=np.eye(2), labels=np.array([1, 0]))
    with pytest.raises(ValueError, match=r"got no references among \['predictions', 'labels'\]" + cure):
        app.read_file(str(path))
    np.savez(path, predictions=np.array([{}], dtype=object), references=np.array([1]))
    with pytest.raises(ValueError, match="got predictions.npy of object, no numbers" + ".*" + cure):
        app.read_file(str(path))
    np.savez_compressed(path, predictions=np.zeros((1000, 10)), references=np.zeros(1000, int))
    app.read_file(str(path))
    monkeypatch.setattr("reading.MAX_VALUES", 9_999)
    with pytest.raises(ValueError, match=r"1,000,000 rows and 9,999 values, got an array of shape \(1000, 10\)"):
        app.read_file(str(path))


# ---- numbers worked out by hand ----


@pytest.mark.parametrize(
    ("rows", "labels", "options", "expected"),
    [
        (SIX_ROWS, "1 0 0 1 0 0", {"check_sums": False}, {"ece": 2.27 / 6, "n": 6}),
        (EIGHT, "0 0 0 1 0 1 1 1", {"mode": "positive"}, {"ece": 0.3425}),
        ("0.3 0.7\n0.9 0.1\n0.4 0.6", "1 0 0", {"n_bins": 3}, {"ece": 1 / 3, "n_bins": 3}),
        (
            "[[0.25, 0.20, 0.55], [0.55, 0.05, 0.40], [0.10, 0.30, 0.60], [0.90, 0.05, 0.05]]",
            "[0, 1, 2, 0]",
            {"n_bins": 3},
            {"ece": 0.2, "rmsce": math.sqrt((3 * (0.7 / 3) ** 2 + 0.1**2) / 4), "mce": 0.7 / 3},
        ),
        ("1\n1\n1\n1\n0", "0 0 1 1 1", {"mode": "positive", "n_bins": 2}, {"ece": 0.6}),
        ("0.95\n1.0", "1 0", {"mode": "top_label"}, {"ece": 0.475}),
    ],
)
def test_from_text_to_numbers(app, rows, labels, options, expected):
    result = app.measure(app.parse_predictions(rows), app.parse_labels(labels), **options)
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert result["bins"]["count"]


def test_examples_have_the_values_they_were_made_for(app):
    """Twenty hits at each confidence as chance has them, then four fewer of each; logits of a closed form."""
    confidence = 1 / (1 + 9 * math.exp(-5))  # of [5, 0, ..., 0] among ten classes
    numbers = {name: app.compute(*values)[0] for name, values in app.EXAMPLES.items()}
    assert {name: result["ece"] for name, result in numbers.items()} == pytest.approx(
        {
            "calibrated": 0.0,
            "over-confident": 0.2,
            "logits": confidence - 0.7,
            "logits, scaled": 0.0,
            "six rows by hand": 2.27 / 6,
        },
        abs=1e-9,
    )
    assert numbers["over-confident"]["overconfidence"] == pytest.approx(0.2, abs=1e-12)
    assert numbers["calibrated"]["p_value"] == 1.0  # every draw has at least an error of 0


@pytest.mark.parametrize(
    ("rows", "labels", "options", "message"),
    [
        ("3.5 -1\n2 2", "0 1", {}, r"got 3\.5 in row 0, column 0\. This looks like logits: pass from_logits=True"),
        ("0.7 0.3", "0", {"temperature": "2"}, r"Expected no `temperature` with probabilities, got 2\.0"),
        (
            "3.5 -1",
            "0",
            {"from_logits": True, "temperature": " 0 "},
            r"Expected a finite `temperature` above 0, got 0\.0",
        ),
        ("0.7\n0.3", "0 1", {}, r"Expected an explicit `mode`"),
        ("0.7 0.3", "2", {}, r"Expected `references` in \[0, 2\), got 2 in row 0"),
        ("0.7 0.2", "0", {}, r"got 0\.9 in row 0"),
        ("0.7 nope", "0", {}, r"Expected a number in line 1, got 'nope'"),
        (
            "0.7 0.3",
            "0",
            {"temperature": "hot"},
            r"Expected `temperature` to be a number, got 'hot'\. Write e\.g\. 1\.5",
        ),
    ],
)
def test_what_is_wrong_is_said_as_it_is(app, rows, labels, options, message):
    with pytest.raises(ValueError, match=message):
        app.compute(rows, labels, **options)


# ---- what is shown ----


def test_summary_names_the_side(app):
    rows = np.array([[0.8, 0.2]] * 10)
    for right, text in ((6, "accuracy 0.6000: on the whole over-"), (8, "neither"), (9, "on the whole under-")):
        summary = app.as_summary(app.measure(rows, (np.arange(10) >= right).astype(int)), "<i>.csv")
        assert summary.startswith(f"<h2>ECE {abs(0.8 - right / 10):.4f}</h2>")
        assert text in summary
        assert "10 rows from &lt;i&gt;.csv." in summary


def test_table_holds_every_number(app):
    rows = np.array([[0.8, 0.2]] * 1000 + [[1.0, 0.0]])
    result = app.measure(rows, np.array([0] * 1000 + [1]), n_bootstrap=10)
    lines = [line.split("|")[1:-1] for line in app.as_table(result).splitlines()[2:]]
    shown = {name.strip(): value.strip() for name, value, _ in lines}
    assert shown.keys() == result.keys() - {"bins"}
    assert (shown["n"], shown["n_bins"], shown["nll"]) == ("1,001", "10", "inf")
    assert shown["accuracy"] == "0.9990"


def test_json_has_no_number_where_there_is_none(app):
    result = app.as_json(app.measure(np.array([[1.0, 0.0]]), np.array([1])))
    assert result["nll"] is None
    assert result["bins"]["accuracy"] == [None] * 9 + [0.0]
    assert result["ece"] == 1.0


def test_picture_is_drawn_from_the_bins(app):
    """Orange, the colour of over-confidence, is in the upper half when it should be and only then."""

    def orange(result):
        return int((np.asarray(app.draw(result).convert("RGB")) == (0xD5, 0x5E, 0x00)).all(-1)[:480].sum())

    rows = np.array([[0.8, 0.2]] * 10)
    assert orange(app.measure(rows, (np.arange(10) >= 6).astype(int))) > 100
    assert orange(app.measure(rows, (np.arange(10) >= 9).astype(int))) == 0


# ---- strangers' files and requests ----


@pytest.mark.parametrize(("name", "value"), [("n_bins", 10**7), ("n_bins", 101), ("n_bins", 0), ("n_bins", 2.5),
                                             ("n_bins", "9"), ("n_bins", True), ("n_bootstrap", 10**6),
                                             ("n_bootstrap", -1), ("n_bins", None), ("n_bins", math.nan)])  # fmt: skip
def test_bins_and_draws_are_bounded(app, name, value):
    """Of the API, whose callers see no slider: 10^7 bins took 20 seconds and 3 GB."""
    with pytest.raises(ValueError, match=rf"Expected `{name}` as a whole number from \d to \d+, got"):
        app.compute(SIX_ROWS, "1 0 0 1 0 0", **{name: value})


def test_rows_and_values_are_bounded(app, monkeypatch):
    monkeypatch.setattr("reading.MAX_ROWS", 5)
    with pytest.raises(ValueError, match=r"at most 5 rows and 20,000,000 values, got an array of shape \(6, 3\)"):
        app.compute(SIX_ROWS, "1 0 0 1 0 0", check_sums=False)
    monkeypatch.setattr("reading.MAX_ROWS", 6)
    monkeypatch.setattr("reading.MAX_VALUES", 17)
    with pytest.raises(ValueError, match="at most 6 rows and 17 values"):
        app.compute(SIX_ROWS, "1 0 0 1 0 0", check_sums=False)
    monkeypatch.setattr("csv_rows.MAX_CELLS", 17)
    with pytest.raises(ValueError, match="at most 17 cells, got more, in line 6"):
        app.compute(SIX_ROWS, "1 0 0 1 0 0", check_sums=False)


def test_requests_wait_in_a_line_that_ends(app):
    assert app.demo._queue.max_size == app.MAX_WAITING
    assert app.demo._queue.default_concurrency_limit == app.AT_ONCE


def npy(header, data=b"", version=1):
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def saved(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def archive_of(path, predictions, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("predictions.npy", predictions)
        archive.writestr("references.npy", saved(np.zeros(2, int)))


def flipped(path, mark, offset, value):
    """Change a field of each entry of an archive."""
    content = bytearray(path.read_bytes())
    at = content.find(mark)
    while at >= 0:
        content[at + offset] = value
        at = content.find(mark, at + 1)
    path.write_bytes(bytes(content))


GOOD = saved(np.full((2, 2), 0.5))
HARMED = {  # arrays
    "80 TB": npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000, 1), }\n"),
    "8 EB": npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 2000000000000), }\n"),
    "long header": npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,)" + b" " * 50_000 + b"}\n"),
    "deep header": npy(b"(" * 5_000),
    "no header": npy(b"hello"),
    "version 9": npy(b"{}", version=9),
    "objects": saved(np.array([[1, "a"]], dtype=object)),
    "texts": saved(np.array(["a", "b"])),
    "cut": GOOD[:-8],
}
FLIPPED = {"encrypted": (6, 1), "odd compression": (8, 97)}  # offset in a local header, and what is put there
KINDS = [*HARMED, *FLIPPED, "corrupt", "no archive", "empty", "folder"]


def harmed(path, kind):
    if kind in HARMED:
        archive_of(path, HARMED[kind])
    elif kind in FLIPPED:
        archive_of(path, GOOD)
        offset, value = FLIPPED[kind]
        flipped(path, b"PK\x03\x04", offset, value)
        flipped(path, b"PK\x01\x02", offset + 2, value)
    elif kind == "corrupt":
        archive_of(path, GOOD, zipfile.ZIP_DEFLATED)
        content = bytearray(path.read_bytes())
        content[60:90] = bytes(30)
        path.write_bytes(bytes(content))
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"PK\x03\x04hello" if kind == "no archive" else b"")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_archives_that_cannot_be_read_are_said(app, tmp_path, kind):
    path = harmed(tmp_path / "a.npz", kind)
    with pytest.raises(
        ValueError, match=r"^Expected an \.npz with the arrays `predictions` and `references`, got "
    ) as said:
        app.compute("", "", str(path))
    assert "allow_pickle" not in str(said.value)
    assert len(str(said.value)) < 600
    assert "Not computed" in app.show("", "", str(path), False, 10, "uniform", "rows", "", 0, True)[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b"\0\0\0", b'"a', b'a,"b\n1,2', b"a,b\n" + b"x" * 200_000 + b",1", b"1,2\r1,2", b"1,inf\n",
     b"1,1e300\n", b"1," + b"9" * 5_000, b"a\0b,1\n", b"nan,0\n"],
)  # fmt: skip
def test_tables_that_cannot_be_read_are_said(app, tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"^Expected|^Every"):
        app.compute("", "", str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(ValueError, match=r"^Expected a CSV, got IsADirectoryError"):
        app.compute("", "", str(tmp_path / "b.csv"))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 100 + "1" + "]" * 100, "[1e999]", "[null]", '["a"]', "[{}]", "[[1], [1, 2]]",
     "[" + "9" * 5_000 + "]", "[[0.5, 0.5]", "[NaN]", f"[{10**400}]", "[true]"],
)  # fmt: skip
def test_json_that_cannot_be_read_is_said(app, text):
    with pytest.raises(ValueError, match=r"^Expected"):
        app.compute(text, "[0]")
    with pytest.raises(ValueError, match=r"^Expected"):
        app.compute("[[0.5, 0.5]]", text)
