// Tables sort by a button in each heading: once, the other way, and back to the order of the file.
function key(row, column, isNumber) {
  const cell = row.cells[column];
  if (!isNumber) return cell.textContent;
  return cell.dataset.v === undefined ? NaN : Number(cell.dataset.v);
}
function compare(a, b) {
  if (typeof a === "number") return a < b ? -1 : a > b ? 1 : 0;
  return a.localeCompare(b, undefined, { numeric: true });
}
function isEmpty(value) {
  return typeof value === "number" ? Number.isNaN(value) : value === "";
}
function sortable(table) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const isNumber = head.classList.contains("n");
    const turns = isNumber ? ["descending", "ascending"] : ["ascending", "descending"];
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = [...turns, "none"][turns.indexOf(head.getAttribute("aria-sort")) + 1];
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      if (next === "none") return body.append(...rows);
      const keys = new Map(rows.map((row) => [row, key(row, column, isNumber)]));
      const filled = rows.filter((row) => !isEmpty(keys.get(row)));
      const sign = next === "ascending" ? 1 : -1;
      filled.sort((a, b) => sign * compare(keys.get(a), keys.get(b)));
      body.append(...filled, ...rows.filter((row) => isEmpty(keys.get(row))));
    });
  });
}
// Which columns are shown, and a file of them.
function choosable(table) {
  const heads = [...table.tHead.rows[0].cells], rows = () => [...table.tBodies[0].rows];
  const tools = document.createElement("details"), summary = document.createElement("summary");
  const say = () => {
    const n = heads.filter((head) => !head.hidden).length;
    summary.textContent = `Columns (${n} of ${heads.length}) and files`;
  };
  tools.className = "tools";
  tools.append(summary);
  heads.forEach((head, column) => {
    const label = document.createElement("label"), box = document.createElement("input");
    Object.assign(box, {type: "checkbox", checked: !head.hidden});
    box.addEventListener("change", () => {
      for (const cell of [head, ...rows().map((row) => row.cells[column])]) cell.hidden = !box.checked;
      say();
    });
    label.append(box, head.querySelector("abbr").textContent);
    tools.append(label);
  });
  for (const [kind, written] of [["CSV", csv], ["LaTeX", latex]]) {
    const button = document.createElement("button");
    Object.assign(button, {type: "button", textContent: kind});
    button.addEventListener("click", () => {
      const shown = heads.flatMap((head, column) => head.hidden ? [] : [column]);
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([written(heads, rows(), shown)]));
      link.download = table.dataset.file + (kind === "CSV" ? ".csv" : ".tex");
      link.click();
    });
    tools.append(button);
  }
  const note = document.createElement("small");
  note.textContent = "Of the columns and rows as they are shown. The run folder has all of "
    + `${table.dataset.file}.csv; Parquet, where there is one, lies there too.`;
  tools.append(note);
  say();
  table.parentElement.before(tools);
}
function csv(heads, rows, shown) {
  const quoted = (text) => /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  // What a spreadsheet takes for a formula stands behind an apostrophe, as in the run's own files.
  const safe = (text) => quoted(/^'*[\t\r\n]*[-=+@\uff1d\uff0b\uff0d\uff20]/.test(text) ? `'${text}` : text);
  const number = (text) => text === "nan" ? "" : (text ?? "").replace("Infinity", "inf");
  const line = (row) => shown.flatMap((column) => {
    const {v, ends} = row.cells[column].dataset, isNumber = heads[column].classList.contains("n");
    const first = isNumber ? number(v) : safe(row.cells[column].textContent);
    const {length} = heads[column].dataset.names.split(" ");
    return length === 1 ? [first] : [first, ...ends.split(" ").map(number)];
  }).join(",");
  const names = shown.flatMap((column) => heads[column].dataset.names.split(" "));
  return [names.join(","), ...rows.map(line), ""].join("\n");
}
function latex(heads, rows, shown) {
  const signs = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}",
    "\u2212": "$-$", "\u221e": "$\\infty$"};
  const escaped = (text) => text.replace(/[\\~^\u2212\u221e&%$#_{}]/g, (sign) => signs[sign] ?? `\\${sign}`);
  const line = (cells) => cells.map(escaped).join(" & ") + " \\\\";
  const columns = shown.map((column) => heads[column].classList.contains("n") ? "r" : "l").join("");
  const titles = shown.map((column) => heads[column].querySelector("abbr").textContent);
  const body = rows.map((row) => line(shown.map((column) => row.cells[column].textContent)));
  return [`\\begin{tabular}{${columns}}`, "\\toprule", line(titles), "\\midrule", ...body,
    "\\bottomrule", "\\end{tabular}", ""].join("\n");
}
// A click on a row picks its layer in the figures of the run, and what is picked there shows here.
function pickable(table) {
  const run = table.closest("[data-run]"), rows = [...table.tBodies[0].rows];
  table.addEventListener("click", ({target}) => {
    const layer = target.closest("tbody tr")?.dataset.layer;
    if (layer) run.dispatchEvent(new CustomEvent("pick-layer", {detail: layer}));
  });
  run.addEventListener("pick-layer", ({detail: layer}) => {
    for (const row of rows) row.classList.toggle("picked", row.dataset.layer === layer);
  });
}
// One sample of every prompt and coefficient at a time.
function sampled(place) {
  const texts = [...place.querySelectorAll("[data-sample]")];
  const names = [...new Set(texts.map((text) => text.dataset.sample))];
  if (names.length < 2) return;
  const label = document.createElement("label"), list = document.createElement("select");
  for (const name of [...names, "all"]) list.append(new Option(name));
  const show = () => {
    for (const text of texts) text.hidden = ![text.dataset.sample, "all"].includes(list.value);
  };
  list.addEventListener("change", show);
  label.className = "sample";
  label.append(`Sample (of ${names.length}) `, list);
  place.querySelector(".note").after(label);
  show();
}
document.querySelectorAll(".samples").forEach(sampled);
for (const table of document.querySelectorAll("table.sortable")) {
  sortable(table);
  choosable(table);
  pickable(table);
}
