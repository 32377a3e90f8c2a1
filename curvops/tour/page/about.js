// Tables of what was computed, how, and with what.

const SETTINGS = {
  setup: "Problem", loss: "Loss", reduction: "Reduction", c: "Constant c", num_data: "Data", seed: "Seed", device: "Device",
  dtype: "Precision", loss_terms: "Loss terms", width: "Outputs of a loss term", risk: "Risk", gradient_norm: "Norm of its gradient",
  mc_samples: "Monte-Carlo samples", effort: "Effort", layers: "Parameters by layer", conventions: "Conventions",
};

// Numbers and digests that tell one problem from another, and nothing to a reader.
const FINGERPRINT = /^(content|gradient_probe|(hessian|ggn|ef)_(norm|probe))$/;

function factTable(caption, facts) {
  const rows = Object.entries(facts).map(([name, text]) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, String(text))),
  );
  return element("table", { class: "facts" }, element("caption", {}, caption), element("tbody", {}, ...rows));
}

function costTable(titles, { costs, products }) {
  const counted = Object.keys(products).length > 0;
  const names = ["Matrix", "Seconds", "Peak memory", ...(counted ? ["Products"] : [])];
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  const rows = titles.filter((title) => costs[title] || products[title]).map((title) => {
    const { seconds = null, peak_bytes: peak = null } = costs[title] ?? {};
    const cells = [seconds === null ? "unknown" : roughly(seconds), bytesText(peak), ...(counted ? [products[title] ?? "unknown"] : [])];
    return element("tr", {}, element("th", { scope: "row" }, title), ...cells.map((c) => element("td", { class: "number" }, String(c))));
  });
  return element("table", { class: "facts" }, element("caption", {}, "Costs"), element("thead", {}, head), element("tbody", {}, ...rows));
}

function showAbout(facts, explanations, page, stop) {
  const { about } = stop;
  const settings = { Parameters: page.axis.side, Matrices: page.titles.length };
  for (const [key, name] of Object.entries(SETTINGS)) if (key in about.settings) settings[name] = about.settings[key];
  const others = Object.entries(about.settings).filter(([key]) => !(key in SETTINGS));
  for (const [key, text] of others) if (!FINGERPRINT.test(key)) settings[key] = text;
  const marks = others.filter(([key]) => FINGERPRINT.test(key));
  if (marks.length) settings.Fingerprint = marks.map(([key, text]) => `${key} ${text}`).join("; ");
  const tables = [factTable("Problem", settings)];
  if (Object.keys(about.costs).length || Object.keys(about.products).length) tables.push(costTable(page.titles, about));
  if (Object.keys(about.versions).length) tables.push(factTable("Versions", about.versions));
  facts.replaceChildren(...tables.map((table) => element("div", {}, table)));
  const told = page.titles.filter((title) => about.explanations[title]);
  const parts = told.map((title) => element("details", {}, element("summary", {}, title), element("pre", {}, about.explanations[title])));
  explanations.replaceChildren(...(parts.length ? parts : [element("p", {}, "The file does not say.")]));
}
