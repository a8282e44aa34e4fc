"use strict";
// A click on a column's title sorts by it, another one turns the order round. Empty cells stay last.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const numeric = (text) => text !== "" && Number.isFinite(Number(text));
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const other = { ascending: "descending", descending: "ascending" };
      const order = other[head.getAttribute("aria-sort")] ?? head.dataset.first;
      const sign = order === "ascending" ? 1 : -1;
      heads.forEach((h) => h.setAttribute("aria-sort", h === head ? order : "none"));
      const value = (row) => row.cells[column].dataset.value ?? "";
      const compare = (a, b) =>
        numeric(a) && numeric(b) ? a - b : a.localeCompare(b, "en", { numeric: true });
      const sorted = [...rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return x === "" || y === "" ? (x === "") - (y === "") : sign * compare(x, y);
      });
      body.append(...sorted);
    });
  });
}
