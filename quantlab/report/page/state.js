// What the reader has chosen, and what follows of it: the rows that are shown, under which metric.
const state = { group: 0, metric: "", axis: "weights_bytes", kind: "backend", words: "", hidden: new Set(), under: null, quality: null };

function group() { return DATA.groups[state.group]; }

function view() { return group().views[state.metric]; }

function verdictOf(row) { return view().verdicts[row.name] || null; }

function isSure() { // is the front one of tests? Of too few samples it is as measured
  return view().is_tested && Object.values(view().verdicts).some((v) => v.verdict !== "too few samples");
}

function onFront(row) { return view().front.includes(row.name); }

function valueOf(row) { return row.metrics[state.metric]; }

function better(a, b) { return view().higher_is_better ? a > b : a < b; }

function candidates() { return group().rows.filter((r) => r.role === "candidate"); }

function kindOf(row) { return (group().kinds[state.kind] || {})[row.name] || row.backend; } // what its colour says

function kinds() { return [...new Set(candidates().map(kindOf))].sort(); }

function isShown(row) { // a row that is no candidate always is
  if (row.role !== "candidate") return true;
  const name = row.name.toLowerCase(), words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
  return !state.hidden.has(kindOf(row)) && words.every((w) => (/^[!-]./.test(w) ? !name.includes(w.slice(1)) : name.includes(w)));
}

function shownRows() { return group().rows.filter(isShown); }

function shownCandidates() { return candidates().filter(isShown); }

function isNamed(name) { // is the scheme of this name shown?
  const row = group().rows.find((r) => r.name === name);
  return !row || isShown(row);
}

function axis() { return group().axes.find((a) => a.key === state.axis) || group().axes[0]; }

function axisOf(row) { return row.axes[axis().key]; }

function axisScale(rows) { // the unit in which the axis is written: bytes as MiB or GiB
  if (axis().unit !== "bytes") return { unit: axis().unit, by: 1 };
  return Math.max(...rows.map((r) => axisOf(r) || 0)) >= GIB ? { unit: "GiB", by: GIB } : { unit: "MiB", by: MIB };
}

function chooseGroup(i) {
  const g = DATA.groups[i];
  const sizes = g.rows.filter((r) => r.role === "candidate" && r.weights_bytes).map((r) => r.weights_bytes / MIB).sort((a, b) => a - b);
  const middle = sizes[Math.floor(sizes.length / 2)] || 0;
  Object.assign(state, { group: i, metric: g.metric, axis: "weights_bytes", kind: Object.keys(g.kinds)[0], words: "", hidden: new Set(), under: middle ? Number((middle * 1.05).toPrecision(2)) : null, quality: null });
}

function anchors(i) { // scheme -> the id of its row, by which an address ends in it
  const taken = new Set(), found = {};
  for (const row of DATA.groups[i].rows) {
    let id = `${i ? `group-${i + 1}-` : ""}scheme-${slug(row.name)}`;
    while (taken.has(id)) id += "-2";
    taken.add(id);
    found[row.name] = id;
  }
  return found;
}

function styleOf(kind) {
  const i = Math.max(0, kinds().indexOf(kind));
  return { colour: `var(--c${i % COLOURS})`, shape: SHAPES[i % SHAPES.length] };
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

function key(kind) {
  const style = styleOf(kind);
  return make("svg", { class: "key", viewBox: "0 0 14 14", "aria-hidden": "true" }, marker(style.shape, 7, 7, 5, { style: `fill:${style.colour}` }));
}

// -- the bar of choices

function toolbar(update) {
  const metrics = Object.keys(group().views).map((m) => [m, m]), axes = group().axes.map((a) => [a.key, `${a.title}${a.unit && a.unit !== "bytes" ? ` [${a.unit}]` : ""}`]);
  const words = make("input", { type: "search", id: "filter", value: state.words, placeholder: "int4 !gguf", "aria-label": "show schemes whose name has these words", spellcheck: "false" });
  const legend = make("div", { class: "legend", id: "legend" }), told = make("span", { class: "told", id: "told" });
  const tell = () => {
    const n = shownCandidates().length, all = candidates().length;
    told.textContent = n === all ? `${all} scheme${all === 1 ? "" : "s"}` : `${n} of ${all} schemes`;
    legend.replaceChildren(...kinds().map((b) => make("button", {
      type: "button", class: "kind", "data-kind": b, "aria-pressed": String(!state.hidden.has(b)), title: "show or hide", onclick: () => toggle(b),
    }, key(b), b)));
  };
  const change = () => { tell(); update(); };
  const toggle = (b) => {
    state.hidden.has(b) ? state.hidden.delete(b) : state.hidden.add(b);
    change();
    legend.querySelector(`[data-kind="${CSS.escape(b)}"]`).focus();
  };
  words.addEventListener("input", () => { state.words = words.value; change(); });
  tell();
  return make("div", { class: "toolbar" },
    make("label", {}, "metric ", chooser("metric", metrics, state.metric, (m) => { state.metric = m; state.quality = null; change(); })),
    make("label", {}, "against ", chooser("axis", axes, axis().key, (a) => { state.axis = a; change(); })),
    make("label", {}, "show ", words),
    Object.keys(group().kinds).length > 1 ? make("label", {}, "colours by ", chooser("kind", Object.keys(group().kinds).map((k) => [k, k]), state.kind, (k) => { state.kind = k; state.hidden = new Set(); change(); })) : null, legend, told);
}

// -- answers to the reader's own questions

function roundedFor(value) { // a short number that this value itself keeps to: two digits, beside 1 two of what it lacks or exceeds
  const near1 = Math.abs(1 - value), size = near1 > 0 && near1 < 0.1 ? near1 : Math.abs(value) || 1;
  const unit = 10 ** (Math.floor(Math.log10(size)) - 1), times = Math.round(value / unit);
  const [near, next] = [times, times + (view().higher_is_better ? -1 : 1)].map((n) => Number((n * unit).toPrecision(12)));
  return better(near, value) ? next : near;
}

function answers() {
  const first = (a, b) => Number(better(b, a)) - Number(better(a, b)); // of one size
  const rows = shownCandidates().filter((r) => r.weights_bytes && valueOf(r)).sort((a, b) => a.weights_bytes - b.weights_bytes || first(valueOf(a).value, valueOf(b).value));
  const sorted = rows.map((r) => valueOf(r).value).sort((a, b) => a - b), ids = anchors(state.group);
  if (state.quality === null && sorted.length) state.quality = roundedFor(sorted[Math.floor(sorted.length / 2)]);
  const result = (place, row, none) => place.replaceChildren(...(row ? [make("div", { class: "name" }, make("a", { href: `#${ids[row.name]}` }, row.name)),
    make("div", { class: "cost" }, `${stored(row)}${row.compression ? `, saving ${decimals(row.compression, 2)}\u00d7` : ""}`),
    make("div", { class: "cost" }, withName(state.metric, valueOf(row)))]
    : [make("div", { class: "none" }, none)]));
  const places = [0, 1, 2].map(() => make("div", { "aria-live": "polite" }));
  const tell = () => {
    const inBytes = rows.filter((r) => state.under === null || r.weights_bytes <= state.under * MIB);
    const best = inBytes.reduce((a, r) => (a && !better(valueOf(r).value, valueOf(a).value) ? a : r), null);
    result(places[0], best, rows.length ? `none: the smallest has ${stored(rows[0])}` : "none is shown");
    result(places[1], rows.find((r) => (verdictOf(r) || {}).verdict === "inside the floor"), view().floor === null ? "no floor is known for this metric" : "none of those shown");
    result(places[2], rows.find((r) => state.quality === null || !better(state.quality, valueOf(r).value)), "none of those shown");
  };
  const written = (v) => (v && Math.abs(v) < 1e-3 ? v.toExponential() : v ?? ""); // as the answer below has it
  const field = (id, min) => make("input", { type: "number", id, min, step: "any", value: written(state[id]), placeholder: "any", oninput: (e) => { state[id] = e.target.value === "" ? null : Number(e.target.value); tell(); } });
  const card = (i, ...question) => make("div", { class: "answer" }, make("div", { class: "question" }, ...question), places[i]);
  tell();
  return make("div", { class: "answers" }, card(0, "best under ", field("under", 0), " MiB"), card(1, "smallest inside the floor: no measurable loss"),
    card(2, `smallest with ${state.metric} at ${view().higher_is_better ? "least" : "most"} `, field("quality")));
}
