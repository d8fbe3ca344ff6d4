// Search over the texts and token ids of a run.
import { get } from "./api.js";
import { empty, field, h, link, select } from "./dom.js";
import { number, oneLine, plural, seconds, sentence, visible } from "./format.js";
import { completionHash, runHash, setQuery } from "./routes.js";
import { stepName } from "./step.js";

export async function searchPage({ query }) {
  const { runs } = await get("/api/runs");
  const asked = query.q || query.ids || query.filter;
  let answer = null;
  let refused = null;
  try {
    answer = asked ? await get("/api/search", query) : null;
  } catch (error) {
    if (error.status !== 400) throw error;
    refused = error;
  }
  const text = field("q", "Text", query.q ?? "", { type: "search", wide: true });
  const ids = field("ids", "or token ids", query.ids ?? "", { placeholder: "15496, 11, 995" });
  const filter = field("search-filter", "Filter", query.filter ?? "", {
    placeholder: "reward == 0",
    "aria-invalid": refused ? "true" : null,
    "aria-describedby": "search-error",
  });
  const value = (label) => label.querySelector("input").value.trim();
  return {
    title: query.q ? `Search: ${query.q}` : "Search",
    run: query.run ?? "0",
    up: runHash(query.run ?? "0"),
    crumbs: [[null, "Search"]],
    body: [
      h("h1", null, "Search"),
      h(
        "form",
        {
          class: "bar",
          on: {
            submit: (event) => {
              event.preventDefault();
              setQuery({ q: value(text), ids: value(ids), filter: value(filter) });
            },
          },
        },
        select(
          "search-run",
          "In",
          query.run ?? "0",
          runs.map((run) => [run.run, oneLine(run.name)]),
          (run) => setQuery({ run }),
        ),
        text,
        ids,
        filter,
        h("button", { type: "submit" }, "Search"),
        h("p", { class: "refused", id: "search-error", role: "alert" }, refused && sentence(refused.message)),
      ),
      ...found(answer, runs, asked),
    ],
  };
}

function found(answer, runs, asked) {
  if (!asked)
    return [
      empty(
        "Type a text, token ids or a filter.",
        "Prompts and completions of all steps are searched; upper and lower case are different.",
      ),
    ];
  if (answer === null) return [];
  const scope = `${plural(answer.rows_searched, "completion")} searched in ${seconds(answer.seconds)}`;
  const problem = answer.problem && h("p", { class: "problem" }, sentence(answer.problem), ".");
  if (answer.hits.length === 0) return [problem, empty("Not found.", `${scope}.`)];
  const name = (run) => runs.find((one) => one.run === run)?.name ?? run;
  return [
    problem,
    h(
      "p",
      { class: "lead", role: "status" },
      `${plural(answer.hits.length, "hit")}${answer.complete ? "" : ", and more that are not listed"}; ${scope}.`,
    ),
    h(
      "ol",
      { class: "hits" },
      answer.hits.map((hit) =>
        h(
          "li",
          null,
          link(
            completionHash(hit.run, hit.file, hit.group, hit.index),
            { "data-item": true },
            `${runs.length > 1 ? `${name(hit.run)}, ` : ""}${stepName(hit.file)}, group ${hit.group}, completion ${hit.index}`,
          ),
          h("span", { class: "muted" }, ` ${hit.where} · reward ${number(hit.reward, 3)}`),
          h(
            "p",
            { class: "text", dir: "auto" },
            hit.cut_before && h("span", { class: "muted" }, "…"),
            visible(hit.before),
            h("mark", null, visible(hit.match)),
            visible(hit.after),
            hit.cut_after && h("span", { class: "muted" }, "…"),
          ),
        ),
      ),
    ),
  ];
}
