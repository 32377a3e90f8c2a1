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
  if (!(array instanceof Float32Array)) return String(number);
  for (let digits = 1; digits < 9; digits++) {
    const text = Number(number.toPrecision(digits));
    if (Math.fround(text) === number) return String(text);
  }
  return String(Number(number.toPrecision(9)));
}

const roughly = (number, digits = 3) => (number === 0 ? "0" : String(Number(number.toPrecision(digits))));

function percent(share) {
  if (!Number.isFinite(share)) return "—";
  return share === 0 ? "0 %" : share < 1e-4 ? `${(100 * share).toExponential(1)} %` : `${roughly(100 * share)} %`;
}

function bytesText(count) {
  if (count === null) return "unknown";
  return count < 1e6 ? `${roughly(count / 1e3)} kB` : count < 1e9 ? `${roughly(count / 1e6)} MB` : `${roughly(count / 1e9)} GB`;
}

const shortened = (text, length = 22) => (text.length > length ? `…${text.slice(1 - length)}` : text);

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
