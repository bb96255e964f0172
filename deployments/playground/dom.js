// Creates elements from data. Text is inserted as text, because no code on the page parses markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** Creates an element, for example `element("td", {class: "number"}, "12")`. Null and false attributes are left out. */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Creates a table of texts. The first cell of each row is its header. */
export function table(caption, head, rows) {
  return element(
    "table",
    {},
    element("caption", { class: "unseen" }, caption),
    element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))),
    element(
      "tbody",
      {},
      ...rows.map(([first, ...rest]) =>
        element("tr", {}, element("th", { scope: "row" }, first), ...rest.map((text) => element("td", {}, text))),
      ),
    ),
  );
}

export const seconds = (s) => (s < 0.9995 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(2)} s`);
export const percent = (share) => `${Math.round(share * 100)}%`;
export const times = (ratio) => `${ratio < 10 ? ratio.toFixed(2) : ratio.toFixed(1)}×`;
export const chance = (p) => (p === null ? "not evaluated" : p.toFixed(3));
