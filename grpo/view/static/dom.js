// Build elements. Text goes in as text nodes only, so no content of a run can become markup.

// Return an element: h("a", {href: "#/", class: "x", on: {click: f}, style: {"--p": "3%"}}, "text", child, [children]).
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

// Return an SVG element.
export function svg(tag, props, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name === "value" || name === "checked" || name === "selected") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) append(element, child);
    else element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

// Return a section with a heading that it is named by.
export function section(id, title, ...children) {
  return h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), children);
}

// Return a table in a box that scrolls sideways. columns: [{label, number, title}]; rows: lists of cells, or <tr>.
export function table(id, caption, columns, rows) {
  const head = columns.map((column) =>
    h(
      "th",
      { scope: "col", class: column.number && "number", title: column.title, "aria-sort": column.sorted },
      column.label,
    ),
  );
  const body = rows.map((row) => (row instanceof Node ? row : tableRow(columns, row)));
  return h(
    "div",
    { class: "scroll", "data-scroll": id, tabindex: "0", role: "group", "aria-label": caption },
    h(
      "table",
      { id },
      h("caption", { class: "hidden" }, caption),
      h("thead", null, h("tr", null, head)),
      h("tbody", null, body),
    ),
  );
}

// Return a row whose first cell is its header.
export function tableRow(columns, cells, props) {
  return h(
    "tr",
    props,
    cells.map((cell, i) =>
      h(
        i ? "td" : "th",
        { scope: i ? null : "row", class: columns[i].number && "number", "data-label": i ? columns[i].label : null },
        cell,
      ),
    ),
  );
}

// Return a link; plain text if href is null. item: j and k stop at it.
export function link(href, props, ...children) {
  if (href !== null) return h("a", { ...props, href }, children);
  const { class: kind, dir, title, style } = props ?? {};
  return h("span", { class: kind, dir, title, style }, children);
}

// Return a labelled select. options: [[value, label]].
export function select(id, label, value, options, change) {
  const box = h(
    "select",
    { id, on: { change: () => change(box.value) } },
    options.map(([key, text]) => h("option", { value: key, selected: String(key) === String(value) }, text)),
  );
  return h("label", { class: "field", for: id }, h("span", null, label), box);
}

// Return a labelled text field.
export function field(id, label, value, props) {
  return h(
    "label",
    { class: `field ${props?.wide ? "wide" : ""}`, for: id },
    h("span", null, label),
    h("input", { type: "text", autocomplete: "off", spellcheck: "false", ...props, wide: null, id, value }),
  );
}

// Return what a page shows where there is nothing: what is absent and what gives it.
export function empty(what, how) {
  return h("p", { class: "empty" }, h("strong", null, what), how ? ` ${how}` : "");
}

// Return pairs as a description list; a pair whose value is null is left out.
export function facts(pairs, props) {
  return h(
    "dl",
    { class: "facts", ...props },
    pairs
      .filter(([, value]) => value !== null && value !== undefined)
      .map(([name, value, title]) => h("div", { title }, h("dt", null, name), h("dd", null, value))),
  );
}
