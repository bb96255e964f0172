// Runs the page: sends requests and shows the answers.

import { ask, Failure, models, readiness } from "./api.js";
import { comparison } from "./comparison.js";
import { byId, element } from "./dom.js";
import { EXAMPLES, MODES, WORDS } from "./examples.js";
import { Pane } from "./pane.js";
import { explained } from "./problems.js";
import { Session } from "./session.js";
import { themes } from "./theme.js";

const READINESS_INTERVAL_MS = 15_000;
const KEY = "parse-key"; // in sessionStorage, which belongs to this tab and ends with it

const session = new Session();
let model = null;
let offer = { modes: null, full: null, prefix: null, methods: null, speculation: null }; // what the server offers; null if not known yet
let panes = [];
let activeRequest = null; // the AbortController of the running request
let last = null; // the last request, without its mode and method
let count = 0;

const announce = (text) => (byId("live").textContent = text);
const number = (id) => (byId(id).value.trim() === "" ? null : Number(byId(id).value));

// The request.

function request() {
  const body = { model, messages: [{ role: "user", content: byId("question").value }] };
  for (const [field, id] of [["temperature", "temperature"], ["seed", "seed"], ["max_tokens", "max-tokens"]]) {
    if (number(id) !== null) body[field] = number(id);
  }
  const own = byId("prediction").value;
  if (own) body.prediction = { type: "content", content: own };
  body.parse = { trace: true };
  for (const name of ["full", "prefix"]) if (number(name) !== null) body.parse[name] = number(name);
  return body;
}

/** Returns {mode, method} of each requested answer. */
function chosen() {
  const choices = ["", "-b"].map((which) => ({ mode: byId(`mode${which}`).value, method: byId(`method${which}`).value }));
  return byId("compare").checked ? choices : choices.slice(0, 1);
}

const several = () => (offer.methods?.length ?? 0) > 1;

async function start() {
  if (!byId("form").reportValidity()) return;
  stop();
  const controller = new AbortController();
  activeRequest = controller;
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  for (const pane of panes) pane.leave();
  panes = [];
  byId("panes").replaceChildren();
  last = request();
  for (const choice of chosen()) open(choice);
  const answers = byId("answers");
  if (answers.getBoundingClientRect().top > innerHeight / 2) answers.scrollIntoView(); // on small screens it is below the form
  await runPanes(controller, panes);
}

/** Asks the last question again in mode `off`, next to the last answer. */
async function measureOff() {
  if (!last) return;
  stop();
  const controller = new AbortController();
  activeRequest = controller;
  for (const pane of panes.slice(1)) pane.leave();
  panes = panes.slice(0, 1);
  byId("answers").focus({ preventScroll: true }); // the button that has the focus is about to disappear
  byId("panes").scrollIntoView({ block: "nearest" });
  await runPanes(controller, [open({ mode: "off", method: offer.speculation })]);
}

function open({ mode, method }) {
  const { full = offer.full, prefix = offer.prefix } = last.parse;
  const usual = !several() || method === offer.speculation;
  const pane = new Pane(mode, {
    method,
    name: usual ? mode : `${mode}, ${method}`,
    thresholds: { full, prefix },
    id: `pane-${++count}`,
  });
  panes.push(pane);
  byId("panes").append(pane.root);
  byId("panes").dataset.count = panes.length;
  return pane;
}

/** Requests one answer after the other, because concurrent requests would slow each other down. */
async function runPanes(controller, waiting) {
  working(true);
  compare({ over: false });
  try {
    for (const pane of waiting) {
      if (controller.signal.aborted) pane.stopped();
      else await answer(pane, controller);
    }
    if (activeRequest === controller) {
      shareScale();
      compare({ over: true });
    }
  } finally {
    if (activeRequest === controller) {
      activeRequest = null;
      working(false);
    }
  }
}

async function answer(pane, controller) {
  pane.state = "sent";
  announce(`Request sent, mode ${pane.name}.`);
  try {
    if (model === null) last.model = await whichModel();
    const body = { ...last, parse: { ...last.parse, mode: pane.mode } };
    if (several()) body.parse.speculation = pane.method || offer.speculation;
    if (pane.mode === "off") delete body.prediction; // mode off does not use it
    for await (const event of ask(body, { key: byId("key").value, signal: controller.signal })) {
      if (controller.signal.aborted) break;
      pane.take(event);
    }
    if (controller.signal.aborted) pane.stopped();
    else finished(pane, body);
  } catch (error) {
    if (controller.signal.aborted) pane.stopped();
    else showFailure(pane, error);
  }
}

function finished(pane, body) {
  pane.show();
  if (!pane.report) throw new Failure("cut", "the stream ended before the answer was complete");
  announce(pane.summary);
  session.take(body.prediction ? `${pane.name}, own draft` : pane.name, pane.report);
  showSession();
}

function showFailure(pane, error) {
  const failure = error instanceof Failure ? error : new Failure("lost", String(error));
  pane.failed(failure); // the box has the role alert, so screen readers announce it
  const field = failure.param && document.querySelector(`[data-param="${CSS.escape(failure.param)}"]`);
  if (field) {
    field.setAttribute("aria-invalid", "true");
    const fold = field.closest("details");
    if (fold) fold.open = true;
  }
  if (failure.status === 401 && failure.code !== "no_keys") byId("access").open = true;
}

function stop() {
  if (!activeRequest) return;
  activeRequest.abort();
  activeRequest = null;
  for (const pane of panes) if (["waiting", "sent", "generating"].includes(pane.state)) pane.stopped();
  working(false);
  compare({ over: true });
  announce("Stopped.");
}

function working(is) {
  const button = byId("stop");
  if (!is && document.activeElement === button) byId("ask").focus();
  button.disabled = !is;
}

// The comparison.

function shareScale() {
  const totals = panes.map(({ report }) => report?.total_s ?? 0);
  const axisSeconds = Math.max(...totals);
  for (const pane of panes) if (pane.report) pane.setScale(axisSeconds);
}

function compare({ over }) {
  const [a, b] = panes;
  const line = byId("comparison");
  line.hidden = !b;
  if (!b) return;
  if (!a.report || !b.report) {
    const why = over ? "cannot be compared, because not both completed." : "are compared when both are done. They run one after the other.";
    line.replaceChildren(element("b", {}, "–"), element("span", {}, `${a.name} and ${b.name} ${why}`));
    return;
  }
  const { ratio, sentences } = comparison(a, b);
  line.replaceChildren(element("b", {}, ratio), element("span", {}, sentences.join(" ")));
}

function showSession() {
  byId("session-empty").hidden = true;
  byId("session").hidden = false;
  byId("session-rows").replaceChildren(...session.drawn());
  byId("no-baseline").hidden = session.hasBaseline;
}

// The server.

async function whichModel() {
  const cards = await models(byId("key").value);
  model = cards[0].id;
  byId("model").textContent = model;
  byId("model").title = `context length: ${cards[0].max_model_len} tokens`;
  offered(cards[0].parse);
  return model;
}

/** Shows what the server offers: its thresholds, which apply where the user sets none, and its modes and methods. */
function offered(parse) {
  offer = { ...offer, ...parse };
  for (const name of ["full", "prefix"]) if (offer[name] !== null) byId(name).placeholder = offer[name];
  for (const option of document.querySelectorAll("#mode option, #mode-b option")) {
    option.disabled = offer.modes !== null && !offer.modes.includes(option.value);
  }
  for (const id of ["mode", "mode-b"]) {
    const [first] = byId(id).querySelectorAll("option:not(:disabled)");
    if (byId(id).selectedOptions[0]?.disabled && first) byId(id).value = first.value;
  }
  offeredMethods();
}

/** Shows the methods if there is more than one. */
function offeredMethods() {
  byId("methods").hidden = !several();
  const methods = offer.methods ?? [];
  for (const id of ["method", "method-b"]) {
    const before = byId(id).value;
    byId(id).replaceChildren(...methods.map((method) => element("option", { value: method }, WORDS[method] ?? method)));
    byId(id).value = methods.includes(before) ? before : offer.speculation;
  }
}

async function loadModel() {
  try {
    await whichModel();
  } catch (error) {
    byId("model").textContent = explained(error).title;
    if (error.status === 401 && error.code !== "no_keys") byId("access").open = true;
  }
}

async function updateReadiness() {
  if (document.hidden) return;
  const { status, troubles } = await readiness();
  const text = Object.entries(troubles ?? {}).map(([name, trouble]) => `${name}: ${trouble}`);
  byId("ready").dataset.state = status;
  byId("ready").title = text.join("\n");
  const shown = text.length ? `${status}, no ${Object.keys(troubles).join(", ")}` : status;
  if (byId("ready-text").textContent !== shown) byId("ready-text").textContent = shown;
}

// The form.

function fill() {
  for (const id of ["mode", "mode-b"]) {
    byId(id).append(...Object.keys(MODES).map((mode) => element("option", { value: mode }, mode)));
  }
  byId("mode").value = "full";
  byId("mode-b").value = "off";
  for (const { name, question } of EXAMPLES) {
    const button = element("button", { type: "button", class: "example", title: question }, name);
    button.addEventListener("click", () => {
      byId("question").value = question;
      byId("question").focus();
    });
    byId("examples").append(element("li", {}, button));
  }
  byId("question").value = EXAMPLES[0].question;
  try {
    byId("key").value = sessionStorage.getItem(KEY) ?? "";
  } catch {
    // Without storage, the user has to enter the key again.
  }
  if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("ask-key").textContent = "⌘ ⏎";
}

function help() {
  const two = byId("compare").checked;
  for (const id of ["mode-b", "method-b"]) byId(id).disabled = !two;
  const modes = [...new Set(chosen().map(({ mode }) => mode))];
  byId("mode-help").replaceChildren(
    ...modes.map((mode) => element("span", {}, element("b", {}, mode), ` ${MODES[mode]}`)),
  );
}

function keep() {
  try {
    sessionStorage.setItem(KEY, byId("key").value);
  } catch {
    // Without storage, the key is kept until the user leaves the page.
  }
  loadModel();
}

function keyboard(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  } else if (event.key === "Escape" && activeRequest) {
    event.preventDefault();
    stop();
  }
}

themes();
fill();
help();
for (const id of ["mode", "mode-b", "compare"]) byId(id).addEventListener("change", help);
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
byId("stop").addEventListener("click", stop);
byId("measure-off").addEventListener("click", measureOff);
byId("key").addEventListener("change", keep);
byId("show-rejected").addEventListener("change", (event) =>
  byId("answers").classList.toggle("without-rejected", !event.target.checked),
);
document.addEventListener("keydown", keyboard);
document.addEventListener("visibilitychange", updateReadiness);
loadModel();
updateReadiness();
setInterval(updateReadiness, READINESS_INTERVAL_MS);
