// Numbers, shares and texts as the page writes them.
import { h } from "./dom.js";

export const MISSING = "–";

// Return a number in at most `digits` significant digits.
export function number(value, digits = 4) {
  if (value === null || value === undefined) return MISSING;
  if (typeof value !== "number") return String(value);
  if (value === 0) return "0"; // not -0
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en-US");
  if (size !== 0 && (size < 1e-3 || size >= 1e7))
    return value.toExponential(Math.min(2, digits - 1)).replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

// Return a difference with its sign.
export function signed(value) {
  return `${value > 0 ? "+" : value < 0 ? "−" : ""}${number(Math.abs(value), 3)}`;
}

// Return a reward for a narrow cell: 1, .67, -.5, 12.3.
export function short(value) {
  if (value === null || value === undefined) return MISSING;
  const text = Math.abs(value) >= 10 ? value.toFixed(0) : String(Number(value.toFixed(2)));
  return text.replace(/^(-?)0\./, "$1.").replace(/^-/, "−");
}

export function percent(value) {
  if (value === null || value === undefined) return MISSING;
  return `${Number((100 * value).toFixed(1))} %`;
}

export function percentPoints(value) {
  const text = (100 * Math.abs(value)).toFixed(1);
  return `${value < 0 ? "−" : "+"}${text} points`;
}

export function seconds(value) {
  if (value === null || value === undefined) return MISSING;
  if (value < 1) return `${number(1000 * value, 3)} ms`;
  if (value < 120) return `${number(value, 3)} s`;
  if (value < 7200) return `${(value / 60).toFixed(1)} min`;
  return `${(value / 3600).toFixed(1)} h`;
}

export function plural(count, word) {
  return `${number(count)} ${word}${count === 1 ? "" : "s"}`;
}

// Return a value of an option or a row as text.
export function shown(value) {
  if (value === null || value === undefined) return "null";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// Return a value as YAML-like text for the options table.
export function interval(pair) {
  return pair ? `${percent(pair[0])} to ${percent(pair[1])}` : null;
}

const NAMED = {
  0x200b: "ZWSP",
  0x200c: "ZWNJ",
  0x200d: "ZWJ",
  0x2060: "WJ",
  0xfeff: "BOM",
  0xad: "SHY",
  0xa0: "NBSP",
  0x200e: "LRM",
  0x200f: "RLM",
  0x61c: "ALM",
  0x202a: "LRE",
  0x202b: "RLE",
  0x202c: "PDF",
  0x202d: "LRO",
  0x202e: "RLO",
  0x2066: "LRI",
  0x2067: "RLI",
  0x2068: "FSI",
  0x2069: "PDI",
  0x2028: "LS",
  0x2029: "PS",
  0x1b: "ESC",
  0x00: "NUL",
  0x7f: "DEL",
  0x0d: "CR",
  0xfffd: "INVALID",
  0x3164: "HF",
  0x115f: "HCF",
  0x1160: "HJF",
};
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u00a0\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202f\u205f-\u206f\u3164\ufe00-\ufe0f\ufeff\ufff0-\ufffd]|[\u{e0000}-\u{e01ef}]|[\ud800-\udfff]/gu;
const REPEATED = new RegExp(`(${HIDDEN.source})\\1*`, "gu");
const SPACED =
  /[\u0000-\u0020\u007f-\u00a0\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202f\u205f-\u206f\u3164\ufe00-\ufe0f\ufeff\ufff0-\ufffd]|[\u{e0000}-\u{e01ef}]|[\ud800-\udfff]/gu;

// Return the nodes of a text in which invisible, control and bidi characters are marks that can be seen.
// spaces: also mark spaces, tabs and line ends (the token view).
export function visible(text, spaces = false) {
  const nodes = [];
  let last = 0;
  for (const found of text.matchAll(spaces ? SPACED : REPEATED)) {
    if (found.index > last) nodes.push(document.createTextNode(text.slice(last, found.index)));
    nodes.push(mark(found[0].codePointAt(0), spaces ? 1 : [...found[0]].length));
    last = found.index + found[0].length;
  }
  if (last < text.length) nodes.push(document.createTextNode(text.slice(last)));
  return nodes;
}

function mark(code, count) {
  if (code === 0x20) return h("span", { class: "space" }, "·");
  if (code === 0x09) return h("span", { class: "space" }, "⇥\t");
  if (code === 0x0a) return h("span", { class: "space" }, "↵\n");
  const point = `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
  const times = count > 1 ? `×${count}` : "";
  return h("span", { class: "mark", title: `${point}: not visible` }, `${NAMED[code] ?? point}${times}`);
}

// Return a sentence of the server: it begins with a capital, and names in backquotes are code.
export function sentence(text) {
  const parts = (text.charAt(0).toUpperCase() + text.slice(1)).split("`");
  return parts.map((part, i) => (i % 2 ? h("code", null, part) : part));
}

// Return the first characters (code points) of a text, and the rest.
export function splitAt(text, count) {
  let at = 0;
  for (let i = 0; i < count && at < text.length; i += 1) at += text.codePointAt(at) > 0xffff ? 2 : 1;
  return [text.slice(0, at), text.slice(at)];
}

// Return a text in one line, for names and titles: line ends are ⏎, other characters that are not visible are �.
export function oneLine(text) {
  return String(text ?? "")
    .replace(/\s*[\n\r]\s*/g, " ⏎ ")
    .replace(/\t/g, " ")
    .replace(HIDDEN, "\ufffd");
}

// Return a text as a JSON string in which characters that are not visible are escaped.
export function escaped(text) {
  const escape = (found) => `\\u{${found.codePointAt(0).toString(16)}}`;
  return JSON.stringify(text).replace(HIDDEN, escape);
}

const LONGEST = 300;

// Return the nodes of a short text such as an answer. A long one is cut.
export function brief(text) {
  if (text.length <= LONGEST) return visible(text);
  return [visible(splitAt(text, LONGEST)[0]), h("em", null, ` … ${number(text.length)} characters`)];
}

const SHOWN_AT_FIRST = 5000;

// Return a block of text of a run: its own direction, line breaks kept, hidden characters shown. It scrolls. A long
// text is shown whole on demand. before: node in front of the text; cut: whether the server has cut the text.
export function textBlock(label, text, before = null, cut = false) {
  const block = h(
    "div",
    { class: "text clip", dir: "auto", tabindex: "0", role: "group", "aria-label": label },
    before,
  );
  const note = cut && h("em", null, ` … the text goes on after ${number([...text].length)} characters`);
  const [first, rest] = splitAt(text, SHOWN_AT_FIRST);
  const more = h("button", {
    type: "button",
    on: { click: () => (more.replaceWith(...visible(rest)), block.focus()) },
  });
  more.append(`… show ${number(rest.length)} more characters`);
  block.append(...(text === "" ? [h("em", null, "empty")] : visible(first)), ...(rest ? [more] : []), note || "");
  return block;
}
