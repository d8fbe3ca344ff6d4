// The list of runs.
import { get } from "./api.js";
import { empty, h, link, table, tableRow } from "./dom.js";
import { interval, number, oneLine, percent, plural, sentence, visible } from "./format.js";
import { runHash } from "./routes.js";

const MARKS = { running: "▶", done: "✓", stopped: "■", failed: "✕", unknown: "?" };

// Return a run's state as a mark with its word.
export function stateChip(run) {
  return h(
    "span",
    { class: `chip ${run.state}`, title: run.exit_reason ?? "" },
    h("span", { "aria-hidden": "true" }, `${MARKS[run.state] ?? "?"} `),
    run.state,
  );
}

// Return the first alarm of a run, and how many more there are.
function alarmsOf(run) {
  const [first, ...others] = run.alarm_titles;
  if (first === undefined) return "none";
  return h(
    "span",
    { class: "warned", title: run.alarm_titles.join("; ").replaceAll("`", "") },
    h("span", { "aria-hidden": "true" }, "▲ "),
    sentence(first),
    others.length > 0 && h("small", null, ` and ${number(others.length)} more`),
  );
}

const COLUMNS = [
  { label: "Run" },
  { label: "State" },
  { label: "Alarms" },
  { label: "Steps", number: true },
  { label: "Before", number: true },
  { label: "After", number: true },
  { label: "Recipe" },
];

export async function runsPage() {
  const { runs } = await get("/api/runs");
  if (runs.length === 0) {
    return {
      title: "Runs",
      body: [h("h1", null, "Runs"), empty("No run.", "Name run folders on the command line: grpo view runs/NAME.")],
    };
  }
  const rows = runs.map((run) =>
    tableRow(COLUMNS, [
      h("a", { href: runHash(run.run), "data-item": true }, visible(run.name)),
      stateChip(run),
      alarmsOf(run),
      run.steps_planned ? `${number(run.steps)} of ${number(run.steps_planned)}` : number(run.steps),
      accuracy(run.accuracy_before, run.accuracy_before_interval),
      accuracy(run.accuracy_after, run.accuracy_after_interval),
      h("span", { class: "path" }, oneLine(run.recipe ?? "–")),
    ]),
  );
  return {
    title: "Runs",
    live: true,
    body: [
      h("h1", null, "Runs"),
      h(
        "p",
        { class: "lead" },
        `${plural(runs.length, "run")}. Before and after are accuracies on held-out prompts with 95 % intervals.`,
      ),
      table("runs", "Runs", COLUMNS, rows),
      runs.length > 1 && h("p", null, link("#/compare", null, "Compare two runs")),
    ],
  };
}

function accuracy(value, range) {
  if (value === null || value === undefined)
    return h("span", { class: "muted", title: "No evaluation: data.eval.sets gives one" }, "not evaluated");
  return h("span", null, percent(value), range && h("small", null, ` ${interval(range)}`));
}
