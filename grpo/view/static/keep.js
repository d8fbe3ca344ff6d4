// What a reader has done to a page, taken before its content is replaced and put back after.

const REACH = "a[href], button, input, select, summary, [tabindex]";

// Return scroll positions, focus, opened blocks, typed text and enlarged curves.
export function keep(main) {
  const active = document.activeElement;
  const fields = [...main.querySelectorAll("input[id]")].map((one) => ({
    id: one.id,
    value: one.type === "range" && one.value === one.max ? null : one.value,
    selection: one === active && one.type !== "range" ? [one.selectionStart, one.selectionEnd] : null,
  }));
  return {
    y: scrollY,
    focus: main.contains(active) && active !== main ? name(active) : null,
    open: new Map([...main.querySelectorAll("details[id]")].map((one) => [one.id, one.open])),
    boxes: new Map([...main.querySelectorAll("[data-scroll]")].map((one) => [one.dataset.scroll, one.scrollLeft])),
    large: [...main.querySelectorAll(".chart.large .name")].map((one) => one.id),
    fields,
  };
}

// Put it back. typed: also the text in fields; otherwise the address says what is in them.
export function restore(main, kept, typed) {
  for (const details of main.querySelectorAll("details[id]")) {
    if (kept.open.has(details.id)) details.open = kept.open.get(details.id);
  }
  for (const id of kept.large) document.getElementById(id)?.click();
  for (const { id, value } of typed ? kept.fields : []) {
    const input = document.getElementById(id);
    if (!input || value === null || input.value === value) continue;
    input.value = value;
    input.dispatchEvent(new Event("input"));
  }
  for (const box of main.querySelectorAll("[data-scroll]")) box.scrollLeft = kept.boxes.get(box.dataset.scroll) ?? 0;
  const again = kept.focus && [...main.querySelectorAll(REACH)].find((one) => name(one) === kept.focus);
  if (again) {
    again.focus({ preventScroll: true });
    const selection = kept.fields.find((one) => one.id === again.id)?.selection;
    if (selection?.[0] !== null && selection) again.setSelectionRange(...selection);
  }
  scrollTo(0, kept.y);
}

// Return what tells an element from the others of the page, also after it has been made anew.
function name(element) {
  return (
    element.id ||
    `${element.tagName} ${element.getAttribute("href") ?? element.closest("[id]")?.id} ${element.textContent.slice(0, 40)}`
  );
}
