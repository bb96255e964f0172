// Light, dark, or as the system has it; remembered in this browser, where it lets us.

import { byId } from "./dom.js";

const NEXT = { system: "light", light: "dark", dark: "system" };
const WHERE = "parse-theme";

export function themes() {
  show(remembered());
  byId("theme").addEventListener("click", () => {
    const chosen = NEXT[byId("theme-name").textContent] ?? "system";
    try {
      localStorage.setItem(WHERE, chosen);
    } catch {
      // It holds until the page is left.
    }
    show(chosen);
  });
}

function remembered() {
  try {
    const found = localStorage.getItem(WHERE);
    return found in NEXT ? found : "system";
  } catch {
    return "system";
  }
}

function show(theme) {
  byId("theme-name").textContent = theme;
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
