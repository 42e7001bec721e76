// ---- the table of layers --------------------------------------------------------------------------------------------

function layersTable() {
  const table = $("layers-table");
  const sorting = { column: null, down: false };

  function compare(a, b) {
    const [x, y] = [a[sorting.column], b[sorting.column]];
    if (x === y) return 0;
    if (x === null) return 1; // what was not measured comes last, either way
    if (y === null) return -1;
    const order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
    return sorting.down ? -order : order;
  }

  function header({ label, numeric }, column) {
    const button = make("button", { type: "button", textContent: label });
    button.addEventListener("click", () => {
      const again = sorting.column === column;
      Object.assign(sorting, { column, down: again ? !sorting.down : numeric });
      show();
      table.querySelectorAll("th button")[column].focus();
    });
    const head = make("th", { scope: "col", className: numeric ? "number" : "text" }, button);
    if (sorting.column === column) head.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    return head;
  }

  function line(row) {
    const cells = row.slice(1).map((value, i) => {
      const { numeric } = data.layerColumns[i + 1];
      return make("td", { className: numeric ? "number" : "text", textContent: numeric ? number(value) : value });
    });
    const parts = row[0].split(".").flatMap((part, i) => (i ? [".", make("wbr"), part] : [part])); // where it may break
    return make("tr", {}, make("th", { scope: "row" }, ...parts), ...cells);
  }

  function show() {
    const { rows, quantized, left, weights } = data.layers[$("layers-method").value];
    const ordered = sorting.column === null ? rows : [...rows].sort(compare);
    table.replaceChildren(
      make("thead", {}, make("tr", {}, ...data.layerColumns.map(header))),
      make("tbody", {}, ...ordered.map(line)),
    );
    $("layers-about").textContent = `${quantized} layers quantized (${weights.toLocaleString("en")} weights), ${left} left in 16 bit`;
  }

  fill($("layers-method"), data.layers.map(({ method }, i) => [i, method]));
  $("layers-method").addEventListener("change", show);
  show();
}

if (data.layers.length) layersTable();
markSection();
performance.mark("ready");
