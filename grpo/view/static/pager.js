// Links between the pages of a list.
import { h, link } from "./dom.js";
import { number } from "./format.js";
import { withQuery } from "./routes.js";

// Return the links, or nothing if all is on one page. count: entries of this page, of total; size: of a full page.
export function pager(what, query, size, count, total) {
  const offset = Number(query.offset ?? 0);
  if (offset === 0 && count >= total) return null;
  const to = (at) => (at < 0 || at >= total ? null : withQuery({ offset: at || null }));
  return h(
    "nav",
    { class: "pager", "aria-label": `Pages of ${what}` },
    link(offset === 0 ? null : to(Math.max(0, offset - size)), { rel: "prev" }, `← previous ${what}`),
    h("span", null, `${what} ${number(offset + 1)} to ${number(offset + count)} of ${number(total)}`),
    link(to(offset + count), { rel: "next" }, `next ${what} →`),
  );
}
