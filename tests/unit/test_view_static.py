"""The files of the viewer's page: what they never contain, and the one script that a single file holds."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from grpo.view.bundle import STATIC, bundle

SCRIPTS = sorted(STATIC.glob("*.js"))


@pytest.mark.parametrize("path", [*SCRIPTS, STATIC / "index.html"], ids=lambda path: path.name)
def test_text_never_becomes_markup_or_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert word not in text
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=|javascript:", text)


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
def test_nothing_is_fetched_from_elsewhere(path: Path) -> None:
    addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w{2,}[\w./-]*", path.read_text(encoding="utf-8"))
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # the name of SVG elements, not an address


def test_the_bundle_holds_each_module_once_after_those_that_it_imports() -> None:
    script = bundle()
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)
    assert "</script" not in script.lower()
    places = {path.name: script.index(path.read_text(encoding="utf-8").splitlines()[0]) for path in SCRIPTS}
    for path in SCRIPTS:
        for imported in re.findall(r'from "\./([\w-]+\.js)";', path.read_text(encoding="utf-8")):
            assert places[imported] < places[path.name]


def test_the_names_at_the_top_of_all_modules_are_different() -> None:
    """In one script they share a scope."""
    names = re.findall(r"^(?:async )?(?:function|const|let|class) (\w+)", bundle(), re.MULTILINE)
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert len(names) > 50


def test_modules_of_a_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "app.js").write_text('import { a } from "./a.js";\nimport { b } from "./b.js";\na(b);\n')
    (tmp_path / "a.js").write_text('import {\n  b,\n} from "./b.js";\nexport function a() { return b; }\n')
    (tmp_path / "b.js").write_text("export const b = 1;\n")
    assert bundle(tmp_path) == "const b = 1;\n\nfunction a() { return b; }\n\na(b);\n"
