// Search over the texts and token ids of one run or of all.
import { get } from "./api.js";
import { empty, field, h, link, select } from "./dom.js";
import { number, plural, seconds, visible } from "./format.js";
import { completionHash, setQuery } from "./routes.js";
import { stepName } from "./group.js";

export async function searchPage({ query }) {
  const { runs } = await get("/api/runs");
  const asked = query.q || query.ids;
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
    up: "#/",
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
          query.run ?? "",
          [
            ["", runs.length === 1 ? runs[0].name : "all runs"],
            ...(runs.length > 1 ? runs.map((run) => [run.run, run.name]) : []),
          ],
          (run) => setQuery({ run }),
        ),
        text,
        ids,
        filter,
        h("button", { type: "submit" }, "Search"),
        h("p", { class: "refused", id: "search-error", role: "alert" }, refused?.message),
      ),
      ...found(answer, runs, asked),
    ],
  };
}

function found(answer, runs, asked) {
  if (!asked)
    return [
      empty(
        "Type a text, or token ids.",
        "Prompts and completions of all steps are searched; upper and lower case are different.",
      ),
    ];
  if (answer === null) return [];
  const scope = `${plural(answer.rows_searched, "completion")} searched in ${seconds(answer.seconds)}`;
  if (answer.hits.length === 0) return [empty("Not found.", `${scope}.`)];
  const name = (run) => runs.find((one) => one.run === run)?.name ?? run;
  return [
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
            visible(hit.before),
            h("mark", null, visible(hit.match)),
            visible(hit.after),
          ),
        ),
      ),
    ),
  ];
}
