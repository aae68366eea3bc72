const data = JSON.parse(document.getElementById("data").textContent);
const details = document.getElementById("details");
const pair = { a: null, b: null };

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// Sorting: numbers before texts, what is empty last, rows that compare equal stay in their order.
function key(row, index) {
  const text = row.cells[index]?.dataset.sort ?? "";
  const number = text === "" ? NaN : Number(text);
  return Number.isNaN(number) ? (text === "" ? [2, ""] : [1, text]) : [0, number];
}
function sort(header) {
  const table = header.closest("table");
  const index = [...header.parentNode.children].indexOf(header);
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("thead th")) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [key(row, index), row]);
  rows.sort(([one], [two]) => {
    if (one[0] !== two[0]) return one[0] - two[0];
    const order = one[1] < two[1] ? -1 : one[1] > two[1] ? 1 : 0;
    return descending ? -order : order;
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

// Filtering: cells by their coordinates and verdict (an axis that a cell lacks lets it pass); then rows, columns,
// sections and contents of which no cell is left. The contents count what is left.
const filters = [...document.querySelectorAll("nav select")];
function filter() {
  const chosen = filters.filter((select) => select.value);
  const passes = (index) => chosen.every(({ id, value }) => [value, "", undefined].includes(data.cells[index][id]));
  const empty = (cells) => cells.length > 0 && cells.every((cell) => cell.classList.contains("off"));
  const inside = (part) => [...part.querySelectorAll("[data-cell]")];
  for (const section of document.querySelectorAll("main section")) {
    const cells = inside(section);
    for (const cell of cells) cell.classList.toggle("off", !passes(cell.dataset.cell));
    for (const row of section.querySelectorAll("tbody tr")) row.hidden = row.matches(".quoted") ? chosen.length > 0 : empty(inside(row));
    const rows = [...section.querySelectorAll("tr")];
    [...(rows[0]?.cells ?? [])].forEach((_, column) => {
      const stack = rows.map((row) => row.cells[column]);
      const off = empty(stack.flatMap(inside));
      for (const each of stack) each.hidden = off;
    });
    section.hidden = empty(cells);
    const entry = document.querySelector(`nav a[href="#${section.id}"]`);
    if (!entry) continue;
    entry.parentNode.hidden = section.hidden;
    for (const count of entry.parentNode.querySelectorAll(".counts span")) {
      const left = cells.filter((cell) => !cell.matches(".off") && data.cells[cell.dataset.cell].verdict === count.title);
      count.hidden = left.length === 0;
      count.textContent = count.textContent.replace(/\d+$/, left.length);
    }
  }
  const groups = [...document.querySelectorAll(".forest .group")];
  for (const group of groups) {
    for (const row of group.querySelectorAll("a")) row.hidden = !passes(row.dataset.row);
    group.hidden = group.querySelectorAll("a:not([hidden])").length === 0;
  }
  if (groups.length) document.getElementById("differences").hidden = groups.every((group) => group.hidden);
}

function listing(title, rows) {
  const table = element("table", {}, element("caption", {}, title));
  for (const row of rows) table.append(element("tr", {}, ...row.map((text) => element("td", {}, String(text)))));
  return table;
}

function drawing(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function plot(label, caption, attributes, ...children) {
  const svg = drawing("svg", { role: "img", "aria-label": label, ...attributes }, ...children);
  return element("div", {}, svg, element("p", {}, element("small", {}, caption)));
}

function curve(loss) {
  const low = Math.min(...loss);
  const high = Math.max(...loss);
  const points = loss.map((value, i) =>
    `${(1000 * i) / Math.max(loss.length - 1, 1)},${95 - (90 * (value - low)) / (high - low || 1)}`);
  const caption = `Training loss over ${loss.length} steps: first ${loss[0].toFixed(3)}, last ${loss.at(-1).toFixed(3)}, `
    + `lowest ${low.toFixed(3)}, highest ${high.toFixed(3)}`;
  const label = `training loss from ${loss[0].toFixed(3)} to ${loss.at(-1).toFixed(3)}`;
  const attributes = { class: "loss", viewBox: "0 0 1000 100", preserveAspectRatio: "none" };
  return plot(label, caption, attributes, drawing("polyline", { points: points.join(" ") }));
}

const signed = (value, digits = 1) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
const small = (p) => (p >= 0.001 ? p.toFixed(3) : p.toExponential(1));

// One point per window of a perplexity: its difference of log losses, the zero line, the mean and its interval.
function strip(found, label) {
  const [part] = found.parts;
  const values = part[0].map((_, i) => mean(part.map((seed) => seed[i])));
  const middle = pairedDifference(found.parts);
  const low = Math.min(0, middle.low, ...values);
  const high = Math.max(0, middle.high, ...values);
  const width = innerWidth < 640 ? 320 : 600;
  const x = (value) => 20 + ((width - 40) * (value - low)) / (high - low || 1);
  const dots = values.map((value, i) => drawing("circle", { cx: x(value), cy: 22 + ((i * 7) % 11) * 2.6, r: 3 },
    drawing("title", {}, `window ${i + 1}: ${signed(value, 4)}`)));
  const bar = [drawing("line", { class: "interval", x1: x(middle.low), x2: x(middle.high), y1: 64, y2: 64 }),
    drawing("circle", { class: "interval", cx: x(middle.mean), cy: 64, r: 4 })];
  const zero = drawing("line", { class: "axis", x1: x(0), x2: x(0), y1: 8, y2: 72 });
  const ends = [[20, low, "start"], [width - 20, high, "end"]].map(([at, value, anchor]) =>
    drawing("text", { x: at, y: 90, "text-anchor": anchor }, value === 0 ? "0" : signed(value, 3)));
  const lower = values.filter((value) => value < 0).length;
  const caption = `${label}: log-loss difference of each of ${values.length} windows, ${lower} of them below 0; `
    + `mean ${signed(middle.mean, 4)} with its 95 % interval below`;
  return plot(caption, caption, { class: "strip", viewBox: `0 0 ${width} 96` }, zero, ...dots, ...bar, ...ends);
}

// The documents that only one of two records had right, folded.
function flips(found, cell, one, label) {
  return cell.metrics.flatMap((metric, i) => {
    const [values] = found.parts[i];
    const ids = data.documents[data.records[one].arrays[metric].on];
    if (!ids || values.length !== ids.length || !values.every((value) => [-1, 0, 1].includes(value))) return [];
    const of = (sign) => ids.filter((_, j) => values[j] === sign);
    const rows = [[`right only in ${label[0]}`, of(1)], [`right only in ${label[1]}`, of(-1)]];
    const title = `${metric}: documents that flipped, ${rows.map(([, those]) => those.length).join(" and ")} of ${ids.length}`;
    const body = listing("", rows.map(([text, those]) => [text, those.join(", ") || "none"]));
    return [element("details", {}, element("summary", {}, title), body)];
  });
}

function pictures(found, cell, one, label) {
  if (found === null) return [];
  const perWindow = found.parts.length === 1 && found.unit !== "points";
  const seeds = found.parts[0].length > 1;
  return [...(perWindow ? [strip(found, label.join(" minus "))] : []), ...(seeds ? [] : flips(found, cell, one, label))];
}

function folded(title, rows, isOpen = false) {
  const block = element("details", {}, element("summary", {}, title), listing("", rows));
  block.open = isOpen;
  return block;
}

// Whether a fact of a record has to do with what a cell reads.
function matters(cell, title, name) {
  const evaluations = cell.metrics.map((metric) => metric.slice(0, metric.lastIndexOf(".")));
  const parts = name.split(".");
  switch (title) {
    case "results": return cell.metrics.some((metric) => [metric, `${metric}_stderr`].includes(name));
    case "text and tokens": return parts[0] === "calibration" || evaluations.includes(parts[0]);
    case "configuration":
      if (parts[0] !== "evals") return parts.at(-1) !== "version";
      return evaluations.some((evaluation) => evaluation === parts[1] || evaluation.endsWith(`-${parts[1]}`));
    case "cost": return ["scales", "weights", "tuned", ...evaluations].includes(name.split(" ")[0]);
    default: return title === "weights";
  }
}

// The command of a cell and a button that copies it; where a page may not write the clipboard, it is selected.
function command(text) {
  const code = element("code", {}, text);
  const button = element("button", { type: "button", class: "pick copy" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
  });
  return element("p", {}, "Run it: ", code, " ", button);
}

function open(title, ...children) {
  document.getElementById("details-title").textContent = title;
  document.getElementById("details-body").replaceChildren(...children);
  if (!details.open) details.showModal();
  details.scrollTop = 0;
}

function showCell(index) {
  const cell = data.cells[index];
  const parts = [listing(`Verdict: ${cell.verdict}`, cell.numbers)];
  if (cell.versus) {
    const found = compareCells(data.records, cell.records, cell.against, cell);
    parts.push(...pictures(found, cell, cell.records[0], ["this cell", cell.versus]));
  }
  if (cell.differences) parts.push(element("p", {}, element("b", {}, "Partial: "), cell.differences));
  parts.push(command(cell.command));
  if (cell.records.length) {
    const picks = element("div", { class: "picks" });
    for (const side of ["a", "b"]) {
      const pick = element("button", { type: "button", class: "pick", "data-pick": side }, `Compare as ${side.toUpperCase()}`);
      pick.addEventListener("click", () => choose(side, index));
      picks.append(pick);
    }
    parts.push(picks);
  }
  for (const name of cell.records) {
    const record = data.records[name];
    parts.push(element("p", {}, `Record ${name}, ${record.created}`));
    if (record.loss.length) parts.push(curve(record.loss));
    if (record.errors) parts.push(listing(record.errors.title, record.errors.rows));
    for (const [title, facts] of Object.entries(record.facts)) {
      const rows = Object.entries(facts).filter(([key]) => !["results", "cost"].includes(title) || matters(cell, title, key));
      if (rows.length) parts.push(folded(title, rows, title === "results" || title === "cost"));
    }
  }
  open(cell.title, ...parts);
  history.replaceState(null, "", `#${cell.link}`);  // a permalink, as long as the cell is open
}

function openLinked() {
  const index = data.cells.findIndex((cell) => cell.link === decodeURIComponent(location.hash.slice(1)));
  if (index >= 0) showCell(index);
}

function choose(side, index) {
  pair[side] = index;
  showPair();
  details.close();
}

function showPair() {
  for (const side of ["a", "b"]) {
    document.getElementById(`pair-${side}`).textContent = pair[side] === null ? "–" : data.cells[pair[side]].title;
  }
  document.getElementById("pair").hidden = pair.a === null && pair.b === null;
  document.getElementById("pair-show").disabled = pair.a === null || pair.b === null;
}

// The numbers of two cells and their paired difference.
function contrast(one, two) {
  const ours = (cell) => Object.fromEntries(cell.numbers).ours ?? cell.numbers[0][1];
  const rows = [["A", `${one.title}: ${ours(one)}`], ["B", `${two.title}: ${ours(two)}`]];
  if (one.metrics.join() !== two.metrics.join() || one.factor !== two.factor) {
    return [listing("", [...rows, ["A minus B", "not paired: they read different numbers"]])];
  }
  const found = compareCells(data.records, one.records, two.records, one);
  if (found === null) return [listing("", [...rows, ["A minus B", "not paired: they did not measure the same texts"]])];
  const digits = { "%": 1, nats: 4, points: 2 }[found.unit];
  const [middle, low, high] = ["mean", "low", "high"].map((name) => signed(found[name], digits));
  const inputs = found.unit === "points" ? "values" : "windows";
  const test = found.gained === undefined ? `paired t interval, n = ${found.n} ${inputs}`
    : `exact McNemar, n = ${found.n}, only A right ${found.gained}, only B right ${found.lost}`;
  rows.push(["A minus B, paired [95 %]", `${middle}${found.unit === "%" ? " %" : ""} [${low}, ${high}]`]);
  rows.push(["test", test], ["p value, of this comparison alone", small(found.p)]);
  return [listing("", rows), ...pictures(found, one, one.records[0], ["A", "B"])];
}

function showDifference() {
  const cells = [pair.a, pair.b].map((index) => data.cells[index]);
  const facts = cells.map((cell) => data.records[cell.records[0]].facts);
  const parts = contrast(...cells);
  const others = [];
  const same = [];
  for (const title of Object.keys(facts[0])) {
    const keys = new Set(facts.flatMap((each) => Object.keys(each[title])));
    const rows = [...keys]
      .map((name) => [name, ...facts.map((each) => each[title][name] ?? "–")])
      .filter(([, a, b]) => a !== b);
    const shown = rows.filter(([name]) => cells.some((cell) => matters(cell, title, name)));
    const rest = rows.filter((row) => !shown.includes(row));
    if (shown.length) parts.push(listing(title, [["", "A", "B"], ...shown]));
    if (rest.length) others.push(folded(`${shown.length ? "more " : ""}${title}: ${rest.length} differ`, [["", "A", "B"], ...rest]));
    if (!rows.length) same.push(title);
  }
  if (same.length) others.push(element("p", {}, `The same: ${same.join(", ")}`));
  open("What differs between these two cells", ...parts, ...others);
}

document.addEventListener("click", (event) => {
  const cell = event.target.closest("[data-cell]");
  const header = event.target.closest("thead th");
  if (cell) showCell(Number(cell.dataset.cell));
  else if (header && !details.contains(header)) sort(header);
});
for (const select of filters) select.addEventListener("change", filter);
document.getElementById("pair-show").addEventListener("click", showDifference);
document.getElementById("pair-clear").addEventListener("click", () => {
  pair.a = pair.b = null;
  showPair();
});
details.addEventListener("close", () => {
  if (!details.open && location.hash.includes("/")) history.replaceState(null, "", location.pathname + location.search);
});
window.addEventListener("hashchange", openLinked);
openLinked();
