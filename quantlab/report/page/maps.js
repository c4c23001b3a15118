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

function namesIn(names, most, letters) { // as they stand at a map: whole; a few too long ones by number or letter, with a list; of many the ends, which tell them apart
  if (widest(names) <= most) return { shown: names, list: null };
  const short = letters ? names : cut(names, most);
  if (names.length <= 24 || new Set(short).size < names.length) {
    const list = make("ol", { class: "numbered", type: letters ? "A" : "1" }, ...names.map((name) => make("li", {}, name)));
    return { shown: names.map((_, i) => (letters ? String.fromCharCode(65 + i) : String(i + 1))), list };
  }
  return { shown: short, list: null };
}

function cut(names, most) { // their ends; with a little of their beginnings where two of them end alike
  const ends = names.map((name) => endOf(name, most * 0.75));
  return new Set(ends).size < names.length ? names.map((name) => endOf(name, most, 3)) : ends;
}

function endOf(name, most, head = 0) {
  if (textWidth(name, 12) <= most) return name;
  let end = name.slice(head + 1);
  const text = () => `${name.slice(0, head)}\u2026${end}`;
  while (end.length > 3 && textWidth(text(), 12) > most) end = end.slice(1);
  return text();
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

function shades(map) { // how a map's values are written and coloured, and what its scale says
  const flat = map.values.flat().filter((v) => v !== null);
  const log = map.log && flat.every((v) => v > 0) && flat.length > 0, f = log ? Math.log10 : (v) => v;
  const low = Math.min(...flat.map(f)), high = Math.max(...flat.map(f));
  const t = (v) => (map.higher_is_better ? high - f(v) : f(v) - low) / (high - low || 1);
  const factor = map.percent ? 100 : 1, unit = map.percent ? "%" : map.unit, digits = map.percent ? 2 : 3;
  const show = (v) => number(factor * v, digits);
  const ends = (map.higher_is_better ? [high, low] : [low, high]).map((v) => show(log ? 10 ** v : v));
  return { show, unit, ends, rgb: (v) => (v === null ? null : colour(t(v))), longest: widest([flat.map(show).reduce((a, b) => (b.length > a.length ? b : a), "0")]) + 6 }; // what the longest number takes
}

function scaleOf(map, { unit, ends }, ...more) {
  const bar = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((s) => `rgb(${colour(s)})`).join(",")})`;
  return make("div", { class: "legend" }, make("span", {}, `${map.metric}${unit ? ` [${unit}]` : ""}:`),
    make("span", {}, `${ends[0]} `, make("span", { class: "ramp", style: `background:${bar}` }), ` ${ends[1]}`), make("span", {}, "darker is worse"),
    map.note ? make("span", {}, map.note) : null, ...more);
}

function headsOf(words, w, every, slant, across, top) { // 'every': of steps those that have a head
  const head = drawing(across, top, { role: null, "aria-hidden": "true" });
  words.forEach((c, j) => {
    const x = slant ? w * (j + 0.5) : Math.max(w * (j + 0.5), every ? textWidth(c, 12) / 2 + 1 : 0);
    if (every && j % every) return;
    head.append(make("text", slant ? { transform: `translate(${x - 2} ${top - 6}) rotate(-40)`, class: "tick" } : { x, y: top - 8, "text-anchor": "middle", class: "tick" }, c));
  });
  return head;
}

function cellOf(shade, v, at, hasNumber, tip) {
  const rgb = shade.rgb(v);
  return [make("rect", { ...at, ...(rgb ? { style: `fill:rgb(${rgb})` } : {}), class: "heat", "data-tip": tip }),
    v === null || !hasNumber ? null : make("text", { x: at.x + at.width / 2, y: at.y + at.height / 2 + 4.5, "text-anchor": "middle", class: "cell", style: `fill:${inkOn(rgb)}` }, shade.show(v))].filter(Boolean);
}

const RISE = Math.sin(0.7), RUN = Math.cos(0.7);
const everyOf = (w, words) => [1, 2, 5, 10, 20, 50, 100].find((n) => n * w >= words + 8) ?? 200;

function heatMap(whole, width, file) {
  const most = Math.max(width * 0.6, width - 24 - 40 * whole.columns.length), side = namesIn(whole.rows, most, false), rows = side.shown;
  const map = gathered(whole, width - widest(rows) - 22), { values } = map, shade = shades(map), above = namesIn(map.heads ?? map.columns, width * 0.45, true);
  const columns = above.shown, left = widest(rows) + 16, words = widest(columns);
  const slant = !map.steps && words + 6 > Math.max(24, (width - left) / columns.length);
  const top = slant ? words * RISE + 22 : 26, right = slant ? words * RUN + 6 : 6;
  const least = map.steps ? STEP : slant ? 19 : Math.max(24, words + 6);
  const w = Math.max(least, Math.min(96, (width - left - right) / columns.length)), h = rows.length > 120 && w < shade.longest ? 14 : 22;
  const across = w * columns.length + right, down = h * rows.length + 2, hasNumbers = w >= shade.longest && h >= 20;
  const head = headsOf(columns, w, map.steps ? everyOf(w, words) : 0, slant, across, top);
  const names = drawing(left, down, { role: null, "aria-hidden": "true" }), cells = drawing(across, down, { "aria-label": map.title });
  rows.forEach((name, i) => {
    names.append(make("text", { x: left - 8, y: h * (i + 0.5) + 4, "text-anchor": "end", class: "tick" }, name));
    values[i].forEach((v, j) => cells.append(...cellOf(shade, v, { x: w * j, y: h * i, width: Math.max(1, w - 1), height: h - 1 }, hasNumbers,
      `${map.tip(map.rows[i], map.columns[j])}\n${v === null ? "not quantized" : `${map.metric} ${shade.show(v)} ${shade.unit}`}`)));
  });
  const legend = scaleOf(map, shade, hasNumbers ? null : make("span", {}, "point at a cell for its number"),
    saveSvg(file, () => alone(map, { head, cells, top, h, shown: columns, listed: above.list, said: [map.name && `${map.name}:`, map.metric, shade.unit && `[${shade.unit}]`, map.note && `(${map.note})`].filter(Boolean).join(" "), ends: shade.ends })));
  const stay = left < width * 0.45 ? " stay" : ""; // long names scroll away on a narrow screen
  const grid = make("div", { class: "map-grid", style: `grid-template-columns:${left}px ${across}px` },
    make("div", { class: `map-corner${stay}` }), make("div", { class: "map-head" }, head), make("div", { class: `map-names${stay}` }, names), make("div", {}, cells));
  return [make("div", { class: "screen" }, ...[legend, make("div", { class: "map-frame", tabindex: 0 }, grid), side.list, above.list].filter(Boolean)), onPaper((paper) => mapOnPaper(whole, paper))];
}

const ROW = 15, WHOLE = 520, UPRIGHT = 120; // pixels on paper: of a row, of a map that every sheet has room for below its headings, and of upright heads (one above a quarter of a sheet is not repeated)

function mapOnPaper(whole, width) { // as many tables below one another as the columns need for each number to be read; the heads are on each page
  const left = Math.min(widest(whole.rows) + 10, width * 0.4), room = width - left, map = gathered(whole, room), shade = shades(map);
  const above = namesIn(map.heads ?? map.columns, 2 * UPRIGHT, true), names = above.shown.map((c) => endOf(c, 2 * UPRIGHT)), words = widest(names), all = names.length;
  const least = map.steps ? room / all : Math.max(shade.longest - 4, 22), num = Math.ceil(all / Math.max(1, Math.floor(room / least + 1e-6))), each = Math.ceil(all / num);
  const w = Math.min(64, room / each), upright = !map.steps && words + 6 > w, top = upright ? Math.min(words, UPRIGHT) + 12 : 22, hasNumbers = w >= shade.longest - 4;
  const tables = Array.from({ length: num }, (_, k) => {
    const from = k * each, to = Math.min(from + each, all);
    const part = num > 1 ? `${map.steps ? "steps" : "schemes"} ${from + 1}\u2013${to} of ${all}` : "";
    const heads = names.slice(from, to), head = !upright ? headsOf(heads, w, map.steps ? everyOf(w, words) : 0, false, room, top) // a turned drawing is empty where a head is repeated
      : make("div", { class: "upright-words", style: `height:${top}px` }, ...heads.map((c) => make("span", { style: `width:${w}px` }, c)));
    const lines = map.rows.map((name, i) => make("tr", {}, make("th", { scope: "row" }, name),
      make("td", {}, drawing(room, ROW, {}, ...map.values[i].slice(from, to).flatMap((v, j) => cellOf(shade, v, { x: w * j, y: 0, width: Math.max(1, w - 1), height: ROW - 1 }, hasNumbers, null))))));
    return make("table", { class: `map-table${top + ROW * map.rows.length < WHOLE ? " whole" : ""}` }, make("colgroup", {}, make("col", { style: `width:${left}px` }), make("col", {})),
      make("thead", {}, make("tr", {}, make("th", {}, part), make("td", {}, head))), make("tbody", {}, ...lines));
  });
  return [scaleOf(map, shade), ...tables, ...[above.list].filter(Boolean)];
}

function alone(map, { head, cells, top, h, shown, listed, said, ends }) { // a map as a file: its scale, its rows' whole names, and what its letters stand for
  const left = widest(map.rows) + 16, width = left + Number(head.getAttribute("width")), over = 34, down = h * map.rows.length + 2, x = textWidth(`${said}: ${ends[0]}`, 12) + 16;
  const scale = drawing(x + 160 + textWidth(`${ends[1]}, darker is worse`, 12), over, {}, make("text", { x: 8, y: 20, class: "tick" }, `${said}: ${ends[0]}`),
    ...Array.from({ length: 28 }, (_, i) => make("rect", { x: x + 5 * i, y: 10, width: 5, height: 12, style: `fill:rgb(${colour(i / 27)})` })),
    make("text", { x: x + 148, y: 20, class: "tick" }, `${ends[1]}, darker is worse`));
  const names = drawing(left, down, {}, ...map.rows.map((name, i) => make("text", { x: left - 8, y: h * (i + 0.5) + 4, "text-anchor": "end", class: "tick" }, name)));
  const list = listed ? [[listDrawing(map.columns.map((name, j) => `${shown[j]}  ${name}`), width), 0, over + top + down + 8]] : [];
  return [[scale, 0, 0], [head, left, over], [names, 0, over + top], [cells, left, over + top], ...list];
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
  const show = (i) => place.replaceChildren(...heatMap({ ...maps[i], heads: maps[i].columns.length > 1 ? undefined : [""], unit: "dB", higher_is_better: true, tip: (layer, step) => (maps[i].columns.length > 1 ? `${layer}\nstep ${step}` : layer) }, room, "calibration"));
  show(0);
  return [make("div", { class: "controls" }, make("label", {}, "scheme ", chooser("calibrated", maps.map((m, i) => [String(i), m.name]), "0", (i) => show(Number(i))))), place];
}
