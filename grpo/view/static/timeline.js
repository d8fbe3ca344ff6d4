// Who worked when in a step: the spans of a trace, or the time/* metrics as bars.
import { get } from "./api.js";
import { empty, h } from "./dom.js";
import { seconds, sentence } from "./format.js";

const PARTS = ["sample", "reward", "batch", "update", "sync", "idle"];

// Return a block that follows the cursor.
export function timeline(info, curves, shared, run) {
  const holder = h("div", { class: "timeline" });
  let wanted = 0;
  const show = async (index) => {
    const step = shared.steps[index];
    const ticket = (wanted += 1);
    holder.replaceChildren(...bars(curves, index));
    if (!info.trace_steps.includes(step)) {
      if (info.trace_steps.length === 0)
        holder.append(
          h(
            "p",
            { class: "muted" },
            "run.trace=true also records when each sampler, the rewards and the learner worked, and who waited.",
          ),
        );
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, 120));
    if (ticket !== wanted) return;
    try {
      const { spans } = await get(`/api/runs/${run}/timeline/${step}`);
      if (ticket === wanted) holder.append(lanes(spans));
    } catch (error) {
      if (ticket === wanted) holder.append(h("p", { class: "muted" }, sentence(error.message)));
    }
  };
  shared.watch(show);
  show(shared.at());
  return holder;
}

function bars(curves, index) {
  const at = (name) => curves.series[`time/${name}_s`]?.[index] ?? null;
  const total = at("step");
  if (!total) return [empty("No times for this step.", "The metrics time/* are written by every training step.")];
  const rows = PARTS.filter((name) => at(name) !== null);
  const extra = ["eval", "save"].filter((name) => at(name) !== null);
  const row = (name, note) =>
    h(
      "tr",
      null,
      h("th", { scope: "row" }, name, note && h("small", null, note)),
      h("td", { class: "number" }, seconds(at(name))),
      h("td", { class: "bar" }, h("i", { style: { width: `${Math.min(100, (100 * at(name)) / total)}%` } })),
    );
  return [
    h(
      "table",
      { class: "bars" },
      h("caption", null, `Step ${curves.steps[index]}: ${seconds(total)}`),
      h(
        "thead",
        { class: "hidden" },
        h(
          "tr",
          null,
          ["Part", "Time", "Share of the step"].map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        null,
        rows.map((name) => row(name)),
        extra.map((name) => row(name, " after the step")),
      ),
    ),
  ];
}

function lanes(spans) {
  const origin = Math.min(...spans.map((span) => span.start_s));
  const length = Math.max(...spans.map((span) => span.start_s + span.seconds)) - origin || 1;
  return h(
    "div",
    { class: "lanes", role: "list", "aria-label": "Spans by role" },
    [...Map.groupBy(spans, (span) => span.role)].map(([role, some]) =>
      h(
        "div",
        { class: "lane", role: "listitem" },
        h("span", { class: "role" }, role),
        h(
          "div",
          { class: "track" },
          some.map((span) => {
            const text = `${span.name}: ${seconds(span.seconds)} from ${seconds(span.start_s - origin)}`;
            return h(
              "span",
              {
                class: "span",
                title: text,
                style: {
                  left: `${(100 * (span.start_s - origin)) / length}%`,
                  width: `${(100 * span.seconds) / length}%`,
                },
              },
              span.seconds > 0.02 * length && span.name,
              h("span", { class: "hidden" }, text),
            );
          }),
        ),
      ),
    ),
  );
}
