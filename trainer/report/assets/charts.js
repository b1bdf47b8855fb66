"use strict";
// Curves: one uPlot per chart, cursors in step, events as vertical lines, held-out values as points with intervals.

const charts = { drawn: [], axis: "step", smooth: 0, hidden: new Set(), zoom: false };
const TIME_STEPS = [1, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000, 864000];
const CURSOR = uPlot.sync("report");

function smoothed(values, window) {
  if (!window) return values;
  const out = [], kept = [];
  let sum = 0;
  for (const value of values) {
    if (value !== null) { kept.push(value); sum += value; }
    if (kept.length > window) sum -= kept.shift();
    out.push(value === null ? null : sum / kept.length);
  }
  return out;
}

// The series of one chart: {label, color, x, y, low, high, kind} of every visible run.
function seriesOf(chart, runs) {
  const found = [];
  runs.forEach((run, index) => {
    if (charts.hidden.has(run.root)) return;
    const add = (points, name, more) => {
      if (!name || !points.values[name] || !points.values[name].some((value) => value !== null)) return;
      found.push({ run, color: color(index), x: charts.axis === "step" ? points.steps : points.times,
                   y: points.values[name], ...more });
    };
    const several = runs.length > 1;
    const { train, held_out, low, high } = run.curves;
    if (charts.smooth && chart.metric) add(train, chart.metric, { kind: "faint" });
    add(train, chart.metric, { kind: "line", label: several ? run.name : chart.held_out ? "training" : "value",
                               low: low[chart.metric], high: high[chart.metric] });
    add(train, chart.beside, { kind: "dashed", label: several && index ? "" : "predicted" });
    const [from, to] = chart.interval || [];
    add(held_out, chart.held_out, { kind: "points", label: several ? `${run.name}, held-out` : "held-out", held: true,
      color: runs.length > 1 ? color(index) : color(1),
      low: held_out.values[from], high: held_out.values[to] });
  });
  return found;
}

function columns(series) {
  const xs = [...new Set(series.flatMap((each) => each.x.filter((x) => x !== null)))].sort((a, b) => a - b);
  const place = new Map(xs.map((x, index) => [x, index]));
  const spread = (each, values) => {
    const column = new Array(xs.length).fill(undefined);
    values.forEach((value, index) => { if (each.x[index] !== null) column[place.get(each.x[index])] = value; });
    return column;
  };
  const data = [xs], options = [{}], bands = [];
  for (const each of series) {
    const values = each.kind === "line" ? smoothed(each.y, charts.smooth) : each.y;
    data.push(spread(each, values));
    options.push(seriesOptions(each, xs.length));
    each.index = data.length - 1;
    if (each.kind === "line" && each.low && !charts.smooth) {
      for (const edge of [each.high, each.low]) {
        data.push(spread(each, edge));
        options.push({ label: "", stroke: "transparent", points: { show: false }, spanGaps: true, class: "edge" });
      }
      bands.push({ series: [data.length - 2, data.length - 1], fill: each.color + "33" });
    }
  }
  return { data, options, bands };
}

const DENSE = 40;

// So many held-out values that circles and whiskers would cover each other: a line and a band instead.
function isDense(each) {
  return each.y.length > DENSE;
}

function seriesOptions(each, length) {
  const few = each.kind === "line" && length <= 60;
  const base = { label: each.label || "", spanGaps: true, stroke: each.color, width: 2,
                 points: { show: few, size: 4, fill: each.color }, value: (_, value) => number(value) };
  if (each.kind === "faint") return { ...base, stroke: each.color + "55", width: 1, points: { show: false } };
  if (each.kind === "dashed") return { ...base, width: 1.5, dash: [6, 5], stroke: theme("--quiet"), points: { show: false } };
  if (each.kind === "points" && isDense(each)) return { ...base, width: 1.5, points: { show: false } };
  if (each.kind === "points") {
    return { ...base, width: 1, dash: [3, 4], points: { show: true, size: 9, width: 2, fill: theme("--card"), stroke: each.color } };
  }
  return base;
}

// Whiskers of the held-out intervals, and a vertical line for each event.
function overlay(series, runs) {
  return (plot) => {
    const ctx = plot.ctx, ratio = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
    ctx.clip();
    runs.forEach((run) => {
      if (charts.hidden.has(run.root)) return;
      for (const event of run.events) {
        const at = charts.axis === "step" ? event.step : event.time;
        if (at === null) continue;
        const x = Math.round(plot.valToPos(at, "x", true));
        ctx.strokeStyle = theme(`--${event.kind}`) || theme("--quiet");
        ctx.lineWidth = ratio;
        ctx.setLineDash([3 * ratio, 3 * ratio]);
        ctx.beginPath();
        ctx.moveTo(x, plot.bbox.top);
        ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
        ctx.stroke();
      }
    });
    ctx.setLineDash([]);
    for (const each of series.filter((one) => one.held && one.low && one.high)) {
      ctx.strokeStyle = each.color;
      if (isDense(each)) { fillBetween(plot, each); continue; }
      ctx.lineWidth = 1.5 * ratio;
      each.x.forEach((at, index) => {
        if (at === null || each.low[index] === null || each.low[index] === undefined) return;
        const x = plot.valToPos(at, "x", true), half = 4 * ratio;
        const [top, bottom] = [plot.valToPos(each.high[index], "y", true), plot.valToPos(each.low[index], "y", true)];
        ctx.beginPath();
        ctx.moveTo(x, top); ctx.lineTo(x, bottom);
        ctx.moveTo(x - half, top); ctx.lineTo(x + half, top);
        ctx.moveTo(x - half, bottom); ctx.lineTo(x + half, bottom);
        ctx.stroke();
      });
    }
    ctx.restore();
  };
}

function fillBetween(plot, each) {
  const places = each.x.map((at, index) => [at, each.low[index], each.high[index]]).filter((place) => place.every((value) => value !== null && value !== undefined));
  const corner = (at, value) => [plot.valToPos(at, "x", true), plot.valToPos(value, "y", true)];
  plot.ctx.fillStyle = each.color + "33";
  plot.ctx.beginPath();
  places.forEach(([at, low]) => plot.ctx.lineTo(...corner(at, low)));
  places.reverse().forEach(([at, , high]) => plot.ctx.lineTo(...corner(at, high)));
  plot.ctx.fill();
}

function yRange(series) {
  const values = series.flatMap((each) => [each.y, each.low || [], each.high || []].flat())
    .filter((value) => value !== null && value !== undefined);
  let [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  if (low === high) { const room = Math.abs(low) * 0.1 || 0.5; low -= low === 0 ? 0 : room; high += room; }
  else { const room = (high - low) * 0.08; high += room; low = low >= 0 && low < room * 3 ? 0 : low - room; }
  return [low, high];
}

// The same range in all charts, so that a step stands at the same place in each.
function xRange(runs) {
  const shown = runs.filter((run) => !charts.hidden.has(run.root));
  const xs = shown.flatMap((run) => [run.curves.train, run.curves.held_out].flatMap((points) => charts.axis === "step" ? points.steps : points.times))
    .filter((x) => x !== null);
  if (!xs.length) return [0, 1];
  const [from, to] = [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))];
  const room = (to - from) * 0.02 || 1;
  return [Math.min(0, from) - room / 2, to + room];
}

function drawChart(chart, card, runs) {
  const series = seriesOf(chart, runs);
  const body = card.querySelector(".plot");
  body.replaceChildren();
  card.hidden = series.length === 0;
  if (!series.length) return null;
  const { data, options, bands } = columns(series);
  const grid = { stroke: theme("--line"), width: 1 };
  const axis = { stroke: theme("--quiet"), grid, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const [low, high] = yRange(series);
  const xs = xRange(runs);
  const plot = new uPlot({
    width: Math.max(200, body.clientWidth), height: 200, bands, series: options, legend: { show: false },
    padding: [8, 18, 0, 0],
    cursor: { sync: { key: CURSOR.key, setSeries: false }, y: false, points: { size: 8 }, drag: { x: true, y: false, setScale: false } },
    scales: { x: { time: false, range: (plot, from, to) => (charts.zoom ? [from, to] : xs) },
              y: { range: [low, high] } },
    axes: [{ ...axis, size: 30, ...(charts.axis === "time" ? { incrs: TIME_STEPS } : {}), values: (_, ticks) => ticks.map((tick) => charts.axis === "step" ? (Number.isInteger(tick) ? tick : "") : span(tick)) },
           { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => number(tick, 3)) }],
    hooks: { draw: [overlay(series, runs)], setSelect: [zoomAll], setCursor: [(each) => legend(card, series, each)] },
  }, data, body);
  legend(card, series, plot);
  return { plot, body };
}

// The values below the title: under the cursor, else the last ones.
function legend(card, series, plot) {
  const index = plot.cursor.idx;
  const at = index === null || index === undefined ? null : plot.data[0][index];
  const row = card.querySelector(".legend");
  row.replaceChildren(...series.filter((each) => each.label).map((each) => {
    const column = plot.data[each.index];
    let place = at === null ? column.length - 1 : index;
    while (place > 0 && (column[place] === null || column[place] === undefined)) place -= 1;
    const mark = element("span", { class: `mark ${each.kind}` });
    mark.style.color = each.kind === "dashed" ? theme("--quiet") : each.color;
    return element("span", {}, mark, `${each.label} `, element("b", {}, number(column[place])));
  }));
  const where = at === null ? "" : charts.axis === "step" ? `step ${at}` : span(at);
  row.append(element("span", { class: "at" }, where));
}

function chartCard(chart) {
  return element("figure", { class: "card chart", "aria-label": chart.title },
    element("figcaption", {}, element("h3", {}, chart.title), element("small", {}, chart.about || " ")),
    element("div", { class: "legend", "aria-live": "off" }), element("div", { class: "plot", ondblclick: () => { charts.zoom = false; drawCharts(data); } }));
}

function drawCharts(data) {
  charts.drawn.forEach((each) => each.state && each.state.plot.destroy());
  charts.drawn = charts.drawn.map((each) => ({ ...each, state: each.details.open ? drawChart(each.chart, each.card, data.runs) : null }));
}

function chartSections(data) {
  charts.drawn = [];
  const made = data.sections.map((section, place) => {
    const cards = section.charts.map((chart) => ({ chart, card: chartCard(chart) }));
    const details = element("details", { class: "section", open: section.is_open && (place === 0 || window.innerWidth > 704) },
      element("summary", {}, element("h2", {}, section.title), element("small", {}, `${cards.length} ${cards.length === 1 ? "chart" : "charts"}`)),
      element("div", { class: "grid" }, cards.map((each) => each.card)));
    details.addEventListener("toggle", () => drawCharts(data));
    cards.forEach((each) => charts.drawn.push({ ...each, details, state: null }));
    return details;
  });
  return made;
}

// A range that was selected with the pointer is shown in all charts; a double click shows everything again.
function zoomAll(plot) {
  const { left, width } = plot.select;
  if (width < 4) return;
  const range = { min: plot.posToVal(left, "x"), max: plot.posToVal(left + width, "x") };
  charts.zoom = true;
  charts.drawn.forEach(({ state }) => state && state.plot.setScale("x", range));
  plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
}

function fitCharts() {
  for (const { state } of charts.drawn) {
    if (state && state.body.clientWidth > 0) state.plot.setSize({ width: state.body.clientWidth, height: 200 });
  }
}
