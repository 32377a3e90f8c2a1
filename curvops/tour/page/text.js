// Names and numbers as people read them. Texts of the user's enter the page as text, never as markup.

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// For plotly, which reads some markup in texts.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// The shortest decimal number that is this one in its own precision.
function exactly(number, array) {
  if (!(array instanceof Float32Array) || number === 0) return written(number); // of −0 the loop would lose the sign
  for (let digits = 1; digits < 9; digits++) {
    const shorter = Number(number.toPrecision(digits));
    if (Math.fround(shorter) === number) return written(shorter);
  }
  return written(Number(number.toPrecision(9)));
}

const roughly = (number, digits = 3) => written(Number(number.toPrecision(digits)));

// A number that is known up to an error: no digits that the error's do not reach.
function measured(number, error, name = "±") {
  if (error === 0) return roughly(number, 6);
  if (!Number.isFinite(error)) return `${roughly(number)}, ${name === "±" ? "error" : name} unknown`;
  const magnitude = (x) => Math.floor(Math.log10(Math.abs(x)));
  const digits = number ? magnitude(number) - magnitude(error) + 3 : 1;
  const value = roughly(number, Math.min(Math.max(digits, 1), 17));
  return name === "±" ? `${value} ± ${roughly(error)}` : `${value}, ${name} ${roughly(error)}`;
}

function written(number) {
  const size = Math.abs(number);
  return Object.is(number, -0) ? "-0" : size && (size < 1e-3 || size >= 1e7) ? number.toExponential() : String(number);
}

function percent(share, error = null) {
  if (!Number.isFinite(share)) return "—";
  const said = (unit) => (error === null ? roughly(unit * share) : measured(unit * share, unit * error));
  return share < 100 ? `${said(100)} %` : `${said(1)} ×`;
}

function bytesText(count) {
  if (count === null) return "unknown";
  return count < 1e6 ? `${roughly(count / 1e3)} kB` : count < 1e9 ? `${roughly(count / 1e6)} MB` : `${roughly(count / 1e9)} GB`;
}

// The end of a long name, whole parts of it if there are any.
function shortened(name, length = 24) {
  if (name.length <= length) return name;
  const end = name.slice(1 - length);
  const dot = end.indexOf(".");
  return `…${dot < 0 || dot === end.length - 1 ? end : end.slice(dot + 1)}`;
}

// A text in lines of so many letters, as far as its words allow.
function inLines(text, letters) {
  const lines = [];
  for (const word of text.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`;
    if (lines.length && longer.length <= letters) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

// The pieces and groups of the axis with the rows at which they begin.
function withStarts(parts) {
  let start = 0;
  return parts.map((part) => {
    const placed = { ...part, start };
    start += part.rows;
    return placed;
  });
}

const partOf = (parts, row) => parts.findLast((part) => part.start <= row && part.rows > 0);

function indexIn(shape, flat) {
  const index = [];
  for (const size of [...shape].reverse()) {
    index.unshift(flat % size);
    flat = Math.floor(flat / size);
  }
  return index.length ? `[${index.join(", ")}]` : "";
}

// What a row stands for: an entry of a parameter, several neighbours, or a whole group.
function rowName(pieces, row) {
  const piece = partOf(pieces, row);
  if (!piece.shape) return `${piece.name} (${piece.size} parameters)`;
  const begin = (row - piece.start) * piece.step;
  const end = Math.min(begin + piece.step, piece.size) - 1;
  const name = piece.name + indexIn(piece.shape, piece.first + begin);
  return end > begin ? `${name} … ${indexIn(piece.shape, piece.first + end)} (${end - begin + 1} entries)` : name;
}
