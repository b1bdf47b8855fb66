"use strict";
// Puts the page together, and in a live page asks the server for news.

const page = document.getElementById("page");
const isLive = document.body.dataset.live === "yes";
let data = JSON.parse(document.getElementById("data").textContent);
let sections = "";

function badge(run) {
  const { state, phase } = run.standing;
  return element("span", { class: `state ${state.split(",")[0].replaceAll(" ", "-")}` }, phase ? `${state}: ${phase}` : state);
}

function runHeader(run, index, several) {
  const mark = element("span", { class: "mark line" });
  mark.style.color = color(index);
  const message = run.standing.message;
  return element("section", { class: several ? "card head" : "head" },
    element("div", { class: "title" }, element(several ? "h2" : "h1", {}, several ? mark : null, run.name), badge(run)),
    element("p", { class: "about" }, run.about.map((fact) => element("span", {}, fact))),
    message && run.standing.state !== "finished" ? element("pre", { class: "message" }, message) : null,
    element("div", { class: "tiles" }, run.tiles.map((tile) => element("div", { class: "tile" }, element("span", {}, tile.label),
      element("b", {}, tile.value), element("small", {}, tile.note)))));
}

function toolbar() {
  const choice = (label, values, current, apply) => element("div", { class: "choice", role: "group", "aria-label": label }, values.map(([value, word]) =>
    element("button", { type: "button", "aria-pressed": String(value === current), onclick: (event) => {
      event.target.parentNode.querySelectorAll("button").forEach((each) => each.setAttribute("aria-pressed", String(each === event.target)));
      apply(value);
      drawCharts(data);
    } }, word)));
  const shown = data.runs.length < 2 ? null : element("div", { class: "runs", role: "group", "aria-label": "runs" }, data.runs.map((run, index) => {
    const mark = element("span", { class: "mark line" });
    mark.style.color = color(index);
    return element("button", { type: "button", "aria-pressed": String(!charts.hidden.has(run.root)), onclick: (event) => {
      const button = event.currentTarget, hides = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!hides));
      if (hides) charts.hidden.add(run.root); else charts.hidden.delete(run.root);
      drawCharts(data);
    } }, mark, run.name);
  }));
  return element("div", { class: "toolbar" }, shown,
    data.runs.length < 2 ? element("nav", { "aria-label": "parts of the page" }, [["events", "Events"], ["samples", "Before and after"], ["rollouts", "Rollouts"], ["recipe", "Recipe"]]
      .filter(([id]) => (id !== "samples" || data.runs[0].samples) && (id !== "rollouts" || data.runs[0].rollouts.groups.length))
      .map(([id, word]) => element("a", { href: `#${id}` }, word))) : null, eventLegend(data.runs),
    element("div", { class: "pair" }, element("span", { class: "quiet" }, "by"), choice("horizontal axis", [["step", "step"], ["time", "time"]], charts.axis, (value) => { charts.axis = value; charts.zoom = false; })),
    element("div", { class: "pair" }, element("span", { class: "quiet" }, "running mean"), choice("running mean over points", [[0, "off"], [5, "5"], [20, "20"]], charts.smooth, (value) => { charts.smooth = value; })));
}

function settingsTable(run) {
  const set = run.settings.filter((each) => each.origin !== "default");
  const rows = (settings) => settings.map((each) => element("tr", {}, element("td", {}, each.field), element("td", { class: "wide" }, plain(each.value)), element("td", { class: "quiet" }, each.origin)));
  const table = (settings) => element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "settings" }, element("table", {}, element("tbody", {}, rows(settings))));
  return element("details", { class: "section", id: data.runs.length > 1 ? null : "recipe" }, element("summary", {}, element("h2", {}, data.runs.length > 1 ? `Recipe: ${run.name}` : "Recipe"), element("small", {}, `${set.length} values set, ${run.settings.length - set.length} defaults`)),
    element("div", { class: "card" }, table(set), element("details", {}, element("summary", {}, "Defaults"), table(run.settings.filter((each) => each.origin === "default")))));
}

function differences() {
  if (data.runs.length < 2) return null;
  const head = element("tr", {}, element("th", { scope: "col" }, "setting"), data.runs.map((run) => element("th", { scope: "col" }, run.name)));
  const rows = data.differences.map((row) => element("tr", {}, element("td", {}, row.field), row.values.map((value) => element("td", { class: "wide" }, value === null ? "–" : plain(value).replace(/^(sha256:[0-9a-f]{12})[0-9a-f]+$/, "$1…")))));
  if (!rows.length) return element("p", { class: "quiet" }, "The runs have the same settings.");
  return element("details", { class: "section", open: rows.length <= 12 }, element("summary", {}, element("h2", {}, "What differs"), element("small", {}, `${rows.length} settings`)),
    element("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": "settings that differ" }, element("table", {}, element("thead", {}, head), element("tbody", {}, rows))));
}

function notes() {
  const several = data.runs.length > 1;
  const found = data.runs.flatMap((run) => [...run.notes, ...run.warnings].map((note) => several ? `${run.name}: ${note}` : note));
  return found.length ? element("ul", { class: "notes" }, found.map((note) => element("li", {}, note))) : null;
}

function timelines() {
  const runs = data.runs.filter((run) => run.attempts.length);
  return runs.length ? element("section", { id: "events" }, element("h2", {}, "Attempts and events"), runs.map((run) => runTimeline(run, data.runs.length > 1 ? run.name : null))) : null;
}

function noSamples() {
  const runs = data.runs.filter((run) => !run.samples && !run.is_rft);
  return runs.length ? element("p", { class: "quiet small" }, `No answers from before and after training are recorded (logging.answers). To read some: trainer chat ${runs[0].root} --against base`) : null;
}

function build() {
  const several = data.runs.length > 1;
  const hasPoints = data.runs.some((run) => run.curves.num_steps || run.curves.held_out.steps.length);
  sections = JSON.stringify(data.sections);
  page.replaceChildren(...[
    several ? element("h1", {}, `${data.runs.length} runs`) : null,
    element("div", { class: several ? "heads" : "" }, data.runs.map((run, index) => runHeader(run, index, several))),
    notes(), differences(),
    hasPoints ? toolbar() : element("p", { class: "quiet" }, "No step has been logged yet."),
    ...chartSections(data), timelines(),
    ...data.runs.filter((run) => run.samples).map((run) => beforeAfter(run, several)),
    rolloutBrowser(data), ...data.runs.map(settingsTable), noSamples(),
    element("footer", {}, "tunesmith report", isLive ? element("span", { id: "live", role: "status" }, "live") : null),
  ].filter((each) => each));
  drawCharts(data);
}

// A new state of the runs: the page is built again; scrolling, filters and what is open stay.
function renew() {
  const open = [...page.querySelectorAll("details.section")].map((each) => each.open);
  const scroll = window.scrollY, focused = document.activeElement && document.activeElement.getAttribute("aria-label");
  const inner = [".list", ".detail"].map((name) => [name, (page.querySelector(name) || {}).scrollTop]);
  const isSame = sections === JSON.stringify(data.sections);
  build();
  if (isSame) [...page.querySelectorAll("details.section")].forEach((each, index) => { each.open = open[index]; });
  inner.forEach(([name, top]) => { const again = page.querySelector(name); if (again && top) again.scrollTop = top; });
  window.scrollTo(0, scroll);
  if (focused) { const again = [...page.querySelectorAll("[aria-label]")].find((each) => each.getAttribute("aria-label") === focused); if (again) again.focus({ preventScroll: true }); }
}

async function follow() {
  let version = "";
  for (;;) {
    await new Promise((done) => setTimeout(done, 2000));
    const live = document.getElementById("live");
    try {
      const answer = await fetch(`data?version=${encodeURIComponent(version)}`, { cache: "no-store" });
      if (answer.status === 204) { live.textContent = "live"; continue; }
      if (!answer.ok) throw new Error(await answer.text());
      const news = await answer.json();
      const typing = document.activeElement && document.activeElement.matches("input, select");
      if (typing) continue;
      version = news.version;
      data = news.data;
      renew();
    } catch (error) {
      live.textContent = `not live: ${error.message}`;
    }
  }
}

build();
new ResizeObserver(fitCharts).observe(page);
darkScheme.addEventListener("change", () => renew());
if (isLive) follow();
