// Answers of the server; in a self-contained page, the answers that it holds.

const holder = document.getElementById("data");
const stored = holder ? JSON.parse(holder.textContent) : null;

// True in a page made by `grpo view --html`.
export const offline = stored !== null;
export const start = stored?.start ?? null;

class Refused extends Error {
  constructor(message, status, position) {
    super(message);
    this.status = status;
    this.position = position ?? null;
  }
}

// Return the path with its query; parameters that are null, undefined or "" are left out.
export function address(path, query) {
  const pairs = Object.entries(query ?? {}).filter(
    ([, value]) => value !== null && value !== undefined && value !== "",
  );
  const text = pairs.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
  return text ? `${path}?${text}` : path;
}

// Return the answer of an endpoint. Throws Refused with a sentence.
export async function get(path, query) {
  const full = address(path, query);
  if (offline) {
    const answer = stored[full] ?? stored[path];
    if (answer === undefined) {
      throw new Refused("This page was exported without this part. Open the run with `grpo view RUN` to see it.", 404);
    }
    return answer;
  }
  let response;
  try {
    response = await fetch(full, { headers: { Accept: "application/json" }, cache: "no-store" });
  } catch {
    throw new Refused("The server does not answer. It ends with the command `grpo view`; start it again.", 0);
  }
  if (response.ok) return response.json();
  const body = await response.json().catch(() => ({}));
  throw new Refused(
    body.error ?? `The server answered with status ${response.status}.`,
    response.status,
    body.position,
  );
}

const known = new Map();

// Return the answer about a run. It is kept until the run's folder changes.
export function runInfo(run) {
  if (!known.has(run)) {
    const answer = get(`/api/runs/${run}`);
    known.set(run, answer);
    answer.catch(() => known.delete(run));
  }
  return known.get(run);
}

// Ask again for what is known about runs: the folder of one has changed.
export function forgetRuns() {
  known.clear();
}

// Return whether a link to this answer works: always with a server, in a self-contained page if it holds the answer.
export function has(path, query) {
  return !offline || address(path, query) in stored || path in stored;
}
