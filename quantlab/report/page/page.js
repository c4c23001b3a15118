// The page: a head, the bar of choices, and what follows of them.
function lists() {
  const parts = [];
  const plain = (columns, rows) => sortable(columns, rows, 0, () => []);
  if (DATA.failed.length) {
    parts.push(section(`What failed? ${DATA.failed.length} ${DATA.failed.length === 1 ? "job" : "jobs"} without a result`, "The other rows do not depend on these. The same command again retries them.", plain([
      { title: "scheme", text: true, name: true, value: (r) => r.name, cell: (r) => r.name },
      { title: "stage", text: true, value: (r) => r.stage, cell: (r) => r.stage },
      { title: "status", text: true, value: (r) => r.status, cell: (r) => r.status.toLowerCase() },
      { title: "reason", text: true, long: true, value: (r) => r.error, cell: (r) => r.error },
    ], DATA.failed)));
  }
  if (DATA.skipped.length) {
    parts.push(section("What was not tried?", "Combinations that no backend offers.", plain([
      { title: "combination", text: true, name: true, value: (r) => r.combination, cell: (r) => r.combination },
      { title: "reason", text: true, long: true, value: (r) => r.reason, cell: (r) => r.reason },
    ], DATA.skipped)));
  }
  return parts;
}

function reading() {
  const words = Object.entries(DATA.rules).map(([k, v]) => [make("dt", {}, pill(k)), make("dd", {}, v)]).flat();
  const metrics = [...new Set([...group().headline, ...Object.keys(group().views)])].map((m) => [make("dt", {}, m), make("dd", {}, `${DATA.metrics[m].description}${direction(m) ? ` (${direction(m)})` : ""}`)]).flat();
  return make("section", {}, make("details", {}, make("summary", {}, "How to read this page"),
    make("p", { class: "hint" }, unbroken("Every number compares a scheme with the unquantized reference on the same inputs. Intervals are of 95 %, over independent samples; p-values are paired and Holm-adjusted over all comparisons of these runs under one metric. A size with ~ is of a simulated format, stored wider than its name says.")),
    make("dl", {}, ...words), make("dl", {}, ...metrics)));
}

function themeButton() {
  const root = document.documentElement, order = ["", "light", "dark"], said = { "": "auto", light: "light", dark: "dark" };
  const node = button("", () => {
    const next = order[(order.indexOf(root.dataset.theme || "") + 1) % 3];
    if (next) root.dataset.theme = next; else delete root.dataset.theme;
    tell();
  }, { id: "theme", title: "Light, dark, or as the system has it" });
  const tell = () => { node.textContent = `colours: ${said[root.dataset.theme || ""]}`; };
  tell();
  return node;
}

function draw(chosen) {
  chooseGroup(chosen);
  redraw();
}

function redraw() {
  const page = document.getElementById("page"), body = make("div", { id: "body" });
  const facts = Object.entries(group().facts).map(([k, v]) => `${k} ${v}`).join(" \u00b7 ");
  const head = [make("div", { class: "head" }, make("h1", {}, "Which scheme for my model?"), themeButton()), make("p", { class: "lead" }, `${DATA.title} \u00b7 ${facts}`)];
  if (DATA.groups.length > 1) {
    head.push(make("div", { class: "groups" }, make("label", {}, "These runs are not all comparable; shown are those with ",
      chooser("group", DATA.groups.map((g, i) => [String(i), g.label]), String(state.group), (i) => draw(Number(i))))));
  }
  head.push(...group().unquantized.map((line) => make("p", { class: "warning" }, ...parted(unbroken(line), /(?<=[\w\]][_.=](?=[\w[]))/))));
  page.replaceChildren(...head, toolbar(update), body);
  update();
}

function update() {
  document.getElementById("body").replaceChildren(...parts());
  document.querySelectorAll(".wide").forEach((frame) => frame.fit());
}

function parts() {
  const page = document.getElementById("page"), v = view(), all = [answers()];
  const room = page.clientWidth - (innerWidth <= 860 ? 62 : 98);
  const add = (title, hint, content, ...tools) => { if (content) all.push(section(title, hint, ...tools, ...[content].flat())); };
  all.push(plotSection(room));
  const meaning = v.is_tested ? `Verdicts compare ${v.metric} with the reference (p: Holm-adjusted); \u2605 is the Pareto front.` : `${v.metric} is not a mean over samples, so that differences in it are not tested; \u2605: no other scheme is smaller and better.`;
  all.push(section("All schemes", make("span", {}, meaning, make("span", { class: "screen" }, " Click a heading to sort; \u201crecipe\u201d shows how to run that row again.")), saveCsv(), schemeTable(), ...v.notes.map((n) => make("p", { class: "hint" }, n))));
  const among = (pairs) => pairs.filter((p) => isNamed(p.a) && isNamed(p.b));
  if (among(v.pairs).length) add("Are the differences between the candidates real?", `Paired differences of ${v.metric} on the same samples, with 95 % intervals, largest p first.`, pairTable(among(v.pairs)));
  if (among(v.twins).length) add("What does calibration buy?", `A: the algorithm; B: the plain one on the same bits. Paired differences of ${v.metric} with 95 % intervals.`, pairTable(among(v.twins)));
  const costs = v.costs.filter((c) => isNamed(c.scheme));
  if (costs.length) add("Which component costs what?", `${v.metric} with that component quantized alone, and what all the others add to it, paired by sample, with 95 % intervals.`, costTable(costs));
  const hasSteps = group().calibrated.some((m) => m.columns.length > 1); // a language model has none
  add(`Which layer hurts${hasSteps ? ", and when" : ""}?`, `Each layer\u2019s own error on calibration data, given the reference\u2019s inputs: output signal over error in dB${hasSteps ? ", layer by denoising step" : ""}. Dark is worse.`, calibrationMaps(room));
  if (group().images) add("What does it look like?", "The same noise and the same request through every scheme.", imagePanel());
  if (group().texts) all.push(...textSections());
  const layers = group().layers && chosenColumns(group().layers);
  if (layers && layers.columns.length) {
    add("Where in the model does the error arise?", "Relative error of each layer's weights, \u2016W \u2212 Q(W)\u2016 / \u2016W\u2016. Layers that a scheme leaves alone are grey.",
      heatMap({ ...layers, percent: true, log: true, unit: "", tip: (layer, scheme) => `${scheme}\n${layer}` }, room, "layers"));
  }
  const steps = group().steps.map(chosenRows).filter((m) => m.rows.length);
  if (steps.length) {
    const together = room > 900 && steps.length > 1 && steps[0].columns.length <= 16, each = together ? (room - 32) / 2 : room;
    add("At which step does it go wrong?", "Step 0 starts from pure noise.", make("div", { class: together ? "beside" : "" },
      ...steps.map((map) => make("div", { class: "map" }, make("p", { class: "hint" }, map.description), ...heatMap({ ...map, tip: (scheme, step) => `${scheme}, step ${step}` }, each, map.metric)))));
  }
  return [...all, ...lists(), reading(), make("footer", {}, `Written by quantlab on ${DATA.created} from ${DATA.store}${DATA.commits.length ? `; runs made at commit ${DATA.commits.join(", ")}` : ""}`)];
}

function goTo(id) { // the row that the address ends in, also of another group, or one that is hidden
  const i = DATA.groups.findIndex((_, k) => Object.values(anchors(k)).includes(id));
  if (i < 0) return;
  if (i !== state.group) draw(i);
  if (!document.getElementById(id)) { Object.assign(state, { words: "", hidden: new Set() }); redraw(); }
  document.querySelectorAll("tr.target").forEach((row) => row.classList.remove("target"));
  const row = document.getElementById(id);
  row.classList.add("target");
  row.scrollIntoView({ block: "center" });
}

let drawnWidth = innerWidth;
draw(0);
const chosenRow = () => goTo(decodeURIComponent(location.hash.slice(1)));
addEventListener("hashchange", chosenRow);
document.addEventListener("click", (event) => { // the same address again changes nothing, and is to lead there too
  const link = event.target.closest ? event.target.closest("a[href^='#']") : null;
  if (link && link.getAttribute("href") === location.hash) chosenRow();
});
chosenRow();
addEventListener("resize", () => { if (innerWidth !== drawnWidth) { drawnWidth = innerWidth; update(); } });
function toPaper() {
  document.querySelectorAll("details:not([open])").forEach((d) => { d.open = true; d.closesAgain = true; });
  document.querySelectorAll(".for-paper").forEach((place) => place.draw());
}
function fromPaper() {
  document.querySelectorAll("details").forEach((d) => { if (d.closesAgain) d.open = d.closesAgain = false; });
  document.querySelectorAll(".on-paper").forEach((place) => place.replaceChildren());
}
addEventListener("beforeprint", toPaper);
addEventListener("afterprint", fromPaper);
if (matchMedia("print").matches) toPaper();
