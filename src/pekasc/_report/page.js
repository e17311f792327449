"use strict";
// The table of genes: search, filter, sort. Names come from the data, so they are only ever set as text.
(function () {
  var source = document.getElementById("genes-data");
  if (!source) { return; }
  var data = JSON.parse(source.textContent);
  var columns = data.columns, rows = data.rows, PAGE = 50;
  var search = document.getElementById("genes-search"), level = document.getElementById("genes-level");
  var status = document.getElementById("genes-status"), more = document.getElementById("genes-more");
  var head = document.getElementById("genes-head"), body = document.getElementById("genes-body");
  var sorted = { column: data.sort, down: true }, shown = PAGE;

  function make(name, text, attributes) {
    var node = document.createElement(name);
    if (text !== null) { node.textContent = text; }
    Object.keys(attributes || {}).forEach(function (key) { node.setAttribute(key, attributes[key]); });
    return node;
  }
  function drawn(name, attributes) {
    var node = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.keys(attributes).forEach(function (key) { node.setAttribute(key, attributes[key]); });
    return node;
  }
  function place(value) { return 5 + 120 * (Math.max(-0.5, Math.min(1, value)) + 0.5) / 1.5; }
  function range(value) {
    // decoration: the numbers stand beside it
    var svg = drawn("svg", { "class": "range", viewBox: "0 0 130 16", "aria-hidden": "true" });
    svg.appendChild(drawn("line", { "class": "zero", x1: place(0), x2: place(0), y1: 0, y2: 16 }));
    if (value[0] === null) { return svg; }
    if (value[1] !== null) {
      svg.appendChild(drawn("line", { x1: place(value[1]), x2: place(value[2]), y1: 8, y2: 8, "stroke-width": 2 }));
    }
    svg.appendChild(drawn("circle", { cx: place(value[0]), cy: 8, r: 4 }));
    return svg;
  }
  function cell(column, value) {
    if (column.kind === "name") { return make("th", value, { scope: "row" }); }
    if (column.kind === "level") { return make("td", value, { "class": "text " + value }); }
    if (column.kind === "range") { var td = make("td", null); td.appendChild(range(value)); return td; }
    if (value === null) { return make("td", "–"); }
    if (column.kind === "share") { return make("td", (100 * value).toFixed(0) + "%"); }
    return make("td", column.kind === "whole" ? String(value) : value.toFixed(2).replace("-", "−"));
  }
  function order(a, b) {
    var i = sorted.column, kind = columns[i].kind, x = a[i], y = b[i];
    if (kind === "range") { x = x[0]; y = y[0]; }
    if (x === null || y === null) { return (x === null) - (y === null); }
    var by = kind === "name" ? String(x).localeCompare(String(y), "en", { numeric: true })
      : kind === "level" ? data.levels.indexOf(x) - data.levels.indexOf(y) : x - y;
    return sorted.down ? -by : by;
  }
  function update() {
    var words = search.value.toLowerCase().split(/[\s,;]+/).filter(Boolean), wanted = level.value;
    var found = rows.filter(function (row) {
      var name = row[0].toLowerCase();
      return (!wanted || row[1] === wanted) && (!words.length || words.some(function (w) { return name.indexOf(w) >= 0; }));
    }).sort(order);
    body.replaceChildren.apply(body, found.slice(0, shown).map(function (row) {
      var line = document.createElement("tr");
      columns.forEach(function (column, i) { line.appendChild(cell(column, row[i])); });
      return line;
    }));
    Array.prototype.forEach.call(head.children, function (th, i) {
      var own = i === sorted.column;
      if (own) { th.setAttribute("aria-sort", sorted.down ? "descending" : "ascending"); } else { th.removeAttribute("aria-sort"); }
      th.querySelector("span").textContent = own ? (sorted.down ? "↓" : "↑") : "";
    });
    status.textContent = found.length + " of " + rows.length + " " + data.what
      + (found.length > shown ? ", the first " + shown + " are shown" : "");
    more.hidden = found.length <= shown;
  }
  columns.forEach(function (column, i) {
    var th = make("th", null, { scope: "col" }), button = make("button", column.label, { type: "button" });
    if (column.kind === "level") { th.className = "text"; }
    button.appendChild(make("span", "", { "aria-hidden": "true" }));
    button.addEventListener("click", function () {
      sorted = { column: i, down: sorted.column === i ? !sorted.down : column.kind !== "name" };
      update();
    });
    th.appendChild(button);
    head.appendChild(th);
  });
  search.addEventListener("input", function () { shown = PAGE; update(); });
  level.addEventListener("change", function () { shown = PAGE; update(); });
  more.addEventListener("click", function () { shown += 4 * PAGE; update(); });
  document.getElementById("genes").hidden = false;
  update();
})();
