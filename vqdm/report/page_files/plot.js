// ---- quality against size -------------------------------------------------------------------------------------------

const SHAPES = ["M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "M-4.5,-4.5h9v9h-9z", "M0,-6l5.5,10h-11z", "M0,-6.2l6.2,6.2l-6.2,6.2l-6.2,-6.2z", "M0,6l5.5,-10h-11z", "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z", "M-5,-3l2,-2l3,3l3,-3l2,2l-3,3l3,3l-2,2l-3,-3l-3,3l-2,-2l3,-3z"];
const MARGIN = { left: 62, right: 18, top: 18, bottom: 46 }; // pixels
const FONT = 12; // pixels of the labels at the points

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Round numbers from low to high, about `count` of them; on a logarithmic axis 1, 2 and 5 of every power of ten. */
function ticks(low, high, count, logarithmic) {
  if (logarithmic) {
    const found = [];
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.log10(high); decade++) {
      found.push(...[1, 2, 5].map((step) => Number((step * 10 ** decade).toPrecision(3))));
    }
    return found.filter((value) => value >= low && value <= high);
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(Number((i * step).toPrecision(8)));
  return found;
}

function scale(values, from, to, logarithmic) {
  const bend = logarithmic ? Math.log : Number;
  const [low, high] = [Math.min(...values), Math.max(...values)].map(bend);
  const room = 0.07 * (high - low || Math.abs(high) || 1);
  const [start, end] = [low - room, high + room];
  const back = logarithmic ? Math.exp : Number;
  const place = (value) => from + ((bend(value) - start) / (end - start)) * (to - from);
  return { place, low: back(start), high: back(end) };
}

function plot() {
  const { sizes, metrics, rows } = data.plot;
  const [chart, tip, holder] = [$("plot"), $("plot-tip"), $("plot-holder")];
  const families = [...new Set(rows.map((row) => row.family))];
  const measure = new OffscreenCanvas(1, 1).getContext("2d");
  measure.font = `${FONT}px system-ui, "Liberation Sans", Arial, sans-serif`;

  /** What is drawn for one metric against one size; published values are points of their own. */
  function pointsOf(metric, size) {
    return rows.flatMap((row) => {
      const [value, error] = row.values[metric];
      const own = { row, x: row.sizes[size], y: value, error: error ?? 0, published: false };
      const published = { row, x: row.publishedSizes[size], y: row.published[metric], error: 0, published: true };
      return [own, published].filter(({ x, y }) => row.compressed && x !== null && x !== undefined && y !== null && y !== undefined);
    });
  }

  /** The points that no other is better than at as small a size, from small to large. */
  function frontOf(points, lower) {
    const sign = lower ? 1 : -1;
    const own = points.filter((point) => !point.published);
    const beaten = (a) => own.some((b) => b !== a && b.x <= a.x && sign * b.y <= sign * a.y && (b.x < a.x || b.y !== a.y));
    return own.filter((point) => !beaten(point)).sort((a, b) => a.x - b.x);
  }

  function words({ row, y, error, published }, metric, size) {
    const { label, digits } = metrics[metric];
    const value = `${y.toFixed(digits)}${error ? ` ± ${error.toFixed(digits)}` : ""}`;
    const measures = (published ? row.publishedSizes : row.sizes).map((v, i) => [i, v]).filter(([, v]) => v !== null && v !== undefined);
    measures.sort(([a], [b]) => (b === size) - (a === size));
    return [
      row.name + (published ? ", published" : ""),
      `${label.replace(/ [↑↓]$/, "")}: ${value}`,
      ...measures.map(([i, v]) => `${sizes[i]}: ${v.toFixed(2)}`),
    ];
  }

  function show(point, lines, x, y) {
    tip.replaceChildren(...lines.map((line) => make("div", { textContent: line })));
    if (point.row.column !== null) tip.append(make("div", { className: "hint", textContent: "click: its images" }));
    tip.hidden = false;
    const left = Math.min(Math.max(x + 14, 0), holder.clientWidth - tip.offsetWidth);
    tip.style.left = `${Math.max(left, 0)}px`;
    tip.style.top = `${y > tip.offsetHeight + 20 ? y - tip.offsetHeight - 12 : y + 16}px`;
  }

  function mark(point, metric, size, x, y) {
    const family = families.indexOf(point.row.family);
    const shape = svg("path", { d: SHAPES[family % SHAPES.length], class: point.published ? "hollow" : "full" });
    const group = svg("g", { transform: `translate(${x},${y})`, class: `point c${family % 7}`, tabindex: 0 }, shape, svg("circle", { r: 15, class: "target" }));
    const lines = words(point, metric, size);
    const open = point.row.column !== null && images;
    group.setAttribute("role", open ? "button" : "img");
    group.setAttribute("aria-label", lines.join(", "));
    for (const event of ["pointerenter", "focus"]) group.addEventListener(event, () => show(point, lines, x, y));
    for (const event of ["pointerleave", "blur"]) group.addEventListener(event, () => (tip.hidden = true));
    if (open) {
      group.classList.add("opens");
      const act = () => {
        tip.hidden = true;
        images.worstOf(point.row.column);
      };
      group.addEventListener("click", act);
      group.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        act();
      });
    }
    return group;
  }

  /** Labels beside their points, where one finds room: those that would touch others are left to the pointer. */
  function labels(places, area) {
    const taken = places.map(({ x, y }) => [x - 8, y - 8, x + 8, y + 8]);
    const touches = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
    return places.flatMap(({ point, x, y }) => {
      const text = point.row.name + (point.published ? ", published" : "");
      const width = measure.measureText(text).width + 4;
      const corners = [[x + 10, y - 8], [x - 10 - width, y - 8], [x - width / 2, y - 26], [x - width / 2, y + 10], [x + 7, y - 23], [x - 7 - width, y + 8], [x + 7, y + 8], [x - 7 - width, y - 23]];
      for (const [left, top] of corners) {
        const box = [left, top, left + width, top + FONT + 4];
        const inside = box[0] >= area[0] && box[1] >= area[1] && box[2] <= area[2] && box[3] <= area[3];
        if (!inside || taken.some((other) => touches(box, other))) continue;
        taken.push(box);
        return [svg("text", { x: left + 2, y: top + FONT, class: "label" }, text)];
      }
      return [];
    });
  }

  function draw() {
    const [metric, size] = [Number($("plot-metric").value), Number($("plot-size").value)];
    const width = Math.max(280, holder.clientWidth);
    const height = Math.round(Math.min(500, Math.max(320, width * 0.5)));
    const area = [MARGIN.left, MARGIN.top, width - MARGIN.right, height - MARGIN.bottom];
    const { label, lower } = metrics[metric];
    const points = pointsOf(metric, size);
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.setAttribute("height", height);
    tip.hidden = true;
    if (!points.length) {
      chart.replaceChildren(svg("text", { x: width / 2, y: height / 2, class: "axis", "text-anchor": "middle" }, "nothing to show: no row has both"));
      return;
    }
    const levels = rows.filter((row) => !row.compressed && row.values[metric][0] !== null).map((row) => ({ row, y: row.values[metric][0] }));
    const ends = points.flatMap(({ y, error }) => [y - error, y + error]).concat(levels.map(({ y }) => y));
    const values = points.map(({ y }) => y);
    const logarithmic = lower && Math.min(...ends) > 0 && Math.max(...values) > 3 * Math.min(...values);
    const across = scale(points.map(({ x }) => x), area[0], area[2], false);
    const up = scale(ends, area[3], area[1], logarithmic);
    const places = points.map((point) => ({ point, x: across.place(point.x), y: up.place(point.y) }));
    const grid = [
      ...ticks(across.low, across.high, width / 110, false).map((value) => {
        const x = across.place(value);
        return svg("g", {}, svg("line", { x1: x, x2: x, y1: area[1], y2: area[3], class: "grid" }), svg("text", { x, y: area[3] + 18, class: "axis", "text-anchor": "middle" }, String(value)));
      }),
      ...ticks(up.low, up.high, 6, logarithmic).map((value) => {
        const y = up.place(value);
        return svg("g", {}, svg("line", { x1: area[0], x2: area[2], y1: y, y2: y, class: "grid" }), svg("text", { x: area[0] - 8, y: y + 4, class: "axis", "text-anchor": "end" }, String(value)));
      }),
      svg("text", { x: (area[0] + area[2]) / 2, y: height - 8, class: "axis", "text-anchor": "middle" }, sizes[size]),
      svg("text", { x: 14, y: (area[1] + area[3]) / 2, class: "axis", "text-anchor": "middle", transform: `rotate(-90 14 ${(area[1] + area[3]) / 2})` }, label),
    ];
    const line = (list, name) => svg("polyline", { points: list.map((p) => `${across.place(p.x)},${up.place(p.y)}`).join(" "), class: name });
    const lines = families.map((family, i) => line(points.filter((p) => p.row.family === family && !p.published).sort((a, b) => a.x - b.x), `family c${i % 7}`));
    const bars = places.filter(({ point }) => point.error).map(({ point, x }) => {
      const [from, to] = [point.y - point.error, point.y + point.error].map(up.place);
      return svg("line", { x1: x, x2: x, y1: from, y2: to, class: `bar-of c${families.indexOf(point.row.family) % 7}` });
    });
    const references = levels.flatMap(({ row, y }) => [
      svg("line", { x1: area[0], x2: area[2], y1: up.place(y), y2: up.place(y), class: "level" }),
      svg("text", { x: area[2] - 2, y: up.place(y) - 5, class: "label", "text-anchor": "end" }, row.name),
    ]);
    chart.replaceChildren(
      ...grid, line(frontOf(points, lower), "frontier"), ...lines, ...bars, ...references, ...labels(places, area),
      ...places.map(({ point, x, y }) => mark(point, metric, size, x, y)),
    );
  }

  fill($("plot-metric"), metrics.map(({ label }, i) => [i, label]));
  fill($("plot-size"), sizes.map((label, i) => [i, label]));
  for (const id of ["plot-metric", "plot-size"]) $(id).addEventListener("change", draw);
  new ResizeObserver(draw).observe(holder);
  draw();
}

if (data.plot) plot();

