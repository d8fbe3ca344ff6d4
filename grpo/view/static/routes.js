// Addresses of the pages. The part after # holds the whole state of a page, so that it can be linked.
import { address, has } from "./api.js";

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a % that begins no code
  }
}

// Return {parts, query} of a hash such as #/run/0/step/step-000010?sort=spread.
export function parseHash(hash) {
  const [path, query] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  return {
    parts: path.split("/").filter(Boolean).map(decoded),
    query: Object.fromEntries(new URLSearchParams(query ?? "")),
  };
}

export function runHash(run) {
  return `#/run/${run}`;
}

export function samplesPath(run, file) {
  return `/api/runs/${run}/samples/${encodeURIComponent(file)}`;
}

// The four below return null where a self-contained page does not hold the page.
export function fileHash(run, file, query) {
  return has(samplesPath(run, file)) ? address(`#/run/${run}/step/${encodeURIComponent(file)}`, query) : null;
}

export function groupHash(run, file, group, query) {
  if (!has(`${samplesPath(run, file)}/groups/${group}`)) return null;
  return address(`#/run/${run}/step/${encodeURIComponent(file)}/group/${group}`, query);
}

export function completionHash(run, file, group, index, query) {
  if (!has(`${samplesPath(run, file)}/groups/${group}/${index}`)) return null;
  return address(`#/run/${run}/step/${encodeURIComponent(file)}/group/${group}/${index}`, query);
}

export function promptHash(run, id) {
  return has(`/api/runs/${run}/prompts/one`, { id }) ? `#/run/${run}/prompt/${encodeURIComponent(id)}` : null;
}

// Return the current address with other parameters; null removes one.
export function withQuery(changes) {
  const { parts, query } = parseHash(location.hash);
  return address(`#/${parts.map(encodeURIComponent).join("/")}`, { ...query, ...changes });
}

// Change parameters of the current address. Going back leaves the page in one step.
export function setQuery(changes) {
  history.replaceState(null, "", withQuery(changes));
  dispatchEvent(new HashChangeEvent("hashchange"));
}
