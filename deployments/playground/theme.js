// Switches between a light theme, a dark theme and that of the system. The browser stores the choice if it allows that.

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
      // Without storage, the choice is kept until the user leaves the page.
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
