"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const MIB = 1024 ** 2, GIB = 1024 ** 3;
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];
const SHAPES = ["circle", "square", "triangle", "diamond", "down", "cross", "circle"];
const RAMP = [[247, 251, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]];

// -- elements

function make(tag, attributes, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "text", "circle", "polyline"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

function section(title, hint, ...children) {
  return make("section", {}, make("h2", {}, title), hint ? make("p", { class: "hint" }, hint) : null, ...children);
}

// -- numbers

function number(value, digits = 3) {
  if (value === null || value === undefined) return "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(1).replace("+", "").replaceAll("-", "\u2212");
  return (size >= 100 ? value.toFixed(1) : value.toPrecision(digits)).replace("-", "\u2212");
}

function interval(low, high) {
  return low === null || low === undefined || low === high ? "" : `${number(low)} to ${number(high)}`;
}

function unitOf(metric) {
  const unit = (DATA.metrics[metric] || {}).unit;
  return unit && unit !== "1" && unit !== "fraction" ? unit : "";
}

function direction(metric) {
  return DATA.metrics[metric].higher_is_better ? "higher is better" : "lower is better";
}

function bytes(value) {
  if (value === null || value === undefined) return "";
  return value >= GIB ? `${(value / GIB).toFixed(2)} GiB` : `${(value / MIB).toFixed(2)} MiB`;
}

function probability(p) {
  return p === null || p === undefined ? "" : p < 0.001 ? "< 0.001" : p.toFixed(3);
}

// -- colour and shape of a backend

function styleOf(group, backend) {
  const known = [...new Set(group.rows.filter((r) => r.role === "candidate").map((r) => r.backend))].sort();
  const i = Math.max(0, known.indexOf(backend));
  return { colour: COLOURS[i % COLOURS.length], shape: SHAPES[i % SHAPES.length] };
}

function marker(shape, x, y, size, attributes) {
  const s = size, paths = {
    circle: `M${x - s},${y}a${s},${s} 0 1,0 ${2 * s},0a${s},${s} 0 1,0 ${-2 * s},0Z`,
    square: `M${x - s * 0.9},${y - s * 0.9}h${s * 1.8}v${s * 1.8}h${-s * 1.8}Z`,
    triangle: `M${x},${y - s * 1.15}L${x + s * 1.1},${y + s * 0.85}H${x - s * 1.1}Z`,
    down: `M${x},${y + s * 1.15}L${x + s * 1.1},${y - s * 0.85}H${x - s * 1.1}Z`,
    diamond: `M${x},${y - s * 1.25}L${x + s * 1.25},${y}L${x},${y + s * 1.25}L${x - s * 1.25},${y}Z`,
    cross: `M${x - s},${y - s / 3}H${x - s / 3}V${y - s}H${x + s / 3}V${y - s / 3}H${x + s}V${y + s / 3}H${x + s / 3}V${y + s}H${x - s / 3}V${y + s / 3}H${x - s}Z`,
  };
  return make("path", { d: paths[shape], ...attributes });
}

function key(group, backend) {
  const style = styleOf(group, backend);
  return make("svg", { class: "key", viewBox: "0 0 14 14", "aria-hidden": "true" }, marker(style.shape, 7, 7, 5, { fill: style.colour }));
}

// -- tooltip

const tip = document.getElementById("tip");
function showTip(node, x, y) {
  tip.textContent = node.getAttribute("data-tip");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18}px`;
}
document.addEventListener("mousemove", (event) => {
  const node = event.target.closest ? event.target.closest("[data-tip]") : null;
  if (node) showTip(node, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  if (!event.target.hasAttribute("data-tip")) return;
  const box = event.target.getBoundingClientRect();
  showTip(event.target, box.right, box.bottom);
});
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("scroll", () => { tip.hidden = true; }, true);

// -- answers

function answers(group) {
  const rows = Object.fromEntries(group.rows.map((r) => [r.name, r]));
  const questions = new Map();
  for (const { question, name } of group.answers) questions.set(name, [...(questions.get(name) || []), question[0].toUpperCase() + question.slice(1)]);
  return make("div", { class: "answers" }, ...[...questions].map(([name, asked]) => {
    const row = rows[name], question = asked.join("\n");
    if (!row) return make("div", { class: "answer" }, make("div", { class: "question" }, question));
    const saving = row.compression ? `, ${row.compression.toFixed(2)}\u00d7 smaller than 16 bit` : "";
    return make("div", { class: "answer" },
      make("div", { class: "question" }, question),
      make("div", { class: "name" }, name),
      make("div", { class: "cost" }, `${bytes(row.weights_bytes)}${saving}`),
      ...Object.entries(row.metrics).map(([name, m]) => make("div", { class: "cost" }, `${name} ${number(m.value)} ${unitOf(name)}`)));
  }));
}

// -- the Pareto plot

function scale(values, from, to, log) {
  const f = log ? Math.log10 : (v) => v;
  let low = Math.min(...values.map(f)), high = Math.max(...values.map(f));
  const pad = (high - low || Math.abs(high) || 1) * 0.07;
  low -= pad; high += pad;
  const at = (v) => from + ((f(v) - low) / (high - low)) * (to - from);
  return { at, low, high, log };
}

function ticks(s, count) {
  if (s.log) {
    const first = Math.ceil(s.low), last = Math.floor(s.high), every = Math.max(1, Math.ceil((last - first) / count));
    const found = [];
    for (let e = first; e <= last; e += every) found.push(10 ** e);
    if (found.length >= 2) return found;
    return [s.low, (s.low + s.high) / 2, s.high].map((e) => Number((10 ** e).toPrecision(2)));
  }
  const raw = (s.high - s.low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * unit >= raw) * unit;
  const found = [];
  for (let v = Math.ceil(s.low / step) * step; v <= s.high + step / 1e6; v += step) found.push(Number(v.toPrecision(10)));
  return found;
}

function tickText(value, log) {
  if (!log) return Number(value.toPrecision(4)).toString().replace("-", "\u2212");
  const exponent = Math.round(Math.log10(value));
  if (Math.abs(Math.log10(value) - exponent) > 1e-9 || (exponent > -3 && exponent < 4)) return tickText(value, false);
  return "10" + String(exponent).replace(/./g, (c) => "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[c] || "\u207b");
}

function tipOf(row, group) {
  const inLayers = row.bits_per_weight_quantized ? `, ${number(row.bits_per_weight_quantized)} in quantized layers` : "";
  const lines = [row.name, `${bytes(row.weights_bytes)}, ${number(row.bits_per_weight_model)} bits per weight${inLayers}`];
  for (const [name, m] of Object.entries(row.metrics)) {
    const range = interval(m.ci_lo, m.ci_hi);
    lines.push(`${name} ${number(m.value)} ${unitOf(name)}${range ? ` (95 %: ${range})` : ""}`);
  }
  if (row.verdict) lines.push(`${row.verdict}${row.on_front ? "; on the Pareto front" : ""}`);
  return lines.join("\n");
}

function paretoPlot(group, width) {
  const height = Math.max(380, Math.min(500, width * 0.46)), left = 74, right = 22, top = 18, bottom = 52;
  const shown = group.rows.filter((r) => r.weights_bytes && r.metrics[group.metric] && (r.role === "candidate" || r.name === group.floor_name));
  const of = (r) => r.metrics[group.metric];
  const values = shown.flatMap((r) => [of(r).value, of(r).ci_lo ?? of(r).value, of(r).ci_hi ?? of(r).value]).concat(group.floor ?? []);
  const positive = values.filter((v) => v > 0);
  const log = shown.every((r) => of(r).value > 0) && Math.max(...positive) / Math.min(...positive) > 30;
  const gib = Math.max(...shown.map((r) => r.weights_bytes)) >= GIB, unit = gib ? GIB : MIB;
  const x = scale(shown.map((r) => r.weights_bytes / unit), left, width - right, false);
  const y = scale(log ? positive : values, height - bottom, top, log);
  const svg = make("svg", { width, height, role: "img", "aria-label": `${group.metric} against the bytes of the weights` });
  const bottomY = height - bottom;
  const floorText = (at) => (group.higher_is_better ? (at - top > 26 ? top + 18 : at + 17) : bottomY - at > 26 ? bottomY - 9 : at - 8);
  if (group.floor !== null && (!log || group.floor > 0)) {
    const at = y.at(group.floor), good = group.higher_is_better ? [top, at] : [at, bottomY];
    svg.append(make("rect", { x: left, y: good[0], width: width - left - right, height: Math.max(0, good[1] - good[0]), fill: "#e2f3ec" }),
      make("line", { x1: left, x2: width - right, y1: at, y2: at, stroke: "#00664b", "stroke-width": 1.5, "stroke-dasharray": "6 4", class: "floor" }),
      make("text", { x: width - right - 8, y: floorText(at), "text-anchor": "end", class: "soft" }, `no measurable loss: inside the floor (${group.floor_name})`));
  }
  for (const t of ticks(y, 6)) {
    svg.append(make("line", { x1: left, x2: width - right, y1: y.at(t), y2: y.at(t), stroke: "#1c2430", "stroke-opacity": 0.09 }),
      make("text", { x: left - 8, y: y.at(t) + 4, "text-anchor": "end", class: "tick" }, tickText(t, log)));
  }
  for (const t of ticks(x, width < 700 ? 6 : 9)) {
    svg.append(make("line", { x1: x.at(t), x2: x.at(t), y1: bottomY, y2: bottomY + 5, stroke: "#8b95a3" }),
      make("text", { x: x.at(t), y: bottomY + 19, "text-anchor": "middle", class: "tick" }, tickText(t, false)));
  }
  svg.append(make("line", { x1: left, x2: width - right, y1: bottomY, y2: bottomY, stroke: "#8b95a3" }),
    make("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, `size of the weights [${gib ? "GiB" : "MiB"}] \u2190 smaller is better`),
    make("text", { transform: `translate(16 ${(top + bottomY) / 2}) rotate(-90)`, "text-anchor": "middle" },
      `${group.metric}${unitOf(group.metric) ? ` [${unitOf(group.metric)}]` : ""}, ${direction(group.metric)}${log ? ", log scale" : ""}`));
  const lines = [];  // what labels keep off: the front, the floor and its text
  if (group.floor !== null && (!log || group.floor > 0)) {
    const at = y.at(group.floor);
    lines.push(box(left, at - 1, width, 2), box(width - right - 270, floorText(at) - 14, 270, 20));
  }
  const front = group.front.map((name) => shown.find((r) => r.name === name)).filter(Boolean);
  let last = null;
  const steps = front.map((r) => {
    const px = x.at(r.weights_bytes / unit), py = y.at(of(r).value);
    if (last) lines.push(box(last[0], last[1] - 1, px - last[0], 2), box(px - 1, Math.min(last[1], py), 2, Math.abs(py - last[1])));
    const step = last ? `H${px}V${py}` : `M${px},${py}`;
    last = [px, py];
    return step;
  });
  svg.append(make("path", { d: steps.join("") || "M0,0", fill: "none", stroke: "#5a6675", "stroke-width": 1.5, class: "front-line" }));
  drawPoints(svg, shown, group, (r) => x.at(r.weights_bytes / unit), (v) => y.at(log ? Math.max(v, 10 ** y.low) : v), width - right, lines);
  return svg;
}

function drawPoints(svg, shown, group, atX, atY, edge, lines) {
  const taken = shown.map((r) => box(atX(r) - 7, atY(r.metrics[group.metric].value) - 7, 14, 14));
  const labels = [...lines];
  const order = [...shown].sort((a, b) => b.on_front - a.on_front);
  for (const row of order) {
    const m = row.metrics[group.metric], px = atX(row), py = atY(m.value), base = row.role !== "candidate";
    const style = base ? { colour: "#5a6675", shape: "square" } : styleOf(group, row.backend);
    if (m.ci_lo !== null && m.ci_lo !== undefined) {
      const a = atY(m.ci_lo), b = atY(m.ci_hi);
      svg.append(make("path", { d: `M${px},${a}V${b}M${px - 4},${a}h8M${px - 4},${b}h8`, stroke: style.colour, "stroke-width": 1.5, fill: "none" }));
    }
    svg.append(marker(style.shape, px, py, row.on_front ? 7 : 5.5, {
      fill: base ? "#fff" : style.colour, stroke: row.on_front ? "#1c2430" : base ? style.colour : "#fff",
      "stroke-width": row.on_front ? 1.8 : base ? 2 : 1, "data-tip": tipOf(row, group), tabindex: 0, class: "point", "data-name": row.name,
    }));
    if (shown.length > 24 && !row.on_front) continue;
    const text = base ? "bf16" : row.name, w = text.length * 6.9 + 4;
    const places = [[px + 11, py + 4, "start"], [px - 11, py + 4, "end"], [px, py - 13, "middle"], [px, py + 22, "middle"],
      [px + 9, py - 11, "start"], [px + 9, py + 17, "start"], [px - 9, py - 11, "end"], [px - 9, py + 17, "end"]];
    for (const [lx, ly, anchor] of places) {
      const own = box(anchor === "start" ? lx : anchor === "end" ? lx - w : lx - w / 2, ly - 12, w, 15);
      const self = taken[shown.indexOf(row)];
      if (own.x < 70 || own.x + own.w > edge || own.y < 0 || taken.some((t) => t !== self && overlaps(t, own)) || labels.some((t) => overlaps(t, own))) continue;
      labels.push(own);
      svg.append(make("text", { x: lx, y: ly, "text-anchor": anchor, class: row.on_front ? "label front" : "label", "pointer-events": "none" }, text));
      break;
    }
  }
}

function box(x, y, w, h) { return { x, y, w, h }; }
function overlaps(a, b) { return a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h; }

// -- tables

function sortable(columns, rows, start, detail, longest = 60) {
  let by = start, up = !columns[start].down;
  const open = new Set();
  const body = make("tbody"), head = make("tr");
  const heads = columns.map((c, i) => make("th", { class: c.text ? "text" : null, scope: "col" }, c.value
    ? make("button", { type: "button", onclick: () => { up = by === i ? !up : !c.down; by = i; draw(); } }, make("span", { class: "title" }, c.title), c.sub ? make("small", {}, c.sub) : null)
    : make("span", { class: "plain" }, c.title)));
  head.append(...heads);
  const compareRows = (a, b) => {
    const [va, vb] = [columns[by].value(a), columns[by].value(b)];
    if (va === vb) return 0;
    if (va === null || va === undefined || va === "") return 1;
    if (vb === null || vb === undefined || vb === "") return -1;
    const order = typeof va === "string" ? va.localeCompare(vb, undefined, { numeric: true }) : va - vb;
    return up ? order : -order;
  };
  function draw() {
    heads.forEach((h, i) => (i === by ? h.setAttribute("aria-sort", up ? "ascending" : "descending") : h.removeAttribute("aria-sort")));
    body.replaceChildren(...[...rows].sort(compareRows).flatMap((row) => {
      const toggle = () => { open.has(row) ? open.delete(row) : open.add(row); draw(); };
      const cells = columns.map((c) => make("td", { class: `${c.text ? "text" : "num"}${c.name ? " name" : ""}` }, ...[c.cell(row, toggle, open.has(row))].flat()));
      const line = make("tr", { class: row.role === "baseline" ? "baseline" : null, "data-name": row.name }, ...cells);
      return open.has(row) ? [line, make("tr", { class: "detail" }, make("td", { colspan: columns.length }, ...detail(row)))] : [line];
    }));
  }
  draw();
  return make("div", { class: rows.length > longest ? "wide scroll" : "wide" }, make("table", {}, make("thead", {}, head), body));
}

function pill(verdict, text) {
  const kind = { "inside the floor": "floor", worse: "worse", better: "better", "inside the margin": "margin", "worse by rank": "worse", "better by rank": "better" }[verdict] || "";
  return verdict ? make("span", { class: `pill ${kind}` }, text || verdict) : "";
}

function schemeTable(group) {
  const metrics = [...new Set(group.rows.flatMap((r) => Object.keys(r.metrics)))];
  const best = (name) => DATA.metrics[name].higher_is_better;
  const quality = (name) => ({
    title: name, sub: `${unitOf(name) ? `${unitOf(name)}, ` : ""}${best(name) === null ? "" : best(name) ? "higher is better" : "lower is better"}`, down: best(name),
    value: (r) => r.metrics[name]?.value, cell: (r) => {
      const m = r.metrics[name], range = m ? interval(m.ci_lo, m.ci_hi) : "";
      return m ? [number(m.value), range ? make("span", { class: "interval" }, range) : ""] : "";
    },
  });
  const columns = [
    { title: "scheme", text: true, name: true, value: (r) => r.name, cell: (r) => make("span", { class: "who" }, r.role === "candidate" ? key(group, r.backend) : null, make("span", {}, r.name)) },
    { title: "bits", sub: "per weight", value: (r) => r.bits_per_weight_model, cell: (r) => r.bits_per_weight_model?.toFixed(2) ?? "" },
    { title: "bits", sub: "in quantized layers", value: (r) => r.bits_per_weight_quantized, cell: (r) => r.bits_per_weight_quantized?.toFixed(2) ?? "" },
    { title: "size", sub: "MiB", value: (r) => r.weights_bytes, cell: (r) => (r.is_simulated ? "~" : "") + (r.weights_bytes ? (r.weights_bytes / MIB).toFixed(2) : "") },
    { title: "saving", sub: "of 16 bit", down: true, value: (r) => r.compression, cell: (r) => (r.compression ? `${r.compression.toFixed(2)}\u00d7` : "") },
    quality(metrics[0]),
    { title: "verdict", text: true, value: (r) => r.verdict, cell: (r) => [pill(r.verdict), r.verdict ? make("span", { class: "interval" }, `p ${probability(r.p_holm)}`) : ""] },
    { title: "\u2605", text: true, down: true, value: (r) => Number(Boolean(r.on_front)), cell: (r) => (r.on_front ? make("span", { "data-tip": "Surely better than every smaller scheme on the front" }, "\u2605") : "") },
    ...metrics.slice(1).map(quality),
    { title: "again", text: true, cell: (r, toggle, isOpen) => (group.recipes[r.run_id] ? make("button", { type: "button", class: "again", onclick: toggle, "aria-expanded": isOpen }, isOpen ? "close" : "recipe") : "") },
  ];
  return sortable(columns, group.rows, 2, (row) => reproduce(row, group));
}

function reproduce(row, group) {
  const file = `${row.name.replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "")}.yaml`, text = group.recipes[row.run_id];
  const pre = make("pre", { tabindex: 0 }, text);
  const copy = make("button", { type: "button", class: "copy", onclick: () => copyText(text, pre, copy) }, "copy recipe");
  return [make("div", {}, "Save as ", make("code", {}, file), " and run ", make("code", {}, `quantlab recipe=${file}`), " ", copy), pre,
    make("div", { class: "hint" }, "With the run's own weights, and each number compared: ", make("code", {}, `quantlab reproduce ${row.run_id}`))];
}

function copyText(text, pre, button) {
  const select = () => { getSelection().selectAllChildren(pre); document.execCommand("copy"); };
  const said = () => { button.textContent = "copied"; setTimeout(() => { button.textContent = "copy recipe"; }, 1500); };
  if (!navigator.clipboard) { select(); said(); return; }
  navigator.clipboard.writeText(text).catch(select).finally(said);
}

function winner(v) {
  const rank = v.verdict.endsWith(" by rank") ? " by rank" : "";
  return v.verdict.startsWith("better") ? `${v.a} is better${rank}` : v.verdict.startsWith("worse") ? `${v.b} is better${rank}` : v.verdict;
}

function pairTable(group, pairs = group.pairs) {
  const columns = [
    { title: "scheme A", text: true, name: true, value: (v) => v.a, cell: (v) => v.a },
    { title: "scheme B", text: true, name: true, value: (v) => v.b, cell: (v) => v.b },
    { title: "A \u2212 B", sub: group.metric, value: (v) => v.difference, cell: (v) => [number(v.difference), make("span", { class: "interval" }, interval(v.ci_lo, v.ci_hi))] },
    { title: "p", sub: "Holm", down: true, value: (v) => v.p_holm, cell: (v) => [probability(v.p_holm), v.share_worse === null ? "" : make("span", { class: "interval" }, `rank ${probability(v.p_rank)}`)] },
    { title: "verdict", text: true, value: winner, cell: (v) => pill(/^(better|worse)/.test(v.verdict) ? "better" : v.verdict, winner(v)) },
  ];
  return sortable(columns, pairs, 3, () => [], 12);
}

// -- images

function imagePanel(group) {
  const { schemes, reference, samples, pixels, difference_gain: stored, moving } = group.images;
  const smooth = pixels > 128 ? "smooth" : null;
  const first = Math.max(0, schemes.findIndex((s) => s.name === group.front[0]));
  const still = make("img", { alt: `images of the reference: ${samples.join(", ")}`, title: samples.join(", "), class: smooth });
  const candidate = make("img", { class: `${smooth || ""} swap`, id: "candidate-image" }), difference = make("img", { class: smooth, id: "difference-image" });
  const label = make("span", {}), gainText = make("small", {});
  const choose = make("select", { id: "scheme", onchange: () => show(choose.selectedIndex) }, ...schemes.map((s) => make("option", {}, s.name)));
  const slider = make("input", { type: "range", id: "scheme-slider", min: 0, max: schemes.length - 1, step: 1, oninput: () => show(Number(slider.value)) });
  const gain = make("input", { type: "range", id: "gain", min: 0, max: 6, step: 1, value: 3, oninput: () => bright() });
  let shown = 0, turn = 0;
  const bright = () => {
    difference.style.filter = `brightness(${2 ** Number(gain.value)})`;
    gainText.textContent = `${stored * 2 ** Number(gain.value)} times as bright`;
  };
  function place(middle) { // videos begin anew together: an animation starts when its own address is first shown
    const mine = ++turn, end = moving ? `#${mine}` : "", all = [reference, middle, schemes[shown].difference].map((a) => a + end);
    const put = () => { if (mine === turn) [still, candidate, difference].forEach((image, k) => { image.src = all[k]; }); };
    if (moving) Promise.all(all.map((a) => Object.assign(new Image(), { src: a }).decode())).then(put, put); else put();
  }
  function show(i) {
    shown = i; place(schemes[i].candidate);
    candidate.alt = `images of ${schemes[i].name}`; difference.alt = `difference of ${schemes[i].name} to the reference`; label.textContent = schemes[i].name; choose.selectedIndex = i; slider.value = i;
  }
  const flick = (on) => { if (on || label.textContent === "reference") place(on ? reference : schemes[shown].candidate); label.textContent = on ? "reference" : schemes[shown].name; };
  candidate.addEventListener("pointerdown", () => flick(true));
  for (const end of ["pointerup", "pointerleave"]) candidate.addEventListener(end, () => flick(false));
  candidate.draggable = false; show(first); bright();
  const name = (text, small) => make("div", { class: "what" }, text, small);
  return [
    make("div", { class: "controls" }, make("label", {}, "scheme ", choose), make("label", {}, "smallest ", slider, " largest"), make("label", {}, "difference dark ", gain, " bright")),
    make("div", { class: "strips", style: `max-width:${Math.max(380, group.images.tiles * 124 + 144)}px` }, name("reference"), still, name(label, make("small", {}, "hold to see the reference")),
      candidate, name("difference", gainText), difference)];
}

// -- heat-maps

function colour(t) {
  const at = Math.max(0, Math.min(1, t)) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(at));
  return RAMP[i].map((v, k) => Math.round(v + (RAMP[i + 1][k] - v) * (at - i)));
}

function heatMap(map, width) {
  const { rows, columns, values } = map;
  const flat = values.flat().filter((v) => v !== null);
  const log = map.log && flat.every((v) => v > 0) && flat.length > 0, f = log ? Math.log10 : (v) => v;
  const low = Math.min(...flat.map(f)), high = Math.max(...flat.map(f));
  const t = (v) => (map.higher_is_better ? high - f(v) : f(v) - low) / (high - low || 1);
  const factor = map.percent ? 100 : 1, unit = map.percent ? "%" : map.unit, digits = map.percent ? 2 : 3;
  const show = (v) => number(factor * v, digits);
  const longest = Math.max(...rows.map((r) => r.length)), words = Math.max(...columns.map((c) => c.length));
  const left = Math.min(longest * 6.6 + 14, width * 0.34), slant = words > 4;
  const top = slant ? Math.min(130, words * 4.6 + 20) : 26, right = slant ? Math.min(110, words * 5) : 6;
  const w = Math.min(96, (width - left - right) / columns.length), h = rows.length > 120 ? 14 : 22;
  const full = left + w * columns.length + right, small = w < 46;
  const head = make("svg", { width: full, height: top, "aria-hidden": "true" });
  const svg = make("svg", { width: full, height: h * rows.length + 4, role: "img", "aria-label": map.title });
  columns.forEach((c, j) => {
    const x = left + w * (j + 0.5);
    head.append(make("text", slant ? { transform: `translate(${x} ${top - 8}) rotate(-42)`, class: "tick" } : { x, y: top - 8, "text-anchor": "middle", class: "tick" }, c));
  });
  const room = Math.floor((left - 12) / 6.6);
  rows.forEach((name, i) => {
    svg.append(make("text", { x: left - 8, y: h * (i + 0.5) + 4, "text-anchor": "end", class: "tick" }, name.length > room ? `\u2026${name.slice(-(room - 1))}` : name));
    columns.forEach((c, j) => {
      const v = values[i][j], at = { x: left + w * j, y: h * i, width: Math.max(1, w - 1), height: h - 1 };
      const rgb = v === null ? null : colour(t(v));
      svg.append(make("rect", { ...at, fill: rgb ? `rgb(${rgb})` : "#f1f3f5", class: "heat", "data-tip": `${map.tip(name, c)}\n${v === null ? "not quantized" : `${map.metric} ${show(v)} ${unit}`}` }));
      if (v === null || w < 30 || h < 20 || (small && show(v).length > 5)) return;
      const dark = rgb[0] * 0.3 + rgb[1] * 0.59 + rgb[2] * 0.11 < 140;
      svg.append(make("text", { x: at.x + w / 2, y: at.y + h / 2 + 4, "text-anchor": "middle", class: small ? "cell small" : "cell", style: `fill:${dark ? "#fff" : "#1c2430"}` }, show(v)));
    });
  });
  const ends = (map.higher_is_better ? [high, low] : [low, high]).map((v) => show(log ? 10 ** v : v));
  const bar = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((s) => `rgb(${colour(s)})`).join(",")})`;
  const legend = make("div", { class: "legend" }, make("span", {}, `${map.metric}${unit ? ` [${unit}]` : ""}:`),
    make("span", {}, `${ends[0]} `, make("span", { class: "ramp", style: `background:${bar}` }), ` ${ends[1]}`), make("span", {}, "darker is worse"));
  return [legend, make("div", { class: "wide scroll" }, make("div", { class: "heat-head", style: `min-width:${full}px` }, head), svg)];
}

// -- the page

function lists() {
  const parts = [];
  const plain = (columns, rows) => sortable(columns, rows, 0, () => []);
  if (DATA.failed.length) {
    parts.push(section(`What failed? ${DATA.failed.length} ${DATA.failed.length === 1 ? "job" : "jobs"} without a result`, "The other rows do not depend on these. The same command again retries them.", plain([
      { title: "scheme", text: true, name: true, value: (r) => r.name, cell: (r) => r.name },
      { title: "stage", text: true, value: (r) => r.stage, cell: (r) => r.stage },
      { title: "state", text: true, value: (r) => r.status, cell: (r) => r.status.toLowerCase() },
      { title: "reason", text: true, value: (r) => r.error, cell: (r) => r.error },
    ], DATA.failed)));
  }
  if (DATA.skipped.length) {
    parts.push(section("What was not tried?", "Combinations that no library can carry out.", plain([
      { title: "combination", text: true, name: true, value: (r) => r.combination, cell: (r) => r.combination },
      { title: "reason", text: true, value: (r) => r.reason, cell: (r) => r.reason },
    ], DATA.skipped)));
  }
  return parts;
}

function calibrationMaps(group, room) {
  const place = make("div", {});
  const show = (i) => place.replaceChildren(...heatMap({ ...group.calibrated[i], unit: "dB", higher_is_better: true, tip: (layer, step) => `${layer}\nstep ${step}` }, room));
  show(0);
  return [make("div", { class: "controls" }, make("label", {}, "scheme ", make("select", { id: "calibrated", onchange: (e) => show(e.target.selectedIndex) }, ...group.calibrated.map((m) => make("option", {}, m.name))))), place];
}

function reading(group) {
  const words = Object.entries(DATA.rules).map(([k, v]) => [make("dt", {}, pill(k)), make("dd", {}, v)]).flat();
  const metrics = [...new Set(group.rows.flatMap((r) => Object.keys(r.metrics)))].map((m) => [make("dt", {}, m), make("dd", {}, `${DATA.metrics[m].description} (${direction(m)})`)]).flat();
  return make("section", {}, make("details", {}, make("summary", {}, "How to read this page"),
    make("p", { class: "hint" }, "Every number compares a scheme with the unquantized reference on the same inputs. Intervals are 95 % bootstrap intervals over independent samples; p-values are paired and Holm-adjusted over all comparisons of these runs. A size with ~ is of a simulated format, stored wider than its name says."),
    make("dl", {}, ...words), make("dl", {}, ...metrics)));
}

function draw(chosen) {
  current = chosen;
  const group = DATA.groups[chosen], page = document.getElementById("page");
  const facts = Object.entries(group.facts).map(([k, v]) => `${k} ${v}`).join(" \u00b7 ");
  const title = [make("h1", {}, "Which scheme for my model?"), make("p", { class: "lead" }, `${DATA.title} \u00b7 ${facts}`)];
  if (DATA.groups.length > 1) {
    title.push(make("div", { class: "groups" }, make("label", {}, "These runs are not all comparable; shown are those with ",
      make("select", { id: "group", onchange: (e) => draw(e.target.selectedIndex) }, ...DATA.groups.map((g, i) => make("option", { selected: i === chosen ? "" : null }, g.label))))));
  }
  title.push(...group.unquantized.map((line) => make("p", { class: "warning" }, line)));
  page.replaceChildren(...title, answers(group));
  const room = page.clientWidth - (innerWidth <= 860 ? 62 : 98), backends = [...new Set(group.rows.filter((r) => r.role === "candidate").map((r) => r.backend))].sort();
  page.append(section("What does each byte buy?", `Schemes on the line (dark outline) are the Pareto front: each is surely better than all that are smaller. Bars are 95 % intervals. n = ${group.n}.`,
    make("div", { class: "legend" }, ...backends.map((b) => make("span", {}, key(group, b), b))), paretoPlot(group, room)));
  page.append(section("All schemes", `Verdicts compare ${group.metric} with the reference (p: Holm-adjusted); \u2605 is the Pareto front. Click a heading to sort; \u201crecipe\u201d shows how to run that row again.`, schemeTable(group), ...group.notes.map((n) => make("p", { class: "hint" }, n))));
  if (group.pairs.length) {
    const hint = `Paired differences of ${group.metric} on the same samples, with 95 % intervals, largest p first.`;
    page.append(section("Are the differences between the candidates real?", hint, pairTable(group)));
  }
  if (group.twins.length) {
    const hint = `A: the algorithm; B: the plain one on the same bits. Paired differences of ${group.metric} with 95 % intervals.`;
    page.append(section("What does calibration buy?", hint, pairTable(group, group.twins)));
  }
  if (group.calibrated.length) page.append(section("Which layer hurts, and when?", "Each layer\u2019s own error on calibration data, given the reference\u2019s inputs: output signal over error in dB, layer by denoising step. Dark is worse.", ...calibrationMaps(group, room)));
  if (group.images) page.append(section("What does it look like?", "The same noise and the same request through every scheme.", ...imagePanel(group)));
  if (group.layers) {
    page.append(section("Where in the model does the error arise?", "Relative error of each layer's weights, \u2016W \u2212 Q(W)\u2016 / \u2016W\u2016. Layers that a scheme leaves alone are grey.",
      ...heatMap({ ...group.layers, percent: true, log: true, unit: "", tip: (layer, scheme) => `${scheme}\n${layer}` }, room)));
  }
  if (group.steps.length) {
    const together = room > 900 && group.steps.length > 1 && group.steps[0].columns.length <= 16, each = together ? (room - 32) / 2 : room;
    page.append(section("At which step does it go wrong?", "Step 0 starts from pure noise.", make("div", { class: together ? "beside" : "" },
      ...group.steps.map((map) => make("div", { class: "map" }, make("p", { class: "hint" }, map.description), ...heatMap({ ...map, tip: (scheme, step) => `${scheme}, step ${step}` }, each))))));
  }
  page.append(...lists(), reading(group), make("footer", {}, `Written by quantlab on ${DATA.created} from ${DATA.store}${DATA.commits.length ? `; runs made at commit ${DATA.commits.join(", ")}` : ""}`));
}

let current = 0, drawnWidth = innerWidth;
draw(0);
addEventListener("resize", () => { if (innerWidth !== drawnWidth) { drawnWidth = innerWidth; draw(current); } });
