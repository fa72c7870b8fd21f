"use strict";
// Draws the page's charts from the embedded data, without libraries or network access.

const runs = JSON.parse(document.getElementById("data").textContent);
const settings = { x: "step", smooth: true };
const redraws = []; // one function per chart
const crosshairs = []; // one function per chart over steps: shows the pointer's x of another chart
const one = runs.length === 1;

// --- building blocks -------------------------------------------------------------------------------------------------

function node(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function button(text, pressed, onClick) {
  const element = node("button", { type: "button", "aria-pressed": pressed }, text);
  element.addEventListener("click", onClick);
  return element;
}

function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 }).format(value);
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  if (size >= 0.001 || size === 0) return String(Number(value.toPrecision(4)));
  return value.toExponential(1).replace("e-", "e−");
}

const words = (name) => name.replaceAll("_", " ");
const colour = (i) => `var(--run-${i % 6})`;
const finite = (values) => values.filter((v) => v !== null && Number.isFinite(v));

function span(values) {
  let low = Infinity, high = -Infinity; // Math.min(...values) would overflow the stack
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  return low > high ? [0, 1] : [low, high];
}

function scale([low, high], [from, to], log) {
  const f = log ? Math.log10 : (v) => v;
  const length = f(high) - f(low);
  return (v) => (length ? from + ((f(v) - f(low)) * (to - from)) / length : (from + to) / 2);
}

function ticks(low, high, count, log) {
  if (log && low > 0) {
    const decades = Math.log10(high / low);
    const steps = decades > 4 ? [1] : decades > 1.5 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const s of steps) found.push(s * 10 ** e);
    return found.filter((t) => t >= low * 0.999 && t <= high * 1.001);
  }
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// --- tooltip ---------------------------------------------------------------------------------------------------------

const tip = document.getElementById("tip");

function showTip(x, y, title, rows) {
  const lines = rows.map(([label, value, hue]) => {
    const name = node("span", {}, label);
    if (hue) name.prepend(node("span", { class: "swatch", style: `background:${hue}` }));
    return node("div", {}, name, node("b", {}, value));
  });
  tip.replaceChildren(node("div", {}, title), ...lines);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${x + 16 + box.width > innerWidth ? Math.max(4, x - 16 - box.width) : x + 16}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - box.height - 4))}px`;
}

const hideTip = () => { tip.hidden = true; };

// --- line charts -----------------------------------------------------------------------------------------------------

function smoothed(values) {
  const keep = 1 - 1 / Math.max(1, values.length / 40);
  let mean = 0, weight = 0;
  return values.map((v) => {
    if (v === null) return null;
    mean = keep * mean + (1 - keep) * v;
    weight = keep * weight + (1 - keep);
    return mean / weight;
  });
}

function path(xs, ys, sx, sy, allowed) {
  let text = "", pen = "M";
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null || !allowed(ys[i])) { pen = "M"; continue; }
    text += `${pen}${sx(xs[i]).toFixed(1)} ${sy(ys[i]).toFixed(1)}`;
    pen = "L";
  }
  return text;
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const m = (low + high) >> 1; if (xs[m] < x) low = m; else high = m; }
  return xs.length && Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

// spec: title, hint, log (initial state), smooth, names (categories instead of steps), series: [{label, hue, dash, xs, ys, tokens}]
function lineChart(holder, spec) {
  const hidden = new Set();
  let log = spec.log ?? false;
  const svg = shape("svg", { role: "img", tabindex: 0, "aria-label": description(spec) });
  const caption = node("figcaption", {}, spec.title, node("small", {}, spec.hint ?? ""));
  const legend = node("div", { class: "legend" });
  const figure = node("figure", { "data-chart": spec.title }, caption, svg, ...(spec.series.length > 1 ? [legend] : []));
  holder.append(figure);
  if (!spec.names) caption.append(button("log", log, (e) => {
    log = !log;
    e.target.setAttribute("aria-pressed", log);
    draw();
  }));
  spec.series.forEach((s, i) => {
    const line = shape("line", { x1: 0, y1: 4, x2: 22, y2: 4, stroke: s.hue, "stroke-width": 2, "stroke-dasharray": s.dash });
    const entry = button("", true, () => {
      if (!hidden.delete(i)) hidden.add(i);
      entry.setAttribute("aria-pressed", !hidden.has(i));
      draw();
    });
    entry.append(shape("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, line), s.label);
    legend.append(entry);
  });

  let drawn = null; // scales, crosshair and series of the last drawing
  const across = (s) => (spec.names || settings.x === "step" ? s.xs : s.xs.map((x) => x * (s.tokens ?? 1)));

  function draw() {
    const width = figure.clientWidth - 32 || 560, height = 230;
    const box = { left: 52, right: width - 8, top: 10, bottom: height - 24 };
    const shown = spec.series.map((s, i) => ({ ...s, i, across: across(s) })).filter((s) => !hidden.has(s.i));
    const allowed = log ? (v) => v > 0 : () => true;
    let [low, high] = span(shown.flatMap((s) => finite(s.ys).filter(allowed)));
    if (low === high) { const by = Math.abs(low) * 0.05 || 0.5; low -= by; high += by; }
    else if (!log) { const by = (high - low) * 0.06; low = low >= 0 && low < by ? 0 : low - by; high += by; }
    const reach = spec.names ? [-0.3, spec.names.length - 0.7] : span(shown.flatMap((s) => s.across));
    const sx = scale(reach, [box.left, box.right]), sy = scale([low, high], [box.bottom, box.top], log);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    for (const t of ticks(low, high, 5, log)) {
      svg.append(shape("line", { class: "grid", x1: box.left, x2: box.right, y1: sy(t), y2: sy(t) }));
      svg.append(shape("text", { x: box.left - 6, y: sy(t) + 4, "text-anchor": "end" }, format(t)));
    }
    const marks = spec.names ? spec.names.map((_, i) => i) : ticks(...reach, Math.max(2, width / 110));
    for (const t of marks) {
      const text = spec.names ? spec.names[t] : format(t);
      svg.append(shape("text", { x: sx(t), y: height - 6, "text-anchor": "middle" }, text));
    }
    const smooth = spec.smooth && settings.smooth;
    for (const s of shown) {
      const look = { stroke: s.hue, "stroke-dasharray": s.dash };
      if (smooth) svg.append(shape("path", { ...look, class: "raw", d: path(s.across, s.ys, sx, sy, allowed) }));
      const kept = s.ys.map((v) => (v !== null && allowed(v) ? v : null));
      const ys = smooth ? smoothed(kept) : kept;
      svg.append(shape("path", { ...look, class: "curve", d: path(s.across, ys, sx, sy, allowed) }));
      if (s.ys.length <= 60) for (let i = 0; i < s.ys.length; i++)
        if (s.ys[i] !== null && allowed(s.ys[i]))
          svg.append(shape("circle", { class: smooth ? "dot soft" : "dot", cx: sx(s.across[i]), cy: sy(s.ys[i]), r: 2.5, fill: s.hue }));
    }
    const cross = shape("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
    svg.append(cross);
    drawn = { sx, back: scale([box.left, box.right], reach), reach, cross, shown, box };
  }

  function mark(x) {
    if (!drawn) return;
    const out = x === null || x < drawn.reach[0] || x > drawn.reach[1];
    drawn.cross.setAttribute("visibility", out ? "hidden" : "visible");
    if (!out) { drawn.cross.setAttribute("x1", drawn.sx(x)); drawn.cross.setAttribute("x2", drawn.sx(x)); }
  }

  function point(x, clientX, clientY) {
    const rows = drawn.shown.filter((s) => s.xs.length).map((s) => [s.label, format(s.ys[nearest(s.across, x)]), s.hue]);
    if (!rows.length) return;
    const first = drawn.shown.find((s) => s.xs.length);
    const at = nearest(first.across, x), exact = first.across[at];
    const title = spec.names ? spec.names[at] : `${settings.x === "step" ? "step" : "tokens"} ${format(exact)}`;
    showTip(clientX, clientY, title, rows);
    if (spec.names) mark(exact); else for (const show of crosshairs) show(exact);
    return at;
  }

  const leave = () => { hideTip(); mark(null); if (!spec.names) for (const show of crosshairs) show(null); };
  svg.addEventListener("pointermove", (e) => {
    const box = svg.getBoundingClientRect();
    point(drawn.back(e.clientX - box.left), e.clientX, e.clientY);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  let key = 0;
  svg.addEventListener("keydown", (e) => { // arrow keys move along the first curve
    const first = drawn.shown.find((s) => s.xs.length);
    if (!first || !["ArrowLeft", "ArrowRight"].includes(e.key)) return;
    e.preventDefault();
    key = Math.max(0, Math.min(first.xs.length - 1, key + (e.key === "ArrowRight" ? 1 : -1)));
    const box = svg.getBoundingClientRect();
    point(first.across[key], box.left + drawn.sx(first.across[key]), box.top + 20);
  });
  if (!spec.names) crosshairs.push(mark);
  redraws.push(draw);
  draw();
}

function description(spec) {
  const parts = spec.series.map((s) => {
    const values = finite(s.ys);
    const [low, high] = span(values);
    return values.length
      ? `${s.label}: from ${format(values[0])} to ${format(values.at(-1))}, minimum ${format(low)}, maximum ${format(high)}`
      : `${s.label}: no values`;
  });
  return `${spec.title}. ${parts.join("; ")}`;
}

const DASHES = ["none", "7 3", "2 3", "9 3 2 3"];

// One series per run and name that has values. Names differ in colour with one run, in dashes with several.
function seriesOf(names, label = (name) => name) {
  const found = [];
  runs.forEach((run, r) => names.forEach((name, n) => {
    const curve = run.curves[name];
    if (!curve) return;
    const [xs, ys] = curve;
    const text = one ? label(name) : names.length > 1 ? `${run.label} · ${label(name)}` : run.label;
    const hue = colour(one ? n : r), dash = one ? "none" : DASHES[n % DASHES.length];
    found.push({ label: text, hue, dash, xs, ys, tokens: run.batch_tokens });
  }));
  return found;
}

function drawCurves() {
  const holder = document.getElementById("curves");
  const bySource = [...new Set(runs.flatMap((run) => Object.keys(run.curves).filter((n) => n.startsWith("val_loss/"))))];
  const charts = [
    { title: "Training loss", hint: "nats per token", names: ["loss"], smooth: true },
    { title: "Validation loss", hint: "nats per token", names: ["val_loss", ...bySource] },
    { title: "Auxiliary losses", names: ["z_loss", "distill_loss", "gate_penalty"], smooth: true },
    { title: "Learning rate", names: ["lr"] },
    { title: "Gradient norm", hint: "before clipping", names: ["grad_norm"], smooth: true, log: true },
    { title: "Throughput", hint: "tokens/s, all ranks", names: ["tokens_per_s"], smooth: true },
    runs.some((run) => run.curves.mfu) // both are the same curve in different units
      ? { title: "MFU", hint: "model FLOPs over the peak", names: ["mfu"], smooth: true }
      : { title: "Compute", hint: "model TFLOP/s per device", names: ["tflop_per_s"], smooth: true },
    { title: "Mean gate", hint: "1: all Mamba, 0: all attention", names: ["gate_mean"], smooth: true },
    { title: "Peak memory", hint: "GiB, maximum over ranks", names: ["memory_gib"] },
  ];
  const label = (name) => (name === "val_loss" ? "all" : name.replace("val_loss/", ""));
  for (const chart of charts) {
    const series = seriesOf(chart.names, label);
    if (series.length) lineChart(holder, { ...chart, names: null, series });
  }
  for (const kind of ["length", "position"]) {
    const names = [...new Set(runs.flatMap((run) => run.buckets[kind]?.names ?? []))];
    const series = runs.flatMap((run, r) => {
      const found = run.buckets[kind];
      if (!found) return [];
      const xs = found.names.map((name) => names.indexOf(name));
      return [{ label: run.label, hue: colour(r), dash: "none", xs, ys: found.losses }];
    });
    const title = `Loss by ${kind === "length" ? "document length" : "position in the document"}`;
    if (series.length) lineChart(holder, { title, hint: "last validation; bucket in tokens", names, series });
  }
  if (!holder.children.length) holder.append(node("p", { class: "note" }, "No figures were recorded."));
}

// --- heat maps -------------------------------------------------------------------------------------------------------

// spec: title, hint, unit, values (columns of rows), hue(value), ramp, say(column) for the tooltip, under (axis labels)
function heatMap(holder, spec) {
  const rows = spec.values[0]?.length ?? 0, columns = spec.values.length;
  const svg = shape("svg", { role: "img", "aria-label": `${spec.title}: ${rows} layers by ${columns} ${spec.unit}` });
  const figure = node("figure", { class: "wide", "data-map": spec.title },
    node("figcaption", {}, spec.title, node("small", {}, spec.hint)), svg, spec.ramp);
  holder.append(figure);
  const left = 30, top = 4, each = Math.max(6, Math.min(22, 420 / Math.max(rows, 1)));
  let wide = 1;
  function draw() {
    const width = figure.clientWidth - 32 || 560, height = top + rows * each + 20;
    wide = (width - left) / Math.max(columns, 1);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    const gap = wide > 5 && each > 5 ? 1 : 0;
    spec.values.forEach((column, c) => column.forEach((value, r) => {
      if (value === null) return;
      const size = { x: (left + c * wide).toFixed(2), y: top + r * each, width: (wide - gap + (gap ? 0 : 0.3)).toFixed(2), height: each - gap };
      svg.append(shape("rect", { class: "cell", ...size, style: `fill:${spec.hue(value)}` }));
    }));
    const sparse = Math.ceil(14 / each);
    for (let r = 0; r < rows; r += sparse)
      svg.append(shape("text", { x: left - 6, y: top + (r + 0.5) * each + 4, "text-anchor": "end" }, r));
    for (const [share, text, anchor] of spec.under)
      svg.append(shape("text", { x: left + share * (width - left), y: height - 4, "text-anchor": anchor }, text));
  }
  svg.addEventListener("pointermove", (e) => {
    const box = svg.getBoundingClientRect();
    const c = Math.floor((e.clientX - box.left - left) / wide), r = Math.floor((e.clientY - box.top - top) / each);
    const value = spec.values[c]?.[r];
    if (value === undefined) return hideTip();
    showTip(e.clientX, e.clientY, spec.say(c), [[`layer ${r}`, format(value)]]);
  });
  svg.addEventListener("pointerleave", hideTip);
  redraws.push(draw);
  draw();
  return () => { redraws.splice(redraws.indexOf(draw), 1); figure.remove(); };
}

const mix = (hue, share, ground) => `color-mix(in oklab, var(${hue}) ${(share * 100).toFixed(1)}%, var(${ground}))`;

// diverging around 0.5: blue for Mamba, orange for attention; the most distant value has the full colour
function leaning(values) {
  const [low, high] = span(finite(values));
  const reach = Math.max(0.02, high - 0.5, 0.5 - low);
  const hue = (g) => mix(g > 0.5 ? "--mamba" : "--attention", Math.min(1, Math.abs(g - 0.5) / reach), "--even");
  const ends = [`attention ${format(0.5 - reach)}`, `Mamba ${format(0.5 + reach)}`];
  return { hue, ramp: () => ramp("var(--attention), var(--even), var(--mamba)", ends) };
}

function rising(values) {
  const [low, high] = span(finite(values));
  const log = low > 0 && high / low > 20;
  const share = scale([low, high], [0.04, 1], log);
  const ends = [format(low), format(high) + (log ? " (log scale)" : "")];
  return { hue: (v) => mix("--high", low === high ? 0.5 : v > 0 || !log ? share(v) : 0, "--low"), ramp: () => ramp("var(--low), var(--high)", ends) };
}

function ramp(stops, [from, to]) {
  return node("div", { class: "key" }, from, node("span", { class: "ramp", style: `background:linear-gradient(to right in oklab, ${stops})` }), to);
}

const MAPS = [
  ["gate_mean", "Gate mean", "1: all Mamba, 0: all attention", leaning],
  ["gate_std", "Gate spread", "standard deviation over channels of the mean gate", rising],
  ["mamba_rms", "Mamba output", "RMS of the branch's output", rising],
  ["attention_rms", "Attention output", "RMS of the branch's output", rising],
  ["grad_norm", "Gradient norm", "over the layer's parameters, before clipping", rising],
];

function drawLayers() {
  const holder = document.getElementById("layers");
  const picker = node("div", { class: "picker", role: "group", "aria-label": "Figure shown in the heat maps" });
  const maps = node("div"), having = runs.filter((run) => run.layers.steps?.length);
  if (having.length) holder.append(picker, maps);
  let remove = [];
  function choose(index) {
    const [name, title, hint, scaling] = MAPS[index];
    [...picker.children].forEach((b, i) => b.setAttribute("aria-pressed", i === index));
    for (const each of remove) each();
    const { hue, ramp } = scaling(having.flatMap((run) => run.layers[name].flat())); // one scale for all runs
    remove = having.map((run) => {
      const { steps } = run.layers;
      return heatMap(maps, {
        title: one ? title : `${title} · ${run.label}`,
        hint: `${hint}; layer by step`,
        unit: "steps",
        values: run.layers[name],
        hue,
        ramp: ramp(),
        say: (c) => `step ${format(steps[c])}`,
        under: [[0, `step ${format(steps[0])}`, "start"], [1, format(steps.at(-1)), "end"]],
      });
    });
  }
  MAPS.forEach(([, title], i) => picker.append(button(title, false, () => choose(i))));
  if (having.length) choose(0);
  const gated = runs.filter((run) => run.channels.values);
  const { hue, ramp } = leaning(gated.flatMap((run) => run.channels.values.flat()));
  for (const run of gated) {
    const { values, step, count } = run.channels;
    const columns = values[0].map((_, c) => values.map((layer) => layer[c]));
    heatMap(holder, {
      title: one ? "Gate by channel" : `Gate by channel · ${run.label}`,
      hint: `running mean at step ${format(step)}; the ${format(count)} channels of each layer in ascending order`,
      unit: "channels",
      values: columns,
      hue,
      ramp: ramp(),
      say: (c) => `channel ${Math.round((c / Math.max(1, columns.length - 1)) * (count - 1)) + 1} of ${count}, sorted`,
      under: [[0, "minimum", "start"], [0.5, "median", "middle"], [1, "maximum", "end"]],
    });
  }
  if (!having.length && !gated.length)
    holder.append(node("p", { class: "note" }, "No layer figures were recorded; set logging.layers_every."));
}

// --- FLOPs and events ------------------------------------------------------------------------------------------------

function drawFlops() {
  const holder = document.getElementById("flops");
  const parts = [...new Set(runs.flatMap((run) => Object.keys(run.flop_share)))];
  const hue = (i) => (i < 6 ? colour(i) : `color-mix(in oklab, ${colour(i)} 50%, var(--card))`);
  for (const run of runs.filter((r) => Object.keys(r.flop_share).length)) {
    const bar = node("div", { class: "bar" }), key = node("div", { class: "key" });
    parts.forEach((part, i) => {
      const share = run.flop_share[part] ?? 0, text = `${words(part)} ${(share * 100).toFixed(1)}%`;
      bar.append(node("span", { title: text, style: `flex:${share};background:${hue(i)}` }));
      key.append(node("span", {}, node("span", { class: "swatch", style: `background:${hue(i)}` }), text));
    });
    holder.append(node("figure", { class: "wide" }, node("figcaption", {}, one ? "Model FLOPs by part" : run.label), bar, key));
  }
  if (!parts.length) holder.append(node("p", { class: "note" }, "Not recorded; set logging.layers_every."));
}

function drawTimeline() {
  const events = runs.flatMap((run, r) => run.events.map((event) => ({ ...event, run, r })));
  const holder = document.getElementById("timeline");
  if (!events.length) return holder.append(node("p", { class: "note" }, "No checkpoints or incidents."));
  const kinds = [...new Set(events.map((e) => e.kind))].sort((a, b) => (b === "checkpoint") - (a === "checkpoint"));
  const svg = shape("svg", { role: "img", "aria-label": `${events.length} events over the steps; the table below lists the incidents` });
  const figure = node("figure", { class: "wide", "data-chart": "Timeline" }, svg);
  holder.append(figure);
  const last = Math.max(1, ...events.map((e) => e.step), ...runs.map((run) => run.curves.loss?.[0].at(-1) ?? 0));
  function draw() {
    const width = figure.clientWidth - 32 || 560, each = 26, height = kinds.length * each + 24, left = 130;
    const sx = scale([0, last], [left, width - 14]);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    kinds.forEach((kind, k) => {
      const y = k * each + each / 2;
      svg.append(shape("line", { class: "grid", x1: left, x2: width - 14, y1: y, y2: y }));
      svg.append(shape("text", { x: left - 14, y: y + 4, "text-anchor": "end" }, words(kind)));
    });
    for (const t of ticks(0, last, Math.max(2, width / 110)))
      svg.append(shape("text", { x: sx(t), y: height - 4, "text-anchor": "middle" }, format(t)));
    for (const event of events) {
      const y = kinds.indexOf(event.kind) * each + each / 2;
      const dot = shape("circle", { class: "event", cx: sx(event.step), cy: y, r: 6, fill: colour(event.r) });
      const rows = [[event.message, ""], ...(event.when ? [[event.when, ""]] : []), ...(one ? [] : [[event.run.label, "", colour(event.r)]])];
      dot.addEventListener("pointerenter", (e) => showTip(e.clientX, e.clientY, `step ${format(event.step)} · ${words(event.kind)}`, rows));
      dot.addEventListener("pointerleave", hideTip);
      svg.append(dot);
    }
  }
  redraws.push(draw);
  draw();
}

// --- settings --------------------------------------------------------------------------------------------------------

const redraw = () => { for (const draw of redraws) draw(); };

function listen() {
  const form = document.getElementById("settings"), root = document.documentElement;
  form.addEventListener("change", () => {
    settings.x = form.elements.x.value;
    settings.smooth = form.elements.smooth.checked;
    redraw();
  });
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  });
  addEventListener("resize", () => requestAnimationFrame(redraw));
}

document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
drawCurves();
drawLayers();
drawFlops();
drawTimeline();
listen();
