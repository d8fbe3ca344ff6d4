// The completions of one file: groups as rows, completions as cells coloured by reward.
import { address, get, offline, runInfo } from "./api.js";
import { empty, field, h, link, select } from "./dom.js";
import { MISSING, number, oneLine, plural, sentence, short } from "./format.js";
import { pager } from "./pager.js";
import { completionHash, fileHash, groupHash, runHash, samplesPath, setQuery } from "./routes.js";

const PAGE = 100;

// Return how a samples file is called.
export function stepName(file) {
  const [kind, digits] = file.split("-");
  if (!digits) return `Evaluation ${file}`; // a folder of grpo eval
  if (kind !== "eval") return `Step ${Number(digits)}`;
  return Number(digits) ? `Evaluation after step ${Number(digits)}` : "Evaluation before training";
}

// Return whether the completions of a samples file are trained on.
export function isStep(file) {
  return file.startsWith("step");
}

const SORTS = [
  ["", "file order"],
  ["spread", "spread"],
  ["mean", "mean reward"],
  ["length", "length"],
  ["failed", "failures"],
  ["dataset", "data set"],
];

export async function stepPage({ parts: [, run, , file], query }) {
  const [info, answer] = await Promise.all([runInfo(run), page(run, file, query)]);
  const files = info.files.filter((one) => one.kind === (isStep(file) ? "step" : "eval"));
  const at = files.findIndex((one) => one.file === file);
  const near = (by) =>
    files[at + by]
      ? fileHash(run, files[at + by].file, { filter: query.filter, sort: query.sort, order: query.order })
      : null;
  const title = stepName(file);
  return {
    title: `${title} · ${info.name}`,
    live: at === files.length - 1,
    run,
    up: runHash(run),
    previous: near(-1),
    next: near(1),
    crumbs: [
      [runHash(run), info.name],
      [null, title],
    ],
    body: [
      h("header", { class: "head" }, h("h1", null, title), walk(near(-1), near(1), isStep(file) ? "step" : "evaluation")),
      answer.total_rows !== undefined && h("p", { class: "lead" }, count(answer, query)),
      !offline && bar(run, file, query, answer),
      answer.problem && h("p", { class: "problem", role: "alert" }, answer.problem),
      ...groups(run, file, query, answer),
    ],
  };
}

// A filter that cannot be read leaves the page as it is: the sentence of the server stands under the field.
async function page(run, file, query) {
  try {
    return await get(samplesPath(run, file), { ...query, limit: null });
  } catch (error) {
    if (error.status !== 400 || !query.filter) throw error;
    return {
      groups: [],
      refused: error,
      columns: [],
      reward_range: [0, 1],
      total_groups: 0,
      matching_groups: 0,
    };
  }
}

// Return links to the previous and the next page of its kind.
export function walk(previous, next, what) {
  return h(
    "nav",
    { class: "walk", "aria-label": `Previous and next ${what}` },
    previous
      ? h("a", { href: previous, rel: "prev", title: "[" }, `← previous ${what}`)
      : h("span", { class: "muted" }, "first"),
    next ? h("a", { href: next, rel: "next", title: "]" }, `next ${what} →`) : h("span", { class: "muted" }, "last"),
  );
}

function count(answer, query) {
  const all = `${plural(answer.total_groups, "group")}, ${plural(answer.total_rows, "completion")}`;
  if (!query.filter) return `${all}. One row is a prompt with its completions; a cell is the reward of one completion.`;
  return `${plural(answer.matching_rows, "completion")} in ${plural(answer.matching_groups, "group")} match; the file has ${all}.`;
}

function bar(run, file, query, answer) {
  const input = field("filter", "Filter", query.filter ?? "", {
    wide: true,
    placeholder: 'reward < 0.5 and finish_reason == "length"',
    "aria-describedby": "filter-help filter-error",
    "aria-invalid": answer.refused ? "true" : null,
  });
  const text = () => input.querySelector("input").value.trim();
  return h(
    "form",
    {
      class: "bar",
      on: {
        submit: (event) => {
          event.preventDefault();
          setQuery({ filter: text(), offset: null });
        },
      },
    },
    input,
    h("button", { type: "submit" }, "Filter"),
    query.filter &&
      h("button", { type: "button", on: { click: () => setQuery({ filter: null, offset: null }) } }, "Clear"),
    select("sort", "Sort by", query.sort ?? "", SORTS, (value) => setQuery({ sort: value, offset: null })),
    select(
      "order",
      "Order",
      query.order ?? "",
      [
        ["", "low first"],
        ["desc", "high first"],
      ],
      (value) => setQuery({ order: value, offset: null }),
    ),
    h(
      "a",
      {
        class: "button",
        id: "export",
        href: address("/api/export", { run, file, filter: query.filter }),
        download: `${file}.jsonl`,
      },
      "Export JSONL",
    ),
    h(
      "p",
      { class: "refused", id: "filter-error", role: "alert" },
      answer.refused && refusal(answer.refused, query.filter),
    ),
    h(
      "details",
      { class: "filter-help", id: "filter-details" },
      h("summary", { id: "filter-help" }, "Filter language"),
      language(answer.columns),
    ),
  );
}

function refusal(error, text) {
  if (error.position === null) return sentence(error.message);
  return [
    sentence(error.message),
    h(
      "code",
      null,
      text.slice(0, error.position),
      h("u", null, text.slice(error.position, error.position + 1) || " "),
      text.slice(error.position + 1),
    ),
  ];
}

const EXAMPLES = [
  ["reward < 0.5", "completions with a low reward"],
  ["failed is null", "completions that were scored"],
  ['completion contains "therefore"', "text"],
  ['finish_reason in ("length", "aborted")', "one of several values"],
  ["spread == 0", "groups whose rewards are all equal"],
  ["length > 100 and not reward == 1", "number of tokens; and, or, not, parentheses"],
];

function language(columns) {
  return h(
    "div",
    null,
    h(
      "dl",
      { class: "examples" },
      EXAMPLES.map(([text, meaning]) => h("div", null, h("dt", null, h("code", null, text)), h("dd", null, meaning))),
    ),
    columns.length > 0 &&
      h(
        "p",
        null,
        "Columns: ",
        columns.map((column, i) => [
          i ? ", " : "",
          h("code", { title: `${column.type}. ${column.doc ?? ""}` }, column.name),
        ]),
      ),
  );
}

function groups(run, file, query, answer) {
  if (answer.refused) return [];
  if (answer.groups.length === 0) {
    return [
      answer.total_groups
        ? empty("No completion matches the filter.", "Clear it, or loosen a comparison.")
        : empty("This file has no completions.", "Each group of the step was dropped before it was scored."),
    ];
  }
  return [
    legend(answer.reward_range),
    groupTable(run, file, answer),
    pager("groups", query, PAGE, answer.groups.length, answer.matching_groups),
  ];
}

function legend([low, high]) {
  if (low === null || low === undefined) return null;
  const steps = low === high ? [low] : [0, 0.25, 0.5, 0.75, 1].map((share) => low + share * (high - low));
  return h(
    "ul",
    { class: "legend", "aria-label": "Legend of the cells" },
    h("li", null, "reward"),
    steps.map((value) =>
      h("li", null, h("span", { class: "cell", style: { "--p": place(value, [low, high]) } }, short(value))),
    ),
    h("li", null, h("span", { class: "cell failed" }, "✕"), " failed"),
    h(
      "li",
      null,
      h("span", { class: "cell cut", style: { "--p": "50%" } }, short((low + high) / 2)),
      " truncated by max_tokens",
    ),
  );
}

// Return where a reward lies between the least and the greatest of the file.
export function place(value, [low, high]) {
  if (value === null || value === undefined) return "50%";
  return high === low ? (value > 0 ? "100%" : "0%") : `${(100 * (value - low)) / (high - low)}%`;
}

const HEADS = [
  ["Prompt", "words"],
  ["Gold", "answer"],
  ["Mean", "figure"],
  ["Spread", "figure"],
  ["Tokens", "figure"],
  ["Completions", "cells-of"],
];

function groupTable(run, file, answer) {
  const most = Math.max(...answer.groups.map((group) => group.cells.length));
  return h(
    "table",
    { class: "groups", id: "groups", style: { "--cells": Math.min(most, 16) } },
    h("caption", { class: "hidden" }, "Groups of the step, one a row"),
    h(
      "colgroup",
      null,
      HEADS.map(([, kind]) => h("col", { class: kind })),
    ),
    h(
      "thead",
      null,
      h(
        "tr",
        null,
        HEADS.map(([name, kind]) => h("th", { scope: "col", class: kind === "figure" && "number" }, name)),
      ),
    ),
    h(
      "tbody",
      null,
      answer.groups.map((group) => groupRow(run, file, group, answer.reward_range)),
    ),
  );
}

function groupRow(run, file, group, range) {
  const spread =
    group.spread === 0 && isStep(file)
      ? h(
          "span",
          { class: "chip warn", title: "All rewards of the group are equal: it gives no policy gradient" },
          "none",
        )
      : number(group.spread, 2);
  const title = `${group.dataset}, group ${group.group}${group.failed ? `, ${group.failed} failed` : ""}`;
  return h(
    "tr",
    { "data-row": true },
    h(
      "th",
      { scope: "row" },
      link(
        groupHash(run, file, group.group),
        { class: "prompt", "data-item": true, dir: "auto", title },
        oneLine(group.prompt) || "empty prompt",
      ),
    ),
    h(
      "td",
      { "data-label": "gold" },
      h("span", { class: "gold", dir: "auto" }, group.gold === null ? MISSING : oneLine(group.gold)),
    ),
    h("td", { class: "number", "data-label": "mean" }, number(group.mean, 3)),
    h("td", { class: "number", "data-label": "spread" }, spread),
    h("td", { class: "number", "data-label": "tokens" }, number(group.length_mean, 3)),
    h(
      "td",
      { class: "wide" },
      h(
        "div",
        { class: "cells" },
        group.cells.map((one) => cell(run, file, group.group, one, range)),
      ),
    ),
  );
}

function cell(run, file, group, one, range) {
  const cut = one.finish_reason === "length";
  const text = one.failed ? "✕" : one.reward === null ? MISSING : short(one.reward);
  const words = [
    `completion ${one.index}`,
    one.failed ? `failed: ${one.failed}` : `reward ${number(one.reward)}`,
    `${number(one.length)} tokens`,
    cut && "truncated",
    one.advantage !== null && `advantage ${number(one.advantage, 3)}`,
  ]
    .filter(Boolean)
    .join(", ");
  return link(
    completionHash(run, file, group, one.index),
    {
      class: `cell${one.failed ? " failed" : ""}${cut ? " cut" : ""}${one.matches === false ? " other" : ""}`,
      tabindex: "-1",
      title: words,
      "aria-label": `${text}, ${words}`, // speech control needs the words that are seen
      style: { "--p": place(one.reward, range) },
    },
    text,
  );
}
