"use strict";
// Attempts as bars over time, and everything that happened as a list.

const WORDS = { restart: "restart", preempted: "preempted", cancelled: "cancelled", failed: "failed", lost: "lost",
                skipped: "skipped rows", refused: "refused", replaced: "held-out rows" };

// What the vertical lines in the charts stand for.
function eventLegend(runs) {
  const kinds = [...new Set(runs.flatMap((run) => run.events.map((each) => each.kind)))];
  return kinds.map((kind) => {
    const mark = element("span", { class: "upright" });
    mark.style.color = theme(`--${kind}`);
    return element("span", { class: "quiet" }, mark, WORDS[kind]);
  });
}

function runTimeline(run, title) {
  const last = Math.max(1, ...run.attempts.map((each) => each.ended || each.began),
    ...run.curves.train.times.filter((time) => time !== null), ...run.events.map((each) => each.time || 0));
  const lane = element("div", { class: "lane", "aria-hidden": "true" });
  const put = (kind, from, to) => {
    const bar = element("span", { class: kind });
    bar.style.left = `${(100 * from) / last}%`;
    if (to !== undefined) bar.style.width = `${Math.max(0.4, (100 * (to - from)) / last)}%`;
    lane.append(bar);
  };
  run.attempts.forEach((each, index) => {
    const following = run.attempts[index + 1];
    put(`bar ${each.state}`, each.began, each.ended ?? (following ? following.began : last));
  });
  run.events.filter((each) => each.time !== null).forEach((each) => put(`tick ${each.kind}`, each.time));
  const rows = run.attempts.map((each) => element("tr", {}, element("td", {}, each.number),
    element("td", {}, element("span", { class: `state ${each.state}` }, each.state)),
    element("td", {}, `${each.from_step} to ${each.to_step}`),
    element("td", {}, each.ended === null ? "–" : span(each.ended - each.began)),
    element("td", { class: "wide" }, `${each.where}${each.processor ? `, ${each.processor}` : ""}`)));
  const head = element("tr", {}, ["attempt", "end", "steps", "time", "on"].map((name) => element("th", { scope: "col" }, name)));
  const events = run.events.map((each) => element("li", {}, element("span", { class: `state ${each.kind}` }, WORDS[each.kind]),
    element("b", {}, `step ${each.step}`), element("span", { class: "quiet" }, each.time === null ? "" : span(each.time)),
    element("span", { class: "what" }, each.text)));
  return element("div", { class: "card" }, title ? element("h3", {}, title) : null, lane,
    element("div", { class: "scale", "aria-hidden": "true" }, element("span", {}, "0"), element("span", {}, span(last))),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "attempts" }, element("table", {}, element("thead", {}, head), element("tbody", {}, rows))),
    events.length ? element("ul", { class: "events" }, events) : element("p", { class: "quiet" }, "Nothing was restarted, skipped or refused."),
    run.excluded.length ? element("p", {}, `Left out since their loss was not finite: ${run.excluded.join(", ")}`) : null);
}
