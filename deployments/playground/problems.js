// Explains errors, and says what the user can do.

/** Returns {title, advice}. The page shows the server's own message between them. */
export function explained({ kind, status, code, param, retryAfter }) {
  if (kind === "lost") {
    return {
      title: "The connection was lost",
      advice: "The text that has arrived stays. Check that the server is running and can be reached, then ask again.",
    };
  }
  if (kind === "cut") {
    return {
      title: "The stream was cut off",
      advice: "The stream ended before the answer was complete, for example because the server was restarted. The text that has arrived stays. Ask again.",
    };
  }
  if (kind === "broken") {
    return {
      title: "The answer is incomplete",
      advice: "The server failed while it generated the answer. The text that has arrived stays. Ask again. If it happens again, look at the server’s log.",
    };
  }
  if (code === "no_keys") {
    return {
      title: "This server serves only its own machine",
      advice: "The server has no keys. Open this page on the server’s machine or through a tunnel to it, or ask the operator to set keys.",
    };
  }
  if (status === 401) {
    return { title: "A key is required", advice: "Enter one of the server’s keys under Key, then ask again." };
  }
  if (code === "context_length_exceeded") {
    return { title: "The request is too long for the model", advice: "Shorten the question, or set a lower Max tokens." };
  }
  if (status === 400 || status === 404) {
    return { title: "The server rejected the request", advice: param ? `Change ${param} and ask again.` : "Change the request and ask again." };
  }
  if (status === 413) return { title: "The question is too long", advice: "Shorten the question or the draft." };
  if (status === 408 || status === 504) {
    return { title: "The request took too long", advice: "Ask again, or set a lower Max tokens." };
  }
  if (status === 503) {
    const when = retryAfter === null ? "in a moment" : `in ${retryAfter} ${retryAfter === 1 ? "second" : "seconds"}`;
    const title = code === "overloaded" ? "The server is busy" : "The server cannot answer now";
    return { title, advice: `Ask again ${when}.` };
  }
  return {
    title: "The server failed",
    advice: "The error is not in your question. Ask again. If it happens again, look at the server’s log.",
  };
}
