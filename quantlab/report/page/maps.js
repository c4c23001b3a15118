// Heat maps: names and headings stay while the cells scroll; a number stands in a cell only where it can be read.
function colour(t) {
  const at = Math.max(0, Math.min(1, t)) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(at));
  return RAMP[i].map((v, k) => Math.round(v + (RAMP[i + 1][k] - v) * (at - i)));
}

function luminance(rgb) {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function inkOn(rgb) { // of black and white the one with more contrast
  const l = luminance(rgb);
  return (l + 0.05) / 0.05 > 1.05 / (l + 0.05) ? "#000000" : "#ffffff";
}

const widest = (words) => Math.max(...words.map((text) => textWidth(text, 12)), 6);

function namesIn(names, most, letters) { // as they stand at a map: whole; a few too long ones by number or letter, with a list; of many the ends
  if (widest(names) <= most) return { shown: names, list: null };
  if (names.length <= 24) {
    const list = make("ol", { class: "numbered", type: letters ? "A" : "1" }, ...names.map((name) => make("li", {}, name)));
    return { shown: names.map((_, i) => (letters ? String.fromCharCode(65 + i) : String(i + 1))), list };
  }
  return { shown: letters ? names : names.map((name) => endOf(name, most * 0.75)), list: null };
}

function endOf(name, most) {
  let text = name;
  while (text.length > 4 && textWidth(text, 12) > most) text = `\u2026${text.slice(2)}`;
  return text;
}

const STEP = 7; // the least width of a column of steps

function gathered(map, room) { // steps side by side where there is no room for each: the worst of some, which is said
  if (map.columns.length < 2 || !map.columns.every((c) => /^\d+$/.test(c))) return map;
  const size = Math.ceil(map.columns.length / Math.max(20, Math.floor(room / STEP)));
  if (size < 2) return { ...map, steps: true };
  const worst = map.higher_is_better ? Math.min : Math.max, columns = [], bins = [];
  for (let j = 0; j < map.columns.length; j += size) {
    const last = Math.min(j + size, map.columns.length) - 1;
    columns.push(last > j ? `${map.columns[j]}\u2013${map.columns[last]}` : map.columns[j]);
    bins.push([j, last + 1]);
  }
  const of = (row, [from, to]) => row.slice(from, to).filter((v) => v !== null);
  const values = map.values.map((row) => bins.map((bin) => (of(row, bin).length ? worst(...of(row, bin)) : null)));
  return { ...map, columns, values, steps: true, heads: bins.map(([from]) => map.columns[from]), note: `each column is the worst of ${size} steps` };
}

function heatMap(whole, width, file) {
  const most = Math.max(width * 0.6, width - 24 - 40 * whole.columns.length);
  const side = namesIn(whole.rows, most, false), onPage = PAPER.width / PAPER.split - widest(side.shown) - 22;
  const map = gathered(whole, onPage), { values } = map, above = namesIn(map.heads ?? map.columns, width * 0.45, true);
  const rows = side.shown, columns = above.shown;
  const flat = values.flat().filter((v) => v !== null);
  const log = map.log && flat.every((v) => v > 0) && flat.length > 0, f = log ? Math.log10 : (v) => v;
  const low = Math.min(...flat.map(f)), high = Math.max(...flat.map(f));
  const t = (v) => (map.higher_is_better ? high - f(v) : f(v) - low) / (high - low || 1);
  const factor = map.percent ? 100 : 1, unit = map.percent ? "%" : map.unit, digits = map.percent ? 2 : 3;
  const show = (v) => number(factor * v, digits);
  const left = widest(rows) + 16, words = widest(columns), longest = widest([flat.map(show).reduce((a, b) => (b.length > a.length ? b : a), "0")]) + 6; // what the longest number takes
  const slant = !map.steps && words + 6 > Math.max(24, (width - left) / columns.length), rise = Math.sin(0.7), run = Math.cos(0.7);
  const top = slant ? words * rise + 22 : 26, right = slant ? words * run + 6 : 6;
  const least = map.steps ? STEP : slant ? 19 : Math.max(24, words + 6), room = (width - left - right) / columns.length;
  const fits = map.steps && room < longest ? Math.min(room, onPage / columns.length) : room; // so that it can be read on paper, too
  const w = Math.max(least, Math.min(96, fits)), every = map.steps ? [1, 2, 5, 10, 20, 50, 100].find((n) => n * w >= words + 8) ?? 200 : 1, h = rows.length > 120 && w < longest ? 14 : 22;
  const across = w * columns.length + right, hasNumbers = w >= longest && h >= 20;
  const paper = onPaper(rows.length, left + across, top, h), parts = [];
  for (let from = 0; from < rows.length; from += paper.most) parts.push({ from, rows: rows.slice(from, from + paper.most) });
  const head = drawing(across, top, { role: null, "aria-hidden": "true" });
  columns.forEach((c, j) => {
    const x = Math.max(w * (j + 0.5), map.steps ? textWidth(c, 12) / 2 + 1 : 0);
    if (j % every) return;
    head.append(make("text", slant ? { transform: `translate(${x - 2} ${top - 6}) rotate(-40)`, class: "tick" } : { x, y: top - 8, "text-anchor": "middle", class: "tick" }, c));
  });
  for (const part of parts) {
    const down = h * part.rows.length + (part === parts.at(-1) ? 2 : 0);
    part.names = drawing(left, down, { role: null, "aria-hidden": "true" });
    part.cells = drawing(across, down, { "aria-label": map.title });
    part.rows.forEach((name, k) => {
      const i = part.from + k;
      part.names.append(make("text", { x: left - 8, y: h * (k + 0.5) + 4, "text-anchor": "end", class: "tick" }, name));
      columns.forEach((c, j) => {
        const v = values[i][j], at = { x: w * j, y: h * k, width: Math.max(1, w - 1), height: h - 1 };
        const rgb = v === null ? null : colour(t(v));
        part.cells.append(make("rect", { ...at, ...(rgb ? { style: `fill:rgb(${rgb})` } : {}), class: "heat", "data-tip": `${map.tip(map.rows[i], map.columns[j])}\n${v === null ? "not quantized" : `${map.metric} ${show(v)} ${unit}`}` }));
        if (v === null || !hasNumbers) return;
        part.cells.append(make("text", { x: at.x + w / 2, y: at.y + h / 2 + 4, "text-anchor": "middle", class: "cell", style: `fill:${inkOn(rgb)}` }, show(v)));
      });
    });
  }
  const ends = (map.higher_is_better ? [high, low] : [low, high]).map((v) => show(log ? 10 ** v : v));
  const bar = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((s) => `rgb(${colour(s)})`).join(",")})`;
  const legend = make("div", { class: "legend" }, make("span", {}, `${map.metric}${unit ? ` [${unit}]` : ""}:`),
    make("span", {}, `${ends[0]} `, make("span", { class: "ramp", style: `background:${bar}` }), ` ${ends[1]}`), make("span", {}, "darker is worse"),
    map.note ? make("span", {}, map.note) : null,
    hasNumbers ? null : make("span", { class: "screen" }, "point at a cell for its number"),
    saveSvg(file, () => alone(map, { head, parts, top, h, shown: columns, listed: above.list, said: [map.name && `${map.name}:`, map.metric, unit && `[${unit}]`, map.note && `(${map.note})`].filter(Boolean).join(" "), ends })));
  const stay = left < width * 0.45 ? " stay" : ""; // long names scroll away on a narrow screen; paper holds all
  const grid = parts.map((part, i) => make("div", { class: "map-part" },
    make("div", { class: `map-corner${stay}${i ? " later" : ""}` }), make("div", { class: `map-head${i ? " later" : ""}` }, i ? head.cloneNode(true) : head),
    make("div", { class: `map-names${stay}` }, part.names), make("div", {}, part.cells)));
  return [legend, make("div", { class: `map-frame${parts.length > 1 ? " parts" : ""}`, tabindex: 0 },
    make("div", { class: "map-grid", style: `--map-columns:${left}px ${across}px;--print-zoom:${paper.zoom.toFixed(3)}` }, ...grid)), side.list, above.list].filter(Boolean);
}

const PAPER = { width: 690, height: 880, least: 0.62, split: 0.8 }; // pixels of a page below a heading; how small print may be

function onPaper(num, width, top, h) { // a map goes onto one page where that can be read, or on as many as it needs, each with its headings
  const wide = Math.min(1, PAPER.width / width), high = PAPER.height / (top + h * num);
  if (num && high >= Math.min(PAPER.least, wide)) return { zoom: Math.min(wide, high), most: num };
  const zoom = Math.min(wide, PAPER.split), most = Math.max(1, Math.floor((PAPER.height / zoom - top) / h));
  return { zoom, most: Math.ceil(num / Math.ceil(num / most)) || 1 };
}

function alone(map, { head, parts, top, h, shown, listed, said, ends }) { // a map as a file: its scale, its rows' whole names, and what its letters stand for
  const left = widest(map.rows) + 16, width = left + Number(head.getAttribute("width")), over = 34, down = h * map.rows.length + 2, x = textWidth(`${said}: ${ends[0]}`, 12) + 16;
  const scale = drawing(x + 160 + textWidth(`${ends[1]}, darker is worse`, 12), over, {}, make("text", { x: 8, y: 20, class: "tick" }, `${said}: ${ends[0]}`),
    ...Array.from({ length: 28 }, (_, i) => make("rect", { x: x + 5 * i, y: 10, width: 5, height: 12, style: `fill:rgb(${colour(i / 27)})` })),
    make("text", { x: x + 148, y: 20, class: "tick" }, `${ends[1]}, darker is worse`));
  const names = drawing(left, down, {}, ...map.rows.map((name, i) => make("text", { x: left - 8, y: h * (i + 0.5) + 4, "text-anchor": "end", class: "tick" }, name)));
  const list = listed ? [[listDrawing(map.columns.map((name, j) => `${shown[j]}  ${name}`), width), 0, over + top + down + 8]] : [];
  return [[scale, 0, 0], [head, left, over], [names, 0, over + top], ...parts.map((part) => [part.cells, left, over + top + h * part.from]), ...list];
}

function chosenColumns(map) { // of a map whose columns are schemes, those that are shown
  const kept = map.columns.map((name, j) => (isNamed(name) ? j : -1)).filter((j) => j >= 0);
  return { ...map, columns: kept.map((j) => map.columns[j]), values: map.values.map((row) => kept.map((j) => row[j])) };
}

function chosenRows(map) {
  const kept = map.rows.map((name, i) => (isNamed(name) ? i : -1)).filter((i) => i >= 0);
  return { ...map, rows: kept.map((i) => map.rows[i]), values: kept.map((i) => map.values[i]) };
}

function calibrationMaps(room) {
  const maps = group().calibrated.filter((m) => isNamed(m.name)), place = make("div", {});
  if (!maps.length) return null;
  const show = (i) => place.replaceChildren(...heatMap({ ...maps[i], unit: "dB", higher_is_better: true, tip: (layer, step) => `${layer}\nstep ${step}` }, room, "calibration"));
  show(0);
  return [make("div", { class: "controls" }, make("label", {}, "scheme ", chooser("calibrated", maps.map((m, i) => [String(i), m.name]), "0", (i) => show(Number(i))))), place];
}
