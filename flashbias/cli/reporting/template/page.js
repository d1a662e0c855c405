// The page at work: filters, cards that are drawn when they come into view, and what the pointer and the keys do.

const ANY = "";

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const problems = data.problems;
  const cards = new Map(problems.map((problem) => [problem, problemCard(problem)]));
  const draw = drawer();
  for (const card of cards.values()) card.addEventListener("toggle", () => card.open && draw(card));
  fillTotals(problems);
  fillLegend();
  fillChoices(data);
  const show = () => showMatching(problems, cards);
  const form = document.getElementById("filters");
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(show));
  const opened = (open) => () => {
    for (const card of shownCards()) card.open = open;
  };
  document.getElementById("open").addEventListener("click", opened(true));
  document.getElementById("close").addEventListener("click", opened(false));
  window.addEventListener("beforeprint", () => {
    for (const card of shownCards()) if (card.open) card.draw();
  });
  listenForTips();
  document.addEventListener("keydown", moveInMap);
  show();
  if (problems.length && problems.length <= 3) for (const card of cards.values()) card.open = true;
}

// Draws an open card once it comes near the window: hundreds may be opened at once.
function drawer() {
  if (!("IntersectionObserver" in window)) return (card) => card.draw();
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        seen.unobserve(entry.target);
        if (entry.target.open) entry.target.draw();
        showKernels();
      }
    },
    { rootMargin: "600px" },
  );
  return (card) => seen.observe(card);
}

function shownCards() {
  return document.querySelectorAll("details.problem:not([hidden])");
}

// --- filters ---

function choice(name, label, options) {
  const select = element("select", { name });
  for (const [value, text] of options) select.append(element("option", { value }, text));
  return element("label", {}, `${label} `, select);
}

function fillChoices(data) {
  const box = document.getElementById("choices");
  const any = (found) => [[ANY, "any"], ...found.map((value) => [value, value])];
  const labels = { gpu: "GPU", dtype: "dtype", head_dim: "head dim", rank: "rank", causal: "causal" };
  for (const name of data.facets) {
    box.append(choice(name, labels[name] || name, any(values(data.problems, (problem) => [problem.facets[name]]))));
  }
  const kernels = values(data.problems, (problem) => problem.kernels.map((kernel) => kernel.name));
  box.append(choice("kernel", "kernel", any(kernels)));
  const flags = data.problems.length ? Object.keys(problemFlags(data.problems[0])) : [];
  box.append(choice("state", "with", any(flags)));
  box.append(choice("order", "order", Object.keys(ORDERS).map((name) => [name, name])));
}

function wantedNow() {
  const form = document.getElementById("filters");
  const picked = Object.fromEntries([...form.querySelectorAll("select")].map((select) => [select.name, select.value]));
  const { kernel, state, order, ...facets } = picked;
  return { search: document.getElementById("search").value, kernel, state, order, facets };
}

function showMatching(problems, cards) {
  const wanted = wantedNow();
  const found = new Set(problems.filter((problem) => matches(problem, wanted)));
  const box = document.getElementById("problems");
  box.replaceChildren(...ordered(problems, wanted.order).map((problem) => cards.get(problem)));
  for (const [problem, card] of cards) card.hidden = !found.has(problem);
  document.getElementById("count").textContent = `${found.size} of ${problems.length} problems`;
  const nothing = document.getElementById("nothing");
  nothing.hidden = found.size > 0;
  nothing.textContent = problems.length ? "No problem matches. Clear a filter to see more." : "Nothing is stored in this database.";
  showKernels();
}

function showKernels() {
  const { kernel } = wantedNow();
  for (const section of document.querySelectorAll("section.kernel")) {
    section.hidden = Boolean(kernel) && section.dataset.kernel !== kernel;
  }
}

// --- above the list ---

function fillTotals(problems) {
  const list = document.getElementById("totals");
  for (const [name, value, note] of totals(problems)) {
    list.append(element("div", {}, element("dt", {}, name), element("dd", {}, String(value), small(note))));
  }
}

function fillLegend() {
  const list = document.getElementById("legend");
  const swatch = (kind, text) => list.append(element("li", {}, element("i", { class: `cell ${kind}` }), text));
  STEPS.forEach((bound, number) => {
    swatch(`step-${number}`, number ? (bound ? `${percent(bound)} or more` : "slower") : `${percent(bound)} of the fastest's speed or more`);
  });
  swatch("winner", "winner");
  swatch("lost", "winner that failed since");
  swatch("pinned", "pinned");
  swatch("unproven", "timed, not proven");
  swatch("failed", "all failed");
  swatch("mixed", "some failed");
}

// --- the pointer and the keys ---

function listenForTips() {
  const tip = document.getElementById("tip");
  let owner = null;
  const hide = () => {
    if (owner) owner.removeAttribute("aria-describedby");
    owner = null;
    tip.hidden = true;
    tip.classList.remove("held");
  };
  const show = (event) => {
    const button = event.target.closest && event.target.closest(".heat button");
    if (!button) return;
    if (button !== owner) {
      hide();
      owner = button;
      tip.replaceChildren(button.tipOf());
      button.setAttribute("aria-describedby", "tip");
      tip.hidden = false;
      placeTip(tip, button.getBoundingClientRect());
    }
    if (event.type !== "pointerover") tip.classList.add("held");
  };
  const leave = (event) => {
    const within = event.relatedTarget && event.relatedTarget.closest && event.relatedTarget.closest(".heat button") === owner;
    if (owner && !within && (event.type === "focusout" || !tip.classList.contains("held"))) hide();
  };
  // One that only the pointer called lets it through to the cells below; a click or the focus holds it, for reading.
  for (const name of ["pointerover", "focusin", "click"]) document.addEventListener(name, show);
  for (const name of ["pointerout", "focusout"]) document.addEventListener(name, leave);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
}

function placeTip(tip, cell) {
  tip.style.left = tip.style.top = "0"; // near the edge it would be measured squeezed
  const own = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(cell.left, document.documentElement.clientWidth - own.width - 8));
  const below = cell.bottom + 4;
  const above = cell.top - own.height - 4;
  const top = below + own.height <= window.innerHeight || above < 0 ? below : above;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${top + window.scrollY}px`;
}

const ARROWS = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };

// Arrow keys go to the next cell of a map in their direction: with Tab alone a map would be dozens of stops.
function moveInMap(event) {
  const button = event.target.closest && event.target.closest(".heat button");
  const way = ARROWS[event.key];
  if (!button || !way) return;
  event.preventDefault();
  const from = [Number(button.dataset.down), Number(button.dataset.right)];
  const next = nextCell(button.closest("table"), from, way) || nextPanel(button.closest("table"), from, way);
  if (!next) return;
  button.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function nextCell(table, [down, right], [south, east]) {
  const buttons = [...table.querySelectorAll("button")].map((each) => [each, Number(each.dataset.down), Number(each.dataset.right)]);
  const ahead = buttons.filter(([, row, column]) =>
    south ? column === right && (row - down) * south > 0 : row === down && (column - right) * east > 0,
  );
  ahead.sort((one, other) => Math.abs(one[1] - down) + Math.abs(one[2] - right) - Math.abs(other[1] - down) - Math.abs(other[2] - right));
  return ahead.length ? ahead[0][0] : null;
}

function nextPanel(table, [down], [south, east]) {
  const other = east > 0 ? table.nextElementSibling : east < 0 ? table.previousElementSibling : null;
  if (south || !other) return null;
  const row = [...other.querySelectorAll("button")].filter((each) => Number(each.dataset.down) === down);
  return (east > 0 ? row[0] : row[row.length - 1]) || null;
}

if (typeof document !== "undefined") start();
