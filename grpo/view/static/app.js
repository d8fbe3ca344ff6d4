// Routes, navigation, refreshing while a run trains, theme.
import { address, forgetRuns, get, offline, start } from "./api.js";
import { comparePage } from "./compare.js";
import { completionPage } from "./completion.js";
import { empty, h, link } from "./dom.js";
import { groupPage } from "./group.js";
import { oneLine, sentence } from "./format.js";
import { keyboard } from "./keys.js";
import { keep, restore } from "./keep.js";
import { promptPage, promptsPage } from "./prompts.js";
import { parseHash } from "./routes.js";
import { runPage } from "./run.js";
import { runsPage } from "./runs.js";
import { searchPage } from "./search.js";
import { stepPage } from "./step.js";

const POLL_MS = 3000;
const main = document.getElementById("main");
const live = document.getElementById("live");
const places = new Map();
let current = { title: "", up: null };
let shownPath = null;
let shownHash = null;
let shownOffset;
let ticket = 0;
let seen = null;

function choose({ parts }) {
  const [first, , third, , fifth] = parts;
  if (parts.length === 0) return runsPage;
  if (first === "compare") return comparePage;
  if (first === "search") return searchPage;
  if (first !== "run") return missingPage;
  if (parts.length === 2) return runPage;
  if (third === "prompts") return promptsPage;
  if (third === "prompt" && parts.length === 4) return promptPage;
  if (third === "step" && parts.length === 4) return stepPage;
  if (third === "step" && fifth === "group") return { 6: groupPage, 7: completionPage }[parts.length] ?? missingPage;
  return missingPage;
}

async function missingPage() {
  return {
    title: "No such page",
    up: "#/",
    body: [
      h("h1", null, "No such page"),
      empty("This address belongs to no page.", "The list of runs is the way to all of them."),
      link("#/", null, "Runs"),
    ],
  };
}

function errorPage(error) {
  return {
    title: "Not shown",
    up: "#/",
    body: [
      h("h1", null, "Not shown"),
      h("p", { class: "problem", role: "alert" }, sentence(error.message)),
      h(
        "p",
        null,
        h("button", { type: "button", on: { click: () => show("same") } }, "Try again"),
        " ",
        link("#/", null, "Runs"),
      ),
    ],
  };
}

// Show the page of the address. how: "new" after following a link, "same" for another state of the page, "refresh" when
// the run has changed: what was typed, opened, focused and scrolled to stays.
async function show(how) {
  const route = parseHash(location.hash);
  const mine = (ticket += 1);
  const slow = setTimeout(() => {
    main.setAttribute("aria-busy", "true");
    if (!main.childElementCount) main.append(h("p", { class: "empty" }, "Loading …"));
  }, 150);
  let page;
  try {
    page = await choose(route)(route);
  } catch (error) {
    if (how === "refresh" && mine === ticket) {
      state("lost", "no answer");
      clearTimeout(slow);
      return;
    }
    if (!(error.status >= 0)) console.error(error);
    page = errorPage(error);
  }
  clearTimeout(slow);
  if (mine !== ticket) return;
  const kept = keep(main);
  if (how === "new" && shownHash !== null) places.set(shownHash, kept);
  current = page;
  shownHash = location.hash;
  shownPath = route.parts.join("/");
  const turned = route.query.offset !== shownOffset;
  shownOffset = route.query.offset;
  main.removeAttribute("aria-busy");
  main.replaceChildren(...page.body.flat(9).filter((part) => part instanceof Node));
  document.title = `${oneLine(page.title)} · grpo view`;
  crumbs(page, route);
  if (how !== "new") {
    restore(main, kept, how === "refresh");
    if (turned) scrollTo(0, 0);
  } else if (places.has(shownHash)) restore(main, places.get(shownHash), false);
  else {
    scrollTo(0, 0);
    if (places.size) main.focus({ preventScroll: true });
  }
}

function crumbs(page, route) {
  const entries = [["#/", "Runs"], ...(page.crumbs ?? (page.up ? [[null, page.title]] : []))];
  document.getElementById("crumbs").replaceChildren(
    h(
      "ol",
      null,
      entries.map(([href, text], i) =>
        h(
          "li",
          null,
          href && i < entries.length - 1
            ? h("a", { href }, oneLine(text))
            : h("span", { "aria-current": "page" }, oneLine(text)),
        ),
      ),
    ),
  );
  const run = page.run ?? route.query.a ?? route.query.run ?? null;
  const tabs = [
    run !== null && [`#/run/${run}`, "Overview"],
    run !== null && !offline && [`#/run/${run}/prompts`, "Prompts"],
    !offline && [run === null ? "#/compare" : `#/compare?a=${run}`, "Compare"],
    !offline && [run === null ? "#/search" : `#/search?run=${run}`, "Search"],
  ].filter(Boolean);
  const here = location.hash.split("?")[0];
  document
    .getElementById("sections")
    .replaceChildren(
      ...tabs.map(([href, text]) =>
        h("a", { href, "aria-current": href.split("?")[0] === here ? "page" : null }, text),
      ),
    );
}

function state(kind, text) {
  if (live.textContent === text) return;
  live.className = kind;
  live.textContent = text;
}

async function poll() {
  if (document.hidden) return;
  try {
    const { runs } = await get("/api/runs");
    const running = runs.some((run) => run.state === "running");
    state(running ? "running" : "still", running ? "live" : "no run trains");
    const now = Object.fromEntries(runs.map((run) => [run.run, run.changed]));
    const moved = Object.keys(now).filter((run) => seen !== null && now[run] !== seen[run]);
    seen = now;
    if (moved.length === 0) return;
    forgetRuns();
    if (current.live && (current.run === undefined || moved.includes(current.run))) await show("refresh");
  } catch (error) {
    state("lost", error.status === 401 ? "token refused" : "no answer");
  }
}

const THEMES = ["auto", "light", "dark"];
const themeButton = document.getElementById("theme");

function theme(name) {
  document.documentElement.dataset.theme = name;
  themeButton.textContent = { auto: "◐", light: "○", dark: "●" }[name];
  themeButton.setAttribute("aria-label", `Theme: ${name}`);
  themeButton.title = `Theme: ${name} (t)`;
  try {
    localStorage.setItem("grpo-view-theme", name);
  } catch {
    /* a browser without storage forgets the choice */
  }
}

function savedTheme() {
  try {
    return THEMES.find((name) => name === localStorage.getItem("grpo-view-theme")) ?? "auto";
  } catch {
    return "auto";
  }
}

function nextTheme() {
  theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
}

async function begin() {
  theme(savedTheme());
  themeButton.addEventListener("click", nextTheme);
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  keyboard(main, () => current, nextTheme);
  const find = document.getElementById("find");
  find.hidden = offline;
  find.addEventListener("submit", (event) => {
    event.preventDefault();
    location.hash = address("#/search", { run: current.run, q: document.getElementById("find-text").value });
  });
  addEventListener("hashchange", () => show(parseHash(location.hash).parts.join("/") === shownPath ? "same" : "new"));
  const first = location.hash || (start ?? (await only()));
  if (!location.hash) history.replaceState(null, "", first); // not if a link was followed meanwhile
  await show("new");
  if (offline) state("still", "saved page");
  else {
    await poll();
    setInterval(poll, POLL_MS);
  }
}

// Return the address of the only run, or of the list.
async function only() {
  const answer = await get("/api/runs").catch(() => ({ runs: [] }));
  return answer.runs.length === 1 ? `#/run/${answer.runs[0].run}` : "#/";
}

begin();
