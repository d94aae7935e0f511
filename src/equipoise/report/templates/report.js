"use strict";
// Draws the charts and tables of the report from the rows in #data. All text goes in as text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const root = document.documentElement;

// -- small helpers -----------------------------------------------------------------------------

function make(parent, tag, attributes, text) {
  const svg = parent && parent.namespaceURI === "http://www.w3.org/2000/svg";
  const node = svg || tag === "svg" ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}
const measure = (x) => x === null || x === undefined ? "-" : Math.abs(x) < 0.9995 ? x.toFixed(3) : Math.abs(x) < 9.995 ? x.toFixed(2) : Math.abs(x) < 99.95 ? x.toFixed(1) : x.toFixed(0);
const share = (x) => x === null || x === undefined ? "-" : x === 0 ? "0" : x < 9.995e-5 ? x.toExponential(1) : x.toFixed(Math.max(2 - Math.floor(Math.log10(x)), 2));
const whole = (x) => x === null || x === undefined ? "-" : x.toLocaleString("en-US");
const percent = (x) => (100 * x).toFixed(1) + " %";
const span = (pair, form) => pair && pair[0] !== null ? form(pair[0]) + " to " + form(pair[1]) : "no interval";
const pretty = (name) => name.replace(/_/g, " ");
const sum = (list) => list.reduce((a, b) => a + b, 0);

const tip = byId("tip");
function showTip(x, y, title, lines) {
  tip.replaceChildren();
  make(tip, "b", {}, title);
  tip.appendChild(document.createTextNode(lines.join("\n")));
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth - 8 ? x - 16 - box.width : x + 16;
  tip.style.left = Math.min(Math.max(8, left), Math.max(8, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(8, Math.min(y + 16, innerHeight - box.height - 8)) + "px";
}
const hideTip = () => { tip.style.display = "none"; };

function withTip(node, title, lines) {
  node.addEventListener("pointermove", (event) => showTip(event.clientX, event.clientY, title, lines));
  node.addEventListener("pointerleave", hideTip);
}

// -- theme -------------------------------------------------------------------------------------

const themes = ["auto", "light", "dark"];
const stored = () => { try { return localStorage.getItem("equipoise-theme"); } catch { return null; } };
let theme = (location.hash.match(/theme=(light|dark)/) || [])[1] || stored() || "auto";
function applyTheme() {
  if (theme === "auto") root.removeAttribute("data-theme"); else root.dataset.theme = theme;
  byId("theme").textContent = "Theme: " + theme;
}
applyTheme();
byId("theme").addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  try { localStorage.setItem("equipoise-theme", theme); } catch { /* a file may not be allowed to store */ }
  applyTheme();
  drawHeats();
});

const STOPS = ["--u3", "--u2", "--u1", "--fair", "--o1", "--o2", "--o3"];
let palette = null;
function readPalette() {
  const style = getComputedStyle(root);
  const colour = (name) => style.getPropertyValue(name).trim();
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  palette = { stops: STOPS.map((name) => rgb(colour(name))) };
  for (const name of ["never", "ink", "soft", "line", "page", "faint"]) palette[name] = colour("--" + name);
}
function rgbOf(log) {
  const at = Math.min(Math.max(log + 3, 0), 6);
  const low = Math.min(Math.floor(at), 5);
  return palette.stops[low].map((v, i) => Math.round(v + (at - low) * (palette.stops[low + 1][i] - v)));
}
const inkOn = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#101317" : "#ffffff";

// -- heatmap -----------------------------------------------------------------------------------

// spec: rows [{label, cells}], cells [{value, never, blank, title, lines}], columns, rowTitle, columnTitle
const heats = new Map();
function heat(id, spec) {
  const host = byId(id);
  host.replaceChildren();
  const canvas = make(host, "canvas", { tabindex: "0", role: "img", "aria-label": spec.label });
  const cursor = make(host, "div", { class: "cursor" });
  const state = { host, canvas, cursor, spec, at: [0, 0] };
  heats.set(id, state);
  drawHeat(state);
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    const column = Math.floor((x - state.left) / state.cellWidth), row = Math.floor((y - state.top) / state.cellHeight);
    if (!select(state, row, column)) { leave(state); return; }
    describe(state, event.clientX, event.clientY);
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", () => leave(state));
  canvas.addEventListener("blur", () => leave(state));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") leave(state);
    if (!move) return;
    event.preventDefault();
    if (!select(state, state.at[0] + move[0], state.at[1] + move[1])) return;
    const box = state.cursor.getBoundingClientRect();
    describe(state, box.right, box.bottom);
    const cell = spec.rows[state.at[0]].cells[state.at[1]];
    byId("live").textContent = cell.title + ". " + cell.lines.join(". ");
  });
}
function leave(state) { hideTip(); state.cursor.style.display = "none"; }
function select(state, row, column) {
  const cells = state.spec.rows[row] && state.spec.rows[row].cells;
  if (!cells || column < 0 || !cells[column]) return false;
  state.at = [row, column];
  Object.assign(state.cursor.style, {
    display: "block", left: state.left + column * state.cellWidth - 2 + "px", top: state.top + row * state.cellHeight - 2 + "px",
    width: state.cellWidth + 4 + "px", height: state.cellHeight + 4 + "px",
  });
  return true;
}
function describe(state, x, y) {
  const cell = state.spec.rows[state.at[0]].cells[state.at[1]];
  showTip(x, y, cell.title, cell.lines);
}
function drawHeats() { readPalette(); for (const state of heats.values()) drawHeat(state); }
function drawHeat(state) {
  if (!palette) readPalette();
  const { canvas, spec, host } = state;
  const dpr = Math.max(1, window.devicePixelRatio || 1), font = "12px system-ui, sans-serif";
  const c = canvas.getContext("2d");
  c.font = font;
  const rows = spec.rows, columns = spec.columns;
  const labelWidth = Math.ceil(Math.max(...rows.map((row) => c.measureText(row.label).width), 0));
  const room = host.parentElement.clientWidth;
  state.left = labelWidth + 30; state.top = 4;
  const snap = (x) => Math.max(1, Math.floor(x * dpr)) / dpr;
  state.cellWidth = snap(Math.min(Math.max((room - state.left - 2) / columns, 3), 72));
  state.cellHeight = snap(spec.rowHeight || (rows.length <= 8 ? 34 : rows.length <= 30 ? 20 : rows.length <= 64 ? 13 : 9));
  const width = state.left + columns * state.cellWidth + 2, height = state.top + rows.length * state.cellHeight + 40;
  canvas.width = Math.round(width * dpr); canvas.height = Math.round(height * dpr);
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  c.scale(dpr, dpr);
  c.font = font;
  const w = state.cellWidth, h = state.cellHeight, gap = w >= 7 && h >= 9 ? 1 : 0;
  rows.forEach((row, r) => row.cells.forEach((cell, k) => {
    if (!cell) return;
    const x = state.left + k * w, y = state.top + r * h;
    if (cell.blank) {
      c.fillStyle = palette.line;
      c.fillRect(x + w / 2 - 0.5, y + h / 2 - 0.5, 1, 1);
      return;
    }
    const rgb = cell.never ? null : rgbOf(cell.value);
    c.fillStyle = cell.never ? palette.never : `rgb(${rgb})`;
    c.fillRect(x, y, w - gap, h - gap);
    if (w >= 40 && h >= 20 && cell.text !== undefined) {
      c.fillStyle = cell.never ? "#ffffff" : inkOn(rgb);
      c.textAlign = "center"; c.textBaseline = "middle";
      c.fillText(cell.text, x + w / 2, y + h / 2);
    }
  }));
  heatAxes(c, state, columns);
}
function heatAxes(c, state, columns) {
  const { spec, left, top, cellWidth: w, cellHeight: h } = state;
  c.fillStyle = palette.soft; c.textAlign = "right"; c.textBaseline = "middle";
  const each = Math.ceil(14 / h);
  spec.rows.forEach((row, r) => { if (r % each === 0) c.fillText(row.label, left - 8, top + r * h + h / 2); });
  c.textAlign = "center"; c.textBaseline = "top";
  const bottom = top + spec.rows.length * h;
  if (spec.columnLabels) {
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find((n) => n * w >= 30) || 256;
    for (let k = 0; k < columns; k += step) c.fillText(String(k), left + k * w + w / 2, bottom + 6);
  }
  c.textAlign = "left";
  c.fillText(spec.columnTitle, left, bottom + 22);
  c.save(); c.translate(10, top + (spec.rows.length * h) / 2); c.rotate(-Math.PI / 2);
  c.textAlign = "center"; c.textBaseline = "middle"; c.fillText(spec.rowTitle, 0, 0); c.restore();
}

// -- layer x expert ----------------------------------------------------------------------------

function expertCell(l, e, counts, total, group) {
  const layer = data.layers[l], ratio = total ? (counts[e] / total) * layer.experts : 0;
  const lines = [];
  if (group) lines.push(`tokens: ${group}`);
  lines.push(`share ${share(total ? counts[e] / total : null)}, ${measure(ratio)} times a fair share`);
  if (!group) lines.push(`95 % interval of the ratio ${span([layer.low[e], layer.high[e]], measure)}`);
  lines.push(`${whole(counts[e])} of ${whole(total)} selections`);
  if (!group) lines.push(`verdict: ${data.verdicts[layer.verdict[e]]}`);
  if (!group && layer.idle[e] !== null) lines.push(`longest idle run ${whole(layer.idle[e])} tokens`);
  if (!group && counts[e] === 0) lines.push(`never selected; true share at most ${share(layer.upper[e])}`);
  return { value: Math.log2(ratio), never: counts[e] === 0, blank: !total, text: measure(ratio), title: `layer ${layer.label}, expert ${e}`, lines };
}
function drawLoad() {
  const order = byId("heat-order").value, view = byId("heat-view").value;
  const [key, name] = view ? JSON.parse(view) : [null, null];
  const rows = data.layers.map((layer, l) => {
    const counts = key ? data.groups[key].counts[data.groups[key].names.indexOf(name)][l] : layer.counts;
    const total = sum(counts);
    const cells = counts.map((_, e) => expertCell(l, e, counts, total, key ? pretty(name) : null));
    if (order === "load") cells.sort((a, b) => a.value - b.value);
    return { label: layer.label, cells };
  });
  const columns = Math.max(...data.layers.map((layer) => layer.experts));
  heat("heat", {
    rows, columns, rowTitle: "layer", columnLabels: order === "number",
    columnTitle: order === "number" ? "expert" : "experts of each layer, least used first",
    label: `Heatmap of load: ${rows.length} layers by ${columns} experts. The table of experts below holds the numbers.`,
  });
}

// -- group x expert ----------------------------------------------------------------------------

function drawGroups() {
  const key = byId("group-key").value, l = Number(byId("group-layer").value);
  const group = data.groups[key], layer = data.layers[l], total = sum(layer.counts);
  byId("group-title").textContent = `Load by ${key}`;
  const rows = group.names.map((name, g) => {
    const counts = group.counts[g][l], here = sum(counts);
    const cells = counts.map((count, e) => {
      const overall = layer.counts[e] / total, own = here ? count / here : null;
      const lines = [`share here ${share(own)}, in all tokens ${share(overall)}`, `${whole(count)} of ${whole(here)} selections`];
      const few = !(here * overall >= data.few);
      lines.unshift(few ? "too few selections to tell" : `${measure(own / overall)} times its share in all tokens`);
      return { value: few ? 0 : Math.log2(own / overall), blank: few, never: !few && !count, text: few ? "" : measure(own / overall),
        title: `${pretty(name)}, layer ${layer.label}, expert ${e}`, lines };
    });
    return { label: pretty(name), cells };
  });
  heat("group-heat", { rows, columns: layer.experts, rowTitle: key, columnTitle: `expert of layer ${layer.label}`, rowHeight: rows.length > 12 ? 16 : 0, columnLabels: true,
    label: `Heatmap of load by ${key} in layer ${layer.label}.` });
}

// -- MaxVio against its floor ------------------------------------------------------------------

function ticksOf(low, high, log) {
  if (!log) {
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= raw);
    const found = [];
    for (let v = Math.ceil(low / step) * step; v <= high * 1.0001; v += step) found.push(Number(v.toPrecision(6)));
    return found;
  }
  const found = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
    for (const m of [1, 3]) if (m * 10 ** p >= low * 0.999 && m * 10 ** p <= high * 1.001) found.push(Number((m * 10 ** p).toPrecision(3)));
  return found;
}
function drawMaxVio() {
  const host = byId("maxvio"), width = host.clientWidth, height = 340;
  const box = { left: 46, right: width - 8, top: 14, bottom: height - 40 };
  const rows = data.layers.filter((layer) => layer.max_vio !== null);
  host.replaceChildren();
  if (!rows.length) { make(host, "p", { class: "note" }, "No tokens, no imbalance."); return; }
  const top = Math.max(...rows.map((r) => Math.max(r.max_vio, r.interval ? r.interval[1] : 0, r.floor95 || 0))) || 1;
  const least = Math.min(...rows.flatMap((r) => [r.floor, r.max_vio, r.interval ? r.interval[0] : null]).filter((v) => v > 0));
  const log = top / least > 25;
  const low = log ? least / 1.6 : 0, high = log ? top * 1.3 : top * 1.06;
  const y = (v) => { const t = log ? Math.log(Math.max(v, low) / low) / Math.log(high / low) : v / high; return box.bottom - t * (box.bottom - box.top); };
  const step = (box.right - box.left) / data.layers.length, x = (i) => box.left + (i + 0.5) * step;
  const svg = make(host, "svg", { viewBox: `0 0 ${width} ${height}`, style: `max-width: ${width}px`, role: "img", "aria-label": "MaxVio of every layer with its interval, against its floor; the numbers are in the table of layers" });
  for (const v of ticksOf(low || high / 1e6, high, log)) {
    make(svg, "line", { class: "gridline", x1: box.left, x2: box.right, y1: y(v), y2: y(v) });
    make(svg, "text", { x: box.left - 8, y: y(v) + 4, "text-anchor": "end" }, String(v));
  }
  let line = "";
  data.layers.forEach((layer, i) => {
    if (!layer.floor) return;
    const l = x(i) - step / 2, r = x(i) + step / 2;
    make(svg, "rect", { class: "chance-area", x: l, width: step + 0.5, y: y(layer.floor95), height: box.bottom - y(layer.floor95) });
    line += `${line ? "L" : "M"}${l} ${y(layer.floor)}L${r} ${y(layer.floor)}`;
  });
  make(svg, "path", { class: "chance-line", d: line });
  make(svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  const widest = Math.max(...data.layers.map((layer) => layer.label.length)) * 7 + 8;
  const every = Math.max(1, Math.ceil(widest / step));
  data.layers.forEach((layer, i) => {
    if (i % every === 0) make(svg, "text", { x: x(i), y: box.bottom + 16, "text-anchor": "middle" }, layer.label);
    if (layer.max_vio === null) return;
    const within = layer.interval ? layer.interval[0] <= layer.floor95 : layer.max_vio <= layer.floor95;
    const tone = within ? " within" : "";
    if (layer.interval) make(svg, "line", { class: "whisker" + tone, x1: x(i), x2: x(i), y1: y(layer.interval[0]), y2: y(layer.interval[1]) });
    make(svg, "circle", { class: "dot" + tone, cx: x(i), cy: y(layer.max_vio), r: Math.min(4.5, Math.max(2.5, step / 4)) });
    const hit = make(svg, "rect", { class: "hit", x: x(i) - step / 2, width: step, y: box.top, height: box.bottom - box.top });
    withTip(hit, `layer ${layer.label}`, [`MaxVio ${measure(layer.max_vio)}`, `95 % interval ${span(layer.interval, measure)}`,
      `by chance ${measure(layer.floor)}, in one run of twenty over ${measure(layer.floor95)}`, `Gini ${measure(layer.gini)}, ${measure(layer.effective)} effective experts of ${layer.experts}`]);
  });
  make(svg, "text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, "layer");
  make(svg, "text", { x: 0, y: 8, "text-anchor": "start" }, log ? "MaxVio, logarithmic" : "MaxVio");
  const last = [...data.layers.keys()].reverse().find((i) => data.layers[i].floor);
  if (last !== undefined) {
    const at = y(data.layers[last].floor95) - 6;
    make(svg, "text", { x: box.right, y: Math.max(at, box.top + 8), "text-anchor": "end" }, "chance alone");
  }
}

// -- Lorenz curves -----------------------------------------------------------------------------

function drawLorenz() {
  const host = byId("lorenz"), width = host.clientWidth, size = Math.min(width - 44, 400), height = size + 52;
  host.replaceChildren();
  const rows = data.layers.map((layer) => {
    const sorted = [...layer.counts].sort((a, b) => a - b), total = sum(sorted);
    let seen = 0;
    return total ? { layer, points: [0, ...sorted.map((v) => (seen += v) / total)] } : null;
  }).filter(Boolean);
  if (!rows.length) { make(host, "p", { class: "note" }, "No selections."); return; }
  const left = 40, top = 8, x = (t) => left + t * size, y = (t) => top + (1 - t) * size;
  const svg = make(host, "svg", { viewBox: `0 0 ${width} ${height}`, style: `max-width: ${width}px`, role: "img", "aria-label": "Lorenz curve of the load of every layer; Gini coefficients are in the table of layers" });
  for (const t of [0, 0.25, 0.5, 0.75, 1]) {
    make(svg, "line", { class: "gridline", x1: x(0), x2: x(1), y1: y(t), y2: y(t) });
    make(svg, "text", { x: left - 7, y: y(t) + 4, "text-anchor": "end" }, String(t));
    make(svg, "text", { x: x(t), y: y(0) + 17, "text-anchor": "middle" }, String(t));
  }
  make(svg, "line", { class: "equal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) });
  const path = (points) => points.map((p, i) => `${i ? "L" : "M"}${x(i / (points.length - 1)).toFixed(1)} ${y(p).toFixed(1)}`).join("");
  for (const row of rows) row.node = make(svg, "path", { class: "curve", d: path(row.points) });
  const ranked = [...rows].sort((a, b) => a.layer.gini - b.layer.gini), worst = ranked[ranked.length - 1], best = ranked[0];
  const high = make(svg, "path", { class: "curve on", d: path(worst.points) });
  if (best !== worst) make(svg, "path", { class: "curve low", d: path(best.points) });
  const key = make(svg, "g", {});
  const entry = (row, place, kind, word) => {
    make(key, "line", { class: kind, x1: left + 12, x2: left + 34, y1: top + 16 + place * 20, y2: top + 16 + place * 20 });
    make(key, "text", { x: left + 42, y: top + 20 + place * 20 }, `layer ${row.layer.label}, ${word} (Gini ${measure(row.layer.gini)})`);
  };
  const legend = (row, word) => { key.replaceChildren(); entry(row, 0, "curve on", word); if (best !== worst) entry(best, 1, "curve low", "most even"); };
  legend(worst, best === worst ? "the only one" : "least even");
  make(svg, "text", { x: x(0.5), y: height - 4, "text-anchor": "middle" }, "part of the experts, least used first");
  make(svg, "text", { x: 9, y: y(0.5), "text-anchor": "middle", transform: `rotate(-90 9 ${y(0.5)})` }, "part of the selections");
  const hit = make(svg, "rect", { x: left, y: top, width: size, height: size, fill: "transparent" });
  hit.addEventListener("pointermove", (event) => {
    const box = hit.getBoundingClientRect();
    const tx = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1), ty = 1 - (event.clientY - box.top) / box.height;
    const at = (row) => { const p = tx * (row.points.length - 1), i = Math.min(Math.floor(p), row.points.length - 2); return row.points[i] + (p - i) * (row.points[i + 1] - row.points[i]); };
    const near = rows.reduce((a, b) => Math.abs(at(a) - ty) <= Math.abs(at(b) - ty) ? a : b);
    high.setAttribute("d", path(near.points));
    legend(near, "pointed at");
    showTip(event.clientX, event.clientY, `layer ${near.layer.label}`, [`the least used ${percent(tx)} of experts get ${percent(at(near))} of selections`, `Gini ${measure(near.layer.gini)}`]);
  });
  hit.addEventListener("pointerleave", () => { hideTip(); high.setAttribute("d", path(worst.points)); legend(worst, best === worst ? "the only one" : "least even"); });
}

// -- accuracy ----------------------------------------------------------------------------------

function drawAccuracy() {
  const host = byId("accuracy-chart"), width = host.clientWidth, narrow = width < 560, rows = data.accuracy;
  host.replaceChildren();
  const step = narrow ? 34 : 19, left = narrow ? 6 : 270, right = width - 12, top = 24;
  const height = top + rows.length * step + 30 + 24, x = (v) => left + v * (right - left);
  const svg = make(host, "svg", { viewBox: `0 0 ${width} ${height}`, style: `max-width: ${width}px`, role: "img", "aria-label": "Accuracy by subject with intervals; the same is in the table below" });
  const bottom = height - 26;
  for (const v of [0, 0.25, 0.5, 0.75, 1]) {
    make(svg, "line", { class: v === data.chance ? "guess" : "gridline", x1: x(v), x2: x(v), y1: top - 6, y2: bottom });
    for (const at of [top - 11, bottom + 16])
      make(svg, "text", { x: x(v), y: at, "text-anchor": v === 0 ? "start" : v === 1 ? "end" : "middle" }, `${100 * v} %`);
  }
  let y = top + step / 2, kind = rows.length ? rows[0].kind : "";
  for (const row of rows) {
    if (row.kind !== kind) { y += 12; kind = row.kind; }
    const line = narrow ? y + 8 : y, within = row.interval[0] <= data.chance && data.chance <= row.interval[1] ? " within" : "";
    make(svg, "text", { x: narrow ? left : left - 12, y: narrow ? y - 4 : y + 4, "text-anchor": narrow ? "start" : "end", class: row.kind === "subject" ? "" : "strong" }, pretty(row.name));
    make(svg, "line", { class: "whisker" + within, x1: x(row.interval[0]), x2: x(row.interval[1]), y1: line, y2: line });
    make(svg, "circle", { class: "dot" + within, cx: x(row.accuracy), cy: line, r: 4 });
    const hit = make(svg, "rect", { class: "hit", x: 0, width, y: y - step / 2, height: step });
    withTip(hit, pretty(row.name), [`${percent(row.accuracy)}: ${whole(row.correct)} of ${whole(row.questions)} right`, `95 % interval ${span(row.interval, percent)}`]);
    y += step;
  }
}

// -- tables ------------------------------------------------------------------------------------

const number = (text) => { const v = parseFloat(text.replace(/,/g, "")); return Number.isNaN(v) ? null : v; };
function compare(a, b) {
  if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}
function sortableHead(cells, onSort) {
  cells.forEach((cell, index) => {
    const name = cell.textContent;
    cell.replaceChildren();
    const button = make(cell, "button", { type: "button" }, name);
    button.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "ascending";
      cells.forEach((other) => other.removeAttribute("aria-sort"));
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      onSort(index, down ? -1 : 1);
    });
  });
}
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  sortableHead([...table.tHead.rows[0].cells], (index, sign) => {
    const text = table.tHead.rows[0].cells[index].classList.contains("text");
    const key = (row) => text ? row.cells[index].textContent : number(row.cells[index].textContent);
    body.append(...[...body.rows].sort((a, b) => sign * compare(key(a), key(b))));
  });
}

const COLUMNS = [
  ["layer", (r) => r.place, (r) => r.label], ["expert", (r) => r.expert, (r) => r.expert], ["verdict", (r) => r.verdict, (r) => r.name],
  ["count", (r) => r.count, (r) => whole(r.count)], ["share", (r) => r.share, (r) => share(r.share)], ["ratio", (r) => r.ratio, (r) => measure(r.ratio)],
  ["95 % interval", (r) => r.low, (r) => r.low === null ? "-" : measure(r.low) + ".." + measure(r.high)], ["true share at most", (r) => r.upper, (r) => share(r.upper)],
  ["longest idle", (r) => r.idle, (r) => whole(r.idle)], ["idle at the end", (r) => r.now, (r) => whole(r.now)], ["serves", (r) => r.serves, (r) => r.serves],
];
const table = { rows: [], shown: 100, key: null, sign: 1 };
function expertRows() {
  return data.layers.flatMap((layer, place) => layer.counts.map((count, expert) => {
    const total = sum(layer.counts), name = data.verdicts[layer.verdict[expert]];
    return { place, label: layer.label, expert, count, share: total ? count / total : null, ratio: total ? (count / total) * layer.experts : null, low: layer.low[expert], high: layer.high[expert],
      upper: layer.upper[expert], idle: layer.idle[expert], now: layer.now[expert], verdict: layer.verdict[expert], name, serves: layer.serves[expert] || "" };
  }));
}
function fillExperts() {
  const layer = byId("experts-layer").value, verdict = byId("experts-verdict").value;
  const keep = (r) => (layer === "" || r.place === Number(layer)) &&
    (verdict === "" || (verdict === "attention" ? data.attention.includes(r.name) || r.count === 0 : r.name === verdict));
  const rows = table.rows.filter(keep);
  if (table.key) rows.sort((a, b) => table.sign * compare(table.key(a), table.key(b)));
  const body = byId("experts-table").tBodies[0];
  body.replaceChildren();
  for (const row of rows.slice(0, table.shown)) {
    const line = make(body, "tr");
    for (const [name, , text] of COLUMNS) {
      const tone = name === "verdict" ? (row.name === "dead" ? "alarm" : data.attention.includes(row.name) ? "notice" : "") : "";
      make(line, "td", { class: name === "serves" ? "text" : tone }, text(row));
    }
  }
  const shown = Math.min(table.shown, rows.length);
  byId("experts-count").textContent = `${whole(rows.length)} of ${whole(table.rows.length)} experts${shown < rows.length ? `, the first ${whole(shown)} shown` : ""}.`;
  byId("experts-more").style.display = shown < rows.length ? "" : "none";
}
function setUpExperts() {
  table.rows = expertRows();
  const head = make(byId("experts-table").tHead, "tr");
  for (const [name] of COLUMNS) make(head, "th", { scope: "col", class: name === "serves" ? "text" : "" }, name);
  sortableHead([...head.cells], (index, sign) => { table.key = COLUMNS[index][1]; table.sign = sign; fillExperts(); });
  const found = new Set(table.rows.map((row) => row.name));
  const some = table.rows.some((row) => data.attention.includes(row.name) || row.count === 0);
  if (some) make(byId("experts-verdict"), "option", { value: "attention" }, "needs attention");
  make(byId("experts-verdict"), "option", { value: "" }, "all");
  for (const name of data.verdicts) if (found.has(name)) make(byId("experts-verdict"), "option", { value: name }, name);
  make(byId("experts-layer"), "option", { value: "" }, "all");
  data.layers.forEach((layer, place) => make(byId("experts-layer"), "option", { value: place }, layer.label));
  for (const id of ["experts-layer", "experts-verdict"]) byId(id).addEventListener("change", () => { table.shown = 100; fillExperts(); });
  byId("experts-more").addEventListener("click", () => { table.shown += 500; fillExperts(); });
  fillExperts();
}

// -- start -------------------------------------------------------------------------------------

function setUp() {
  if (data.layers.length) {
    make(byId("heat-view"), "option", { value: "" }, "all");
    for (const [key, group] of Object.entries(data.groups))
      for (const name of group.names) make(byId("heat-view"), "option", { value: JSON.stringify([key, name]) }, `${key}: ${pretty(name)}`);
    if (byId("heat-view").options.length < 2) byId("heat-view-label").style.display = "none";
    for (const id of ["heat-order", "heat-view"]) byId(id).addEventListener("change", drawLoad);
    setUpExperts();
  }
  if (byId("group-layer")) {
    data.layers.forEach((layer, place) => make(byId("group-layer"), "option", { value: place }, layer.label));
    byId("group-layer").value = String(data.group_layer);
    for (const id of ["group-layer", "group-key"]) byId(id).addEventListener("change", drawGroups);
  }
  drawAll();
}
function drawAll() {
  readPalette();
  if (byId("heat")) { drawLoad(); drawMaxVio(); drawLorenz(); }
  if (byId("group-heat")) drawGroups();
  if (byId("accuracy-chart")) drawAccuracy();
}
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawHeats);
addEventListener("beforeprint", () => { root.dataset.theme = "light"; drawHeats(); });
addEventListener("afterprint", () => { applyTheme(); drawHeats(); });
setUp();
