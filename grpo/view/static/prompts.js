// Prompts of a run, and one prompt over its steps.
import { get, runInfo } from "./api.js";
import { cursor, curve } from "./chart.js";
import { empty, facts, field, h, link, section, select, table, tableRow } from "./dom.js";
import { brief, number, oneLine, plural, signed, textBlock, visible } from "./format.js";
import { pager } from "./pager.js";
import { groupHash, promptHash, runHash, setQuery } from "./routes.js";
import { stepName } from "./step.js";

const PROMPTS = 100;
const LIST = [
  { label: "Prompt" },
  { label: "Data set" },
  { label: "Groups", number: true },
  { label: "First mean", number: true },
  { label: "Last mean", number: true },
  { label: "Change", number: true },
];
const SORT = [
  ["", "id"],
  ["change", "change"],
  ["first", "first mean"],
  ["last", "last mean"],
  ["groups", "groups"],
  ["dataset", "data set"],
];

export async function promptsPage({ parts: [, run], query }) {
  const [info, answer] = await Promise.all([runInfo(run), get(`/api/runs/${run}/prompts`, query)]);
  const search = field("prompt-search", "Prompt or id contains", query.search ?? "", { type: "search", wide: true });
  const rows = answer.prompts.map((one) =>
    tableRow(LIST, [
      link(
        promptHash(run, one.prompt_id),
        { "data-item": true, class: "prompt", dir: "auto", title: oneLine(one.prompt_id) },
        oneLine(one.prompt),
      ),
      one.dataset,
      number(one.groups),
      number(one.first_mean, 3),
      number(one.last_mean, 3),
      change(one.change),
    ]),
  );
  return {
    title: `Prompts · ${info.name}`,
    live: true,
    run,
    up: runHash(run),
    crumbs: [
      [runHash(run), info.name],
      [null, "Prompts"],
    ],
    body: [
      h("h1", null, "Prompts"),
      h(
        "p",
        { class: "lead" },
        `${plural(answer.total, "prompt")}. Means are rewards of the first and the last group of a prompt.`,
      ),
      h(
        "form",
        {
          class: "bar",
          on: {
            submit: (event) => {
              event.preventDefault();
              setQuery({ search: search.querySelector("input").value, offset: null });
            },
          },
        },
        search,
        h("button", { type: "submit" }, "Search"),
        select("prompt-sort", "Sort by", query.sort ?? "", SORT, (value) => setQuery({ sort: value, offset: null })),
        select(
          "prompt-order",
          "Order",
          query.order ?? "",
          [
            ["", "low first"],
            ["desc", "high first"],
          ],
          (value) => setQuery({ order: value, offset: null }),
        ),
      ),
      rows.length
        ? table("prompts", "Prompts", LIST, rows)
        : query.search
          ? empty("No prompt matches.", "Search for a part of its text or of its id.")
          : empty("No prompts yet.", "A samples file is written after each step."),
      pager("prompts", query, PROMPTS, rows.length, answer.total),
    ],
  };
}

function change(value) {
  if (value === null || value === undefined) return "–";
  const mark = value > 0 ? "▲ " : value < 0 ? "▼ " : "= ";
  return h("span", { class: value > 0 ? "up" : value < 0 ? "down" : "" }, `${mark}${signed(value)}`);
}

const SEEN = [
  { label: "Step" },
  { label: "Mean", number: true },
  { label: "Completions", number: true },
  { label: "Failed", number: true },
  { label: "Tokens", number: true },
  { label: "Answers, most frequent first" },
];

export async function promptPage({ parts: [, run, , id] }) {
  const [info, answer] = await Promise.all([runInfo(run), get(`/api/runs/${run}/prompts/one`, { id })]);
  const trained = answer.occurrences.filter((one) => one.file.startsWith("step"));
  const shared = cursor(
    trained.map((one) => one.step),
    (step) => {
      const one = trained.find((some) => some.step === step);
      if (one) location.hash = groupHash(run, one.file, one.group) ?? location.hash;
    },
  );
  const rows = answer.occurrences.map((one) =>
    tableRow(SEEN, [
      link(groupHash(run, one.file, one.group), { "data-item": true }, stepName(one.file)),
      number(one.mean, 3),
      number(one.n),
      number(one.failed),
      number(one.length_mean, 3),
      h(
        "ul",
        { class: "answers" },
        one.answers.map((some) =>
          h(
            "li",
            { class: some.answer && some.answer === answer.gold ? "right" : "" },
            h("b", { dir: "auto" }, !some.answer ? h("em", null, "nothing") : visible(some.answer.slice(0, 80))),
            ` ×${some.count}`,
            h(
              "small",
              null,
              ` reward ${number(some.mean_reward, 2)}${some.answer && some.answer === answer.gold ? ", = gold" : ""}`,
            ),
          ),
        ),
      ),
    ]),
  );
  return {
    title: `Prompt ${oneLine(id)} · ${info.name}`,
    live: true,
    run,
    up: `#/run/${run}/prompts`,
    crumbs: [
      [runHash(run), info.name],
      [promptsHref(run), "Prompts"],
      [null, oneLine(id)],
    ],
    body: [
      h("h1", { class: "path" }, oneLine(id)),
      facts([["Gold", answer.gold === null ? null : h("b", { dir: "auto" }, brief(answer.gold))]]),
      section("prompt", "Prompt", textBlock("Text of the prompt", answer.prompt)),
      trained.length > 1 &&
        section(
          "success",
          "Over the steps",
          h(
            "div",
            { class: "grid" },
            curve(
              shared,
              "mean reward",
              "Mean reward of the prompt's group in each step that drew it.",
              trained.map((one) => one.mean),
            ),
            curve(
              shared,
              "completion tokens",
              "Mean number of sampled tokens.",
              trained.map((one) => one.length_mean),
            ),
            curve(
              shared,
              "different answers",
              "Number of different answers that were listed: few and wrong means that the policy settled on a wrong answer.",
              trained.map((one) => one.answers.length),
            ),
          ),
        ),
      section(
        "seen",
        "Groups of this prompt",
        rows.length
          ? table("occurrences", "Groups of this prompt", SEEN, rows)
          : empty("No step has drawn this prompt."),
      ),
    ],
  };
}

function promptsHref(run) {
  return `#/run/${run}/prompts`;
}
