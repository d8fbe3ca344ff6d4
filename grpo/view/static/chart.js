// Curves and stacks over steps, drawn as SVG. All charts of one cursor show the same step under the pointer.
import { h, svg } from "./dom.js";
import { number, percent } from "./format.js";

const WIDTH = 300;
const HEIGHT = 80;

// Return the shared step of a page's charts. open(step) is called when a step is clicked.
export function cursor(steps, open) {
  const watchers = [];
  let index = steps.length - 1;
  let pinned = index;
  return {
    steps,
    open,
    at: () => index,
    watch: (watcher) => watchers.push(watcher),
    move(to, hovering) {
      index = Math.max(0, Math.min(steps.length - 1, to));
      for (const watcher of watchers) watcher(index, hovering);
    },
    // Move to a step that stays when the pointer has left.
    pin(to) {
      pinned = to;
      this.move(to, true);
    },
    leave() {
      this.move(pinned, pinned !== steps.length - 1);
    },
  };
}

// Return a figure with one curve. Its text alternative gives the last value, the least and the greatest.
export function curve(shared, name, doc, values, within = "curve") {
  const known = values.map((value, i) => [value, i]).filter(([value]) => value !== null && value !== undefined);
  const id = `${within}-${name.replace(/[^\w-]/g, "_")}`;
  const [low, high] = known.reduce(
    ([a, b], [value]) => [Math.min(a, value), Math.max(b, value)],
    [Infinity, -Infinity],
  );
  const [last, lastIndex] = known.at(-1) ?? [null, 0];
  const [line, points] = known.length ? paths(values, low, high) : ["", ""];
  const alternative = known.length
    ? `${name}: last ${number(last)} at step ${shared.steps[lastIndex]}, minimum ${number(low)}, maximum ${number(high)}`
    : `${name}: no values`;
  const value = h("output", { class: "value", "aria-live": "off" }, number(last));
  const rule = svg("line", { class: "rule", y1: 0, y2: HEIGHT });
  const button = h(
    "button",
    {
      type: "button",
      id,
      class: "name",
      "aria-expanded": "false",
      "aria-describedby": `${id}-doc`,
      on: {
        click: () => button.setAttribute("aria-expanded", String(figure.classList.toggle("large"))),
        keydown: (event) => {
          const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
          if (by) {
            event.preventDefault();
            shared.pin(Math.max(0, Math.min(shared.steps.length - 1, shared.at() + by)));
          }
        },
      },
    },
    name,
  );
  const plot = svg(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": alternative,
    },
    svg("path", { class: "curve", d: line }),
    svg("path", { class: "points", d: points }),
    rule,
  );
  const figure = h(
    "figure",
    { class: "chart" },
    h("figcaption", null, button, value),
    h("p", { class: "tip", role: "tooltip", id: `${id}-doc` }, doc || "No description."),
    h(
      "div",
      { class: "plot" },
      plot,
      h("span", { class: "high", "aria-hidden": "true" }, known.length && high !== low ? number(high, 3) : ""),
      h("span", { class: high === low ? "middle" : "low", "aria-hidden": "true" }, known.length ? number(low, 3) : ""),
    ),
  );
  follow(shared, plot);
  shared.watch((index, hovering) => {
    rule.classList.toggle("on", hovering);
    putRule(rule, index, shared.steps.length);
    value.textContent = hovering ? `${number(values[index])} · step ${shared.steps[index]}` : number(last);
  });
  return figure;
}

function putRule(rule, index, count) {
  const x = String(across(index, count));
  rule.setAttribute("x1", x);
  rule.setAttribute("x2", x);
}

function across(index, count) {
  return count > 1 ? (index / (count - 1)) * WIDTH : WIDTH / 2;
}

// Return the curve and its points as paths. A value without neighbours is a point; if all are, as those of evaluations
// every few steps, the points are joined. Otherwise a missing value is a gap.
function paths(values, low, high) {
  const up = (value) => (high === low ? HEIGHT / 2 : HEIGHT - 4 - ((value - low) / (high - low)) * (HEIGHT - 8));
  const point = (i) => `${across(i, values.length).toFixed(1)},${up(values[i]).toFixed(1)}`;
  const known = (i) => values[i] !== null && values[i] !== undefined;
  const kept = [...thinned(values)];
  const lonely = kept.filter((i) => known(i) && !known(i - 1) && !known(i + 1));
  const points = lonely.map((i) => `M${point(i)}h.01`).join("");
  if (lonely.length && lonely.length === kept.filter(known).length) return [`M${lonely.map(point).join("L")}`, points];
  let curve = "";
  let pen = false;
  for (const i of kept) {
    if (known(i)) curve += `${pen ? "L" : "M"}${point(i)}`;
    pen = known(i);
  }
  return [curve, points];
}

function thinned(values) {
  const size = Math.ceil(values.length / WIDTH);
  if (size === 1) return values.keys();
  const kept = [];
  for (let from = 0; from < values.length; from += size) {
    let least = -1;
    let most = -1;
    for (let i = from; i < Math.min(from + size, values.length); i += 1) {
      if (values[i] === null || values[i] === undefined) continue;
      if (least < 0 || values[i] < values[least]) least = i;
      if (most < 0 || values[i] > values[most]) most = i;
    }
    if (least < 0) kept.push(from);
    else kept.push(...new Set([Math.min(least, most), Math.max(least, most)]));
  }
  return kept;
}

function follow(shared, plot) {
  const find = (event) => {
    const box = plot.getBoundingClientRect();
    const gutter = parseFloat(getComputedStyle(plot).paddingLeft);
    return Math.round(((event.clientX - box.left - gutter) / (box.width - gutter)) * (shared.steps.length - 1));
  };
  plot.addEventListener("pointermove", (event) => shared.move(find(event), true));
  plot.addEventListener("pointerleave", () => shared.leave());
  plot.addEventListener("click", (event) =>
    shared.open(shared.steps[Math.max(0, Math.min(shared.steps.length - 1, find(event)))]),
  );
}

// Return a stack of shares over steps with its legend, a table that gives the numbers at the step of the cursor.
// layers: [{name, label, doc, values}] from top to bottom.
export function stack(shared, id, total, layers) {
  const count = shared.steps.length;
  const size = Math.ceil(count / WIDTH);
  const wide = WIDTH / Math.ceil(count / size);
  const plot = svg("svg", {
    viewBox: `0 0 ${WIDTH} 100`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": `Shares of ${total} over steps ${shared.steps[0]} to ${shared.steps[count - 1]}; the table has the numbers`,
  });
  const columns = layers.map(() => "");
  for (let i = 0; i < count; i += size) {
    const values = layers.map((layer) => layer.values[i] ?? 0);
    const sum = values.reduce((a, b) => a + b, 0);
    let top = 0;
    values.forEach((value, layer) => {
      const height = sum ? (100 * value) / sum : 0;
      if (height)
        columns[layer] +=
          `M${((i / size) * wide).toFixed(2)},${top.toFixed(2)}h${wide.toFixed(2)}v${height.toFixed(2)}h-${wide.toFixed(2)}z`;
      top += height;
    });
  }
  const paths = layers.map((layer, i) => svg("path", { class: `layer ${tint(layers, i)}`, d: columns[i] }));
  const rule = svg("line", { class: "rule on", y1: 0, y2: 100 });
  plot.append(...paths, rule);
  follow(shared, plot);
  const cells = layers.map(() => [h("td", { class: "number" }), h("td", { class: "number" })]);
  const rows = layers.map((layer, i) => {
    const dim = (on) => paths.forEach((path, j) => path.classList.toggle("dim", on && j !== i));
    return h(
      "tr",
      { on: { pointerenter: () => dim(true), pointerleave: () => dim(false) } },
      h("th", { scope: "row", title: layer.doc }, h("i", { class: `swatch ${tint(layers, i)}` }), layer.label),
      cells[i],
    );
  });
  const caption = h("caption");
  const show = (index) => {
    putRule(rule, index, count);
    const values = layers.map((layer) => layer.values[index] ?? 0);
    const sum = values.reduce((a, b) => a + b, 0);
    caption.textContent = `Step ${shared.steps[index]}: ${number(sum)} ${total}`;
    cells.forEach(([amount, share], i) => {
      amount.textContent = number(values[i]);
      share.textContent = sum ? percent(values[i] / sum) : "–";
      rows[i].classList.toggle("zero", !values[i]);
    });
  };
  shared.watch(show);
  show(shared.at());
  return h(
    "div",
    { class: "stack", id },
    h("div", { class: "plot" }, plot),
    h(
      "table",
      null,
      caption,
      h(
        "thead",
        { class: "hidden" },
        h(
          "tr",
          null,
          ["What became of them", "Number", "Share"].map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h("tbody", null, rows),
    ),
  );
}

// The last layer is what remained; the others are reasons.
function tint(layers, i) {
  return i === layers.length - 1 ? "layer-kept" : `layer-${i}`;
}

// Return a slider that moves the cursor, for the keyboard and for touch.
export function slider(shared, id) {
  const input = h("input", {
    type: "range",
    id,
    min: 0,
    max: shared.steps.length - 1,
    value: shared.at(),
    on: { input: () => shared.pin(Number(input.value)) },
  });
  const label = h("output", { for: id });
  const show = (index) => {
    input.value = index;
    label.textContent = `step ${shared.steps[index]}`;
    input.setAttribute("aria-valuetext", label.textContent);
  };
  shared.watch(show);
  show(shared.at());
  return h("div", { class: "slider" }, h("label", { for: id }, "Step"), input, label);
}

// Return a share or mean with its interval as a small picture on a scale from 0 to 1.
export function whisker(value, interval, label) {
  const [low, high] = interval ?? [value, value];
  return svg(
    "svg",
    { class: "whisker", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": label },
    svg("line", { class: "scale", x1: 0, x2: 100, y1: 5, y2: 5 }),
    svg("line", { class: "span", x1: 100 * low, x2: 100 * high, y1: 5, y2: 5 }),
    svg("line", { class: "point", x1: 100 * value, x2: 100 * value, y1: 0, y2: 10 }),
  );
}
