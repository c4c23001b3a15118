// Images and videos: the reference's, a scheme's, and what differs.
function imagePanel() {
  const { reference, samples, pixels, difference_gain: stored, moving } = group().images;
  const schemes = group().images.schemes.filter((s) => isNamed(s.name));
  if (!schemes.length) return null;
  const smooth = pixels > 128 ? "smooth" : null;
  const first = Math.max(0, schemes.findIndex((s) => view().front.includes(s.name)));
  const still = make("img", { alt: `images of the reference: ${samples.join(", ")}`, title: samples.join(", "), class: smooth });
  const candidate = make("img", { class: `${smooth || ""} swap`, id: "candidate-image" }), difference = make("img", { class: smooth, id: "difference-image" });
  const label = make("span", {}), gainText = make("small", {});
  const choose = chooser("scheme", schemes.map((s, i) => [String(i), s.name]), "0", (i) => show(Number(i)));
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
    make("div", { class: "controls" }, make("label", {}, "scheme ", choose), schemes.length > 1 ? make("label", { class: "screen" }, "smallest ", slider, " largest") : null, make("label", { class: "screen" }, "difference dark ", gain, " bright")),
    make("div", { class: "strips", style: `max-width:${Math.max(380, group().images.tiles * 124 + 144)}px` }, name("reference"), still, name(label, make("small", { class: "screen" }, "hold to see the reference")),
      candidate, name("difference", gainText), difference)];
}
