const MANY = 10; // columns, of which more stand closer
function parted(title, behind = /(?<=_)/) { // a name that may go on in the next line, behind each _
  return title.split(behind).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
}

// Tables that a click on a heading sorts; on a narrow screen each row is a card.
function sortable(columns, rows, start, detail, longest = 60) {
  let by = start, up = !columns[start].down;
  const open = new Set(), gone = new Set();
  const body = make("tbody"), head = make("tr");
  const heads = columns.map((c, i) => make("th", { class: `${c.text ? "text" : ""}${c.away ? " away" : ""}`, scope: "col" }, ...(c.value
    ? [make("button", { type: "button", onclick: () => { up = by === i ? !up : !c.down; by = i; draw(); } }, make("span", { class: "title" }, ...parted(c.title)), c.sub ? make("small", {}, c.sub) : null),
      make("span", { class: "paper", "aria-hidden": "true" }, c.title, c.sub ? make("small", {}, c.sub) : null)] // a head that is repeated on each page shows no button there
    : [make("span", { class: "plain" }, c.title)])));
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
    heads.forEach((h, i) => {
      h.classList.toggle("gone", gone.has(columns[i]));
      if (i === by) h.setAttribute("aria-sort", up ? "ascending" : "descending"); else h.removeAttribute("aria-sort");
    });
    body.replaceChildren(...[...rows].sort(compareRows).flatMap((row) => {
      const toggle = () => { open.has(row) ? open.delete(row) : open.add(row); draw(); };
      const cells = columns.map((c) => {
        const inside = [c.cell(row, toggle, open.has(row))].flat().filter((x) => x !== "" && x !== null && x !== undefined);
        const label = c.name || c.away ? null : [c.title, c.sub && c.sub.length < 20 ? c.sub : ""].filter(Boolean).join(" ");
        return make("td", { class: `${c.text ? "text" : "num"}${c.name ? " name" : ""}${c.away ? " away" : ""}${c.quote ? " quote" : ""}${c.long ? " long" : ""}${gone.has(c) ? " gone" : ""}${inside.length ? "" : " empty"}`, "data-label": label }, make("div", {}, ...inside));
      });
      const line = make("tr", { class: ["reference", "floor"].includes(row.role) ? "unquantized" : null, "data-name": row.name, id: row.anchor }, ...cells);
      return open.has(row) ? [line, make("tr", { class: "detail" }, make("td", { colspan: columns.length }, ...detail(row)))] : [line];
    }));
  }
  draw();
  const table = make("table", { class: columns.length > MANY ? "many" : null }, make("thead", {}, head), body);
  const frame = make("div", { class: rows.length > longest ? "wide scroll" : "wide" }, table), note = make("p", { class: "hint screen hidden-columns" });
  const givers = columns.filter((c) => c.gives).sort((a, b) => a.gives - b.gives);
  frame.fit = (whole = false) => { // columns give way in their order until the rest has room; which, is said, and a press brings them back
    gone.clear();
    draw();
    note.remove();
    frame.classList.remove("over");
    if (!givers.length || getComputedStyle(table).display !== "table") return; // cards have room for each
    const isFull = () => frame.scrollWidth > frame.clientWidth;
    if (!isFull()) return;
    for (const c of whole ? [] : givers) {
      gone.add(c);
      draw();
      if (!isFull()) break;
    }
    const said = gone.size ? `${gone.size} ${gone.size === 1 ? "column" : "columns"} hidden (${[...gone].map((c) => [c.title, c.told].filter(Boolean).join(" ")).join(", ")}): ` : "The table goes on to the right: ";
    note.replaceChildren(said, button(whole ? "hide what has no room" : "show all", () => frame.fit(!whole)));
    frame.after(note);
    frame.classList.toggle("over", isFull());
  };
  return frame;
}

const KINDS = { "inside the floor": "floor", worse: "worse", better: "better", "inside the margin": "margin", "worse by rank": "worse", "better by rank": "better" };

function pill(verdict, text) { // a text of its own names a scheme
  return verdict ? make("span", { class: `pill ${KINDS[verdict] || ""}${text && text !== verdict ? " wraps" : ""}` }, text || verdict) : "";
}

function schemeTable() {
  const metrics = [...new Set([state.metric, ...group().headline])], ids = anchors(state.group);
  const quality = (name) => ({
    title: name, sub: [unitOf(name), direction(name)].filter(Boolean).join(", "), down: DATA.metrics[name].higher_is_better,
    value: (r) => r.metrics[name]?.value, cell: (r) => {
      const m = r.metrics[name], range = m ? interval(m.ci_lo, m.ci_hi) : "";
      return m ? [measured(m), range ? make("span", { class: "interval" }, range) : ""] : "";
    },
  });
  const extra = ["weights_bytes", "bits_per_weight_model", "bits_per_weight_quantized"].includes(axis().key) ? [] : [{
    title: axis().title, sub: axisScale(group().rows).unit, down: axis().higher_is_better, value: axisOf, cell: (r) => number(axisOf(r) === undefined ? null : axisOf(r) / axisScale(group().rows).by),
  }];
  const known = (v) => (v === null || v === undefined ? "" : decimals(v, 2));
  const columns = [
    { title: "scheme", text: true, name: true, value: (r) => r.name, cell: (r) => make("span", { class: "who" }, r.role === "candidate" ? key(kindOf(r)) : null, make("span", {}, r.name), make("a", { class: "anchor", href: `#${r.anchor}`, title: "Address of this row" }, "#")) },
    { title: "bits", sub: "per weight", told: "per weight", gives: 30, value: (r) => r.bits_per_weight_model, cell: (r) => known(r.bits_per_weight_model) },
    { title: "bits", sub: "in quantized layers", told: "in quantized layers", gives: 1, value: (r) => r.bits_per_weight_quantized, cell: (r) => known(r.bits_per_weight_quantized) },
    { title: "MiB", sub: "stored", value: (r) => r.weights_bytes, cell: (r) => stored(r, mib) },
    { title: "saving", sub: "against 16 bit", down: true, gives: 29, value: (r) => r.compression, cell: (r) => (r.compression ? `${decimals(r.compression, 2)}\u00d7` : "") },
    quality(metrics[0]),
    { title: "verdict", text: true, value: (r) => verdictOf(r)?.verdict, cell: (r) => (verdictOf(r) ? [pill(verdictOf(r).verdict), verdictOf(r).p_holm === null ? "" : make("span", { class: "interval" }, `p ${probability(verdictOf(r).p_holm)}`)] : "") },
    { title: "front", text: true, down: true, value: (r) => Number(onFront(r)), cell: (r) => (onFront(r) ? make("span", { "data-tip": isSure() ? "Surely better than every smaller scheme on the front" : "No other scheme is smaller and better" }, "\u2605") : "") },
    ...extra, ...metrics.slice(1).map((name, i) => ({ ...quality(name), gives: 28 - i })), // the last of them first
    { title: "again", text: true, away: true, cell: (r, toggle, isOpen) => [
      group().recipes[r.run_id] ? button(isOpen ? "close" : "recipe", toggle, { class: "again", "aria-expanded": isOpen }) : "",
      r.link && webAddress(r.link) ? make("a", { class: "run", href: webAddress(r.link), target: "_blank", rel: "noopener noreferrer", title: "The run in MLflow" }, "run\u2009\u2197") : ""] },
  ];
  const rows = shownRows().map((r) => ({ ...r, anchor: ids[r.name] }));
  return sortable(columns, rows, 3, reproduce, 200);
}

function saveCsv() {
  const metrics = [...new Set(group().rows.flatMap((r) => Object.keys(r.metrics)))], axes = group().axes;
  const head = ["scheme", "run_id", "role", "backend", ...axes.map((a) => a.key), "compression", "coverage", "is_simulated",
    ...metrics.flatMap((m) => [m, `${m}/ci_lo`, `${m}/ci_hi`]), `verdict on ${state.metric}`, "p_holm", "on_front"];
  const lines = shownRows().map((r) => [r.name, r.run_id, r.role, r.backend, ...axes.map((a) => r.axes[a.key]), r.compression, r.coverage, r.is_simulated,
    ...metrics.flatMap((m) => [r.metrics[m]?.value, r.metrics[m]?.ci_lo, r.metrics[m]?.ci_hi]), verdictOf(r)?.verdict, verdictOf(r)?.p_holm, onFront(r)]);
  return button("CSV", () => save(`${slug(DATA.title)}.csv`, "text/csv", csv([head, ...lines])), { class: "save", "data-save": "csv", title: "Save the rows that are shown" });
}

function reproduce(row) {
  const file = `${slug(row.name)}.yaml`, text = group().recipes[row.run_id];
  const pre = make("pre", { tabindex: 0 }, text);
  const copy = button("copy recipe", () => copyText(text, pre, copy), { class: "copy" });
  return [make("div", {}, "Save as ", make("code", {}, file), " and run ", make("code", {}, `quantlab recipe=${file}`), " ", copy), pre,
    make("div", { class: "hint" }, "With the run's own weights, and each number compared: ", make("code", {}, `quantlab reproduce ${row.run_id}`))];
}

function copyText(text, pre, copy) {
  const select = () => { getSelection().selectAllChildren(pre); document.execCommand("copy"); };
  const said = () => { copy.textContent = "copied"; setTimeout(() => { copy.textContent = "copy recipe"; }, 1500); };
  if (!navigator.clipboard) { select(); said(); return; }
  navigator.clipboard.writeText(text).catch(select).finally(said);
}

function costTable(costs) {
  const cell = (v, sign = "") => (v ? [`${v.value > 0 ? sign : ""}${measured(v)}`, interval(v.ci_lo, v.ci_hi) ? make("span", { class: "interval" }, interval(v.ci_lo, v.ci_hi)) : ""] : "");
  const size = (v) => (v === null ? "" : mib(v));
  return sortable([
    { title: "component", text: true, name: true, value: (c) => c.component, cell: (c) => c.component },
    { title: "scheme", text: true, value: (c) => c.scheme, cell: (c) => c.scheme },
    { title: "MiB", sub: "stored", value: (c) => c.weights_bytes, cell: (c) => stored(c, mib) },
    { title: "saves MiB", sub: "of the reference", down: true, value: (c) => c.saved_bytes, cell: (c) => size(c.saved_bytes) },
    { title: "alone", sub: state.metric, down: true, value: (c) => c.alone.value, cell: (c) => cell(c.alone) },
    { title: "+ others", sub: state.metric, down: true, value: (c) => c.on_top?.value, cell: (c) => cell(c.on_top, "+") },
  ], costs, 4, () => [], 30);
}

function pairTable(pairs) {
  const columns = [
    { title: "scheme A", text: true, name: true, value: (v) => v.a, cell: (v) => v.a },
    { title: "scheme B", text: true, value: (v) => v.b, cell: (v) => make("div", { class: "wraps" }, v.b) },
    { title: "A \u2212 B", sub: state.metric, value: (v) => v.difference, cell: (v) => [measured({ ...v, value: v.difference }), make("span", { class: "interval" }, interval(v.ci_lo, v.ci_hi))] },
    { title: "p", sub: "Holm", down: true, value: (v) => v.p_holm, cell: (v) => [probability(v.p_holm), v.share_worse === null ? "" : make("span", { class: "interval" }, `rank ${probability(v.p_rank)}`)] },
    { title: "verdict", text: true, value: (v) => v.said, cell: (v) => pill(/^(better|worse)/.test(v.verdict) ? "better" : v.verdict, v.said) },
  ];
  return sortable(columns, pairs, 3, () => [], 12);
}
