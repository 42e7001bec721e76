// ---- the gallery ----------------------------------------------------------------------------------------------------

/** Worst value of a row among the chosen methods, as a number that is small for bad; without a value Infinity. */
function badness(row, score, method) {
  const sign = data.scores[score].lower ? -1 : 1;
  const values = method < 0 ? row.scores[score] : [row.scores[score][method]];
  return Math.min(...values.filter((value) => value !== null).map((value) => sign * value));
}

const PER_PAGE = 50; // rows of the gallery that stand on the page at the same time

function gallery() {
  const rows = read("rows");
  const grid = $("grid");
  let shownRows = []; // all that the filter lets through, in order
  let visible = []; // those of the present page
  let page = 0;
  let chosen = -1; // the method whose images the plot was asked for
  let current = null; // the one cell that Tab reaches; arrows go to the others

  function cell(row, method) {
    const { name, size } = data.methods[method];
    const image = make("img", { alt: "", width: data.shown[0], height: data.shown[1], decoding: "async" });
    const score = make("span", { className: "score" });
    const button = make("button", { type: "button", tabIndex: -1 }, image, make("span", { className: "name", textContent: name }), score);
    button.setAttribute("aria-label", `${name}, ${nameOf(row)}: enlarge`);
    button.title = size ? `${name} (${size})` : name;
    button.addEventListener("click", () => zoom.open(row, method));
    const holder = make("div", { className: "cell" }, button);
    holder.setAttribute("role", "gridcell");
    row.buttons.push(button);
    row.labels.push(score);
    return holder;
  }

  function build(row) {
    Object.assign(row, { buttons: [], labels: [] });
    const text = make("span", { className: "prompt", textContent: row.text, dir: "auto" });
    const head = make("div", { className: "head" }, make("span", { className: "hint", textContent: nameOf(row) }), text);
    head.setAttribute("role", "rowheader");
    const cells = make("div", { className: "cells" }, ...data.methods.map((_, method) => cell(row, method)));
    cells.setAttribute("role", "presentation");
    row.element = make("div", { className: "row" }, head, cells);
    row.element.setAttribute("role", "row");
    row.element.row = row;
  }

  /** The row's data URLs, undefined while the file is still being read. */
  function load(row) {
    const block = $(`images-${row.index}`);
    if (!row.urls && block) {
      row.urls = JSON.parse(block.textContent);
      block.remove();
    }
    return row.urls;
  }

  /** Images get their source only when their row is near the window: this is when they are decoded. */
  function place(row) {
    if (row.placed || !load(row)) return; // not parsed so far: DOMContentLoaded asks again
    row.placed = true;
    row.urls.forEach((url, method) => {
      const image = row.buttons[method].firstChild;
      if (url) {
        image.src = url;
      } else {
        image.replaceWith(make("span", { className: "absent", textContent: "not made" }));
      }
    });
  }

  function makeCurrent(button) {
    if (current) current.tabIndex = -1;
    current = button;
    if (current) current.tabIndex = 0;
  }

  function arrange() {
    const score = Number($("score").value);
    const worstOf = Number($("order").value); // a method, any (-1), or as listed (-2)
    const words = $("filter").value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const order = [...rows];
    if (worstOf >= -1) {
      order.sort((a, b) => {
        const [x, y] = [badness(a, score, worstOf), badness(b, score, worstOf)];
        return x === y ? a.index - b.index : x - y;
      });
    }
    shownRows = order.filter((row) => words.every((word) => row.words.includes(word)));
    $("none").hidden = shownRows.length > 0;
    turnTo(0);
  }

  /** Show one page of the rows in order. */
  function turnTo(wanted) {
    const pages = Math.max(1, Math.ceil(shownRows.length / PER_PAGE));
    page = Math.min(Math.max(wanted, 0), pages - 1);
    const score = Number($("score").value);
    visible = shownRows.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
    near.disconnect();
    for (const row of visible) {
      if (!row.element) build(row);
      row.labels.forEach((label, column) => {
        label.textContent = data.scores.length ? number(row.scores[score][column]) : "";
      });
      row.buttons.forEach((button, method) => button.parentElement.classList.toggle("chosen", method === chosen));
      near.observe(row.element);
    }
    grid.replaceChildren(...visible.map((row) => row.element));
    const first = page * PER_PAGE + 1;
    const which = pages > 1 ? `${first}–${first + visible.length - 1} of ${shownRows.length}` : shownRows.length;
    $("count").textContent = pages > 1 && shownRows.length === rows.length ? which : `${which} of ${rows.length} shown`;
    for (const pager of document.querySelectorAll(".pager")) {
      pager.hidden = pages < 2;
      pager.querySelector(".before").disabled = page === 0;
      pager.querySelector(".after").disabled = page === pages - 1;
      pager.querySelector(".place").textContent = `page ${page + 1} of ${pages}`;
    }
    makeCurrent(visible.length ? visible[0].buttons[Math.max(chosen, 0)] : null);
  }

  function move(event) {
    const row = event.target.closest(".row")?.row;
    if (!row || event.ctrlKey || event.altKey || event.metaKey) return;
    const at = visible.indexOf(row);
    const method = row.buttons.indexOf(event.target);
    const targets = {
      ArrowLeft: [at, method - 1],
      ArrowRight: [at, method + 1],
      ArrowUp: [at - 1, method],
      ArrowDown: [at + 1, method],
      Home: [at, 0],
      End: [at, data.methods.length - 1],
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    const [to, column] = targets[event.key];
    visible[to]?.buttons[column]?.focus();
  }

  const worst = data.methods.map(({ name }, i) => [i, `worst of ${name} first`]);
  fill($("order"), [[-2, "as listed"], [-1, "worst of any method first"], ...worst]);
  fill($("score"), data.scores.map(({ label }, i) => [i, label]));
  $("score").value = data.score;
  if (data.scores.length) $("order").value = -1;
  for (const id of ["score-label", "order-label"]) $(id).hidden = !data.scores.length;
  grid.style.setProperty("--columns", Math.min(data.methods.length, 8));
  grid.style.setProperty("--narrow", [2, 4].includes(data.methods.length) ? 2 : 3);
  rows.forEach((row, index) => Object.assign(row, { index, words: row.text.toLocaleLowerCase() }));

  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => place(entry.target.row)),
    { rootMargin: "300px" },
  );
  arrange();
  for (const id of ["order", "score"]) $(id).addEventListener("change", arrange);
  $("filter").addEventListener("input", arrange);
  grid.addEventListener("keydown", move);
  grid.addEventListener("focusin", (event) => makeCurrent(event.target));
  document.querySelectorAll(".pager").forEach((pager, below) => {
    for (const [kind, by] of [["before", -1], ["after", 1]]) {
      pager.querySelector(`.${kind}`).addEventListener("click", () => {
        turnTo(page + by);
        if (below) $("gallery").scrollIntoView();
      });
    }
  });
  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", () => turnTo(page));
  }

  return {
    load,
    rows: () => shownRows,
    /** The cell of an image, on its page. */
    focus(row, method) {
      if (!visible.includes(row)) turnTo(Math.floor(shownRows.indexOf(row) / PER_PAGE));
      row.buttons[method].focus();
    },
    /** One method's images, the worst first. */
    worstOf(method) {
      chosen = method;
      $("filter").value = "";
      if (data.scores.length) $("order").value = method;
      arrange();
      $("gallery").scrollIntoView();
      visible[0]?.buttons[method].focus({ preventScroll: true });
    },
  };
}

// ---- one image large, two under a slider, or their difference -------------------------------------------------------

function zoomDialog() {
  const state = { row: null, method: 0, other: 0, mode: "single" };
  const dialog = $("zoom");
  const stage = $("stage");

  function show() {
    const { row, method, other, mode } = state;
    images.load(row);
    if (!row.urls) document.addEventListener("DOMContentLoaded", show, { once: true }); // the file is still being read
    const shown = images.rows();
    const two = mode !== "single";
    const [right, left] = [row.urls?.[method], row.urls?.[other]];
    const there = Boolean(right && (left || !two));
    const [name, otherName] = [data.methods[method].name, data.methods[other].name];
    dialog.dataset.mode = there ? mode : "missing";
    $("zoom-place").textContent = `${nameOf(row)} · ${shown.indexOf(row) + 1} of ${shown.length}`;
    $("zoom-prompt").textContent = row.text;
    $("method").value = method;
    $("other").value = other;
    $("method-word").textContent = two ? "Right" : "Method";
    $("other-label").hidden = !two;
    $("gain-label").hidden = mode !== "difference";
    $("split-label").hidden = mode !== "slider";
    $("split-left").textContent = otherName;
    $("split-right").textContent = name;
    document.querySelector(`[name=mode][value=${mode}]`).checked = true;
    if (right) $("right").src = right;
    if (left && two) $("left").src = left;
    $("right").alt = `${name}: ${row.text}`;
    $("left").alt = `${otherName}: ${row.text}`;
    $("missing").hidden = there;
    const scores = data.scores.map((score, i) => `${score.label} ${number(row.scores[i][method])}`).join(" · ");
    const size = data.methods[method].size;
    const title = two ? `${otherName} and ${name}` : size ? `${name} (${size})` : name;
    $("zoom-method").textContent = title;
    $("zoom-scores").textContent = two && scores ? `${name}: ${scores}` : scores;
    if (there && mode === "difference") subtract(title);
  }

  /** Per channel |left − right| × gain, at most 255; mean, maximum and PSNR are of the 8-bit values before the gain. */
  async function subtract(title) {
    const asked = { ...state };
    const pair = [$("left"), $("right")];
    await Promise.all(pair.map((image) => image.decode()));
    if (asked.row !== state.row || asked.method !== state.method || asked.other !== state.other) return;
    const [width, height] = [pair[0].naturalWidth, pair[0].naturalHeight];
    const [a, b] = pair.map((image) => {
      const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0, width, height);
      return context.getImageData(0, 0, width, height).data;
    });
    const canvas = $("difference");
    [canvas.width, canvas.height] = [width, height];
    const picture = new ImageData(width, height);
    const gain = Number($("gain").value);
    let [sum, squares, largest] = [0, 0, 0];
    for (let i = 0; i < a.length; i++) {
      if (i % 4 === 3) {
        picture.data[i] = 255;
        continue;
      }
      const difference = Math.abs(a[i] - b[i]);
      sum += difference;
      squares += difference * difference;
      largest = Math.max(largest, difference);
      picture.data[i] = Math.min(255, gain * difference);
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
    const n = width * height * 3;
    const psnr = squares ? `${(10 * Math.log10((255 * 255 * n) / squares)).toFixed(2)} dB` : "∞";
    const numbers = `mean difference ${(sum / n).toFixed(2)}, largest ${largest} of 255, PSNR ${psnr}`;
    canvas.setAttribute("aria-label", `Difference of ${title}, times ${gain}: ${numbers}`);
    $("zoom-method").textContent = `${title} · ${numbers}`;
  }

  function step(by) {
    const shown = images.rows();
    const to = shown[shown.indexOf(state.row) + by];
    if (to) update({ row: to });
  }

  function update(change) {
    Object.assign(state, change);
    show();
  }

  function setSplit(percent) {
    $("split").value = percent;
    stage.style.setProperty("--split", `${$("split").value}%`);
  }

  function keys(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const own = event.target.matches("select, [type=range], [type=radio]") && event.key.startsWith("Arrow");
    if (own) return; // there the arrows choose
    const last = data.methods.length - 1;
    const actions = {
      ArrowLeft: () => update({ method: Math.max(0, state.method - 1) }),
      ArrowRight: () => update({ method: Math.min(last, state.method + 1) }),
      ArrowUp: () => step(-1),
      ArrowDown: () => step(1),
      1: () => update({ mode: "single" }),
      2: () => update({ mode: "slider" }),
      3: () => update({ mode: "difference" }),
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  }

  function drag(event) {
    if (state.mode !== "slider" || (event.type === "pointermove" && event.buttons === 0)) return;
    const box = $("right").getBoundingClientRect();
    setSplit((100 * (event.clientX - box.left)) / box.width);
    event.preventDefault();
  }

  const methods = data.methods.map((method, i) => [i, method.name]);
  fill($("method"), methods);
  fill($("other"), methods);
  fill($("gain"), [1, 2, 4, 8, 16, 32].map((gain) => [gain, `× ${gain}`]));
  $("gain").value = 8;
  stage.style.setProperty("--width", data.shown[0]);
  stage.style.setProperty("--height", data.shown[1]);
  if (Math.max(...data.shown) <= 128) document.documentElement.classList.add("pixels");
  setSplit(50);
  $("method").addEventListener("change", (event) => update({ method: Number(event.target.value) }));
  $("other").addEventListener("change", (event) => update({ other: Number(event.target.value) }));
  $("gain").addEventListener("change", show);
  $("split").addEventListener("input", (event) => setSplit(event.target.value));
  for (const radio of document.querySelectorAll("[name=mode]")) radio.addEventListener("change", () => update({ mode: radio.value }));
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => dialog.close());
  stage.addEventListener("pointerdown", drag);
  stage.addEventListener("pointermove", drag);
  dialog.addEventListener("keydown", keys);
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  dialog.addEventListener("close", () => images.focus(state.row, state.method));

  return {
    open(row, method) {
      const other = state.other === method ? (method === 0 && data.methods.length > 1 ? 1 : 0) : state.other;
      update({ row, method, other });
      dialog.showModal();
      dialog.focus(); // not the first button: arrows belong to the dialog
    },
  };
}

const images = $("grid") && gallery();
const zoom = images && zoomDialog();
