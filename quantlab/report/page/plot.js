// The plot of what each byte (or bit, or millisecond) buys, with a label for every point.
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
  if (!log) return Number(value.toPrecision(10)).toString().replace("-", "\u2212"); // steps may be small: 0.99994, 0.99996
  const exponent = Math.round(Math.log10(value));
  if (Math.abs(Math.log10(value) - exponent) > 1e-9 || (exponent > -3 && exponent < 4)) return tickText(value, false);
  return "10" + String(exponent).replace(/./g, (c) => "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[c] || "\u207b");
}

function tipOf(row) {
  const inLayers = row.bits_per_weight_quantized ? `, ${number(row.bits_per_weight_quantized)} in quantized layers` : "";
  const lines = [row.name, `${stored(row)}, ${number(row.bits_per_weight_model)} bits per weight${inLayers}`];
  for (const name of new Set([state.metric, ...group().headline])) {
    const m = row.metrics[name], range = m ? interval(m.ci_lo, m.ci_hi) : "";
    if (m) lines.push(`${withName(name, m)}${range ? ` (95 %: ${range})` : ""}`);
  }
  if (!["weights_bytes", "bits_per_weight_model"].includes(axis().key)) lines.push(`${axis().title} ${number(axisOf(row) / axisScale([row]).by)} ${axisScale([row]).unit}`.trim());
  if (verdictOf(row)) lines.push(`${verdictOf(row).verdict}${onFront(row) ? "; on the Pareto front" : ""}`);
  return lines.join("\n");
}

function frontNow(rows) { // by bytes the front that was tested; by another axis the points that none beats
  if (axis().key === "weights_bytes") return view().front.map((name) => rows.find((r) => r.name === name)).filter(Boolean);
  const cheaper = (a, b) => (axis().higher_is_better ? a > b : a < b);
  const ordered = rows.filter((r) => r.role === "candidate").sort((a, b) => (axisOf(a) === axisOf(b) ? (better(valueOf(a).value, valueOf(b).value) ? -1 : 1) : cheaper(axisOf(a), axisOf(b)) ? -1 : 1));
  const front = [];
  for (const row of ordered) if (!front.length || better(valueOf(row).value, valueOf(front[front.length - 1]).value)) front.push(row);
  return front;
}

function plotSection(width) {
  const rows = shownRows().filter((r) => axisOf(r) > 0 && valueOf(r) && (r.role === "candidate" || r.name === view().floor_name));
  const byBytes = axis().key === "weights_bytes";
  const hint = (svg) => [byBytes && isSure() ? "Schemes on the line (dark outline) are the Pareto front: each is surely better than all that are smaller." : "The line joins the schemes that no other one beats in both, as measured.",
    rows.some((r) => valueOf(r).ci_lo !== null) ? `Bars are 95 % intervals${svg.querySelector("[data-goes-on]") ? "; one with an arrow goes on beyond the plot" : ""}.` : "", `n = ${group().n}.`, axis().note].filter(Boolean).join(" ");
  const title = byBytes ? "What does each byte buy?" : `${state.metric} against ${axis().title}`;
  if (!rows.some((r) => r.role === "candidate")) return section(title, "No scheme is shown: another word, or a press on its backend, brings it back.");
  const drawn = (room) => {
    const { svg, numbered } = plot(rows, room);
    const list = numbered.length ? make("ol", { class: "numbered" }, ...numbered.map((row, i) => make("li", { value: i + 1 }, make("a", { href: `#${anchors(state.group)[row.name]}` }, row.name)))) : null;
    return [svg, list, numbered];
  };
  const [svg, list, numbered] = drawn(width), file = saveSvg("plot", () => aloneToo(svg, rows, numbered));
  return section(title, hint(svg), make("div", { class: "figure screen" }, file, svg, list), onPaper((room) => drawn(room).slice(0, 2).filter(Boolean)));
}

function aloneToo(svg, rows, numbered) { // the plot as a file: what its colours say, and what its numbers stand for
  const width = Number(svg.getAttribute("width")), shown = [...new Set(rows.filter((r) => r.role === "candidate").map(kindOf))].sort();
  const legend = drawing(width, 0, {}), list = numbered.length ? listDrawing(numbered.map((row, i) => `${i + 1}  ${row.name}`), width) : null;
  const what = state.kind === "backend" ? "" : `${state.kind}:`;
  let x = 8 + (what ? textWidth(what, 12) + 12 : 0), y = 20;
  legend.append(make("text", { x: 8, y, class: "tick" }, what));
  for (const kind of shown) {
    const style = styleOf(kind), room = textWidth(kind, 12) + 40;
    if (x > 8 && x + room > width) { x = 8; y += 20; }
    legend.append(marker(style.shape, x + 7, y - 4, 5, { style: `fill:${style.colour}` }), make("text", { x: x + 18, y, class: "tick" }, kind));
    x += room;
  }
  legend.setAttribute("height", y + 10);
  const below = y + 10 + Number(svg.getAttribute("height"));
  return [[legend, 0, 0], [svg, 0, y + 10], ...(list ? [[list, 0, below]] : [])];
}

function plot(rows, width) {
  for (let height = Math.max(380, Math.min(500, width * 0.46)); ; height += 140) {
    const made = plotAt(rows, width, height);
    if (made) return made;
  }
}

// How far intervals may stretch the axis: one that goes on over twenty powers of ten would press all points into a line.
function reachOf(own, log) {
  const low = Math.min(...own), high = Math.max(...own), span = high - low || Math.abs(high) || 1;
  return log ? [low / 100, high * 100] : [low - 3 * span, high + 3 * span];
}

function plotAt(rows, width, height) { // null where not every label found a place
  const narrow = width < 560, right = 22, top = 18, bottom = 52, bottomY = height - bottom;
  const v = view(), of = valueOf, { unit, by } = axisScale(rows);
  const own = rows.map((r) => of(r).value).concat(v.floor ?? []);
  const every = rows.flatMap((r) => [of(r).ci_lo ?? of(r).value, of(r).ci_hi ?? of(r).value]).concat(own), among = every.filter((x) => x > 0);
  const log = rows.every((r) => of(r).value > 0) && Math.max(...among) / Math.min(...among) > 30;
  const room = reachOf(log ? own.filter((x) => x > 0) : own, log), values = every.map((x) => Math.min(Math.max(x, room[0]), room[1]));
  const positive = values.filter((x) => x > 0);
  const y = scale(log ? positive : values, bottomY, top, log), heights = ticks(y, 6).map((t) => [t, tickText(t, log)]);
  const left = Math.max(narrow ? 56 : 74, ...heights.map(([, text]) => textWidth(text, 12) + 32));
  const x = scale(rows.map((r) => axisOf(r) / by), left, width - right, false);
  const label = `${state.metric}${unitOf(state.metric) ? ` [${unitOf(state.metric)}]` : ""}${narrow ? "" : `, ${direction(state.metric)}`}${log ? ", log scale" : ""}`;
  const svg = drawing(width, height, { class: "plot", "aria-label": `${state.metric} against ${axis().title}` });
  const lines = []; // what labels keep off: the front, the floor and its text
  if (v.floor !== null && (!log || v.floor > 0)) {
    const at = y.at(v.floor), good = v.higher_is_better ? [top, at] : [at, bottomY];
    const text = narrow ? "inside the floor" : `no measurable loss: inside the floor (${v.floor_name})`;
    const wide = textWidth(text, 12) + 8, side = v.higher_is_better ? (at - top > 26 ? top + 18 : at + 17) : bottomY - at > 26 ? bottomY - 9 : at - 8;
    const marks = rows.map((r) => box(x.at(axisOf(r) / by) - 8, y.at(log ? Math.max(of(r).value, 10 ** y.low) : of(r).value) - 8, 16, 16));
    const spots = [side, at + 17, at - 8].filter((textY) => textY > top + 12 && textY < bottomY - 4) // off the points, at the right if it can be
      .flatMap((textY) => [width - right - 8, (left + width - right + wide) / 2, left + wide].map((end) => ({ end, textY, own: box(end - wide, textY - 13, wide, 18) })));
    const { end, textY, own } = spots.find((spot) => !marks.some((m) => overlaps(m, spot.own))) || spots[0];
    svg.append(make("rect", { x: left, y: good[0], width: width - left - right, height: Math.max(0, good[1] - good[0]), class: "good" }),
      make("line", { x1: left, x2: width - right, y1: at, y2: at, class: "floor" }),
      make("text", { x: end, y: textY, "text-anchor": "end", class: "soft" }, text));
    lines.push(box(left, at - 1, width, 2), own);
  }
  for (const [t, text] of heights) {
    svg.append(make("line", { x1: left, x2: width - right, y1: y.at(t), y2: y.at(t), class: "grid" }),
      make("text", { x: left - 8, y: y.at(t) + 4, "text-anchor": "end", class: "tick" }, text));
  }
  for (const t of ticks(x, narrow ? 5 : 9)) {
    svg.append(make("line", { x1: x.at(t), x2: x.at(t), y1: bottomY, y2: bottomY + 5, class: "axis" }),
      make("text", { x: x.at(t), y: bottomY + 19, "text-anchor": "middle", class: "tick" }, tickText(t, false)));
  }
  svg.append(make("line", { x1: left, x2: width - right, y1: bottomY, y2: bottomY, class: "axis" }),
    make("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle", class: "axis-title" }, `${axis().title}${unit ? ` [${unit}]` : ""}${narrow ? "" : axis().higher_is_better ? " \u2192 larger is better" : " \u2190 smaller is better"}`),
    make("text", { transform: `translate(${narrow ? 13 : 16} ${(top + bottomY) / 2}) rotate(-90)`, "text-anchor": "middle" }, label));
  const atX = (r) => x.at(axisOf(r) / by), [least, most] = log ? [10 ** y.low, 10 ** y.high] : [y.low, y.high], atY = (value) => y.at(Math.min(Math.max(value, least), most));
  let last = null;
  const steps = frontNow(rows).map((r) => {
    const px = atX(r), py = atY(of(r).value);
    if (last) lines.push(box(Math.min(px, last[0]), last[1] - 1, Math.abs(px - last[0]), 2), box(px - 1, Math.min(last[1], py), 2, Math.abs(py - last[1])));
    const step = last ? `H${px}V${py}` : `M${px},${py}`;
    last = [px, py];
    return step;
  });
  svg.append(make("path", { d: steps.join("") || "M0,0", class: "front-line" }));
  const numbered = drawPoints(svg, rows, atX, atY, (bound) => bound < least || bound > most, { left: left + 2, right: width - 4, top: 4, bottom: bottomY - 2 }, lines);
  return numbered && { svg, numbered };
}

// Each point has its name: beside it, or further off at the end of a line, or as a number that a list explains.
function drawPoints(svg, rows, atX, atY, goesOn, room, lines) {
  const front = new Set(frontNow(rows).map((r) => r.name));
  const points = [...rows].sort((a, b) => front.has(b.name) - front.has(a.name)).map((row) => ({ row, x: atX(row), y: atY(valueOf(row).value) }));
  const bars = points.map((p) => ({ ...p, ...valueOf(p.row) })).filter((p) => p.ci_lo !== null && p.ci_lo !== undefined)
    .map((p) => box(p.x - 5, Math.min(atY(p.ci_lo), atY(p.ci_hi)), 10, Math.abs(atY(p.ci_lo) - atY(p.ci_hi))));
  const taken = points.map((p) => box(p.x - 7, p.y - 7, 14, 14)), placed = [...lines], numbered = [], many = points.length > 24;
  const wires = make("g", {}), marks = make("g", {}), labels = make("g", {});
  for (const [i, p] of points.entries()) {
    const { row } = p, m = valueOf(row), base = row.role !== "candidate", isFront = front.has(row.name), style = base ? { colour: "var(--soft)", shape: "square" } : styleOf(kindOf(row));
    if (m.ci_lo !== null && m.ci_lo !== undefined) {
      const a = atY(m.ci_lo), b = atY(m.ci_hi), ends = [[m.ci_lo, a, -6], [m.ci_hi, b, 6]].map(([bound, at, back]) => goesOn(bound) ? `M${p.x - 4},${at + back}L${p.x},${at}L${p.x + 4},${at + back}` : `M${p.x - 4},${at}h8`);
      marks.append(make("path", { class: "bar", d: `M${p.x},${a}V${b}${ends.join("")}`, style: `stroke:${style.colour};stroke-width:1.5px;fill:none`, ...(goesOn(m.ci_lo) || goesOn(m.ci_hi) ? { "data-goes-on": row.name } : {}) }));
    }
    marks.append(marker(style.shape, p.x, p.y, isFront ? 7 : 5.5, {
      style: base ? `fill:var(--panel);stroke:${style.colour};stroke-width:2px` : `fill:${style.colour};stroke:${isFront ? "var(--ink)" : "var(--panel)"};stroke-width:${isFront ? "1.8px" : "1px"}`,
      "data-tip": tipOf(row), tabindex: 0, class: "point", "data-name": row.name,
    }));
    const name = base ? row.name.replace(/^floor_/, "") : row.name, others = taken.filter((_, k) => k !== i);
    const find = (words, reach) => findPlace(p, words, isFront, room, [...others, ...bars], placed, 42) || findPlace(p, words, isFront, room, others, placed, reach); // off the intervals where there is room
    let text = name, place = many && !isFront && !base ? null : find(name, 60);
    if (!place) { text = String(numbered.length + 1); place = find(text, 150); numbered.push(row); }
    if (!place) return null;
    placed.push(place.box);
    if (place.far) wires.append(make("line", { x1: p.x, y1: p.y, x2: place.near[0], y2: place.near[1], class: "wire" }));
    labels.append(make("text", { x: place.x, y: place.y, "text-anchor": place.anchor, class: isFront ? "label front" : "label", "pointer-events": "none", "data-of": row.name }, text));
  }
  svg.append(wires, marks, labels);
  return numbered;
}

function findPlace(p, text, bold, room, points, placed, reach) {
  const w = textWidth(text, 12.5, bold ? 650 : 400) + 6, h = 15;
  const free = (own) => own.x >= room.left + 1 && own.x + own.w <= room.right && own.y >= room.top && own.y + own.h <= room.bottom && !points.some((t) => overlaps(t, own)) && !placed.some((t) => overlaps(t, own));
  const near = [[11, 4, "start"], [-11, 4, "end"], [0, -13, "middle"], [0, 22, "middle"], [9, -11, "start"], [9, 17, "start"], [-9, -11, "end"], [-9, 17, "end"]];
  const at = (x, y, anchor) => ({ x, y, anchor, box: box(anchor === "start" ? x - 1 : anchor === "end" ? x - w + 1 : x - w / 2, y - 12, w, h) });
  for (const [dx, dy, anchor] of near) {
    const place = at(p.x + dx, p.y + dy, anchor);
    if (free(place.box)) return place;
  }
  for (let r = 24; r <= reach; r += 9) {
    for (let k = 0; k < 24; k += 1) {
      const turn = (k % 2 ? 1 : -1) * Math.ceil(k / 2) * (Math.PI / 12) - Math.PI / 4, dx = Math.cos(turn) * r, dy = Math.sin(turn) * r;
      const place = at(p.x + dx, p.y + dy + 4, dx >= 0 ? "start" : "end");
      if (free(place.box)) return { ...place, far: true, near: [p.x + dx + (dx >= 0 ? -2 : 2), p.y + dy] };
    }
  }
  return null;
}

function box(x, y, w, h) { return { x, y, w, h }; }
function overlaps(a, b) { return a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h; }
