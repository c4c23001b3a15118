// Language models: what reference and scheme say, side by side, and the tokens that changed most.
function tokensOf(own, other) { // tokens that differ at their place are marked, the first of them most
  let seen = false;
  return own.map((token, i) => {
    if (token === other[i]) return token;
    const mark = make("mark", { class: seen ? null : "first" }, token);
    seen = true;
    return mark;
  });
}

function textSections() {
  const schemes = group().texts.schemes.filter((s) => isNamed(s.name));
  if (!schemes.length) return [];
  const first = Math.max(0, schemes.findIndex((s) => onFront({ name: s.name }))), said = make("div", { class: "texts" }), worst = make("div", {});
  const show = (i) => {
    const scheme = schemes[i];
    said.replaceChildren(...scheme.continuations.flatMap((c) => [make("div", { class: "prompt" }, c.prompt),
      make("div", { class: "side" }, make("small", {}, "reference"), ...tokensOf(c.reference, c.candidate)),
      make("div", { class: "side", "data-scheme": scheme.name }, make("small", {}, scheme.name), ...tokensOf(c.candidate, c.reference))]));
    worst.replaceChildren(sortable([
      { title: "divergence", sub: "nats", down: true, value: (t) => t.kld_nats, cell: (t) => number(t.kld_nats) },
      { title: "reference expects", text: true, value: (t) => t.reference, cell: (t) => make("code", {}, JSON.stringify(t.reference)) },
      { title: "scheme expects", text: true, value: (t) => t.candidate, cell: (t) => make("code", {}, JSON.stringify(t.candidate)) },
      { title: "in the text", text: true, quote: true, cell: (t) => [t.before, make("b", {}, t.token)] },
    ], scheme.worst, 0, () => []));
  };
  const choose = chooser("texts", schemes.map((s, i) => [String(i), s.name]), String(first), (i) => show(Number(i)));
  show(first);
  const parts = [section("What does it say?", "Prompts, and how the reference and the scheme go on by themselves (greedily). Tokens that differ are marked; behind the first of them the texts have gone different ways.",
    make("div", { class: "controls" }, make("label", {}, "scheme ", choose)), schemes.some((s) => s.continuations.length) ? said : null)];
  if (schemes.some((s) => s.worst.length)) parts.push(section("Which tokens changed most?", "The scored tokens at which the scheme's distribution is furthest from the reference's, for the scheme chosen above.", worst));
  return parts;
}
