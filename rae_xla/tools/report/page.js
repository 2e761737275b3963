"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const state = { smoothing: 0.6, raw: true, log: false, hidden: new Set() };
const charts = [];

// ------------------------------------------------------------------ elements and numbers

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

const color = (index) => `var(--c${index % 8})`;
const dot = (index) => make("i", { class: "dot", style: `--color:${color(index)}` });
const visible = () => data.runs.map((_, i) => i).filter((i) => !state.hidden.has(i));

function number(value) {
  if (value === undefined || value === null) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en");
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${Number((value / 1e9).toPrecision(4))}G`;
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return String(Number(value.toPrecision(4)));
}

// ------------------------------------------------------------------ curves

/** Exponential moving average with bias correction. */
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    sum = sum * weight + value;
    total = total * weight + 1;
    return sum / total;
  });
}

function quantile(values, fraction) {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.min(sorted.length - 1, Math.floor(fraction * sorted.length))];
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const factors = decades < 1 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : decades < 3 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low && tick <= high) found.push(tick);
    }
  return found.length > 1 ? found : [low, high];
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

class Chart {
  constructor(metric, index) {
    this.metric = metric;
    this.index = index;
    this.svg = makeSvg("svg", { tabindex: "0", role: "img" });
    this.tip = make("div", { class: "tip", role: "status", hidden: "" });
    const caption = make("figcaption", {}, make("b", {}, metric.name));
    if (metric.unit) caption.append(make("span", { class: "unit" }, metric.unit));
    caption.append(make("span", { class: "about", title: metric.about }, metric.about));
    this.element = make("figure", { class: "card chart" }, caption, this.svg, this.tip);
    this.svg.addEventListener("pointermove", (event) => this.pointAt(event));
    this.svg.addEventListener("pointerdown", (event) => this.pointAt(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.render()).observe(this.svg);
    charts.push(this);
  }

  /** Curves of the visible runs that have the metric. */
  curves() {
    return visible().filter((run) => data.runs[run].metrics[this.metric.name]).map((run) => {
      const [steps, raw] = data.runs[run].metrics[this.metric.name];
      const few = raw.length <= 12; // sparse values, such as evaluations, are not smoothed
      const exact = few || this.metric.name.startsWith("opt/"); // nor are schedules
      return { run, steps, raw, smooth: exact ? raw : smoothed(raw, state.smoothing), few };
    });
  }

  range(curves) {
    let low = Infinity, high = -Infinity;
    for (const { raw, smooth } of curves) {
      const ends = [quantile(raw, 0.01), quantile(raw, 0.99)]; // outliers must not determine the range
      for (const value of [...smooth.slice(Math.min(3, smooth.length - 1)), ...(state.raw ? ends : [])]) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
    const log = state.log && curves.every(({ raw }) => raw.every((value) => value > 0));
    if (low === high) {
      const margin = log ? low / 2 : Math.abs(low) / 2 || 1;
      [low, high] = [low - margin, high + margin];
    } else if (log) {
      const margin = (high / low) ** 0.06;
      [low, high] = [low / margin, high * margin];
    } else {
      const margin = (high - low) * 0.06;
      [low, high] = [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
    }
    return { low, high, log };
  }

  render() {
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (!width) return;
    const curves = this.curves();
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("aria-label", this.description(curves));
    this.shown = curves;
    if (!curves.length) return;
    const { low, high, log } = this.range(curves);
    const first = Math.min(...curves.map((c) => c.steps[0]));
    const last = Math.max(...curves.map((c) => c.steps[c.steps.length - 1]), first + 1);
    const rows = log ? logTicks(low, high) : ticks(low, high, 5);
    const labels = rows.map(short);
    const box = { left: 10 + 6.4 * Math.max(...labels.map((l) => l.length)), right: width - 8, top: 8, bottom: height - 22 };
    const scale = log ? Math.log : (value) => value;
    this.box = box;
    this.x = (step) => box.left + ((step - first) / (last - first)) * (box.right - box.left);
    this.step = (x) => first + ((x - box.left) / (box.right - box.left)) * (last - first);
    this.y = (value) => box.bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (box.bottom - box.top);
    rows.forEach((tick, i) => {
      const y = this.y(tick);
      this.svg.append(makeSvg("line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y }));
      this.svg.append(makeSvg("text", { x: box.left - 6, y: y + 4, "text-anchor": "end" }, labels[i]));
    });
    for (const tick of ticks(first, last, Math.max(2, Math.floor(width / 70)))) {
      if (!Number.isInteger(tick)) continue;
      const x = this.x(tick), end = x > box.right - 14;
      this.svg.append(makeSvg("text", { x: end ? box.right : x, y: height - 6, "text-anchor": end ? "end" : "middle" }, short(tick)));
    }
    const clip = `clip-${this.index}`;
    const shape = makeSvg("clipPath", { id: clip });
    shape.append(makeSvg("rect", { x: box.left - 4, y: box.top - 4, width: box.right - box.left + 8, height: box.bottom - box.top + 8 }));
    const group = makeSvg("g", { "clip-path": `url(#${clip})` });
    this.svg.append(shape, group);
    for (const curve of curves) {
      const stroke = color(curve.run);
      if (state.raw && !curve.few && state.smoothing > 0)
        group.append(makeSvg("path", { class: "raw", stroke, d: this.path(curve.steps, curve.raw) }));
      group.append(makeSvg("path", { class: "smooth", stroke, d: this.path(curve.steps, curve.smooth) }));
      if (curve.few)
        curve.steps.forEach((step, i) => group.append(makeSvg("circle", { cx: this.x(step), cy: this.y(curve.raw[i]), r: 3, fill: stroke })));
    }
    this.marks = makeSvg("g");
    this.svg.append(this.marks);
  }

  path(steps, values) {
    return values.map((value, i) => `${i ? "L" : "M"}${this.x(steps[i]).toFixed(1)} ${this.y(value).toFixed(1)}`).join("");
  }

  description(curves) {
    const parts = curves.map(({ run, steps, raw }) =>
      `${data.runs[run].name}: ${number(raw[0])} at step ${steps[0]}, ${number(raw[raw.length - 1])} at step ${steps[steps.length - 1]}`);
    return `${this.metric.name}. ${parts.join("; ")}. Press the arrow keys to read values.`;
  }

  pointAt(event) {
    if (this.shown?.length) this.show(this.step(event.clientX - this.svg.getBoundingClientRect().left));
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !this.shown?.length) return;
    event.preventDefault();
    const steps = this.shown[0].steps;
    const from = this.at === undefined ? (by > 0 ? -1 : steps.length) : nearest(steps, this.at);
    this.show(steps[Math.max(0, Math.min(steps.length - 1, from + by))]);
  }

  show(step) {
    const found = this.shown.map((curve) => ({ ...curve, i: nearest(curve.steps, step) }));
    const closest = found.reduce((a, b) => (Math.abs(a.steps[a.i] - step) <= Math.abs(b.steps[b.i] - step) ? a : b));
    this.at = closest.steps[closest.i];
    const x = this.x(this.at);
    this.marks.replaceChildren(makeSvg("line", { class: "cursor", x1: x, x2: x, y1: this.box.top, y2: this.box.bottom }));
    this.tip.replaceChildren(make("div", {}, `step ${number(this.at)}`));
    for (const { run, steps, raw, smooth, i, few } of found) {
      const y = this.y(smooth[i]);
      if (y >= this.box.top - 4 && y <= this.box.bottom + 4)
        this.marks.append(makeSvg("circle", { cx: this.x(steps[i]), cy: y, r: 3.5, fill: color(run) }));
      const row = make("div", {}, dot(run), `${data.runs.length > 1 ? data.runs[run].name + "  " : ""}`, make("b", {}, number(smooth[i])));
      if (!few && state.smoothing > 0) row.append(make("span", {}, `  raw ${number(raw[i])}`));
      if (steps[i] !== this.at) row.append(make("span", {}, `  (step ${number(steps[i])})`));
      this.tip.append(row);
    }
    this.tip.hidden = false;
    // Above the plot, so that it covers no curve.
    const limit = this.element.clientWidth - this.tip.offsetWidth - 6;
    this.tip.style.left = `${Math.max(6, Math.min(limit, x + 12 - this.tip.offsetWidth / 2))}px`;
    const top = this.svg.getBoundingClientRect().top - this.element.getBoundingClientRect().top;
    this.tip.style.top = `${top - this.tip.offsetHeight + 6}px`;
  }

  leave() {
    this.tip.hidden = true;
    this.at = undefined;
    this.marks?.replaceChildren();
  }
}

// ------------------------------------------------------------------ sections

function section(title, small, ...content) {
  const heading = make("h2", {}, title);
  if (small) heading.append(" ", make("small", {}, small));
  main.append(make("section", {}, heading, ...content));
}

const GROUPS = [
  ["Training", ["train/"]],
  ["Quality", ["eval/"]],
  ["Throughput", ["perf/"]],
  ["Learning rates", ["opt/"]],
  ["Checkpoints and data", ["ckpt/", "data/"]],
];
const FIRST_METRICS = ["perf/images_per_second", "perf/data_wait", "perf/step_time"];
const HIDDEN_METRICS = ["train/epoch", "opt/disc_count"]; // mere counters

function curveSection([title, prefixes]) {
  let metrics = data.metrics.filter(({ name }) => prefixes.some((prefix) => name.startsWith(prefix)) && !HIDDEN_METRICS.includes(name));
  // With a single chip, throughput and throughput per chip are the same curve.
  const throughput = "perf/images_per_second", text = JSON.stringify;
  const duplicate = (name) => name === `${throughput}_per_chip` && data.runs.every((run) => text(run.metrics[name]) === text(run.metrics[throughput]));
  metrics = metrics.filter(({ name }) => !duplicate(name));
  const rank = ({ name }) => (FIRST_METRICS.includes(name) ? FIRST_METRICS.indexOf(name) : FIRST_METRICS.length);
  metrics.sort((a, b) => rank(a) - rank(b));
  const isZero = ({ name }) => data.runs.every((run) => (run.metrics[name]?.[1] ?? []).every((value) => value === 0));
  const zero = metrics.filter(isZero), shown = metrics.filter((metric) => !isZero(metric));
  if (!metrics.length) return;
  const grid = make("div", { class: title === "Training" ? "charts lead" : "charts" }, ...shown.map((metric) => new Chart(metric, charts.length).element));
  const content = [grid];
  if (zero.length) content.push(make("p", { class: "note" }, `Always zero: ${zero.map((metric) => metric.name).join(", ")}.`));
  section(title, "", ...content);
}

function otherSection() {
  const known = GROUPS.flatMap(([, prefixes]) => prefixes);
  const others = data.metrics.filter(({ name }) => !known.some((prefix) => name.startsWith(prefix))).map(({ name }) => name);
  if (others.length) curveSection(["Other metrics", others]);
}

function runCards() {
  const container = document.getElementById("runs");
  data.runs.forEach((run, i) => {
    const box = make("input", { type: "checkbox", id: `run-${i}` });
    box.checked = true;
    const last = (name) => run.metrics[name]?.[1].at(-1);
    const median = (name) => run.metrics[name] && quantile(run.metrics[name][1], 0.5);
    const numbers = make("dl", { class: "numbers" });
    const add = (label, value) => value !== "–" && numbers.append(make("div", {}, make("dt", {}, label), make("dd", {}, value)));
    add(run.steps ? `of ${number(run.steps)} steps` : "steps", number(run.last_step));
    add("loss", number(last("train/loss")));
    for (const name of ["eval/fid", "eval/rfid", "eval/psnr"]) add(name.slice(5), number(last(name)));
    add("images/s", number(median("perf/images_per_second")));
    add("data wait", run.metrics["perf/data_wait"] ? `${(100 * median("perf/data_wait")).toFixed(1)}%` : "–");
    add("skipped steps", number((run.metrics["train/skipped"]?.[1] ?? []).reduce((a, b) => a + b, 0) || undefined));
    if (run.starts > 1) add("starts", number(run.starts));
    const card = make("div", { class: "card run", style: `--color:${color(i)}` },
      make("label", { for: `run-${i}` }, box, run.name),
      make("p", { class: "where" }, [run.stage, run.folder].filter(Boolean).join(" · ")), numbers);
    if (run.last_step === null) card.append(make("p", { class: "note" }, "No steps yet."));
    box.addEventListener("change", () => {
      box.checked ? state.hidden.delete(i) : state.hidden.add(i);
      card.classList.toggle("off", !box.checked);
      update();
    });
    container.append(card);
  });
}

function sampleSection() {
  const steps = [...new Set(data.runs.flatMap((run) => run.images.map((image) => image.step)))].sort((a, b) => a - b);
  if (!steps.length) return;
  const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "step of the images" });
  const stepText = make("output", {}), play = make("button", { type: "button" }, "Play");
  const frames = data.runs.map((run, i) => {
    const image = make("img", { alt: "" }), step = make("span", {});
    const frame = make("figure", { class: "sample" },
      make("figcaption", {}, dot(i), `${run.name} `, step), make("div", { class: "scroll", tabindex: "0" }, image));
    return { run, i, image, step, frame };
  }).filter(({ run }) => run.images.length);
  const card = make("div", { class: "card" }, make("div", { class: "stepper" }, play, slider, stepText), ...frames.map((f) => f.frame));
  const show = () => {
    const step = steps[slider.value];
    stepText.textContent = `step ${number(step)}`;
    slider.setAttribute("aria-valuetext", stepText.textContent);
    const available = card.clientWidth - 34;
    for (const { run, i, image, step: label, frame } of frames) {
      const sample = run.images.filter((candidate) => candidate.step <= step).at(-1) ?? run.images[0];
      frame.hidden = state.hidden.has(i);
      image.src = sample.src;
      image.alt = `${run.name}: images at step ${sample.step}`;
      image.style.width = `${Math.max(sample.width, Math.min(2 * sample.width, available))}px`;
      label.textContent = `step ${number(sample.step)}`;
    }
  };
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === steps.length - 1) slider.value = 0;
    play.textContent = "Stop";
    show();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === steps.length - 1) stop();
    }, 600);
  });
  slider.addEventListener("input", () => { stop(); show(); });
  section("Samples over time", "", card);
  new ResizeObserver(show).observe(card);
  listeners.push(show);
}

const HIGHER_IS_BETTER = /psnr|ssim|precision|recall|inception|accuracy|coverage|density|(^|\/)is(_lite)?$/;
const LOWER_IS_BETTER = /fid|lpips|l1|loss|kid|mmd|fdd|fd_/;

function evaluationSection() {
  const rows = data.runs.flatMap((run, i) => run.evaluations.map((e) => ({ i, ...e })));
  if (!rows.length) return;
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.values)))];
  const best = Object.fromEntries(names.map((name) => {
    const values = rows.map((row) => row.values[name]).filter((value) => value !== undefined);
    const pick = HIGHER_IS_BETTER.test(name) ? Math.max : LOWER_IS_BETTER.test(name) ? Math.min : null;
    return [name, pick && values.length > 1 ? pick(...values) : undefined];
  }));
  const head = make("tr", {}, ...["run", "step"].map((t) => make("th", { scope: "col" }, t)), ...names.map((n) => make("th", { scope: "col", class: "number" }, n)));
  const body = rows.map((row) => make("tr", {}, make("th", { scope: "row" }, dot(row.i), data.runs[row.i].name), make("td", { class: "number" }, number(row.step)),
    ...names.map((name) => make("td", { class: row.values[name] !== undefined && row.values[name] === best[name] ? "number best" : "number" }, number(row.values[name])))));
  section("Evaluation", Object.values(best).some((b) => b !== undefined) ? "the best value of each column is highlighted" : "",
    make("div", { class: "card scroll", tabindex: "0", style: "max-height:460px" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body))));
}

/** Epochs until the FID of samples without guidance was at most k. */
function epochsToFid() {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.epochs_to_fid)))];
  if (!names.length) return;
  const head = make("tr", {}, make("th", { scope: "col" }, "run"), ...names.map((n) => make("th", { scope: "col", class: "number" }, n)));
  const body = data.runs.map((run, i) => make("tr", {}, make("th", { scope: "row" }, dot(i), run.name),
    ...names.map((name) => make("td", { class: "number" }, number(run.epochs_to_fid[name])))));
  section("Epochs to reach an FID", "of samples without guidance; against the reference of each run",
    make("div", { class: "card scroll", tabindex: "0" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body))));
}

/** A dotted name that may be broken after each dot. */
const breakable = (name) => name.split(".").flatMap((part, i) => (i ? [".", make("wbr"), part] : [part]));

function comparison(rows) {
  const head = make("tr", {}, make("th", { scope: "col" }, ""), ...data.runs.map((run, i) => make("th", { scope: "col" }, dot(i), run.name)));
  const body = rows.map((row) => make("tr", {}, make("th", { scope: "row" }, ...breakable(row.key)), ...row.values.map((value) => make("td", {}, value))));
  return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

function settingsSection() {
  if (!data.settings.length) return;
  const different = data.settings.filter((row) => row.differs), several = data.runs.length > 1;
  const all = make("details", {}, make("summary", {}, `All ${data.settings.length} settings`), comparison(data.settings));
  const card = make("div", { class: "card" });
  if (different.length) card.append(comparison(different));
  else if (several) card.append(make("p", { class: "note" }, "The runs have the same settings."));
  card.append(all);
  section(several ? "Differences in the settings" : "Settings", "", card);
}

function environmentSection() {
  if (data.environment.length) section("Environment", "of the last start", make("div", { class: "card" }, comparison(data.environment)));
}

// ------------------------------------------------------------------ page

const listeners = [];

function update() {
  for (const chart of charts) chart.render();
  for (const listener of listeners) listener();
}

function controls() {
  const bar = document.getElementById("controls");
  const smoothing = document.getElementById("smoothing"), value = document.getElementById("smoothing-value");
  smoothing.addEventListener("input", () => {
    state.smoothing = Number(smoothing.value);
    value.textContent = state.smoothing.toFixed(2);
    update();
  });
  for (const name of ["raw", "log"]) {
    const box = document.getElementById(name);
    box.addEventListener("change", () => { state[name] = box.checked; update(); });
  }
  if (data.runs.length > 1) data.runs.forEach((run, i) => bar.append(make("span", { class: "key" }, dot(i), run.name)));
  bar.hidden = !data.metrics.length;
}

runCards();
controls();
const [training, quality, ...others] = GROUPS;
curveSection(training);
sampleSection();
curveSection(quality);
evaluationSection();
epochsToFid();
others.forEach(curveSection);
otherSection();
settingsSection();
environmentSection();
if (!data.metrics.length) main.append(make("p", { class: "note" }, "No metrics yet: they appear with the first log line of the run."));

const footer = document.getElementById("footer");
if (data.warnings.length) footer.append(make("ul", {}, ...data.warnings.map((warning) => make("li", {}, warning))));
footer.append(make("p", {}, `rae_xla ${data.version}, ${data.created}`));
