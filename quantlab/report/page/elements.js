"use strict";
// Elements, numbers, downloads: what everything below is made of.
const DATA = JSON.parse(document.getElementById("data").textContent);
const MIB = 1024 ** 2, GIB = 1024 ** 3;
const SHAPES = ["circle", "square", "triangle", "diamond", "down", "cross"];
const COLOURS = 7; // --c0 to --c6 in the styles
const RAMP = [[247, 251, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]];
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "text", "circle"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

function drawing(width, height, attributes, ...children) {
  return make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", ...attributes }, ...children);
}

function unbroken(text) { // no line ends between a number and its percent sign
  return typeof text === "string" ? text.replace(/(\d) %/g, "$1\u00a0%") : text;
}

function section(title, hint, ...children) {
  return make("section", {}, make("h2", {}, title), hint ? make("p", { class: "hint" }, unbroken(hint)) : null, ...children);
}

function button(text, onclick, attributes) {
  return make("button", { type: "button", onclick, ...attributes }, text);
}

function chooser(id, options, chosen, onchange) {
  const node = make("select", { id }, ...options.map(([value, text]) => make("option", { value, selected: value === chosen ? "" : null }, text)));
  node.addEventListener("change", () => onchange(node.value));
  return node;
}

const PAPER = { upright: 690, across: 960 }; // pixels between the margins of A4 and US Letter, the narrower of the two

function onPaper(draw) { // what paper has instead of what a screen has, for either way that it lies; made when it is printed
  const places = Object.entries(PAPER).map(([lies, width]) => [make("div", { class: `on-paper ${lies}` }), width]);
  const whole = make("div", { class: "for-paper" }, ...places.map(([place]) => place));
  whole.draw = () => places.forEach(([place, width]) => place.replaceChildren(...draw(width)));
  return whole;
}

const PEN = document.createElement("canvas").getContext("2d"), FONT = getComputedStyle(document.body).fontFamily;
function textWidth(text, size = 12.5, weight = 400) {
  PEN.font = `${weight} ${size}px ${FONT}`;
  return PEN.measureText(text).width;
}

// -- numbers

function number(value, digits = 3, told = 0) { // 'told': significant digits that its interval needs
  if (value === null || value === undefined) return "";
  if (value === 0) return "0";
  const size = Math.abs(value), near = Math.abs(1 - size);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(Math.max(1, told - 1)).replace("+", "").replaceAll("-", "\u2212");
  if (size >= 100) return value.toFixed(Math.max(1, told - Math.floor(Math.log10(size)) - 1)).replace("-", "\u2212");
  const apart = near > 0 && near < 5e-4 ? Math.min(-Math.floor(Math.log10(near)), 6) + (size > 1) : 0; // what is not 1 is not shown as 1
  return value.toPrecision(Math.max(digits, apart, told)).replace("-", "\u2212");
}

function interval(low, high) {
  const told = digitsOf(low, high);
  return told ? `${number(low, 3, told)} to ${number(high, 3, told)}` : "";
}

function digitsOf(low, high) { // as many as tell the ends of an interval apart; 0 where there is none
  if (low === null || low === undefined || low === high) return 0;
  return Math.max(1, Math.min(8, Math.floor(Math.log10(Math.max(Math.abs(low), Math.abs(high)))) - Math.floor(Math.log10(high - low)) + 1));
}

function measured(m) { // a number with as many digits as its interval has
  return number(m.value, 3, digitsOf(m.ci_lo, m.ci_hi));
}

function unitOf(metric) {
  const unit = (DATA.metrics[metric] || {}).unit;
  return unit && unit !== "1" && unit !== "fraction" ? unit : "";
}

function withName(metric, m) { // name, number and unit of what was measured
  return [metric, measured(m), unitOf(metric)].filter(Boolean).join(" ");
}

function direction(metric) {
  const up = DATA.metrics[metric].higher_is_better;
  return up === null ? "" : up ? "higher is better" : "lower is better";
}

function decimals(value, digits) { // halves to the even digit, as the terminal's tables have them
  const scaled = value * 10 ** digits, low = Math.floor(scaled);
  return (scaled - low === 0.5 && Number.isInteger(value * 2 ** (digits + 1)) ? (low + (low % 2)) / 10 ** digits : value).toFixed(digits);
}

function mib(value) { // two digits behind the point, and of small modules two that say something
  const v = value / MIB;
  return v !== 0 && Math.abs(v) < 0.095 ? v.toPrecision(2) : decimals(v, 2);
}

function bytes(value) {
  if (value === null || value === undefined) return "";
  return value >= GIB ? `${decimals(value / GIB, 2)} GiB` : `${mib(value)} MiB`;
}

function stored(row, written = bytes) { // what a scheme stores, marked where its format is simulated
  return row.weights_bytes ? `${row.is_simulated ? "~" : ""}${written(row.weights_bytes)}` : "";
}

function probability(p) {
  return p === null || p === undefined ? "" : p < 0.001 ? "< 0.001" : p.toFixed(3);
}

function slug(text) {
  return text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "scheme";
}

// -- what leaves the page

function webAddress(text) { // an address that a link may have: of the web, and of nothing else
  try {
    const url = new URL(text);
    return ["http:", "https:"].includes(url.protocol) ? url.href : null;
  } catch (_) { return null; }
}

function save(name, kind, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: kind })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function csv(lines) { // text that a spreadsheet would take for a formula begins with an apostrophe
  const cell = (v) => {
    if (v === null || v === undefined) return "";
    const text = typeof v === "string" && /^[=+\-@\t\r]/.test(v) ? `'${v}` : String(v);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return lines.map((line) => line.map(cell).join(",") + "\r\n").join("");
}

const STYLED = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity", "font-size", "font-weight", "font-family", "text-anchor", "paint-order", "stroke-linejoin"];

function svgText(pieces, home) { // [svg, x, y] ... as one file, which looks alone as it does here
  const ground = home.closest("section"), desk = make("div", { class: "desk", "aria-hidden": "true" });
  desk.append(...pieces.map(([svg]) => svg).filter((svg) => !svg.isConnected)); // what is made for the file has styles while it lies here
  ground.append(desk);
  const width = Math.max(...pieces.map(([s, x]) => x + Number(s.getAttribute("width"))));
  const height = Math.max(...pieces.map(([s, , y]) => y + Number(s.getAttribute("height"))));
  const whole = make("svg", { xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}` });
  whole.append(make("rect", { width, height, fill: getComputedStyle(ground).backgroundColor }));
  for (const [svg, x, y] of pieces) {
    const copy = svg.cloneNode(true), group = make("g", { transform: `translate(${x} ${y})` });
    const [here, there] = [svg, copy].map((node) => [...node.querySelectorAll("*")]);
    here.forEach((node, i) => {
      const style = getComputedStyle(node);
      there[i].removeAttribute("style");
      for (const name of STYLED) if (style.getPropertyValue(name)) there[i].setAttribute(name, style.getPropertyValue(name));
      for (const name of ["class", "tabindex", "data-name"]) there[i].removeAttribute(name);
      const tip = there[i].getAttribute("data-tip");
      if (tip) { there[i].removeAttribute("data-tip"); const title = document.createElementNS(SVG, "title"); title.textContent = tip; there[i].append(title); }
    });
    group.append(...copy.childNodes);
    whole.append(group);
  }
  desk.remove();
  return new XMLSerializer().serializeToString(whole);
}

function listDrawing(lines, width) { // a list as a drawing, in as many columns as have room
  const each = Math.max(...lines.map((line) => textWidth(line, 12))) + 28, across = Math.max(1, Math.floor(width / each)), down = Math.ceil(lines.length / across);
  return drawing(Math.max(each * Math.min(across, lines.length), 1), 18 * down + 10, {},
    ...lines.map((line, i) => make("text", { x: 8 + each * Math.floor(i / down), y: 18 * ((i % down) + 1), class: "tick" }, line)));
}

function saveSvg(name, pieces) {
  const node = button("SVG", () => save(`${slug(DATA.title)}-${name}.svg`, "image/svg+xml", svgText(pieces(), node)), { class: "save", "data-save": name, title: "Save this figure" });
  return node;
}

// -- tooltip

const tip = document.getElementById("tip");
function showTip(node, x, y) {
  tip.textContent = node.getAttribute("data-tip");
  tip.hidden = false;
  const own = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - own.width - 8))}px`;
  tip.style.top = `${y + 18 + own.height > innerHeight ? Math.max(8, y - own.height - 12) : y + 18}px`;
}
document.addEventListener("mousemove", (event) => {
  const node = event.target.closest ? event.target.closest("[data-tip]") : null;
  if (node) showTip(node, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  if (!event.target.hasAttribute("data-tip")) return;
  const own = event.target.getBoundingClientRect();
  showTip(event.target, own.right, own.bottom);
});
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("scroll", () => { tip.hidden = true; }, true);
