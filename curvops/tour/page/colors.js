// From numbers to colours: three scales, which the axes of the curves share.

const DECADES = 6; // below the largest magnitude, that colours tell apart

// The least, the most and the usual magnitude of some titles at all stops, so that stops can be compared.
function magnitudes(stops, titles) {
  const scales = stops.flatMap((stop) => titles.map((title) => stop.sheets[title].scale)).filter((s) => s.most > 0);
  if (!scales.length) return { least: 0.1, most: 1, usual: 1 };
  return {
    least: Math.min(...scales.map((s) => s.least)),
    most: Math.max(...scales.map((s) => s.most)),
    usual: Math.max(...scales.map((s) => s.usual)),
  };
}

// How a scale draws numbers: `of` a number is its place between `low` and `high`, NaN for an exact zero of the logarithm.
function scaleOf(kind, { least, most, usual }, decades = DECADES, positive = false) {
  const floor = Math.max(least, most * 10 ** -decades);
  if (kind === "log") {
    const high = Math.log10(most);
    const low = Math.min(Math.log10(floor), high - 1e-3);
    const of = (x) => (x === 0 ? NaN : Math.max(low, Math.log10(Math.abs(x))));
    return { kind, low, high, of, ticks: powers(low, high).map((k) => ({ at: k, text: power(k) })), cut: floor > least };
  }
  if (kind === "signed") {
    const of = (x) => Math.sign(x) * Math.log10(1 + Math.abs(x) / floor);
    const exponents = powers(Math.log10(floor) + 1.2, Math.log10(most), 4);
    const upper = exponents.map((k) => ({ at: of(10 ** k), text: power(k) }));
    const lower = upper.map(({ at, text }) => ({ at: -at, text: `−${text}` })).reverse();
    return { kind, low: -of(most), high: of(most), of, ticks: [...lower, { at: 0, text: "0" }, ...upper] };
  }
  const high = positive ? most : usual;
  const low = positive ? 0 : -high;
  const ticks = [low, (low + high) / 2, high].map((at) => ({ at, text: roughly(at, 2) }));
  return { kind, low, high, of: (x) => x, ticks, cut: !positive && usual < most };
}

function powers(low, high, most = 8) {
  const step = Math.max(1, Math.ceil((high - low) / most));
  const found = [];
  for (let k = Math.ceil(low - 1e-9); k <= high + 1e-9; k++) if (k % step === 0) found.push(k);
  return found.length ? found : [Math.round(high)];
}

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const power = (k) => `10${k < 0 ? "⁻" : ""}${[...String(Math.abs(k))].map((d) => SUPERSCRIPTS[d]).join("")}`;

// `colors` evenly spaced, as plotly takes them.
const colorscale = (colors) => colors.map((color, k) => [k / (colors.length - 1), color]);

function showLegend(place, scale, colors, texts) {
  const bar = element("div", { class: "bar" });
  const strip = element("div", { class: "strip", role: "img", "aria-label": texts.title });
  strip.style.background = `linear-gradient(to right, ${colors.join(", ")})`;
  const ticks = element("div", { class: "ticks" });
  for (const { at, text } of texts.own ? [] : scale.ticks) {
    const tick = element("span", {}, text);
    const share = (100 * (at - scale.low)) / (scale.high - scale.low);
    tick.style.left = `clamp(1em, ${share}%, 100% - 1em)`; // the first and the last are no wider than the bar
    ticks.append(tick);
  }
  if (texts.own) ticks.append(texts.own);
  bar.append(element("div", {}, texts.title), strip, ticks);
  place.replaceChildren(bar);
  if (scale.kind === "log") place.append(element("div", {}, element("span", { class: "swatch" }), texts.zero ?? "exactly zero"));
}
