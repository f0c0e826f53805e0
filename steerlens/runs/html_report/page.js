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
document.querySelectorAll("table.sortable").forEach(sortable);
