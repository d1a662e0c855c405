"use strict";
// What the page decides, as plain functions of plain data: none of them knows a document, so all run in any engine.

// A cell's colour by its speed, as part of the fastest safe config's: the first bound that it reaches.
const STEPS = [0.97, 0.9, 0.8, 0.65, 0.5, 0];
const SHORT = {
  out_of_bounds: "bounds",
  compile_error: "compile",
  out_of_resources: "resources",
};
const FAILURES = ["wrong", "racy", "out_of_bounds", "compile_error", "out_of_resources", "crashed", "timeout", "killed"];
const LEVELS = ["not proven", "quick proof", "gate", "soak"];

function failed(state) {
  return FAILURES.includes(state);
}

function words(state) {
  return state.replaceAll("_", " ");
}

function step(best, ms) {
  return STEPS.findIndex((bound) => best / ms >= bound);
}

function significant(value, digits) {
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  return size >= digits - 1 ? String(Math.round(value)) : value.toFixed(Math.min(digits - 1 - size, 20));
}

function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 0.1 ? `${significant(value * 1000, 3)} µs` : `${significant(value, 3)} ms`;
}

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function times(best, ms) {
  const ratio = ms / best;
  return ratio > 0.995 && ratio < 1.005 ? "1.00×" : `${significant(ratio, 3)}×`;
}

function level(number) {
  return `level ${number}${LEVELS[number] ? ` (${LEVELS[number]})` : ""}`;
}

function percent(part) {
  const value = part * 100;
  return `${Math.abs(value) < 10 ? value.toFixed(1) : Math.round(value)} %`;
}

// What one cell of the heat map shows: its best config, the state that colours it, and how many others failed.
function cellOf(kernel, cell) {
  const best = kernel.configs[cell.configs[0]];
  const bad = cell.configs.filter((number) => failed(kernel.configs[number].state)).length;
  const holds = (part) => Boolean(part) && cell.configs.includes(part.config);
  const safe = best.state === "safe" && best.ms !== null;
  return {
    best,
    bad,
    of: cell.configs.length,
    kind: failed(best.state) ? "failed" : safe && kernel.best ? `step-${step(kernel.best, best.ms)}` : "unproven",
    winner: holds(kernel.winner) && !failed(kernel.configs[kernel.winner.config].state),
    lost: holds(kernel.winner) && failed(kernel.configs[kernel.winner.config].state),
    pinned: holds(kernel.pin),
    text: failed(best.state) ? SHORT[best.state] || best.state : best.ms === null ? best.state : milliseconds(best.ms),
    under: failed(best.state) ? "" : safe && kernel.best ? times(kernel.best, best.ms) : best.ms === null ? "" : best.state,
  };
}

// A cell in words, for who cannot see it.
function cellLabel(cell, shown) {
  const parts = [`${cell.m} by ${cell.n}, ${cell.warps} warps: ${failed(shown.best.state) ? words(shown.best.state) : shown.text}`];
  if (shown.under) parts.push(shown.under.replace("×", " times the fastest"));
  if (shown.winner) parts.push("the winner");
  if (shown.lost) parts.push("the winner, which failed since");
  if (shown.pinned) parts.push("pinned");
  if (shown.bad) parts.push(`${shown.bad} of ${shown.of} unsafe`);
  return parts.join(", ");
}

// The failures of a kernel, told once for each verdict and reason: those that most configs share come first.
function failures(kernel) {
  const found = new Map();
  for (const config of kernel.configs) {
    if (!failed(config.state)) continue;
    const reason = config.reason || "no reason given";
    const name = JSON.stringify([config.state, reason]);
    const row = found.get(name) || { state: config.state, reason, count: 0 };
    row.count += 1;
    found.set(name, row);
  }
  return [...found.values()].sort((one, other) => other.count - one.count);
}

function secondText(winner) {
  if (winner.behind === null) return "no other safe config has a time";
  if (winner.behind >= 0) return `${percent(winner.behind)} slower`;
  return `stored as ${percent(-winner.behind)} faster: its time is of the quick rounds, the finalists were then timed side by side`;
}

function kernelState(kernel) {
  return kernel.winner ? (kernel.winner.level >= 2 ? "proven" : "unproven") : "no winner";
}

function problemFlags(problem) {
  const kernels = problem.kernels;
  const unsafe = (kernel) => kernel.configs.some((config) => failed(config.state));
  const lost = (kernel) => kernel.winner && failed(kernel.configs[kernel.winner.config].state);
  return {
    "any failed config": kernels.some(unsafe),
    "unsafe winner": kernels.some(lost),
    "no winner": kernels.some((kernel) => !kernel.winner),
    "unfinished sweep": kernels.some((kernel) => kernel.winner && !kernel.winner.complete),
    pinned: kernels.some((kernel) => kernel.pin),
    "foreign winner": kernels.some((kernel) => kernel.winner && kernel.configs[kernel.winner.config].implementation !== "triton"),
  };
}

function problemSeconds(problem) {
  return problem.kernels.reduce((sum, kernel) => sum + kernel.cost.seconds, 0);
}

// The part of its budget that the worst output of any winner takes; -1 where none is known.
function worstMargin(problem) {
  return Math.max(-1, ...problem.kernels.flatMap((kernel) => (kernel.winner ? kernel.winner.margins.map((row) => row[2]) : [])));
}

const ORDERS = {
  "GPU, dtype, dims": null,
  "newest first": (problem) => -problem.newest,
  "longest sweep first": (problem) => -problemSeconds(problem),
  "least margin first": (problem) => -worstMargin(problem),
  "slowest first": (problem) => -(problem.ms || 0),
};

function ordered(problems, order) {
  const by = ORDERS[order];
  return by ? [...problems].sort((one, other) => by(one) - by(other)) : problems;
}

function texts(value, into) {
  if (typeof value === "string") into.push(value);
  else if (value && typeof value === "object") for (const each of Object.values(value)) texts(each, into);
  return into;
}

const haystacks = new WeakMap();

function haystack(problem) {
  let found = haystacks.get(problem);
  if (found === undefined) {
    const fields = problem.about.map(([name, value]) => `${name}=${value}`);
    found = [...fields, ...texts(problem, [])].join("\n").toLowerCase();
    haystacks.set(problem, found);
  }
  return found;
}

// wanted: {search, kernel, state, facets: {name: value}}, each empty for any.
function matches(problem, wanted) {
  for (const [name, value] of Object.entries(wanted.facets)) if (value && problem.facets[name] !== value) return false;
  if (wanted.kernel && !problem.kernels.some((kernel) => kernel.name === wanted.kernel)) return false;
  if (wanted.state && !problemFlags(problem)[wanted.state]) return false;
  const terms = wanted.search.toLowerCase().split(/\s+/).filter(Boolean);
  return terms.every((term) => haystack(problem).includes(term));
}

// Numbers as numbers, the rest as text.
function values(problems, pick) {
  const found = [...new Set(problems.flatMap(pick))];
  return found.sort((one, other) => one - other || (one < other ? -1 : 1));
}

function totals(problems) {
  const kernels = problems.flatMap((problem) => problem.kernels);
  const configs = kernels.flatMap((kernel) => kernel.configs);
  const bad = configs.filter((config) => failed(config.state)).length;
  const won = problems.filter((problem) => problem.kernels.some((kernel) => kernel.winner)).length;
  return [
    ["Problems", problems.length, `${won} with winners`],
    ["Kernels", kernels.length, `${kernels.filter((kernel) => kernel.winner && kernel.winner.level >= 2).length} proven`],
    ["Configs", configs.length, `${bad} failed`],
    ["Sweeps", duration(problems.reduce((sum, problem) => sum + problemSeconds(problem), 0)), "of judging"],
    ["GPUs", new Set(problems.map((problem) => problem.facets.gpu)).size, ""],
  ];
}
