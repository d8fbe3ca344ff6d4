// One group: its completions side by side from where they first differ.
import { get, runInfo } from "./api.js";
import { facts, h, link, section, select } from "./dom.js";
import { brief, number, oneLine, plural, short, shown, splitAt, textBlock } from "./format.js";
import { completionHash, fileHash, groupHash, promptHash, runHash, samplesPath, setQuery } from "./routes.js";
import { isStep, place, stepName, walk } from "./step.js";

export async function groupPage({ parts: [, run, , file, , group], query }) {
  const [info, answer] = await Promise.all([runInfo(run), get(`${samplesPath(run, file)}/groups/${group}`)]);
  const near = (to) => (to === null ? null : groupHash(run, file, to, query));
  const step = stepName(file);
  return {
    title: `Group ${group} · ${step} · ${info.name}`,
    run,
    up: fileHash(run, file),
    previous: near(answer.previous),
    next: near(answer.next),
    crumbs: [
      [runHash(run), info.name],
      [fileHash(run, file), step],
      [null, `Group ${group}`],
    ],
    body: [
      h(
        "header",
        { class: "head" },
        h("h1", null, `Group ${group}`),
        walk(near(answer.previous), near(answer.next), "group"),
      ),
      facts([
        ["Data set", answer.dataset],
        [
          "Prompt",
          link(promptHash(run, answer.prompt_id), { title: "This prompt over all steps" }, oneLine(answer.prompt_id)),
        ],
        ["Gold", answer.gold === null ? null : h("b", { dir: "auto" }, brief(answer.gold))],
      ]),
      section("prompt", "Prompt", textBlock("Text of the prompt", answer.prompt), dataRow(answer)),
      section(
        "completions",
        plural(answer.completions.length, "completion"),
        ...completions(info, file, answer, query),
      ),
    ],
  };
}

function dataRow(answer) {
  const fields = Object.entries(answer.row ?? {});
  if (fields.length === 0) return null;
  return h(
    "details",
    { id: "row" },
    h("summary", null, "Row of the data"),
    facts(fields.map(([name, value]) => [name, h("span", { dir: "auto" }, brief(shown(value)))])),
  );
}

const ORDERS = [
  ["", "index"],
  ["best", "highest reward"],
  ["worst", "lowest reward"],
  ["long", "longest"],
];
const COMPARE = {
  "": (a, b) => a.index - b.index,
  best: (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity),
  worst: (a, b) => (a.reward ?? -Infinity) - (b.reward ?? -Infinity),
  long: (a, b) => b.length - a.length,
};

function completions(info, file, answer, query) {
  const rewards = answer.completions.map((one) => one.reward).filter((value) => value !== null);
  const range = [Math.min(...rewards), Math.max(...rewards)];
  const shared = answer.common_prefix;
  const prefix = splitAt(answer.completions[0]?.text ?? "", shared)[0];
  const order = COMPARE[query.order] ?? COMPARE[""];
  const note =
    isStep(file) &&
    rewards.length > 1 &&
    range[0] === range[1] &&
    h(
      "p",
      { class: "problem" },
      `All rewards of this group are ${number(range[0])}. A group without spread gives no policy gradient.`,
    );
  return [
    note,
    h(
      "div",
      { class: "bar" },
      select("card-order", "Order by", query.order ?? "", ORDERS, (value) => setQuery({ order: value })),
    ),
    shared > 0 &&
      h(
        "details",
        { id: "shared", class: "shared" },
        h("summary", null, `All begin with the same ${plural(shared, "character")}`),
        textBlock("The same beginning", prefix),
      ),
    h(
      "ol",
      { class: "cards" },
      [...answer.completions].sort(order).map((one) => card(info, file, one, answer, range)),
    ),
  ];
}

function card(info, file, one, answer, range) {
  const href = completionHash(info.run, file, answer.group, one.index);
  const shared = answer.common_prefix;
  return h(
    "li",
    { class: "card" },
    h(
      "h3",
      null,
      link(href, { "data-item": true }, `Completion ${one.index}`),
      h(
        "span",
        { class: `cell${one.failed ? " failed" : ""}`, style: { "--p": place(one.reward, range) } },
        one.failed ? "✕" : short(one.reward),
      ),
    ),
    textBlock(
      `Text of completion ${one.index}`,
      splitAt(one.text, shared)[1],
      shared > 0 && h("span", { class: "muted", title: "the same in all completions" }, "… "),
      one.truncated_text,
    ),
    verdict(one, answer.gold, info.weights),
  );
}

// Return an answer with a mark that compares it with the gold answer.
function against(answer, gold) {
  const same = answer !== null && gold !== null && answer.trim() === gold.trim();
  return h(
    "span",
    null,
    answer === null ? h("em", null, "nothing") : h("b", { dir: "auto" }, brief(answer)),
    " ",
    gold !== null && h("span", { class: `chip ${same ? "good" : "warn"}` }, same ? "= gold" : "≠ gold"),
  );
}

// Return what the graders made of a completion: extracted against gold, the parts of the reward, the reason.
// weights: reward -> its weight.
export function verdict(one, gold, weights = {}) {
  const parts = Object.entries(one.parts ?? {});
  const logged = Object.entries(one.logged ?? {}).filter(([name]) => !/\/(why|extracted)$/.test(name));
  const cut = one.finish_reason === "length" && h("span", { class: "chip warn" }, "truncated");
  return [
    one.failed &&
      h("p", { class: "problem" }, `✕ ${one.failed}`, one.failed_detail && [": ", brief(one.failed_detail)]),
    facts([
      [
        "Extracted",
        against(one.extracted, gold),
        "The answer that the grader read, if it logs it; otherwise the one that the completion ends with",
      ],
      [
        "Ends with",
        one.final_answer && one.final_answer !== one.extracted ? against(one.final_answer, gold) : null,
        "The answer that the completion ends with, which is not what the grader read",
      ],
      ["Why", one.why ? brief(one.why) : null],
      ...parts.map(([name, value]) => [
        `Reward ${oneLine(name)}`,
        value === null
          ? h("em", null, "abstained or failed")
          : [number(value), name in weights && h("span", { class: "muted" }, ` × ${number(weights[name])}`)],
        "Value of this reward, and its weight in the sum",
      ]),
      ...logged.map(([name, value]) => [oneLine(name), brief(shown(value)), "Logged by the reward"]),
      ["Advantage", one.advantage === null ? null : number(one.advantage)],
      ["Tokens", h("span", null, `${number(one.length)}, ended by ${one.finish_reason ?? "–"} `, cut)],
    ]),
  ];
}
