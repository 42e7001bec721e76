"use strict";
// Text from outside becomes text nodes and attributes only; the policy in <head> forbids everything else.

const $ = (id) => document.getElementById(id);
const read = (id) => JSON.parse($(id).textContent);

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function fill(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value, textContent: text })));
}

// ---- light and dark: the system's choice, until the button says otherwise -------------------------------------------

function remembered(value) {
  try {
    if (value !== undefined) localStorage.setItem("theme", value);
    return localStorage.getItem("theme");
  } catch {
    return null; // some browsers give a file no storage
  }
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").setAttribute("aria-pressed", String(dark));
}

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const chosen = remembered();
setTheme(chosen === null ? systemIsDark.matches : chosen === "dark");
systemIsDark.addEventListener("change", () => remembered() === null && setTheme(systemIsDark.matches));
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme !== "dark";
  remembered(dark ? "dark" : "light");
  setTheme(dark);
});

// ---- the navigation: which section is being read --------------------------------------------------------------------

const links = [...document.querySelectorAll("nav a")];

/** Mark the last section that begins in the upper third of the window; at the page's end, the last of all. */
function markSection() {
  const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 2;
  const begun = links.filter((link) => $(link.hash.slice(1)).getBoundingClientRect().top < innerHeight / 3);
  const current = atEnd ? links.at(-1) : begun.at(-1);
  for (const link of links) {
    if (link === current) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

addEventListener("scroll", markSection, { passive: true });
addEventListener("resize", markSection);

// ---- what all parts use ---------------------------------------------------------------------------------------------

const data = read("data");

function number(value) {
  return value === null || value === undefined ? "–" : String(Number(value.toPrecision(4)));
}

function nameOf(row) {
  return data.copies > 1 ? `prompt ${row.prompt + 1}, image ${row.copy + 1}` : `prompt ${row.prompt + 1}`;
}
