// Calls the public API: it reads models and readiness, and streams the events of an answer.

/** A failed request. The message is that of the API, if the API sent one. */
export class Failure extends Error {
  /**
   * `kind` is "refused" (the response has an error status), "broken" (the stream contains an error), "cut" (the stream
   * ended too early) or "lost" (the connection failed).
   */
  constructor(kind, message, { status = null, code = null, param = null, retryAfter = null, request = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, code, param, retryAfter, request });
  }
}

/** Calls the API. Paths are relative to the page, so that the service can be under any prefix. */
async function callApi(path, { key = "", ...options } = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && /header|ByteString|ISO-8859/i.test(error.message)) {
      throw new Failure("refused", "the key contains characters that a header cannot contain", { status: 401, code: "invalid_api_key" });
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
    return new Failure("refused", `the server responded with status ${response.status}`, about);
  }
}

export async function models(key) {
  const response = await callApi("v1/models", { key });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data;
}

/** Returns {status, troubles}. A 503 contains them too. */
export async function readiness() {
  try {
    const response = await callApi("ready");
    return await response.json();
  } catch {
    return { status: "unreachable", troubles: {} };
  }
}

/** Sends a question. Yields {piece} and {verdict} objects, and finally {report, finish}. */
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
  throw new Failure("cut", "the stream ended before the answer was complete");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Failure("cut", "the stream contains invalid JSON");
  }
}

/** Yields the `data` of server-sent events. They can be split into chunks at any byte. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event ends with an empty line; an incomplete event is dropped
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
    reader.cancel().catch(() => {}); // the stream may have failed already
  }
}
