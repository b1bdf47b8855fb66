"use strict";
// Builds elements. Texts become text nodes, never HTML, so nothing that a run wrote can be markup.

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) made.append(child instanceof Node ? child : String(child));
  }
  return made;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0*e/, "e");
  return String(+value.toPrecision(digits));
}

function signed(value, digits = 2) {
  return (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(digits);
}

function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole}s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes}m${whole % 60 ? `${String(whole % 60).padStart(2, "0")}s` : ""}`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours}h${minutes % 60 ? `${String(minutes % 60).padStart(2, "0")}m` : ""}` : `${Math.floor(hours / 24)}d${hours % 24}h`;
}

function plain(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

const COLORS = { light: ["#2563eb", "#d9480f", "#0f8a5f", "#9333ea", "#b7791f", "#0e7490", "#be185d", "#4b5563"],
                 dark: ["#7aa7ff", "#ff9e66", "#4fd1a1", "#c79bff", "#e8c26a", "#67d3e8", "#ff8fc2", "#b6bdc9"] };
const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");

function color(index) {
  const shades = COLORS[darkScheme.matches ? "dark" : "light"];
  return shades[index % shades.length];
}

function theme(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
