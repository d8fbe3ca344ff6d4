"""The documentation: generated pages are current, links lead somewhere, and what it names exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_driver import lines, make_config, make_loop

from grpo.config.reference import exit_codes_page, options_page
from grpo.driver import train
from grpo.metrics.names import page as metrics_page
from grpo.types import ExitCode

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_the_options_page_is_the_schema() -> None:
    """python -m grpo.config.reference options > docs/options.md"""
    page = (DOCS / "options.md").read_text()
    assert page == options_page()
    assert "| `algorithm.kl_place` | loss \\| reward | `loss` | Add the KL to the reference to the loss, or" in page
    assert "| `model.path` | text | required |" in page
    assert "\n## data.eval.sets[i]\n" in page


def test_the_exit_codes_page_is_the_enum() -> None:
    """python -m grpo.config.reference exit-codes > docs/exit-codes.md"""
    page = (DOCS / "exit-codes.md").read_text()
    assert page == exit_codes_page()
    assert re.findall(r"^\| (\d+) \| `(\w+)` \| \w", page, re.M) == [(str(c.value), c.name) for c in ExitCode]


def test_the_metrics_page_is_the_table_of_names() -> None:
    """python -m grpo.metrics.names > docs/metrics.md"""
    assert (DOCS / "metrics.md").read_text() == metrics_page()


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target


@every_page
def test_every_page_is_in_the_index(page: Path) -> None:
    if page.parent == DOCS and page.name != "README.md":
        assert f"]({page.name}" in (DOCS / "README.md").read_text()


PATH = re.compile(r"(?<![\w./-])(?:grpo|tests|launch|benchmarks|recipes|reward_fns)/[\w./-]*\w")
TEST = re.compile(r"(?<![\w/])(?:unit|integration|faults|gpu)/test_\w+")
MODULE = re.compile(r"(?<![\w./-])(?:grpo|benchmarks)(?:\.[a-z]\w*)+")


def exists(path: str) -> bool:
    """Whether a file, a folder, or a module without its suffix is in the project, or a script of recipes/ makes it."""
    made = path.startswith("recipes/tiny")
    path = re.sub(r"^grpo/(?=(recipes|reward_fns)\b)", "", path)  # where the wheel has them
    return made or any((ROOT / f"{path}{suffix}").exists() for suffix in ("", ".py"))


@every_page
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    assert [path for path in PATH.findall(text) if not exists(path)] == []
    assert [test for test in TEST.findall(text) if not exists(f"tests/{test}")] == []


@every_page
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    """`grpo.sync.transport`, or something in it: `grpo.types.ExitCode`."""
    for module in MODULE.findall(page.read_text()):
        path = module.replace(".", "/")
        assert exists(path) or exists(path.rpartition("/")[0]), module


def documented_metrics() -> list[str]:
    cells = [line.split(" | ")[0] for line in (DOCS / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_no_metric_is_documented_twice() -> None:
    names = documented_metrics()
    assert len(names) > 100
    assert len(names) == len(set(names))


SUMS = {
    "value/error",
    "value/error_square",
    "value/return_square",
    "mismatch/importance_weight_square",
}
"""Sums from which `learner_metrics` derives metrics; not logged."""


def literals() -> set[str]:
    """Every string of the package that has the form of a metric's name."""
    families = {name.partition("/")[0] for name in documented_metrics()}
    name = re.compile(rf"(?:{'|'.join(families)})/[a-z0-9_]*[a-z0-9]")
    found = {
        node.value.removesuffix("_negated")
        for file in (ROOT / "grpo").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and name.fullmatch(node.value)
    }
    return found - SUMS


def logged(tmp_path: Path) -> set[str]:
    """The names that runs with a stand-in for the engines log: without a reference, with refills, and with two sets."""
    names: set[str] = set()
    for i, (datasets, options) in enumerate([({"d": 12}, ["algorithm.max_refills=1"]), ({"d": 8, "e": 8}, TWO_SETS)]):
        folder = tmp_path / str(i)
        folder.mkdir()
        config = make_config(folder, "run.steps=2", "run.save_every=1", *options)
        loop, _ = make_loop(folder, config, datasets=datasets)
        train(loop)
        loop.folder.close()
        names |= {name for line in lines(folder) for name in line}
    return {name for name in names if "/" in name}


TWO_SETS = ["data.train=[{path: d, name: d, weight: 1}, {path: e, name: e, weight: 1}]", "data.eval.sets=x"]


def test_the_metrics_page_has_the_names_of_the_code(tmp_path: Path) -> None:
    """Both ways: what is logged is documented, and what is documented is logged."""
    documented, code = documented_metrics(), literals() | logged(tmp_path)
    patterns = [re.sub("<[^>]+>", "[^ ]+", name) for name in documented]
    assert [name for name in code if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []
    assert [name for name in documented if "<" not in name and name not in code] == []


def changes() -> Iterator[tuple[str, str, str]]:
    """For each hunk of the diffs in docs/extending.md: the file, and the lines that it has before and after."""
    for diff in re.findall(r"^```diff\n(.*?)^```", (DOCS / "extending.md").read_text(), re.S | re.M):
        for part in re.split(r"^--- ", diff, flags=re.M)[1:]:
            file, _, rest = part.split("\n", 2)
            for hunk in re.split(r"^@@ .*\n", rest, flags=re.M)[1:]:
                before, after = ("\n".join(x[1:] for x in hunk.splitlines() if x[:1] != sign) for sign in "+-")
                yield file.removeprefix("a/"), before, after


def test_the_diffs_of_extending_fit_the_code() -> None:
    """Each hunk can be applied, or has been applied. One that does neither has to be written again."""
    found = [change for change in changes() if change[0] != "/dev/null"]
    assert len(found) > 40
    for file, before, after in found:
        text = (ROOT / file).read_text()
        assert before in text or after in text, f"{file}:\n{before}"
