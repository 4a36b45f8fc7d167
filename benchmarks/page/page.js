// Sorting by the buttons in table heads, choosing a budget, and printing with everything unfolded.
"use strict";
const worth = (cell) => (cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value);

function compare(a, b) {
  // What is missing comes last whichever way one sorts, so it is told apart here and not by its value.
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
}

for (const button of document.querySelectorAll("th > button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const row = head.parentElement;
    const column = [...row.children].indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of row.children) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = row.closest("table").tBodies[0];
    const rows = [...body.rows];
    const missing = (r) => worth(r.cells[column]) === "";
    rows.sort((r, s) => {
      if (missing(r) || missing(s)) return missing(r) - missing(s);
      return (down ? -1 : 1) * compare(worth(r.cells[column]), worth(s.cells[column]));
    });
    body.append(...rows);
  });
}

for (const select of document.querySelectorAll("select[data-filters]")) {
  select.closest(".filter").hidden = false;
  const apply = () => {
    for (const row of document.getElementById(select.dataset.filters).tBodies[0].rows)
      row.hidden = select.value !== "" && row.dataset.budget !== select.value;
  };
  select.addEventListener("change", apply);
  apply();
}

window.addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
});
