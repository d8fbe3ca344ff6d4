// The keyboard: moving between entries and pages, and the help that lists the keys.
import { offline } from "./api.js";
import { h } from "./dom.js";

const KEYS = [
  ["j  k", "next, previous entry"],
  ["← →", "within a row of completions, or between tokens"],
  ["Enter", "open"],
  ["u  Backspace", "up one level"],
  ["[  ]", "previous, next step, group or completion"],
  ["/", "search"],
  ["f", "filter of the page"],
  ["t", "theme: auto, light, dark"],
  ["Esc", "leave a field"],
  ["?", "this help"],
];

// Listen for keys. page: () -> the shown page with its up, previous and next.
export function keyboard(main, page, nextTheme) {
  const help = document.getElementById("help");
  const close = h("button", { type: "button", id: "help-close", on: { click: () => help.close() } }, "Close");
  help.append(
    h("h2", { id: "help-title" }, "Keyboard"),
    h(
      "table",
      null,
      h("caption", { class: "hidden" }, "Keys"),
      h(
        "thead",
        { class: "hidden" },
        h("tr", null, h("th", { scope: "col" }, "Key"), h("th", { scope: "col" }, "What it does")),
      ),
      h(
        "tbody",
        null,
        KEYS.map(([keys, meaning]) =>
          h(
            "tr",
            null,
            h(
              "th",
              { scope: "row" },
              keys.split("  ").map((key, i) => [i ? " " : "", h("kbd", null, key)]),
            ),
            h("td", null, meaning),
          ),
        ),
      ),
    ),
    close,
  );
  document.getElementById("help-open").addEventListener("click", () => help.showModal());
  const actions = {
    j: () => step(main, 1),
    k: () => step(main, -1),
    t: nextTheme,
    ArrowRight: () => aside(1),
    ArrowLeft: () => aside(-1),
    l: () => aside(1),
    h: () => aside(-1),
    u: () => go(page().up),
    Backspace: () => go(page().up),
    "[": () => go(page().previous),
    "]": () => go(page().next),
    "/": () => focus(offline ? main.querySelector("input[type=search]") : searchField(main)),
    f: () => focus(main.querySelector("#filter, #curve-filter, #prompt-search, #q")),
    "?": () => (help.showModal(), true),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || help.open) return;
    if (event.target.closest("input:not([type=range]), select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (actions[event.key]?.()) event.preventDefault();
  });
}

function go(href) {
  if (!href) return false;
  location.hash = href;
  return true;
}

function focus(element) {
  if (!element) return false;
  element.focus();
  element.select?.();
  return true;
}

function step(main, by) {
  const items = [...main.querySelectorAll("[data-item]")].filter((one) => one.checkVisibility());
  if (items.length === 0) return false;
  const active = document.activeElement;
  let at = items.indexOf(active.closest("[data-row]")?.querySelector("[data-item]") ?? active);
  if (at < 0) at = by > 0 ? firstBelow(items) - 1 : items.length;
  const next = items[Math.max(0, Math.min(items.length - 1, at + by))];
  next.focus();
  next.scrollIntoView({ block: "nearest" });
  return true;
}

// Return the first entry that is not above the window, so that j begins where the reader looks.
function firstBelow(items) {
  const at = items.findIndex((one) => one.getBoundingClientRect().top > 60);
  return at < 0 ? 0 : at;
}

function aside(by) {
  const row = document.activeElement.closest?.("[data-row]");
  if (!row) return false;
  const links = [...row.querySelectorAll("a")];
  links[Math.max(0, Math.min(links.length - 1, links.indexOf(document.activeElement) + by))].focus();
  return true;
}

// Return the field of the header; in a narrow window, which hides it, that of the page of searches.
function searchField(main) {
  const field = document.getElementById("find-text");
  if (field.checkVisibility()) return field;
  if (!main.querySelector("#q")) location.hash = "#/search";
  return main.querySelector("#q");
}
