// Explains errors, and what to do about them.

/** {title, advice}: the server's own message stands between them. */
export function explained({ kind, status, code, param, retryAfter }) {
  if (kind === "lost") {
    return {
      title: "The connection was lost",
      advice: "What had arrived stays. See whether the server is still running and can be reached, then ask again.",
    };
  }
  if (kind === "cut") {
    return {
      title: "The stream was cut off",
      advice: "It ended before the answer did, as when the server is restarted. What had arrived stays; ask again.",
    };
  }
  if (kind === "broken") {
    return {
      title: "The answer broke off",
      advice: "The server failed on its way. What had arrived stays; ask again, and if it happens again, look into the server’s log.",
    };
  }
  if (code === "no_keys") {
    return {
      title: "This server only serves its own machine",
      advice: "It has no keys. Open this page on the server’s machine or through a tunnel to it, or have the operator set keys.",
    };
  }
  if (status === 401) {
    return { title: "A key is required", advice: "Enter one of the server’s keys under Key, then ask again." };
  }
  if (code === "context_length_exceeded") {
    return { title: "Too long for the model", advice: "Shorten the question, or ask for fewer tokens." };
  }
  if (status === 400 || status === 404) {
    return { title: "The server rejected the request", advice: param ? `Change ${param} and ask again.` : "Change it and ask again." };
  }
  if (status === 413) return { title: "The question is too long", advice: "Shorten the question or the draft." };
  if (status === 408 || status === 504) {
    return { title: "It took too long", advice: "Ask again, or ask for fewer tokens." };
  }
  if (status === 503) {
    const when = retryAfter === null ? "in a moment" : `in ${retryAfter} ${retryAfter === 1 ? "second" : "seconds"}`;
    const title = code === "overloaded" ? "The server is busy" : "The server cannot answer now";
    return { title, advice: `Ask again ${when}.` };
  }
  return {
    title: "The server failed",
    advice: "The fault is not in your question. Ask again; if it happens again, look into the server’s log.",
  };
}
