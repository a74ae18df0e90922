"""The documentation: every block of code runs, or its options are those of its program; the site builds."""

from __future__ import annotations

import csv
import html
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from urllib.parse import unquote

import numpy as np
import pages as docs
import pytest
import yaml
from scipy import stats
from toys import ROOT

import carot_hf
from carot_hf.cli import published, report
from carot_hf.objective import losses, start_losses
from carot_hf.presets import PRESETS

LOG = "   step  epoch  left    loss  contrastive  distillation        lr  momentum"
# Blocks that neither run nor are checked: page, first line, why.
EXEMPT = {
    ("docs/how-to/watch_a_run.md", LOG): "a log with times; tests/run/test_log_for_people.py checks its lines",
    ("docs/imagenet.md", "from carot_hf import load_suite"): "loads ImageNet; test_imagenet_suite.py has this option",
    ("carot_hf/ece/README.md", "pip install -r space/requirements.txt"): "the Space; tests/space runs it",
}
LANGUAGES = {"python", "bash", "yaml", "text", "bibtex"}  # bibtex is no code; the others are checked
QUICK = {"docs/explanations/ema_teacher.md"}  # the others take longer
PAGES = {path.relative_to(ROOT).as_posix(): path for path in docs.pages()}
BLOCKS = {page: docs.blocks(path) for page, path in PAGES.items()}


def is_exempt(page, block):
    return (page, block.code.split("\n")[0]) in EXEMPT


def runs(page):
    """Whether there is anything to run: Python, or a command that is small."""
    found = [block for block in BLOCKS[page] if not is_exempt(page, block)]
    if any(block.language == "python" for block in found):
        return True
    lines = [words for block in found if block.language == "bash" for words in docs.commands(block.code)]
    return any(docs.small(words) for words in lines)


def test_every_block_has_a_language_that_is_checked():
    unknown = [(page, block) for page, found in BLOCKS.items() for block in found if block.language not in LANGUAGES]
    assert [(page, block.line) for page, block in unknown if not is_exempt(page, block)] == []
    known = {(page, block.code.split("\n")[0]) for page, found in BLOCKS.items() for block in found}
    assert EXEMPT.keys() <= known, "an exemption is of no block"


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "bash" for b in BLOCKS[page])])
def test_programs_know_the_options_of_every_command(page):
    for block in BLOCKS[page]:
        if block.language == "bash" and not is_exempt(page, block):
            for words in docs.commands(block.code):
                docs.check_command(words)


def test_suites_have_keys_that_exist():
    for page, found in BLOCKS.items():
        for block in found:
            if block.language == "yaml" and not is_exempt(page, block):
                docs.check_suite(block.code)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[] if page in QUICK else [pytest.mark.slow]) for page in PAGES if runs(page)]
)
def test_page_runs(page, tmp_path):
    for name in docs.LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
    }
    exempt = [str(block.line) for block in BLOCKS[page] if is_exempt(page, block)]
    command = [sys.executable, str(ROOT / "tests" / "pages.py"), str(PAGES[page]), *exempt]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    left = {path.name for path in tmp_path.iterdir()} - {"home", *docs.LINKED, "__pycache__"}
    assert left <= {"out", *docs.OF_PAGES}  # the places that git ignores and test_leftovers.py looks at


def test_the_map_for_contributors_names_every_room():
    tree = next(block.code for block in docs.blocks(ROOT / "CONTRIBUTING.md") if block.code.startswith("carot_hf/"))
    named = set(re.findall(r"^  (\w+(?:/|\.py))", tree, re.MULTILINE)) | set(re.findall(r"; (\w+\.py):", tree))
    places = [path for path in (ROOT / "carot_hf").iterdir() if not path.name.startswith("__")]
    assert named == {f"{p.name}/" if p.is_dir() else p.name for p in places if p.is_dir() or p.suffix == ".py"}
    mentioned = set(re.findall(r"\w+\.py", tree)) - {"test_architecture.py"}
    assert mentioned - named == {path.name for path in (ROOT / "examples").glob("*.py")}


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 110


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "carot_hf/ece/README.md"])
def test_links_lead_to_files(page):
    """Those inside docs/ are checked when the site is built."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


def test_the_table_of_presets_has_every_preset_with_its_learning_rate_and_a_paper():
    page = (ROOT / "docs" / "how-to" / "compare_methods.md").read_text(encoding="utf-8")
    section = page.split("## The presets")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    rates = {re.match(r"`([\w-]+)`", name)[1]: float(rate) for name, _, _, rate, _ in rows}
    default = carot_hf.CaRotTrainingArguments.learning_rate
    assert rates == {name: preset.arguments.get("learning_rate", default) for name, preset in PRESETS.items()}
    assert len(rows) == len(PRESETS)
    assert [row for row in rows if not re.search(r"\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", row[-1])] == []


def test_the_published_figures_are_those_of_the_report():
    page = (ROOT / "docs" / "how-to" / "compare_methods.md").read_text(encoding="utf-8")
    section = page.split("Table 1:")[1].split("TRACER, 2026")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    names = [name if name != "zero-shot" else "ZS" for name, *_ in rows[1:]]
    assert names == [report.TITLES[method] for method in published.CAROT]
    assert [tuple(map(float, row[1:])) for row in rows[1:]] == list(published.CAROT.values())


def test_the_table_of_the_readme_is_that_of_the_digits():
    rows = [line.split("|")[1:-1] for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    shown = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 10}
    columns = ["eval_id_accuracy", "eval_ood_accuracy"]
    columns += [f"eval_{side}_ece{end}" for side in ("id", "ood") for end in ("", "_ts", "_dts")]
    columns.append("eval_ood_ece_oracle")
    with (ROOT / "docs" / "digits" / "results.csv").open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    for method in ("zero-shot", "ft", "flyp", "carot"):
        of_method = [run for run in runs if run["method"] == method]
        cells = [report.number([float(run[name]) for run in of_method]) for name in columns]
        title = report.TITLES[method] if method != "zero-shot" else method
        assert shown[title] == [cell.replace("0.", ".") for cell in cells], method


def test_what_wins_where_is_what_the_digits_say():
    """Means, and differences to FLYP by seed with scipy's intervals; the cost is that of the benchmarks' table."""
    page = (ROOT / "docs" / "how-to" / "compare_methods.md").read_text(encoding="utf-8")
    section = page.split("## What wins where")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    with (ROOT / "docs" / "digits" / "results.csv").open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    costs = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split("### What each method costs")[1]
    cost = {cells[0]: cells for line in costs.split("`python benchmarks/gpu.py")[0].splitlines()
            if len(cells := [cell.strip() for cell in line.split("|")[1:-1]]) == 6}  # fmt: skip
    named = {"static": "never", "VRF of ft": "vrf", "Model Stock of ft": "model-stock"}  # a static teacher never moves
    columns = ["eval_id_accuracy", "eval_ood_accuracy", "eval_ood_ece_ts", "eval_ood_ece_dts"]
    values = {}
    for run in runs:
        values.setdefault(run["method"], []).append([float(run[name] or "nan") for name in columns])
    base, seen = np.array(values["flyp"]), set()
    for title, *cells in rows[1:]:
        plain = title.replace("`", "")
        method = named.get(plain, plain.lower())
        own = np.array(values[method])
        seen.add(method)
        shown = ["" if np.isnan(value) else f"{value:.3f}"[1:] for value in own.mean(axis=0)]
        assert cells[:4] == shown, method
        for cell, column in zip(cells[4:7], (0, 1, 3), strict=True):
            if method in ("zero-shot", "flyp") or np.isnan(own[:, column]).any():
                assert cell == ""
                continue
            gap = own[:, column] - base[:, column]
            half = stats.sem(gap) * stats.t.ppf(0.975, len(gap) - 1)
            assert cell == f"{gap.mean():+.3f} ± {half:.3f}".replace("0.", "."), method
        paid = [f"{float(cost[plain][place]):.2f}" for place in (2, 5)] if plain in cost else ["", ""]
        assert cells[7:] == paid, method
    left = set(values) - seen
    assert left == {"ft-ls", "wise-ft-ls", "every-1", "every-2x"}  # they are in the report


def test_the_citation_names_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == carot_hf.__version__


def test_the_reference_has_every_public_name():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: carot_hf\.([\w.]+)$", text, re.MULTILINE))
    public = set(carot_hf.__all__) - {"__version__"}
    functions = {
        f"objective.losses.{name}"
        for name, value in vars(losses).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == losses.__name__
    }
    functions |= {
        f"objective.start_losses.{name}"
        for name, value in vars(start_losses).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == start_losses.__name__
    }
    functions -= {
        f"objective.losses.{name}" for name in ("check_pair", "check_smoothing", "target_rows")
    }  # of use to sigmoid.py alone
    assert public <= shown
    assert {name for name in shown if name.startswith(("objective.losses.", "objective.start_losses."))} == functions
    for name in shown:
        home, _, last = name.rpartition(".")
        module = importlib.import_module(f"carot_hf.{home}") if home else carot_hf
        assert getattr(module, last).__doc__


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_asks_no_other_host(site):
    """Links may lead elsewhere; nothing that a browser loads by itself does."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=\"?([^\"\s>]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|icon|preload|preconnect)[^>]*", text)
        assert not [item for item in loaded if "http:" in item or "https:" in item or "//" in item], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_docstrings_arrive_on_the_site_as_text_links_and_formulas(site):
    reference = {page.stem: page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html")}
    for name, text in reference.items():
        assert not re.findall(r":[a-z]+:(?:`|<code>)|\.\. math|arithmatex|autoref ", text), name
        assert not re.search(r"<p>(?:Returns|Raises|Args|Attributes|Source):", text), name
    assert 'id="carot_hf.objective.losses.contrastive_loss"' in reference["losses"]
    assert reference["losses"].count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == 8
    assert 'href="models.html#carot_hf.CLIPClassifier"' in reference["trainer"]
    assert 'href="#carot_hf.CaRotTrainer.evaluate"><code>evaluate' in reference["trainer"]


def article(page):
    """What a page says, without its navigation."""
    return re.search(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.DOTALL)[0]


@pytest.mark.slow
def test_the_first_page_leads_to_every_other(site):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")} - {"index.html", "404.html"}
    assert {"changelog.html", "benchmarks.html", "contributing.html", "reference/ece.html"} <= pages
    assert pages - set(re.findall(r'href="([^"#]+)', article(site / "index.html"))) == set()


@pytest.mark.slow
def test_links_of_the_site_lead_to_pages_and_anchors_that_exist(site):
    """Those of the pages that lie elsewhere in the repository as well."""
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"}
    for path in pages:
        for link, anchor in re.findall(r'href="(?!\w+:)([^"#]*)(?:#([^"]*))?"', article(path)):
            target = (path.parent / link).resolve() if link else path
            assert target.exists(), (path, link)
            assert not anchor or target not in pages or f'id="{html.unescape(unquote(anchor))}"' in pages[target], (
                path,
                link,
                anchor,
            )


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "link", "without", "with_address"),
    [
        ("scale.md", "[x](../setup.cfg)", "x (`setup.cfg`)", "[x](https://h/r/blob/main/setup.cfg)"),
        ("scale.md", "[`setup.cfg`](../setup.cfg)", "`setup.cfg`", "[`setup.cfg`](https://h/r/blob/main/setup.cfg)"),
        ("scale.md", "[x](../tests)", "x (`tests`)", "[x](https://h/r/tree/main/tests)"),
        ("imagenet.md", "[x](../benchmarks/README.md#a)", "[x](benchmarks.md#a)", "[x](benchmarks.md#a)"),
        ("reference/losses.md", "[x](../../CONTRIBUTING.md)", "[x](../contributing.md)", "[x](../contributing.md)"),
        ("benchmarks.md", "[x](../docs/scale.md)", "[x](scale.md)", "[x](scale.md)"),
        ("reference/ece.md", "[x](../../docs/scale.md)", "[x](../scale.md)", "[x](../scale.md)"),
        ("contributing.md", "[x](docs/digits/README.md)", "[x](digits/README.md)", "[x](digits/README.md)"),
        (
            "scale.md",
            "[x](imagenet.md) [y](https://u.v) [z](#a) a[0](b)",
            *["[x](imagenet.md) [y](https://u.v) [z](#a) a[0](b)"] * 2,
        ),
    ],
)
def test_links_lead_to_the_site_or_to_the_repository(hooks, page, link, without, with_address):
    assert hooks.with_links(link, page, "") == without
    assert hooks.with_links(link, page, "https://h/r") == with_address


def test_a_link_to_no_file_is_refused(hooks):
    with pytest.raises(FileNotFoundError, match=r"docs/scale.md: expected a file at \.\./gone, got none"):
        hooks.with_links("[x](../gone)", "scale.md", "")


def test_roles_become_links_from_where_they_stand(hooks):
    """Of every kind that docstrings here use; what has no page becomes code."""
    import griffe

    suite = griffe.load("carot_hf.data.suite")["ShiftSuite"]
    for text, target, label in (
        (":attr:`content`", "carot_hf.data.suite.ShiftSuite.content", "content"),
        (":data:`~carot_hf.presets.PRESETS`", "carot_hf.presets.PRESETS", "PRESETS"),
        (":exc:`ValueError`", "carot_hf.data.suite.ValueError", "ValueError"),
    ):
        assert hooks.markdown(text, suite) == f'<autoref optional identifier="{target}"><code>{label}</code></autoref>'


@pytest.mark.slow
def test_with_the_address_of_the_repository_pages_have_edit_links_and_ask_nobody(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "CAROT_HF_REPO_URL": "https://github.com/some/project"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    edited = {
        name: re.search(
            r'href="([^"]+)"[^>]*rel="edit"|title="Edit[^"]*"[^>]*href="([^"]+)"', (tmp_path / name).read_text()
        )[0]
        for name in ("scale.html", "changelog.html", "reference/ece.html")
    }
    base = "https://github.com/some/project/edit/main/"
    for name, path in {
        "scale.html": "docs/scale.md",
        "changelog.html": "CHANGELOG.md",
        "reference/ece.html": "carot_hf/ece/README.md",
    }.items():
        assert f'href="{base}{path}"' in edited[name]
    assert 'data-md-component="source"' not in (tmp_path / "index.html").read_text(), "it would count stars"


@pytest.mark.slow
def test_the_site_shows_every_argument_of_ours(site):
    from inspect import get_annotations

    page = (site / "reference" / "trainer.html").read_text(encoding="utf-8")
    missing = [name for name in get_annotations(carot_hf.CaRotTrainingArguments) if f"<code>{name}</code>" not in page]
    assert missing == []
