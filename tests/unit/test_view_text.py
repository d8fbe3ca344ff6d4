"""The terminal view and the HTML page of the viewer."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_run import make_run, sample, write_metrics, write_samples
from rich.console import Console

from grpo.commands.cli import main
from grpo.types import UserError
from grpo.view import export
from grpo.view.api import open_paths
from grpo.view.export import html_page
from grpo.view.text import print_place
from grpo.view.visible import visible


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def printed(run: Path, place: str = "", color: bool = False, width: int = 150) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False, emoji=False, force_terminal=color)
    print_place(open_paths([run]), place, console)
    return out.getvalue()


def test_control_and_invisible_characters_are_shown_by_number() -> None:
    assert visible("a\x1b[31mb") == "a<U+001B>[31mb"
    assert visible("\u202eabc\u200b\ufeff\u2028") == "<U+202E>abc<U+200B><U+FEFF><U+2028>"
    assert visible("\x00\x07\r\t\x7f\x9b\ud800") == "<U+0000><U+0007><U+000D><U+0009><U+007F><U+009B><U+D800>"
    assert visible("line\nüber 中文 😀 é") == "line\nüber 中文 😀 é"


def test_the_overview(run: Path) -> None:
    lines = [{"step": i, "reward/mean": i / 8, "group/count": 2, "mismatch/q99": 0.6} for i in range(1, 9)]
    write_metrics(run, lines)
    text = printed(run)
    assert "running; 8 of 4 steps" in text
    assert "! Sampler and learner disagree on some tokens (8 of the steps 1 to 8)" in text
    assert re.search(r"reward/mean +0\.125 +1 +▁▂▃▄▅▆▇█", text)
    assert re.search(r"algorithm\.group_size +2 +required", text)
    assert "2 samples files, step-000001 to step-000002; show one with --text step-000002" in text


def test_a_step_a_group_and_a_completion(run: Path) -> None:
    text = printed(run, "step-000001?filter=reward == 1&sort=spread")
    assert "2 of 2 groups, 2 of 4 completions" in text
    assert re.search(r"0 +0\.5 +1 +3 +0 +1 0 +What is 0\+1\?", text)
    text = printed(run, "step-000001/1")
    assert "gold: 2" in text
    assert "[0]; reward 1; judge 1; extracted 1; stop after 3 tokens\nIt is 1." in text
    text = printed(run, "step-000001/1/0")
    assert re.search(r"id +text +logprob +version", text)
    assert re.search(r"1 +11 +- +-0\.25", text)
    assert "entropy: run.token_columns=true stores the learner's values of each token" in text
    with pytest.raises(UserError, match=r"did you mean step-000001\?"):
        printed(run, "step-1")
    with pytest.raises(UserError, match="it must be FILE, FILE/GROUP or FILE/GROUP/COMPLETION"):
        printed(run, "step-000001/1/0/0")


def test_a_run_fits_into_80_columns(run: Path) -> None:
    """A curve of 100 steps is on the line of its metric, and a heading in one piece. A logprob of -0 is 0."""
    write_metrics(run, [{"step": i, "completion/truncated_fraction": i / 100, "group/count": 2} for i in range(1, 101)])
    assert re.search(r"^completion/truncated_fraction +0\.01 +1 +▁\S+█$", printed(run, width=80), re.M)
    write_samples(run, "step-000003", [sample(sampler_logprobs=[-0.0, -0.000123456, -1.0])])
    text = printed(run, "step-000003/0/0", width=80)
    assert re.search(r"0 +10 +- +0 ", text)
    assert "-0.000123 " in text


@pytest.mark.parametrize("color", [False, True])
def test_a_hostile_completion_does_nothing_to_the_terminal(run: Path, color: bool) -> None:
    """The only escape sequences are the colours of the view itself."""
    evil = "\x1b[2J\x1b]0;title\x07\r\u202ehidden\u200b [bold]markup[/bold] :smile: \x9b31m"
    row = sample(completion=evil, prompt=evil, gold=evil, extracted=evil, failed=evil, failed_detail=evil,
                 dataset=evil, finish_reason=evil, reward=None)  # fmt: skip
    write_samples(run, "step-000003", [row])
    (run / "recipe.txt").write_text(evil)
    for place in ("", "step-000003", "step-000003/0", "step-000003/0/0"):
        text = re.sub(r"\x1b\[[\d;]*m", "", printed(run, place, color))
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u200b]", text), place
    assert "<U+001B>[2J<U+001B>]0;title<U+0007>" in printed(run, "step-000003/0")
    assert "[bold]markup[/bold] :smile:" in printed(run, "step-000003/0")


def test_the_command_prints(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["view", str(run), "--json", "/api/runs/0/samples/step-000001?filter=reward == 0&limit=1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["matching_rows"], len(answer["groups"])) == (2, 1)
    assert main(["view", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "run"
    assert main(["view", str(run), "--json", "/api/export?file=step-000001"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["view", str(run), "--text"]) == 0
    assert "2 samples files" in capsys.readouterr().out
    target = tmp_path / "page.html"
    assert main(["view", str(run), "--html", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: {len(target.read_bytes()) / 1e6:.1f} MB\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["RUN/nothing"], "does not exist"),
        (["RUN", "--step", "1"], "--step is for --html"),
        (["RUN", "--port", "70000"], "--port 70000: it must be a number from 0 to 65535"),
        (["RUN", "--html", "x.html", "--step", "9"], "--step 9: no run has such a samples file"),
        (["RUN", "--json", "/api/rums"], "there is no endpoint /api/rums; did you mean /api/runs?"),
        (["RUN", "--json", "/api/runs/0/samples/step-000001?filter=rewrd<1"], "did you mean reward?"),
        (["RUN", "--text", "step-000009"], "did you mean step-00000"),
    ],
)
def test_mistakes_of_the_command(
    run: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["view", *(word.replace("RUN", str(run)) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_a_hostile_name_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = run.rename(run.parent / "\x1b[2J<script>..%2f\u202e")
    assert "<U+001B>[2J<script>..%2f<U+202E>" in printed(named)
    assert main(["view", str(named), "--text", "step-9"]) == 2
    error = capsys.readouterr().err
    assert "<U+001B>[2J<script>..%2f<U+202E> has no samples file" in error
    assert "\x1b" not in error
    assert main(["view", str(named), "--json", "/api/runs"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["runs"]
    assert entry["name"] == named.name


# --- HTML -------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page, with the text inside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_data(self, data: str) -> None:
        if self._open in self.inside:
            self.inside[self._open][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def data(self) -> dict[str, Any]:
        return json.loads(self.inside["script"][0])


def test_the_page_has_the_last_step_and_evaluation(run: Path) -> None:
    write_samples(run, "eval-000001", [sample(3, 0)])
    page = Page(html_page(open_paths([run])))
    data = page.data()
    assert {*data} == {
        "/api/runs", "/api/runs/0", "/api/runs/0/series", "/api/runs/0/samples/step-000002",
        "/api/runs/0/samples/step-000002/groups/0", "/api/runs/0/samples/step-000002/groups/1",
        "/api/runs/0/samples/eval-000001", "/api/runs/0/samples/eval-000001/groups/0",
    }  # fmt: skip
    opened = open_paths([run])
    for path, stored in data.items():
        from grpo.view import api

        assert stored == json.loads(api.to_json(api.answer(opened, path, {}))), path  # type: ignore[arg-type]
    for step in ("1", "step-000001"):
        data = Page(html_page(open_paths([run]), step)).data()
        assert data["start"] == "#/run/0/step/step-000001"
        assert "/api/runs/0/samples/step-000001/groups/1" in data
        assert "/api/runs/0/samples/step-000002" not in data


def test_the_page_loads_nothing_and_runs_only_its_own_script(run: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- \u2028 <img src=http://evil.com/x>"
    write_samples(run, "step-000003", [sample(completion=evil, prompt=evil, row=json.dumps({evil: evil}))])
    text = html_page(open_paths([run]))
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in page.tags]
    assert page.data()["/api/runs/0/samples/step-000003/groups/0"]["completions"][0]["text"] == evil
    outside = [(tag, attrs) for tag, attrs in page.tags if any(
        re.match(r"(https?:)?//|/", attrs.get(name) or "") for name in ("src", "href", "action"))]  # fmt: skip
    assert outside == []
    [policy] = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    script, style = page.inside["script"][1], page.inside["style"][0]
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in (script, style)]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not re.search(r"^(?:import|export)\b", script, re.M)


def test_long_texts_are_truncated_to_fit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two short completions are whole, two long ones share the rest of the space."""
    texts = ["short", "s" * 900, "ü" * 60_000, "x" * 60_000]
    write_samples(run, "step-000003", [sample(0, i, completion=text) for i, text in enumerate(texts)])
    whole = Page(html_page(open_paths([run]), "3")).data()
    assert len(json.dumps(whole)) > 400_000  # "ü" has six characters in JSON
    monkeypatch.setattr(export, "MAX_BYTES", 120_000)
    data = Page(html_page(open_paths([run]), "3")).data()
    kept = data["/api/runs/0/samples/step-000003/groups/0"]["completions"]
    assert [one["truncated_text"] for one in kept] == [False, False, True, True]
    assert [one["text"] for one in kept[:2]] == texts[:2]
    assert len(kept[3]["text"]) == pytest.approx(6 * len(kept[2]["text"]), rel=0.01)
    assert 100_000 < len(json.dumps(data)) < 125_000
    monkeypatch.setattr(export, "MAX_BYTES", 0)
    data = Page(html_page(open_paths([run]), "3")).data()
    kept = data["/api/runs/0/samples/step-000003/groups/0"]["completions"]
    assert len(kept[3]["text"]) == 499  # two quotation marks count, too: 500 * 60000 // 60002
