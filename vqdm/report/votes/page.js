"use strict";
// One rater's votes on one page. A vote is {pair, choice, ms}: choice is what was seen (image A is "left"), ms the time
// from when both images stood on the screen. For every second rater, by name, all pairs are reversed in order and side.
const READY_AFTER = 300; // ms in which nobody can have looked at two images: a second tap of a double tap
const CHOICES = ["left", "tie", "right"];
const study = JSON.parse(document.getElementById("study").textContent);
const byId = (id) => document.getElementById(id);
let state = null; // {rater, mirrored, votes, spent: {pair: ms of votes that were undone}}
let pairs = []; // in this rater's order
let shownAt = null; // when the present pair was shown; null while a choice is not taken
let turn = 0; // of showing: what was started for an earlier turn is dropped

function stored(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
    return value;
  } catch {
    byId("unkept").hidden = false; // storage is blocked or full
    return null;
  }
}

const keyOf = (rater) => `votes/${study.study}/${study.page}/${rater}`;
const isMirrored = (rater) => [...rater].reduce((sum, letter) => sum + letter.charCodeAt(0), 0) % 2 === 1;
const ordered = (mirrored) => (mirrored ? [...study.pairs].reverse() : study.pairs);

function kept(rater) {
  // what this browser kept, if it is a beginning of the rater's own sequence
  const fresh = { rater, mirrored: isMirrored(rater), votes: [], spent: {} };
  try {
    const found = JSON.parse(stored(keyOf(rater)));
    const sequence = ordered(fresh.mirrored);
    const whole = found.votes.every((vote, i) =>
      vote.pair === sequence[i].id && CHOICES.includes(vote.choice) && Number.isInteger(vote.ms) && vote.ms >= 0);
    return whole ? { ...fresh, votes: found.votes, spent: found.spent ?? {} } : fresh;
  } catch {
    return fresh;
  }
}

const keep = () => stored(keyOf(state.rater), JSON.stringify({ votes: state.votes, spent: state.spent }));
const nameTyped = () => byId("rater").value.trim().toLowerCase();

function sayWhatIsKept() {
  const count = nameTyped() ? kept(nameTyped()).votes.length : 0;
  byId("kept").textContent = count ? `${count} of ${study.pairs.length} votes by ${nameTyped()} are kept here.` : "";
  byId("enter").querySelector("button").textContent = count ? "Go on" : "Start";
}

function open(screen) {
  for (const id of ["start", "vote", "end"]) byId(id).hidden = id !== screen;
}

function begin(event) {
  event.preventDefault();
  state = kept(nameTyped());
  pairs = ordered(state.mirrored);
  stored("votes/rater", state.rater);
  keep();
  show();
}

const busy = (isBusy) => byId("images").setAttribute("aria-busy", String(isBusy));

function enableChoices(enabled) {
  for (const choice of CHOICES) byId(`choose-${choice}`).disabled = !enabled;
}

async function show() {
  const mine = ++turn;
  const done = state.votes.length;
  shownAt = null;
  if (done === pairs.length) return finish();
  open("vote");
  busy(true);
  enableChoices(false);
  const pair = pairs[done];
  byId("bar").max = pairs.length;
  byId("bar").value = done;
  byId("number").textContent = `${done + 1} / ${pairs.length}`;
  byId("undo").disabled = done === 0;
  byId("caption").textContent = pair.caption;
  byId("caption").scrollTop = 0;
  byId("said").textContent = `Pair ${done + 1} of ${pairs.length}. ${pair.caption}`;
  await Promise.all([setImage("left", pair), setImage("right", pair)]);
  if (mine !== turn) return;
  busy(false);
  const started = performance.now();
  setTimeout(() => {
    if (mine !== turn) return;
    shownAt = started;
    enableChoices(true);
    preload(pairs[done + 1]);
  }, READY_AFTER);
}

const source = (text) => `data:${study.type};base64,${text}`;

async function setImage(side, pair) {
  const shown = state.mirrored ? { left: pair.right, right: pair.left } : pair;
  const image = byId(`image-${side}`);
  image.src = source(shown[side]);
  try {
    await image.decode();
  } catch {
    // taken away by a later turn; a damaged image stays empty and its alternative text is shown
  }
  image.classList.toggle("pixels", Math.max(image.naturalWidth, image.naturalHeight) < study.small);
}

function preload(pair) {
  if (!pair) return;
  for (const text of [pair.left, pair.right]) new Image().src = source(text);
}

function choose(choice) {
  if (shownAt === null) return;
  const pair = pairs[state.votes.length].id;
  const ms = Math.round(performance.now() - shownAt) + (state.spent[pair] ?? 0);
  delete state.spent[pair];
  state.votes.push({ pair, choice, ms });
  keep();
  show();
}

function undo() {
  const vote = state.votes.pop();
  if (!vote) return;
  state.spent[vote.pair] = vote.ms; // the time of a vote that is changed is that of all its showings
  keep();
  show();
}

function finish() {
  open("end");
  byId("total").textContent = String(pairs.length);
  byId("said").textContent = "All votes are in. Save them now.";
  byId("saved").textContent = "";
  byId("thanks").focus();
}

function save() {
  const { rater, mirrored, votes } = state;
  const ballot = { format: "vqdm-votes-1", study: study.study, page: study.page, rater, mirrored, votes };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(ballot, null, 1)], { type: "application/json" }));
  link.download = `votes-${study.study}-${study.page}-${rater}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  byId("said").textContent = byId("saved").textContent = `Saved as ${link.download}`;
}

const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", t: "tie", T: "tie" };

function press(event) {
  // a key that is held down, or is part of a shortcut of the browser, is no vote
  if (byId("start").hidden === false || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "u" || event.key === "U") undo();
  else if (event.key in KEYS && !byId("vote").hidden) choose(KEYS[event.key]);
  else return;
  event.preventDefault();
}

byId("count").textContent = String(study.pairs.length);
byId("choices").setAttribute("aria-label", study.question);
byId("rater").value = stored("votes/rater") ?? "";
byId("rater").addEventListener("input", sayWhatIsKept);
byId("enter").addEventListener("submit", begin);
for (const choice of CHOICES) byId(`choose-${choice}`).addEventListener("click", () => choose(choice));
for (const side of ["left", "right"]) byId(side).addEventListener("click", () => choose(side));
for (const id of ["undo", "back"]) byId(id).addEventListener("click", undo);
for (const id of ["save", "save-all"]) byId(id).addEventListener("click", save);
document.addEventListener("keydown", press);
sayWhatIsKept();
byId("rater").focus();
