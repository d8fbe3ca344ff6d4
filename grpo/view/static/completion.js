// One completion: its tokens, coloured by a quantity.
import { get, runInfo } from "./api.js";
import { empty, facts, h, link, section, select } from "./dom.js";
import { brief, escaped, number, oneLine, sentence, textBlock, visible } from "./format.js";
import { pager } from "./pager.js";
import { completionHash, fileHash, groupHash, promptHash, runHash, samplesPath, setQuery } from "./routes.js";
import { stepName, walk } from "./step.js";
import { verdict } from "./group.js";

const PAGE_TOKENS = 2000;
// sided: two colours tell the sign, and tokens below 0 are underlined; otherwise one colour grows.
// least: the value at the end of the colours if all are smaller.
const QUANTITIES = {
  advantage: { label: "advantage", sided: true, doc: "advantage of the token in training" },
  difference: {
    label: "learner − sampler",
    sided: true,
    least: 0.1, // smaller differences are rounding
    doc: "learner's minus sampler's logprob, under the weights that sampled",
  },
  sampler_logprob: { label: "sampler logprob", doc: "logprob of the token when it was sampled; dark is unlikely" },
  learner_logprob: { label: "learner logprob", doc: "logprob of the token in the learner; dark is unlikely" },
  entropy: { label: "entropy", doc: "entropy of the distribution in nats" },
  importance_weight: { label: "importance weight", doc: "weight of the token in the loss; 0: not trained, struck out" },
};

export async function completionPage({ parts: [, run, , file, , group, index], query }) {
  const path = `${samplesPath(run, file)}/groups/${group}`;
  const [info, answer] = await Promise.all([runInfo(run), get(`${path}/${index}`, { offset: query.offset })]);
  const near = (by) => {
    const to = Number(index) + by;
    return to >= 0 && to < answer.group_size ? completionHash(run, file, group, to, { color: query.color }) : null;
  };
  return {
    title: `Completion ${index} · group ${group} · ${stepName(file)} · ${info.name}`,
    run,
    up: groupHash(run, file, group),
    previous: near(-1),
    next: near(1),
    crumbs: [
      [runHash(run), info.name],
      [fileHash(run, file), stepName(file)],
      [groupHash(run, file, group), `Group ${group}`],
      [null, `Completion ${index}`],
    ],
    body: [
      h("header", { class: "head" }, h("h1", null, `Completion ${index}`), walk(near(-1), near(1), "completion")),
      h(
        "div",
        { class: "verdict" },
        facts([
          ["Reward", h("b", null, number(answer.reward))],
          ["Gold", answer.gold === null ? null : h("b", { dir: "auto" }, brief(answer.gold))],
          ["Prompt", link(promptHash(run, answer.prompt_id), null, oneLine(answer.prompt_id))],
          ["Policy version", answer.policy_version],
          ["Seed", answer.seed === null ? null : String(answer.seed)],
        ]),
        verdict(answer, answer.gold, info.weights),
      ),
      section("tokens", "Tokens", ...tokens(answer, query)),
      section("prompt", "Prompt", promptTokens(answer)),
      section("text", "Text", textBlock("Text of the completion", answer.text ?? "", null, answer.truncated_text)),
    ],
  };
}

function tokens(answer, query) {
  if (answer.total_tokens === 0)
    return [empty("No tokens.", "The generation of this completion failed before its first token.")];
  const present = Object.keys(QUANTITIES).filter((name) =>
    answer.tokens.some((token) => token[name] !== null && token[name] !== undefined),
  );
  const color = present.includes(query.color) ? query.color : (present[0] ?? "");
  const offset = Number(query.offset ?? 0);
  const colour = scale(
    answer.tokens.map((token) => token[color] ?? null),
    color,
  );
  const inspector = h(
    "div",
    { class: "inspector", id: "inspector", "aria-live": "polite" },
    "Point at a token, or focus the text and use the arrow keys.",
  );
  return [
    h(
      "div",
      { class: "bar" },
      select(
        "color",
        "Colour by",
        color,
        [...present.map((name) => [name, QUANTITIES[name].label]), ["none", "nothing"]],
        (value) => setQuery({ color: value }),
      ),
      color && query.color !== "none" && colour.legend,
    ),
    answer.absent
      .filter((one) => one.column === "text")
      .map((one) => h("p", { class: "muted" }, sentence(one.why), ".")),
    tokenList(answer, offset, query.color === "none" ? () => null : colour.of, inspector),
    inspector,
    h("p", { class: "muted" }, `${number(answer.total_tokens)} tokens`),
    pager("tokens", query, PAGE_TOKENS, answer.tokens.length, answer.total_tokens),
    absent(answer),
  ];
}

// Return the colours of a quantity and their legend: the least, the middle and the greatest of the page.
function scale(values, name) {
  const known = values.filter((value) => typeof value === "number");
  const low = Math.min(...known);
  const high = Math.max(...known);
  const reach = Math.max(Math.abs(low), Math.abs(high), QUANTITIES[name]?.least ?? 0) || 1;
  const sided = QUANTITIES[name]?.sided;
  const falling = name.endsWith("logprob");
  const share = (value) =>
    sided
      ? (100 * Math.abs(value)) / reach
      : high === low
        ? 0
        : (100 * (falling ? high - value : value - low)) / (high - low);
  const style = (value) => (typeof value === "number" ? { "--p": `${share(value)}%` } : null);
  const kind = (value) => (sided && value < -reach / 10 ? "minus" : "plus"); // no line under what has no colour
  const ends = !known.length
    ? []
    : sided
      ? [-reach, 0, reach]
      : [...new Set(falling ? [high, (low + high) / 2, low] : [low, (low + high) / 2, high])];
  return {
    of: (token) => [style(token[name]), kind(token[name])],
    legend: h(
      "ul",
      { class: "legend", "aria-label": `Legend: ${QUANTITIES[name]?.label}` },
      h("li", { class: "muted" }, QUANTITIES[name]?.doc),
      ends.map((value) =>
        h("li", null, h("span", { class: `token ${kind(value)}`, style: style(value) }, number(value, 3))),
      ),
    ),
  };
}

function tokenList(answer, offset, colour, inspector) {
  let active = -1;
  const spans = answer.tokens.map((token, i) => {
    const [style, kind] = colour(token) ?? [];
    return h(
      "span",
      {
        role: "option",
        id: `token-${offset + i}`,
        "data-i": i,
        "aria-selected": "false",
        class: `token ${style ? kind : ""} ${token.special ? "special" : ""} ${token.importance_weight === 0 ? "masked" : ""}`,
        style,
      },
      tokenText(token),
    );
  });
  const choose = (i) => {
    if (i < 0 || i >= spans.length) return;
    spans[active]?.setAttribute("aria-selected", "false");
    active = i;
    spans[i].setAttribute("aria-selected", "true");
    box.setAttribute("aria-activedescendant", spans[i].id);
    inspector.replaceChildren(details(answer.tokens[i], offset + i));
  };
  const box = h(
    "div",
    {
      class: "tokens text",
      id: "token-list",
      dir: "auto",
      tabindex: "0",
      role: "listbox",
      "aria-label": "Tokens of the completion",
      "aria-describedby": "inspector",
      on: {
        pointerover: (event) => {
          const i = event.target.closest("[data-i]")?.dataset.i;
          if (i !== undefined) choose(Number(i));
        },
        focus: () => choose(Math.max(0, active)),
        keydown: (event) => {
          const to = {
            ArrowRight: active + 1,
            ArrowLeft: active - 1,
            ArrowDown: active + 10,
            ArrowUp: active - 10,
            Home: 0,
            End: spans.length - 1,
          }[event.key];
          if (to === undefined) return;
          event.preventDefault();
          choose(Math.max(0, Math.min(spans.length - 1, to)));
          spans[active].scrollIntoView({ block: "nearest" });
        },
      },
    },
    spans.map((span, i) => [breakBefore(answer.tokens[i]), span]),
  );
  return box;
}

// Return where a line may break: before a token that begins with a space, which is shown as a dot.
function breakBefore(token) {
  return token.text?.startsWith(" ") ? h("wbr") : null;
}

function tokenText(token) {
  if (token.text === null || token.text === undefined) return h("span", { class: "id" }, String(token.id));
  return token.text === "" ? h("span", { class: "mark" }, "∅") : visible(token.text, true);
}

function details(token, position) {
  return facts([
    ["Token", position],
    ["Id", String(token.id)],
    ["Text", token.text === null ? null : h("code", null, escaped(token.text))],
    ["Special", token.special ? "yes" : null],
    ["Trained", token.importance_weight === 0 ? "no: masked or rejected" : null],
    ...Object.entries(QUANTITIES).map(([name, quantity]) => [
      quantity.label,
      token[name] === null || token[name] === undefined ? null : number(token[name]),
      quantity.doc,
    ]),
  ]);
}

// Return what is not recorded of the tokens, and what records it.
function absent(answer) {
  const columns = answer.absent.filter((one) => one.column !== "text");
  if (columns.length === 0) return null;
  return h(
    "details",
    { id: "absent" },
    h("summary", null, `Not recorded: ${columns.map((one) => one.column.replaceAll("_", " ")).join(", ")}`),
    h(
      "ul",
      null,
      columns.map((one) => h("li", null, h("code", null, one.column), ": ", sentence(one.why))),
    ),
  );
}

function promptTokens(answer) {
  if (!answer.prompt_tokens?.length) return empty("No prompt tokens.");
  return h(
    "div",
    { class: "tokens text", dir: "auto", tabindex: "0", role: "group", "aria-label": "Tokens of the prompt" },
    answer.prompt_tokens.map((token) => [
      breakBefore(token),
      h("span", { class: `token ${token.special ? "special" : ""}`, title: `id ${token.id}` }, tokenText(token)),
    ]),
  );
}
