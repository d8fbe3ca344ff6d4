// One run: what is wrong, what it reached, its curves, where the tokens and the time went, its options.
import { address, get, has, offline, runInfo } from "./api.js";
import { cursor, curve, slider, stack, whisker } from "./chart.js";
import { empty, facts, field, h, link, section, table, tableRow } from "./dom.js";
import { interval, number, percent, percentPoints, seconds, sentence, shown, visible } from "./format.js";
import { fileHash, groupHash } from "./routes.js";
import { stateChip } from "./runs.js";
import { timeline } from "./timeline.js";

export async function runPage({ parts: [, run], query }) {
  const [info, curves] = await Promise.all([runInfo(run), get(`/api/runs/${run}/series`)]);
  const fileAt = (step) => info.files.find((file) => file.kind === "step" && file.step === step)?.file;
  const shared = cursor(curves.steps, (step) => {
    if (fileAt(step)) location.hash = fileHash(run, fileAt(step)) ?? location.hash;
  });
  const body = [
    h(
      "header",
      { class: "head" },
      h("h1", null, visible(info.name)),
      stateChip(info),
      h("p", { class: "muted path" }, visible(info.folder)),
    ),
    facts([
      ["Steps", info.steps_planned ? `${number(info.steps)} of ${number(info.steps_planned)}` : number(info.steps)],
      ["Recipe", info.recipe],
      ["Ended", info.state === "done" ? null : info.exit_reason],
      ["Time", info.summary?.wall_s_all_sessions ? seconds(info.summary.wall_s_all_sessions) : null],
      ["Sessions", info.sessions?.length > 1 ? info.sessions.length : null],
    ]),
    info.problem && h("p", { class: "problem" }, sentence(info.problem), "."),
    section("alarms", "Alarms", alarms(info, run, fileAt)),
    section("result", "Before and after", result(info)),
    section("samples", "Completions by step", files(info, run)),
  ];
  if (curves.steps.length) {
    body.splice(5, 0, section("glance", "At a glance", glance(info, curves, shared)));
    body.push(
      section("tokens", "What became of the sampled tokens", waterfall(info, curves, shared)),
      section("time", "Time of a step", slider(shared, "time-step"), timeline(info, curves, shared, run)),
      section("curves", "Curves", ...charts(info, curves, shared, query)),
    );
  } else {
    body.push(
      section("curves", "Curves", empty("No step has ended yet.", "metrics.jsonl gets a line after each step.")),
    );
  }
  body.push(section("options", "Options", ...options(info)));
  return { title: info.name, live: true, run, up: "#/", body };
}

function alarms(info, run, fileAt) {
  if (info.alarms.length === 0 && info.files.length === 0) return empty("Nothing to judge yet.", "No step has ended.");
  if (info.alarms.length === 0) {
    return h(
      "p",
      { class: "good" },
      h("span", { "aria-hidden": "true" }, "✓ "),
      "No alarm: rewards spread within groups, few completions are truncated, no kind of failure is frequent, sampler and learner agree.",
    );
  }
  return h(
    "ul",
    { class: "alarms" },
    info.alarms.map((alarm) => {
      const file = alarm.file ?? fileAt(alarm.first_step);
      const [what, href] = !file
        ? []
        : alarm.group !== null
          ? [`group ${alarm.group} of step ${alarm.first_step}`, groupHash(run, file, alarm.group)]
          : [`the completions of step ${alarm.first_step}`, fileHash(run, file, { filter: alarm.filter })];
      return h(
        "li",
        { class: "alarm" },
        h(
          "h3",
          null,
          h("span", { "aria-hidden": "true" }, "▲ "),
          sentence(alarm.title),
          h("small", null, ` ${stepsOf(alarm)}`),
        ),
        h("p", null, sentence(alarm.text), "."),
        alarm.cause && h("p", { class: "cause" }, h("strong", null, "Likely cause: "), sentence(alarm.cause), "."),
        href && h("a", { href, "data-item": true }, `See ${what}`),
      );
    }),
  );
}

// Return the steps in which an alarm held.
function stepsOf({ first_step: first, last_step: last, steps }) {
  if (first === last) return `step ${first}`;
  if (steps === 2) return `steps ${first} and ${last}`;
  return steps === last - first + 1 ? `steps ${first} to ${last}` : `${steps} of the steps ${first} to ${last}`;
}

function result(info) {
  if (info.accuracy_before === null && info.accuracy_after === null) {
    return empty(
      "Not evaluated.",
      "data.eval.sets names held-out prompts; the run answers them before the first step and at the end.",
    );
  }
  const row = (name, value, range) =>
    value === null || value === undefined
      ? [name, "–", "not yet", ""]
      : [
          name,
          percent(value),
          interval(range) ?? "of one prompt, no interval",
          whisker(value, range, `${name}: ${percent(value)}${range ? `, interval ${interval(range)}` : ""}`),
        ];
  const both = typeof info.accuracy_before === "number" && typeof info.accuracy_after === "number";
  return h(
    "div",
    { class: "result" },
    table(
      "accuracy",
      "Accuracy before and after training",
      [{ label: "When" }, { label: "Accuracy", number: true }, { label: "95 % interval" }, { label: "0 to 100 %" }],
      [
        row("Before training", info.accuracy_before, info.accuracy_before_interval),
        row(
          info.accuracy_after_step ? `After step ${info.accuracy_after_step}` : "After",
          info.accuracy_after,
          info.accuracy_after_interval,
        ),
      ],
    ),
    both &&
      h(
        "p",
        { class: "change" },
        h("strong", null, percentPoints(info.accuracy_after - info.accuracy_before)),
        " accuracy",
        !offline &&
          info.files.filter((file) => file.kind === "eval").length > 1 && [
            " · ",
            link(evalComparison(info), null, "compare the answers, with the paired interval"),
          ],
      ),
  );
}

function evalComparison(info) {
  const evals = info.files.filter((file) => file.kind === "eval");
  return address("#/compare", { a: info.run, b: info.run, file_a: evals[0].file, file_b: evals.at(-1).file });
}

// Links to the samples files, a hundred steps a line; only the last hundred is open.
function files(info, run) {
  const steps = info.files.filter((file) => file.kind === "step");
  const evals = info.files.filter((file) => file.kind === "eval");
  if (steps.length + evals.length === 0)
    return empty("No completions yet.", "A samples file is written after each step.");
  const entry = (file) =>
    h(
      "li",
      null,
      link(
        fileHash(run, file.file),
        {
          "data-item": true,
          title: file.rows === null ? `${file.file}: unreadable` : `${file.file}: ${number(file.rows)} completions`,
        },
        file.step ?? file.file,
      ),
    );
  const hundreds = Map.groupBy(steps, (file) => Math.floor((file.step - 1) / 100));
  const last = [...hundreds.keys()].at(-1);
  return [
    ...[...hundreds].map(([hundred, some]) => {
      const list = h("ol", { class: "steps" }, some.map(entry));
      if (hundreds.size === 1) return list;
      return h(
        "details",
        { id: `steps-${hundred}`, open: hundred === last },
        h("summary", null, `Steps ${some[0].step} to ${some.at(-1).step}`),
        list,
      );
    }),
    evals.length > 0 && h("p", { class: "muted" }, "Evaluations after step; 0 is before training"),
    evals.length > 0 && h("ol", { class: "steps" }, evals.map(entry)),
  ];
}

function waterfall(info, curves, shared) {
  const layers = info.waterfall
    .filter((layer) => layer.name !== "gradient/sampled" && curves.series[layer.name])
    .map((layer) => ({
      ...layer,
      label: layer.name.replace("gradient/", "").replaceAll("_", " "),
      values: curves.series[layer.name],
    }));
  if (layers.length === 0)
    return empty("No token accounting.", "The metrics gradient/* are written by every training step.");
  const fate = layers.findIndex((layer) => layer.name === "gradient/contributing");
  if (fate >= 0) layers.push(...layers.splice(fate, 1));
  return [
    h(
      "p",
      { class: "lead" },
      "Each use of a sampled token is counted once: at the first reason for which it gives no gradient, or as contributing.",
    ),
    slider(shared, "tokens-step"),
    stack(shared, "waterfall", "uses of sampled tokens", layers),
  ];
}

// The curves that tell first whether a run learns.
const GLANCE = [
  "reward/mean",
  "eval/accuracy",
  "group/no_spread_fraction",
  "completion/tokens_mean",
  "completion/truncated_fraction",
  "policy/entropy",
  "optim/grad_norm",
  "mismatch/mean",
];

function glance(info, curves, shared) {
  const docs = new Map(info.metrics.map((metric) => [metric.name, metric.doc]));
  const grid = h(
    "div",
    { class: "grid" },
    GLANCE.filter((name) => curves.series[name]?.some((value) => value !== null)).map((name) =>
      curve(shared, name, docs.get(name), curves.series[name], "glance"),
    ),
  );
  const hint = "Point at a curve for its values, at a name for its meaning. A click on a curve opens the step.";
  return [h("p", { class: "lead" }, hint), grid];
}

function charts(info, curves, shared, query) {
  const wanted = field("curve-filter", "Show curves whose name contains", query.curves ?? "", { type: "search" });
  const docs = info.metrics.filter((metric) => curves.series[metric.name]);
  const sections = [...Map.groupBy(docs, (metric) => metric.section)].map(([title, metrics], i) => {
    const drawn = metrics.map((metric) => [
      metric.name,
      curve(shared, metric.name, metric.doc, curves.series[metric.name]),
    ]);
    return {
      drawn,
      block: h(
        "details",
        { class: "charts", id: `curves-${i}`, open: true },
        h("summary", null, h("h3", null, title), h("small", null, ` ${metrics.length}`)),
        h(
          "div",
          { class: "grid" },
          drawn.map(([, figure]) => figure),
        ),
      ),
    };
  });
  const show = (text) => {
    for (const { drawn, block } of sections) {
      for (const [name, figure] of drawn) figure.hidden = !name.toLowerCase().includes(text.toLowerCase());
      block.hidden = drawn.every(([, figure]) => figure.hidden);
    }
  };
  const box = wanted.querySelector("input");
  box.addEventListener("input", () => show(box.value));
  show(box.value);
  return [wanted, sections.map((one) => one.block)];
}

function options(info) {
  const columns = [{ label: "Option" }, { label: "Value" }, { label: "Default" }];
  const cells = (option) => [
    h("code", { title: option.doc }, option.name),
    h("code", null, shown(option.value)),
    option.required
      ? h("span", { class: "muted" }, "none, required")
      : h("code", { class: "muted" }, shown(option.default)),
  ];
  const changed = info.options.filter((option) => !option.is_default);
  const search = field("option-filter", "Options whose name or description contains", "", { type: "search" });
  const rows = info.options.map((option) => {
    const [name, value, standard] = cells(option);
    const mark = option.is_default ? null : h("span", { class: "chip" }, "changed");
    return tableRow(columns, [[name, mark, h("small", null, sentence(option.doc))], value, standard], {
      class: option.is_default ? "" : "changed",
    });
  });
  const box = search.querySelector("input");
  box.addEventListener("input", () => {
    const text = box.value.toLowerCase();
    info.options.forEach((option, i) => {
      rows[i].hidden = !`${option.name} ${option.doc}`.toLowerCase().includes(text);
    });
  });
  return [
    changed.length
      ? table(
          "changed",
          "Options that differ from their defaults",
          [...columns, { label: "What it does" }],
          changed.map((option) => [...cells(option), sentence(option.doc)]),
        )
      : empty("All options have their defaults."),
    h(
      "details",
      { id: "all-options" },
      h("summary", null, `All ${info.options.length} options`),
      search,
      table("every-option", "All options", columns, rows),
    ),
  ];
}
