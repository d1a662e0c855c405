// What a problem looks like. All text goes in as text: nothing here reads markup.

function element(name, options, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") made.className = value;
    else made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function badge(kind, text) {
  return element("span", { class: `badge ${kind}` }, text);
}

function configName(config) {
  const tile = config.axes[0] === "–" ? "" : `${config.axes[0]}×${config.axes[1]}, ${config.axes[2]} warps `;
  return `${config.implementation}/${config.variant} ${tile}${config.params}`.trim();
}

function stateBadge(config) {
  return badge(failed(config.state) ? "bad" : config.state === "safe" ? "good" : "dim", words(config.state));
}

// --- the heat map ---

function heatMap(kernel) {
  const warps = values(kernel.cells, (cell) => [cell.warps]);
  const rows = values(kernel.cells, (cell) => [cell.m]);
  const columns = values(kernel.cells, (cell) => [cell.n]);
  const at = new Map(kernel.cells.map((cell) => [`${cell.warps} ${cell.m} ${cell.n}`, cell]));
  const panels = warps.map((count) => panel(kernel, count, rows, columns, at));
  return element("div", { class: "maps" }, ...panels);
}

function panel(kernel, warps, rows, columns, at) {
  const head = element("tr", {}, element("td", { class: "corner" }, "M \\ N"));
  for (const n of columns) head.append(element("th", { scope: "col" }, n));
  const body = element("tbody", {});
  rows.forEach((m, down) => {
    const row = element("tr", {}, element("th", { scope: "row" }, m));
    columns.forEach((n, right) => {
      const cell = at.get(`${warps} ${m} ${n}`);
      row.append(cell ? heatCell(kernel, cell, down, right) : element("td", { class: "empty", title: "not a candidate" }));
    });
    body.append(row);
  });
  const caption = element("caption", {}, `${warps} warps`);
  const table = element("table", { class: "heat" }, caption, element("thead", {}, head), body);
  const first = table.querySelector("td.winner button") || table.querySelector("td button");
  if (first) first.tabIndex = 0;
  return table;
}

function kindsOf(shown) {
  return ["cell", shown.kind, shown.winner ? "winner" : "", shown.lost ? "lost" : "", shown.pinned ? "pinned" : ""];
}

function heatCell(kernel, cell, down, right) {
  const shown = cellOf(kernel, cell);
  const kinds = [...kindsOf(shown), shown.bad ? "mixed" : ""];
  const mark = shown.winner ? element("span", { class: "mark", "aria-hidden": "true" }, "★") : null;
  const button = element(
    "button",
    { type: "button", tabindex: -1, "aria-label": cellLabel(cell, shown), "data-down": down, "data-right": right },
    mark,
    element("span", { class: "time" }, shown.text),
    element("span", { class: "ratio" }, shown.under),
  );
  button.tipOf = () => tipOf(kernel, cell);
  return element("td", { class: kinds.filter(Boolean).join(" ") }, button);
}

function tipOf(kernel, cell) {
  const title = `BLOCK_M ${cell.m} × BLOCK_N ${cell.n}, ${cell.warps} warps`;
  const list = element("ul", {});
  for (const number of cell.configs) {
    const config = kernel.configs[number];
    const names = [];
    if (kernel.winner && kernel.winner.config === number) names.push(badge("best", "winner"));
    if (kernel.pin && kernel.pin.config === number) names.push(badge("pin", "pinned"));
    const line = element("li", {}, stateBadge(config), " ", ...names, ` ${config.variant} ${config.params} `);
    if (config.ms !== null) line.append(element("b", {}, milliseconds(config.ms)));
    if (config.reason) line.append(element("span", { class: "reason" }, config.reason));
    list.append(line);
  }
  return element("div", {}, element("strong", {}, title), list);
}

// --- facts beside it ---

function fact(name, ...content) {
  return element("div", { class: "fact" }, element("dt", {}, name), element("dd", {}, ...content));
}

function facts(kernel) {
  const list = element("dl", { class: "facts" });
  const winner = kernel.winner;
  if (kernel.pin) {
    const why = kernel.pin.reason ? `: ${kernel.pin.reason}` : "";
    list.append(fact("Pinned", configName(kernel.configs[kernel.pin.config]), small(`${kernel.pin.when}${why}`)));
  }
  if (!winner) list.append(fact("Winner", "none"));
  else {
    const config = kernel.configs[winner.config];
    const now = failed(config.state) ? [" ", badge("bad", `${words(config.state)} since`), small(config.reason || "")] : [];
    list.append(fact("Winner", element("b", {}, milliseconds(winner.ms)), ` ${configName(config)}`, ...now));
    const second = winner.second === null ? null : kernel.configs[winner.second];
    list.append(fact("Runner-up", ...(second ? runnerUp(winner, second) : [secondText(winner)])));
    list.append(fact("Proof", `${level(winner.level)}${now.length ? " when it was chosen" : ""}`, small(`${winner.when}: ${winner.made}`), ...proofs(winner)));
    list.append(fact("Error", ...(winner.margins.length ? [margins(winner)] : ["not stored"])));
  }
  list.append(fact("Sweep", ...cost(kernel)));
  return list;
}

function small(text) {
  return text ? element("small", {}, text) : null;
}

function runnerUp(winner, second) {
  const line = `${milliseconds(second.ms)} ${configName(second)}`;
  const track = element("span", { class: "versus", "aria-hidden": "true" }, element("i", {}), element("i", {}));
  const slowest = Math.max(winner.ms, second.ms);
  track.children[0].style.width = `${(100 * winner.ms) / slowest}%`;
  track.children[1].style.width = `${(100 * second.ms) / slowest}%`;
  return [line, small(secondText(winner)), track];
}

function proofs(winner) {
  const repeats = winner.repeats === null ? [] : [small(`no race in ${winner.repeats.toLocaleString("en")} repeats`)];
  return [...repeats, ...winner.proofs.map((proof) => small(`proven again: ${proof}`))];
}

function margins(winner) {
  const table = element("table", { class: "margins" });
  table.append(element("caption", { class: "unseen" }, "Error of each output, as part of its budget"));
  for (const [output, error, ratio] of winner.margins) {
    const bar = element("span", { class: ratio > 1 ? "meter over" : "meter", "aria-hidden": "true" }, element("i", {}));
    bar.firstChild.style.width = `${100 * Math.min(Math.max(ratio, 0), 1)}%`;
    const room = ratio > 1 ? `${percent(ratio - 1)} over budget` : `${percent(1 - ratio)} below budget`;
    const cells = [element("th", { scope: "row" }, output), element("td", {}, bar), element("td", {}, room)];
    table.append(element("tr", { title: `error ${error.toExponential(1)}, ${percent(ratio)} of its budget` }, ...cells));
  }
  return element("div", {}, table, small(winner.case ? `nearest on case ${winner.case}` : ""));
}

function cost(kernel) {
  const { seconds, tried, total, states } = kernel.cost;
  const bar = element("span", { class: "stack", "aria-hidden": "true" });
  const list = element("span", { class: "counts" });
  for (const [state, count] of states) {
    const kind = failed(state) ? "bad" : state === "safe" ? "good" : "dim";
    const part = element("i", { class: kind });
    part.style.flexGrow = count;
    bar.append(part);
    list.append(element("span", { class: kind }, `${count} ${words(state)}`), " ");
  }
  const left = kernel.winner && !kernel.winner.complete ? " (unfinished)" : "";
  return [`${duration(seconds)} of judging, ${tried} of ${total} candidates${left}`, bar, list];
}

// --- tables ---

function configTable(kernel, numbers, caption) {
  const names = ["config", "state", "level", "time", "of fastest", "error", "registers", "spills", "shared", "judged in", "reason"];
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  const body = element("tbody", {});
  for (const number of numbers) {
    const config = kernel.configs[number];
    const figure = (name) => (config[name] === undefined ? "" : String(config[name]));
    const cells = [
      element("td", { class: "name" }, configName(config), element("code", {}, config.hash.slice(0, 12))),
      element("td", {}, stateBadge(config)),
      element("td", { class: "figure" }, config.level),
      element("td", { class: "figure" }, milliseconds(config.ms)),
      element("td", { class: "figure" }, config.ms !== null && kernel.best ? times(kernel.best, config.ms) : ""),
      element("td", { class: "figure" }, config.margin === undefined ? "" : percent(config.margin)),
      ...["registers", "spills", "shared"].map((name) => element("td", { class: "figure" }, figure(name))),
      element("td", { class: "figure" }, config.seconds === undefined ? "" : duration(config.seconds)),
      element("td", { class: "reason" }, config.reason || ""),
    ];
    const won = kernel.winner && kernel.winner.config === number;
    body.append(element("tr", { class: won ? "won" : null }, ...cells));
  }
  const table = element("table", { class: "configs" }, element("caption", {}, caption), element("thead", {}, head), body);
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, table);
}

// What has no place in the map, foreign implementations above all: one row each, coloured as the map's cells are.
function otherRows(kernel, title) {
  const body = element("tbody", {});
  for (const number of kernel.rest) {
    const shown = cellOf(kernel, { configs: [number] });
    const config = shown.best;
    const name = [element("b", {}, `${config.implementation}/${config.variant}`), small(config.params)];
    const time = element("td", { class: kindsOf(shown).filter(Boolean).join(" ") }, element("b", {}, shown.text), element("span", {}, shown.under));
    const told = element("td", { class: "told" }, stateBadge(config), " ");
    if (shown.winner) told.append(badge("best", "winner"), " ");
    if (failed(config.state) && config.ms !== null) told.append(`timed ${milliseconds(config.ms)} `);
    if (config.margin !== undefined) told.append(`worst error ${percent(config.margin)} of its budget`);
    if (config.reason) told.append(element("small", { class: "reason" }, config.reason));
    body.append(element("tr", {}, element("th", { scope: "row" }, ...name), time, told));
  }
  return element("table", { class: "others" }, element("caption", {}, title), body);
}

function failureList(kernel) {
  const found = failures(kernel);
  if (!found.length) return null;
  const list = element("ul", { class: "failures" });
  for (const row of found.slice(0, 4)) {
    list.append(element("li", {}, badge("bad", `${row.count} ${words(row.state)}`), " ", element("span", { class: "reason" }, row.reason)));
  }
  if (found.length > 4) list.append(element("li", {}, `and ${found.length - 4} more reasons, in the table of all configs`));
  return list;
}

function lazyDetails(title, draw) {
  const made = element("details", { class: "more" }, element("summary", {}, title));
  made.draw = () => {
    if (made.childElementCount === 1) made.append(draw());
  };
  made.addEventListener("toggle", () => made.open && made.draw());
  return made;
}

// --- one problem ---

function kernelSection(kernel) {
  const head = element("h3", {}, kernel.name, " ", element("code", { title: "hash of the key" }, kernel.key.slice(0, 12)));
  const left = element("div", { class: "left" });
  if (kernel.cells.length) left.append(heatMap(kernel));
  const failing = failureList(kernel);
  if (failing) left.append(failing);
  if (kernel.rest.length) {
    const title = kernel.cells.length ? "Implementations without these tiles" : "Implementations";
    left.append(otherRows(kernel, title));
  }
  const everything = lazyDetails(`All ${kernel.configs.length} configs`, () =>
    configTable(kernel, [...kernel.configs.keys()], `All configs of ${kernel.name}, the fastest first`),
  );
  return element("section", { class: "kernel", "data-kernel": kernel.name }, head, element("div", { class: "halves" }, left, facts(kernel)), everything);
}

function aboutList(problem) {
  const list = element("dl", { class: "about" });
  for (const [name, value] of [["problem", problem.hash], ...problem.about]) {
    list.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }
  return list;
}

function problemCard(problem) {
  const flags = problemFlags(problem);
  const bad = problem.kernels.reduce((sum, kernel) => sum + kernel.configs.filter((config) => failed(config.state)).length, 0);
  const marks = element("span", { class: "marks" });
  if (problem.ms !== null) marks.append(element("b", {}, milliseconds(problem.ms)));
  if (problem.level !== null) marks.append(badge(problem.level >= 2 && !flags["unsafe winner"] ? "good" : "dim", level(problem.level)));
  if (flags["no winner"]) marks.append(badge("bad", "no winner"));
  if (flags["unsafe winner"]) marks.append(badge("bad", "unsafe winner"));
  if (bad) marks.append(badge("warn", `${bad} failed`));
  if (flags["unfinished sweep"]) marks.append(badge("dim", "unfinished"));
  if (flags.pinned) marks.append(badge("pin", "pinned"));
  const title = element("span", { class: "title" }, element("span", { role: "heading", "aria-level": 2 }, problem.title));
  title.append(element("small", {}, `${problem.facets.gpu} · ${problem.kernels.map((kernel) => kernel.name).join(", ")} · ${problem.when}`));
  const card = element("details", { class: "problem" }, element("summary", {}, title, marks));
  card.draw = () => {
    if (card.childElementCount > 1) return;
    const about = lazyDetails("What it is", () => aboutList(problem));
    card.append(element("div", { class: "inside" }, about, ...problem.kernels.map(kernelSection)));
  };
  return card;
}
