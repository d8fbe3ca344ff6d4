"""The pages of `grpo view` in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from view_runs import HOSTILE, STEPS, add_step, make_run

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no browser; apt-get install -y chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

STEP = "#/run/0/step/step-000010"
PROMPT = "#/run/0/prompt/" + quote("sums:3:<i>3</i>", safe="")
PAGES = {
    "runs": "#/",
    "run": "#/run/0",
    "broken run": "#/run/1",
    "step": STEP,
    "filtered step": f"{STEP}?filter={quote('reward == 0')}&sort=spread&order=desc",
    "wrong filter": f"{STEP}?filter={quote('rewrd == 0')}",
    "evaluation": "#/run/1/step/eval-000012",
    "group": f"{STEP}/group/0",
    "hostile group": f"{STEP}/group/1",
    "group with a failure": f"{STEP}/group/2?order=worst",
    "completion": f"{STEP}/group/0/1",
    "hostile completion": f"{STEP}/group/1/2",
    "long completion": f"{STEP}/group/1/3?offset=2000",
    "prompts": "#/run/0/prompts",
    "prompt": PROMPT,
    "compare": "#/compare?a=0&b=1",
    "search": "#/search?run=0&q=plus",
    "error": "#/run/7",
    "missing": "#/nowhere",
    "no address": "#/run/%zz/%",
}
REFUSED = ("wrong filter", "error")
"""Pages for which the browser's console reports a response with status 400 or 404."""

CHECKS = """() => {
  const problems = [];
  const own = (one) => (one.matches("input, select") ? one.labels[0]?.innerText : one.textContent) || "";
  const words = (one) => one.getAttribute("aria-label") || own(one);
  const name = (one) => words(one).trim();
  const say = (what, one) => problems.push(`${what}: ${one.outerHTML.slice(0, 160)}`);
  for (const details of document.querySelectorAll("details")) details.open = true;
  const shown = (one) => one.checkVisibility({ visibilityProperty: true });
  for (const one of document.querySelectorAll("a, button, input, select, summary, svg[role=img], [role=group], nav"))
    if (shown(one) && !name(one)) say("no name", one);
  for (const one of document.querySelectorAll("th")) if (!one.scope) say("no scope", one);
  for (const one of document.querySelectorAll("table")) if (!one.caption) say("no caption", one);
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  for (const id of ids.filter((id, i) => ids.indexOf(id) !== i)) problems.push(`duplicate id ${id}`);
  let level = 0;
  for (const one of document.querySelectorAll("main h1, main h2, main h3, main h4")) {
    if (Number(one.tagName[1]) > level + 1) say("heading skips a level", one);
    level = Number(one.tagName[1]);
  }
  if (document.querySelectorAll("h1").length !== 1) problems.push("not one h1");

  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (color, below) => {
    pixel.fillStyle = `rgb(${below.join(" ")})`;
    pixel.fillRect(0, 0, 1, 1);
    pixel.fillStyle = color;
    pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const ground = (one) => {
    const colors = [];
    for (let at = one; at; at = at.parentElement) colors.push(getComputedStyle(at).backgroundColor);
    return colors.reverse().reduce((below, color) => over(color, below), [255, 255, 255]);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  let count = 0;
  while (texts.nextNode()) {
    const one = texts.currentNode.parentElement;
    if (!texts.currentNode.textContent.trim() || seen.has(one) || !shown(one) || one.closest(":disabled, .hidden"))
      continue;
    seen.add(one);
    const below = ground(one);
    const [a, b] = [light(over(getComputedStyle(one).color, below)), light(below)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) say(`contrast ${((a + 0.05) / (b + 0.05)).toFixed(2)}`, one);
    count += 1;
  }
  if (count < 5) problems.push("no text was checked");
  for (const one of document.querySelectorAll(".scroll"))
    if (innerWidth < 760 && one.scrollWidth > one.clientWidth) say("a table is cut off", one);
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) problems.push(`the page is ${wide} px wide`);
  return problems;
}"""
"""Returns the problems of the page: names, labels, headings, tables, contrast of texts, width."""


class Served:
    """A server of three runs."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("runs")
    made = [
        make_run(folder / "learns", broken=False, steps=STEPS - 2),
        make_run(folder / "a <b>bold", broken=True),
        make_run(folder / "trains", broken=False, steps=3),
    ]
    command = [sys.executable, "-m", "grpo", "view", *map(str, made), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        try:
            assert server.stdout
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found
            yield Served(found[0], folder)
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Watched:
    """A browser page that records errors and the addresses of its requests."""

    def __init__(self, context: Any) -> None:
        self.page = context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def go(self, address: str) -> None:
        """Show the page of this hash, and wait until it is shown."""
        self.page.evaluate(
            """address => new Promise((resolve, reject) => {
              setTimeout(() => reject(new Error(`${address} is not shown`)), 20000);
              if (location.hash === address) return resolve();
              new MutationObserver(resolve).observe(document.getElementById("crumbs"), { childList: true });
              location.hash = address;
            })""",
            address,
        )

    def key(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.getAttribute('href') ?? document.activeElement.id"))

    def hash(self) -> str:
        return urlsplit(self.page.url).fragment

    def heading(self, text: str) -> None:
        """Wait for a page with this heading."""
        self.page.locator("main h1", has_text=text).wait_for(timeout=20000)


@pytest.fixture
def watched(browser: Any, served: Served) -> Iterator[Watched]:
    """A page at 1280 px that shows the list of runs."""
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        opened = Watched(context)
        opened.page.goto(served.url)
        opened.heading("Runs")
        yield opened


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page(browser: Any, served: Served, width: int) -> None:
    """Opens without errors, is accessible in both themes, fits the width, and asks nobody but the server. No text
    becomes markup."""
    with browser.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce") as context:
        opened = Watched(context)
        opened.page.goto(served.url)
        opened.heading("Runs")
        for name, address in PAGES.items():
            opened.go(address)
            for theme in ("light", "dark"):
                opened.page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
                assert [f"{name}, {theme}: {problem}" for problem in opened.page.evaluate(CHECKS)] == []
            errors = [error for error in opened.errors if name not in REFUSED or "status of 40" not in error]
            assert errors == [], name
            opened.errors.clear()
        assert opened.page.evaluate("window.hacked") is None
        assert opened.page.locator("main img, main script, main iframe, main [onload], main [onfocus]").count() == 0
        origin = "http://" + urlsplit(served.url).netloc
        assert {f"{u.scheme}://{u.netloc}" for u in map(urlsplit, opened.requests)} == {origin}
        assert {u.path.split("/")[1] for u in map(urlsplit, opened.requests)} == {"", "static", "api"}
        assert "token" not in opened.page.url


def test_hostile_texts_are_shown_as_they_are(watched: Watched) -> None:
    watched.go(f"{STEP}/group/1")
    texts = watched.page.locator(".card .text").all_inner_texts()
    assert texts[0] == HOSTILE[0]
    assert texts[1] == HOSTILE[1]
    assert texts[2] == "abcRLOdcbPDF zeroZWSP×3width ESC[31mredESC[0m INVALID NUL end"
    last = watched.page.locator(".card .text").nth(3)
    assert last.inner_text().startswith(5000 * "a" + "… show 195,000 more characters")
    last.get_by_role("button").click()
    assert last.inner_text() == 200_000 * "a" + " … the text goes on after 200,000 characters"
    assert watched.page.evaluate("document.activeElement.matches('.text')")
    watched.go("#/run/1")
    assert watched.page.locator("h1").inner_text() == "a <b>bold"


def test_a_broken_run_says_why(watched: Watched) -> None:
    """From the list of runs to the completions: the alarm, its step, and what the grader read."""
    row = watched.page.locator("tr", has_text="a <b>bold")
    assert "▲ All rewards are equal and 2 more" in row.inner_text()
    row.get_by_role("link").click()
    watched.heading("a <b>bold")
    alarm = watched.page.locator("li.alarm", has_text="All rewards are equal")
    assert "steps 5 to 12" in alarm.inner_text()
    alarm.get_by_role("link").click()
    watched.heading("Step 5")
    assert watched.page.locator("#groups .chip", has_text="none").count() == 6
    watched.page.locator("#groups th a").first.click()
    watched.heading("Group 0")
    assert "gives no policy gradient" in watched.page.locator("main .problem").inner_text()
    right = watched.page.locator(".card", has_text="= gold").first.inner_text()
    assert "read 30, gold is 40" in right
    assert "Reward right\n0 × 1\nReward format\n0.5 × 0" in right


def test_the_keyboard_walks_through_all_levels(watched: Watched) -> None:
    watched.key("j")
    assert watched.focused() == "#/run/0"
    watched.key("j", "j", "j")
    assert watched.focused() == "#/run/2"
    watched.key("k", "k", "Enter")
    watched.heading("learns")
    watched.go(STEP)
    watched.key("j", "j")
    assert watched.focused() == f"{STEP}/group/1"
    watched.key("ArrowRight", "ArrowRight")
    assert watched.focused() == f"{STEP}/group/1/1"
    watched.key("j")
    assert watched.focused() == f"{STEP}/group/2"
    watched.key("Enter")
    watched.heading("Group 2")
    watched.key("]")
    watched.heading("Group 3")
    watched.key("j", "Enter")
    watched.heading("Completion 0")
    watched.key("]")
    watched.heading("Completion 1")
    watched.key("[")
    watched.heading("Completion 0")
    watched.key("u")
    watched.heading("Group 3")
    watched.key("Backspace")
    watched.heading("Step 10")
    watched.key("[")
    watched.heading("Step 9")
    watched.key("u")
    watched.heading("learns")


def test_the_focus_is_visible_and_help_and_search_open(watched: Watched) -> None:
    watched.key("Tab")
    assert watched.focused() == "#main"
    watched.key("j")
    style = watched.page.evaluate("getComputedStyle(document.activeElement).outline")
    assert "solid 2px" in style
    watched.key("?")
    help_ = watched.page.locator("dialog[open]")
    assert "next, previous entry" in help_.inner_text()
    watched.key("Escape")
    assert help_.count() == 0
    watched.key("/")
    assert watched.focused() == "find-text"
    watched.page.keyboard.type("plus ten is 43")
    watched.key("Enter")
    watched.heading("Search")
    assert watched.page.locator(".hits mark").first.inner_text() == "plus ten is 43"
    assert watched.page.locator(".hits .text").first.inner_text() == "Let me add. 33 plus ten is 43"  # not cut
    watched.key("Escape", "t")
    assert watched.page.evaluate("document.documentElement.dataset.theme") == "light"
    assert watched.page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"


def test_two_runs_compared(watched: Watched) -> None:
    """The broken run is worse: its differences have a minus sign, and a verdict is on one line."""
    watched.go("#/compare?a=0&b=1&file_a=eval-000000&file_b=eval-000012")
    watched.heading("Compare")
    row = watched.page.locator("#pairs-table tbody tr").first
    row.wait_for()
    cells = row.locator("td").all_inner_texts()
    assert float(cells[3].replace("−", "-")) == pytest.approx(float(cells[2]) - float(cells[1]), abs=0.002)
    assert cells[3].startswith("−")
    assert cells[4] == "▼ lost"
    assert row.locator(".verdict-word").evaluate("one => one.getClientRects().length") == 1
    few = "The interval contains 0, as it always does with 5 prompts: too few to show a difference."
    assert watched.page.locator("#verdict .muted").first.inner_text() == few


def test_filter_sort_and_export(watched: Watched) -> None:
    watched.go(STEP)
    watched.key("f")
    assert watched.focused() == "filter"
    watched.page.keyboard.type('finish_reason == "length"')
    watched.key("Enter")
    watched.page.get_by_text("6 completions in 6 groups match").wait_for()
    assert watched.focused() == "filter"
    assert watched.page.locator(".cells .other").count() == 18
    watched.page.locator("#sort").select_option("mean")
    watched.page.wait_for_function("location.hash.includes('sort=mean')")
    with watched.page.expect_download() as download:
        watched.page.locator("#export").click()
    assert len(Path(download.value.path()).read_text().splitlines()) == 6
    watched.page.locator("#filter").fill("rewrd < 1")
    watched.key("Enter")
    watched.page.locator("#filter-error", has_text="reward").wait_for()
    assert watched.page.locator("#filter").get_attribute("aria-invalid") == "true"


def test_an_evaluation_has_no_gradient(watched: Watched) -> None:
    """Groups with one reward are reported in a step, not in an evaluation."""
    watched.go("#/run/1/step/eval-000012")
    watched.heading("Evaluation after step 12")
    watched.page.get_by_text("5 groups, 20 completions").wait_for()
    assert watched.page.locator("#groups .chip").count() == 0
    assert watched.page.locator(".walk").inner_text().startswith("← previous evaluation")
    assert watched.page.locator(".legend li").first.inner_text() == "reward"
    watched.page.locator("#groups th a").first.click()
    watched.heading("Group 0")
    assert watched.page.locator("main .problem").count() == 0
    watched.key("u")
    watched.heading("Evaluation after step 12")
    watched.page.locator(".walk a").first.click()
    watched.heading("Evaluation before training")


def test_tokens_are_read_with_the_arrow_keys(watched: Watched) -> None:
    watched.go(f"{STEP}/group/1/3")
    assert watched.page.locator("#token-list .token").count() == 2000
    watched.page.locator("#token-list").focus()
    watched.key("ArrowRight", "ArrowRight", "ArrowRight")
    inspector = watched.page.locator("#inspector")
    inspector.get_by_text("sampler logprob").wait_for()
    assert re.search(r"Id\s+3\b", inspector.inner_text())
    watched.page.get_by_role("link", name="next tokens").click()
    watched.page.get_by_text("tokens 2,001 to 2,500 of 2,500").wait_for()
    assert watched.page.locator("#token-list .token").count() == 500


def test_tokens_are_coloured_by_what_the_learner_stored(watched: Watched) -> None:
    watched.go(f"{STEP}/group/0/1")
    assert watched.page.locator("#color").input_value() == "advantage"
    assert watched.page.locator(".legend .token").all_inner_texts() == ["-1", "0", "1"]
    assert watched.page.locator("#token-list .minus").count() == 9  # from -1 to -3/19
    assert watched.page.locator("#token-list .masked").count() == 10
    watched.page.locator("#color").select_option("difference")
    watched.page.get_by_text("learner's minus sampler's logprob").wait_for()
    assert watched.page.locator("#token-list .minus").count() == 18  # -i/19; 0 and -1/19 have no colour to speak of
    watched.page.locator("#color").select_option("importance weight")
    watched.page.get_by_text("weight of the token in the loss").wait_for()
    watched.page.locator("#token-list").focus()
    watched.key("End")
    watched.page.locator("#inspector", has_text="importance weight").wait_for()
    values = watched.page.locator("#inspector dd").all_inner_texts()
    assert values[:2] == ["19", "19"]
    assert {"-1", "1", "2"} <= set(values[2:])
    watched.go(f"{STEP}/group/0/2")
    assert "Not recorded: learner logprob" in watched.page.locator("#absent summary").inner_text()


def test_each_token_is_shown_by_what_it_is(watched: Watched) -> None:
    """Spaces, line ends, controls and special tokens are marks; ids stand for tokens without a text."""
    watched.go(f"{STEP}/group/0/0")
    tokens = watched.page.locator("#token-list .token")
    assert tokens.all_inner_texts()[:8] == ["<b>", "·a", "↵\n", "RLO", "ESC", "⇥\t", "<|end|>", "7"]
    assert watched.page.locator("#token-list .special").all_inner_texts() == ["<|end|>"]
    tokens.nth(3).hover()
    inspector = watched.page.locator("#inspector")
    assert '"\\u{202e}"' in inspector.inner_text()
    assert inspector.inner_html().count("\u202e") == 0


def test_a_curve_names_its_metric_and_has_a_text_alternative(watched: Watched) -> None:
    watched.go("#/run/0")
    constant = watched.page.locator("#glance figure", has_text="completion/truncated_fraction")
    assert constant.locator(".middle").inner_text() == "0.25"  # beside its line, not at the bottom
    image = watched.page.locator("#glance svg").first
    assert image.get_attribute("aria-label") == "reward/mean: last 0.7 at step 10, minimum 0.25, maximum 0.7"
    name = watched.page.locator("#glance .name").first
    name.focus()
    tip = watched.page.locator("#glance [role=tooltip]").first
    assert tip.is_visible()
    assert "rewards of the scored rollouts" in tip.inner_text()
    watched.key("ArrowLeft")
    assert watched.page.locator("#glance .value").first.inner_text() == "0.65 · step 9"
    assert "Step 9: 1,000 uses" in watched.page.locator("#waterfall caption").inner_text()
    watched.page.locator("#curve-filter").fill("entropy")
    assert watched.page.locator("#curves .chart:visible").count() == 1


def test_a_run_that_trains_is_refreshed_in_place(watched: Watched, served: Served) -> None:
    watched.go("#/run/2")
    watched.page.locator("#option-filter").evaluate("one => { one.closest('details').open = true; }")
    watched.page.locator("#option-filter").fill("entropy_coef")
    watched.page.evaluate("scrollTo(0, 700)")
    add_step(served.folder / "trains", 4, broken=False)
    watched.page.locator("#samples a", has_text="4").wait_for(state="attached", timeout=20000)
    assert watched.focused() == "option-filter"
    assert watched.page.locator("#option-filter").input_value() == "entropy_coef"
    assert watched.page.locator("#every-option tr:visible").count() == 2
    assert watched.page.evaluate("scrollY") == 700


def test_an_address_that_is_opened_while_the_first_page_loads_stays(browser: Any, served: Served) -> None:
    with browser.new_context() as context:
        opened = Watched(context)
        held: list[Any] = []
        opened.page.route("**/api/runs", lambda route: route.continue_() if held else held.append(route))
        opened.page.goto(served.url)
        opened.page.locator("#theme[aria-label]").wait_for()
        opened.page.evaluate("location.hash = '#/run/0'")
        opened.heading("learns")
        held[0].continue_()
        opened.page.locator("#live", has_text="live").wait_for()
        assert opened.hash() == "/run/0"


def test_a_server_that_has_ended_is_reported(watched: Watched) -> None:
    watched.page.route("**/api/**", lambda route: route.abort())
    watched.page.locator("#live.lost").wait_for(timeout=20000)
    watched.page.evaluate("location.hash = '#/run/0'")
    watched.heading("Not shown")
    assert "The server does not answer" in watched.page.locator(".problem").inner_text()
    watched.page.unroute("**/api/**")
    watched.page.get_by_role("button", name="Try again").click()
    watched.heading("learns")


def test_a_page_in_one_file(browser: Any, served: Served, tmp_path: Path) -> None:
    """Opened from the disk, without a server."""
    file = tmp_path / "run.html"
    command = [sys.executable, "-m", "grpo", "view", str(served.folder / "a <b>bold"), "--html", str(file)]
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    with browser.new_context(viewport={"width": 390, "height": 800}) as context:
        opened = Watched(context)
        opened.page.goto(file.as_uri())
        opened.heading("")
        assert opened.page.evaluate(CHECKS) == []
        for address in ("#/", "#/run/0"):
            opened.go(address)
            assert opened.page.evaluate(CHECKS) == []
        opened.page.locator("#samples a").last.click()
        opened.page.locator("#groups th a").nth(1).click()
        opened.heading("Group 1")
        assert opened.page.evaluate(CHECKS) == []
        assert opened.page.locator("#find").is_hidden()
        assert opened.errors == []
        assert opened.page.evaluate("window.hacked") is None
        assert {url for url in opened.requests if not url.startswith("data:")} == {file.as_uri()}
