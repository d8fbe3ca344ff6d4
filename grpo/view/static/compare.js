// Two files of completions, prompt by prompt: runs against each other, or steps of one run.
import { get, runInfo } from "./api.js";
import { empty, h, link, section, select, table, tableRow } from "./dom.js";
import { number, oneLine, plural, signed } from "./format.js";
import { pager } from "./pager.js";
import { groupHash, setQuery } from "./routes.js";
import { stepName } from "./step.js";

const COLUMNS_OF_PAIRS = [
  { label: "Prompt" },
  { label: "Gold" },
  { label: "A", number: true },
  { label: "B", number: true },
  { label: "Difference", number: true },
  { label: "Verdict" },
];
const VERDICTS = { lost: "▼ lost", won: "▲ won", unchanged: "= unchanged" };
const SHOWN = 200;

export async function comparePage({ query }) {
  const { runs } = await get("/api/runs");
  const a = query.a ?? String(runs[0]?.run ?? 0);
  const b = query.b ?? String((runs[1] ?? runs[0])?.run ?? 0);
  const [infoA, infoB] = await Promise.all([runInfo(a), runInfo(b)]);
  const fileA = query.file_a ?? standard(infoA, a === b);
  const fileB = query.file_b ?? standard(infoB, false);
  const chosen = fileA && fileB;
  const answer = chosen
    ? await get("/api/compare", {
        a,
        b,
        file_a: fileA,
        file_b: fileB,
        verdict: query.verdict,
        offset: query.offset,
      })
    : null;
  const names = runs.map((run) => [run.run, oneLine(run.name)]);
  const filesOf = (info) => info.files.map((file) => [file.file, stepName(file.file)]);
  return {
    title: "Compare",
    up: "#/",
    crumbs: [[null, "Compare"]],
    body: [
      h("h1", null, "Compare"),
      h("p", { class: "lead" }, "Pairs the prompts of two files by their id. Won: the mean reward of B is higher."),
      h(
        "div",
        { class: "bar pair" },
        select("run-a", "A: run", a, names, (value) => setQuery({ a: value, file_a: null, offset: null })),
        select("file-a", "A: completions of", fileA ?? "", filesOf(infoA), (value) =>
          setQuery({ file_a: value, offset: null }),
        ),
        select("run-b", "B: run", b, names, (value) => setQuery({ b: value, file_b: null, offset: null })),
        select("file-b", "B: completions of", fileB ?? "", filesOf(infoB), (value) =>
          setQuery({ file_b: value, offset: null }),
        ),
      ),
      ...(answer
        ? pairs(answer, [a, fileA], [b, fileB], query)
        : [empty("Nothing to compare.", "Both runs need a file of completions.")]),
    ],
  };
}

// Compare evaluations by default: they answer the same prompts. first: the first one, to compare a run with its start.
function standard(info, first) {
  const evals = info.files.filter((file) => file.kind === "eval");
  const files = evals.length > (first ? 1 : 0) ? evals : info.files.filter((file) => file.kind === "step");
  return files.at(first ? 0 : -1)?.file;
}

// Return what the interval says.
function judgement({ interval, too_few: few }, count) {
  if (!interval) return "One prompt is too few for an interval.";
  if (interval[0] > 0 || interval[1] < 0) return "The interval does not contain 0.";
  return few
    ? `The interval contains 0, as it always does with ${plural(count, "prompt")}: too few to show a difference.`
    : "The interval contains 0: these prompts do not show a difference.";
}

function pairs(answer, [a, fileA], [b, fileB], query) {
  const count = answer.won + answer.lost + answer.unchanged;
  if (count === 0) {
    return [
      empty(
        "No prompt is in both files.",
        `${plural(answer.only_a, "prompt")} only in A, ${number(answer.only_b)} only in B. Evaluations of the same data sets share their prompts.`,
      ),
    ];
  }
  const share = (part) => ({ width: `${(100 * part) / count}%` });
  const rows = answer.prompts.map((one) =>
    tableRow(COLUMNS_OF_PAIRS, [
      h("span", { dir: "auto", class: "prompt" }, oneLine(one.prompt)),
      h("span", { dir: "auto" }, oneLine(one.gold ?? "–")),
      link(
        groupHash(a, fileA, one.group_a),
        { "aria-label": `A: mean ${number(one.mean_a, 3)}` },
        number(one.mean_a, 3),
      ),
      link(
        groupHash(b, fileB, one.group_b),
        { "data-item": true, "aria-label": `B: mean ${number(one.mean_b, 3)}` },
        number(one.mean_b, 3),
      ),
      signed((one.mean_b ?? 0) - (one.mean_a ?? 0)),
      h("span", { class: `verdict-word ${{ lost: "down", won: "up" }[one.verdict] ?? ""}` }, VERDICTS[one.verdict]),
    ]),
  );
  return [
    section(
      "verdict",
      "Result",
      h(
        "p",
        { class: "big" },
        h("strong", null, signed(answer.difference)),
        " mean reward, B minus A",
        answer.interval &&
          h("small", null, ` 95 % interval ${signed(answer.interval[0])} to ${signed(answer.interval[1])}`),
      ),
      h("p", { class: "muted" }, judgement(answer, count)),
      h(
        "div",
        {
          class: "balance",
          role: "img",
          "aria-label": `${answer.won} won, ${answer.unchanged} unchanged, ${answer.lost} lost`,
        },
        h("i", { class: "won", style: share(answer.won) }),
        h("i", { class: "same", style: share(answer.unchanged) }),
        h("i", { class: "lost", style: share(answer.lost) }),
      ),
      h(
        "p",
        null,
        `▲ ${number(answer.won)} won, = ${number(answer.unchanged)} unchanged, ▼ ${number(answer.lost)} lost`,
        (answer.only_a > 0 || answer.only_b > 0) &&
          h("span", { class: "muted" }, `; ${number(answer.only_a)} only in A, ${number(answer.only_b)} only in B`),
      ),
    ),
    section(
      "pairs",
      "Prompts",
      h(
        "div",
        { class: "bar" },
        select(
          "verdict-filter",
          "Show",
          query.verdict ?? "",
          [
            ["", "all"],
            ["lost", "lost"],
            ["won", "won"],
            ["unchanged", "unchanged"],
          ],
          (value) => setQuery({ verdict: value, offset: null }),
        ),
      ),
      table("pairs-table", "Prompts in both files", COLUMNS_OF_PAIRS, rows),
      pager("prompts", query, SHOWN, rows.length, answer.total),
    ),
  ];
}
