// Runs the checks of a client. Each program registers its checks and calls `main`. The contract is that of checks.py.

export const { BASE_URL, TOOLS_BASE_URL, MODEL, QUESTION, ANSWER } = process.env;
export const WEATHER = "Sunny, 20 degrees"; // what the tool get_weather returns

const checks = [];

// Registers a feature that must work. The function throws an error if it does not.
export function check(title, run) {
  checks.push({ title, expected: "works", words: [], run });
}

// Registers a feature that the server must reject with a message that names all these fields.
export function rejected(title, words, run) {
  checks.push({ title, expected: "rejected", words, run });
}

// Runs all checks and prints the result of each one as a line of JSON.
export async function main() {
  for (const { title, expected, words, run } of checks) {
    let result = "works";
    let detail = "";
    try {
      await run();
    } catch (error) {
      const messages = causes(error).map((cause) => cause.message ?? String(cause));
      const isRejection = expected === "rejected" && words.every((word) => isNamed(word, messages.join("\n")));
      result = isRejection ? "rejected" : "failed";
      detail = isRejection ? words.join(" ") : causes(error).map((cause) => cause.stack ?? String(cause)).join("\n");
    }
    if (result !== expected && result !== "failed") {
      result = "failed";
      detail = "it was expected to be rejected, but it works";
    }
    console.log("\n" + JSON.stringify({ title, result, detail: detail.slice(-3000) }));
  }
  console.log(`\n${checks.length} checks`);
  process.exit(0); // some clients keep connections
}

// Whether a message of the server names a field: `field.path: reason`. Clients reject some requests themselves.
function isNamed(word, text) {
  const escaped = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  return new RegExp(`${escaped}[\\w.\\[\\]]*(: |\\))`).test(text);
}

function causes(error) {
  return error == null ? [] : [error, ...causes(error.cause)];
}

export function assert(condition, message) {
  if (!condition) throw new Error(message);
}

export function checkText(text) {
  assert(typeof text === "string" && text.endsWith(ANSWER), `expected "${ANSWER}" at the end of "${text}"`);
}

export function checkWeather(text) {
  assert(typeof text === "string" && text.includes(WEATHER), `expected "${WEATHER}" in "${text}"`);
}
