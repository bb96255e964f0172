// The public API: models, readiness, and an answer as a stream of events.

/** An error, with the message of the API if there is one. */
export class Failure extends Error {
  /** kind: "refused" (a status), "broken" (an error within the stream), "cut" (no end), "lost" (no connection). */
  constructor(kind, message, { status = null, code = null, param = null, retryAfter = null, request = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, code, param, retryAfter, request });
  }
}

/** Addresses are relative to the page, so that the service can be under any prefix. */
async function callApi(path, { key = "", ...options } = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && /header|ByteString|ISO-8859/i.test(error.message)) {
      throw new Failure("refused", "the key contains characters that cannot be sent", { status: 401, code: "invalid_api_key" });
    }
    throw new Failure("lost", error.message);
  }
  return response;
}

/** The id of the request in the server's log. */
const requestId = (response) => response.headers.get("X-Request-Id");

async function refusal(response) {
  const seconds = Number(response.headers.get("Retry-After") ?? NaN);
  const retryAfter = Number.isFinite(seconds) ? seconds : null;
  const about = { status: response.status, retryAfter, request: requestId(response) };
  try {
    const { error } = await response.json();
    return new Failure("refused", String(error.message), { ...about, code: error.code, param: error.param });
  } catch {
    return new Failure("refused", `the server answered with status ${response.status}`, about);
  }
}

export async function models(key) {
  const response = await callApi("v1/models", { key });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data;
}

/** {status, troubles}; a 503 is an answer too. */
export async function readiness() {
  try {
    const response = await callApi("ready");
    return await response.json();
  } catch {
    return { status: "unreachable", troubles: {} };
  }
}

/** Yields {piece}, {verdict} and at last {report, finish}. */
export async function* ask(body, { key, signal }) {
  const response = await callApi("v1/chat/completions", {
    key,
    signal,
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
  });
  if (!response.ok) throw await refusal(response);
  try {
    yield* eventsOf(response.body);
  } catch (error) {
    if (error instanceof Failure) error.request = requestId(response);
    throw error;
  }
}

async function* eventsOf(stream) {
  for await (const data of events(stream)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) {
      const { message, code, param } = chunk.error;
      throw new Failure("broken", String(message), { code, param });
    }
    const choice = chunk.choices?.[0];
    const parse = chunk.parse ?? {};
    if (parse.piece) yield { piece: parse.piece };
    if (parse.verdict) yield { verdict: parse.verdict };
    if (choice?.finish_reason) yield { report: parse, finish: choice.finish_reason };
  }
  throw new Failure("cut", "the stream ended before the answer did");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Failure("cut", "the stream contains invalid JSON");
  }
}

/** Yields the `data` of server-sent events, whatever the chunk boundaries. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event without its empty line never ended
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure("lost", error.message);
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}
