// The frame around every page: sliders, their state in the URL, colours by theme, and plots with axes.
import { axisBottom, axisLeft } from "d3-axis";
import { scaleLinear, scaleLog } from "d3-scale";
import { select } from "d3-selection";

// --- elements and numbers ---------------------------------------------------------------------------------------------

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "html") node.innerHTML = value;                       // texts of the pages themselves, never of a URL
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter(child => child != null));
  return node;
}

const raised = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
export const power = exponent => "10" + [...String(exponent)].map(c => raised[c]).join("");

// Three significant digits, a true minus sign, and powers of ten where zeros would fill the line.
export function number(value, digits = 3) {
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : value < 0 ? "−∞" : "–";
  const size = Math.abs(value), sign = value < 0 ? "−" : "";
  if (size >= 1e-3 && size < 1e4) return sign + String(+size.toPrecision(digits)).replace(/(\.\d+)e.*/, "$1");
  const exponent = Math.floor(Math.log10(size));
  return `${sign}${+(size / 10 ** exponent).toPrecision(2)}·${power(exponent)}`;
}
export const fixed = (value, digits = 2) => (value < 0 && +value.toFixed(digits) !== 0 ? "−" : "") + Math.abs(value).toFixed(digits);
export const percent = (value, digits = 0) => fixed(100 * value, digits) + "\u00a0%";

// --- the state of a page, in the fragment of the URL -------------------------------------------------------------------
// #explorer?churn.S_churn=40&churn.N=32: the fragment is all of the address that a page opened from file:// may change.

const PREFIX = "#explorer?";

function readAddress(id) {
  const found = {};
  if (location.hash.startsWith(PREFIX))
    for (const [key, value] of new URLSearchParams(location.hash.slice(PREFIX.length)))
      if (key.startsWith(id + ".")) found[key.slice(id.length + 1)] = value;
  return found;
}

function writeAddress(id, values) {
  const all = new URLSearchParams(location.hash.startsWith(PREFIX) ? location.hash.slice(PREFIX.length) : "");
  for (const key of [...all.keys()]) if (key.startsWith(id + ".")) all.delete(key);
  for (const [key, value] of Object.entries(values)) all.set(`${id}.${key}`, value);
  const text = all.toString();
  const address = location.href.split("#")[0] + (text ? PREFIX + text : "");
  if (address !== location.href) history.replaceState(history.state, "", address);
}

// --- fields: what a reader can set ---------------------------------------------------------------------------------------

const POSITIONS = 240;   // of a slider: arrow keys move by one, page keys by a tenth of the range

// A number from min to max, on a linear or logarithmic track; `step` for whole numbers and the like.
export const range = (label, value, min, max, more = {}) => ({ kind: "range", label, value, min, max, ...more });
// One of [value, text] pairs.
export const choice = (label, value, options, more = {}) => ({ kind: "choice", label, value, options, ...more });

const clean = (field, value) => {                    // any text or number -> a value that the field allows
  if (field.kind === "choice") return field.options.some(([name]) => name === value) ? value : field.value;
  value = Number(value);
  if (!Number.isFinite(value)) return field.value;
  if (field.step) value = Math.round(value / field.step) * field.step;
  value = Math.min(field.max, Math.max(field.min, value));
  return +value.toPrecision(field.step ? 12 : 4);
};
const toTrack = (field, value) => field.log ? Math.log(value / field.min) / Math.log(field.max / field.min) : (value - field.min) / (field.max - field.min);
const fromTrack = (field, u) => field.log ? field.min * (field.max / field.min) ** u : field.min + u * (field.max - field.min);

function rangeControl(id, name, field, set) {
  const track = !(field.step && !field.log);        // a stepped linear field is its own track
  const input = element("input", { type: "range", id: `${id}-${name}`, "data-field": name, ...(track ? { min: 0, max: POSITIONS, step: 1 } : { min: field.min, max: field.max, step: field.step }) });
  const shown = element("output", { for: input.id });
  input.addEventListener("input", () => {
    let value = clean(field, track ? fromTrack(field, input.value / POSITIONS) : input.value);
    if (field.snap) value = field.snap(value);
    set(name, value);
  });
  if (track && field.step) input.addEventListener("keydown", event => {     // a whole number moves by one, also where the track is finer
    const move = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (move) { event.preventDefault(); set(name, clean(field, input._value + move * field.step)); }
  });
  const text = value => (field.format ?? number)(value) + (field.unit ?? "");
  return {
    node: element("div", { class: "field" }, element("label", { for: input.id, html: field.label }), shown, input, field.hint && element("div", { class: "hint", html: field.hint })),
    show(value) {
      input._value = value;
      input.value = track ? Math.round(toTrack(field, value) * POSITIONS) : value;
      shown.textContent = text(value);
      input.setAttribute("aria-valuetext", text(value));
    },
  };
}

function choiceControl(id, name, field, set) {
  const inputs = field.options.map(([value]) => element("input", { type: "radio", name: `${id}-${name}`, value, "data-field": name, onchange: () => set(name, value) }));
  return {
    node: element("div", { class: "field", role: "radiogroup", "aria-label": field.label.replace(/<[^>]+>/g, "") },
      element("div", { class: "label", html: field.label }), element("span"),
      element("div", { class: "choice" }, ...inputs.map((input, i) => element("label", {}, input, element("span", { html: field.options[i][1] })))),
      field.hint && element("div", { class: "hint", html: field.hint })),
    show: value => inputs.forEach(input => { input.checked = input.value === value; }),
  };
}

export const control = (id, name, field, set) => (field.kind === "range" ? rangeControl : choiceControl)(id, name, field, set);

// --- one page ------------------------------------------------------------------------------------------------------------

// definition: { id, title, lead, fields, tries: [{ text, set }], build(stage) -> draw(state, changed) }.
export function mount(root, definition) {
  const { id, fields } = definition, chosen = new URLSearchParams(root.dataset.start ?? "");     // data-start="solver=heun&N=8": a chapter's own defaults
  const defaults = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, chosen.has(name) ? clean(field, chosen.get(name)) : field.value]));
  const state = { ...defaults }, controls = {}, reads = {};
  const frame = element("section", { class: "edm-x", "aria-label": definition.title });
  let draw = () => {}, waiting = 0, changed = new Set(Object.keys(fields));

  const redraw = () => {
    waiting = 0;
    for (const name of Object.keys(controls)) {
      if (changed.has(name)) controls[name].show(state[name]);
      const hidden = Boolean(fields[name].when && !fields[name].when(state));
      if (controls[name].node.hidden !== hidden) controls[name].node.hidden = hidden;
    }
    const which = changed;
    changed = new Set();
    draw(state, which);
    stage.fresh = false;
  };
  let writing = 0;
  const address = () => writeAddress(id, Object.fromEntries(Object.keys(fields).filter(name => state[name] !== defaults[name]).map(name => [name, state[name]])));
  const later = names => { names.forEach(name => changed.add(name)); waiting ||= requestAnimationFrame(redraw); };
  const set = (patch, value) => {
    if (typeof patch === "string") patch = { [patch]: value };
    const names = Object.keys(patch).filter(name => state[name] !== patch[name]);
    if (!names.length) return;
    Object.assign(state, patch);
    clearTimeout(writing);                                        // browsers refuse a hundred new addresses a second
    writing = setTimeout(address, 150);
    later(names);
  };
  const fromAddress = () => {
    const given = readAddress(id), next = { ...defaults };
    for (const name of Object.keys(fields)) if (name in given) next[name] = clean(fields[name], given[name]);
    return [next, Object.keys(given).length > 0];
  };

  // A number that the page reports: tests and screen readers find it by its name.
  const read = (name, label) => {
    const output = element("output", { "data-read": name });
    reads[name] = (value, text) => { output.dataset.value = value; output.textContent = text ?? number(value); };
    return element("div", {}, element("span", { html: label + " " }), output);
  };
  const stage = { id, root, frame, state, set, read, reads, plots: element("div", { class: "plots" }),
                  colour: name => getComputedStyle(frame).getPropertyValue("--" + name).trim(),
                  still: matchMedia("(prefers-reduced-motion: reduce)"), redraw: () => { stage.fresh = true; later(Object.keys(fields)); } };     // fresh: another width, other colours

  const copy = element("button", { type: "button", onclick: () => {
    address();
    const link = location.href, done = () => { copy.textContent = "Copied"; setTimeout(() => { copy.textContent = "Copy link"; }, 1500); };
    const byHand = () => prompt("The address of this setting:", link);
    if (navigator.clipboard) navigator.clipboard.writeText(link).then(done, byHand); else byHand();
  } }, "Copy link");
  for (const [name, field] of Object.entries(fields)) if (!field.apart) controls[name] = control(id, name, field, set);
  const experiments = element("div", { class: definition.below ? "try below" : "try" }, element("div", { class: "label" }, "What to try"),
    element("ol", {}, ...definition.tries.map((experiment, k) => element("li", {}, element("span", { html: experiment.text + " " }), element("br"),
      element("button", { type: "button", "data-try": k + 1, onclick: () => set({ ...defaults, ...experiment.set }) }, "Set this up")))));
  frame.append(
    element("div", { class: "head" }, element("div", { class: "title", role: "heading", "aria-level": 3 }, definition.title),
      element("p", { class: "intro", html: definition.lead }),
      element("div", { class: "tools" }, copy, element("button", { type: "button", onclick: () => set(defaults) }, "Reset"))),
    element("div", { class: "layout" }, stage.plots, element("div", { class: "side" },
      element("div", { class: "controls" }, ...Object.values(controls).map(c => c.node)), definition.below ? null : experiments), definition.below ? experiments : ""));
  root.replaceChildren(frame);

  const theme = matchMedia("(prefers-color-scheme: dark)"), page = document.documentElement;
  const paint = () => {
    const dark = page.dataset.theme ? page.dataset.theme === "dark" : theme.matches;
    frame.classList.toggle("dark", dark);
    stage.dark = dark;
    stage.redraw();
  };
  const [start, linked] = fromAddress();
  Object.assign(state, start);
  draw = definition.build(stage, (name, own = set) => control(id, name, fields[name], own)) ?? draw;
  paint();
  theme.addEventListener("change", paint);
  new MutationObserver(paint).observe(page, { attributes: true, attributeFilter: ["data-theme"] });
  addEventListener("hashchange", () => { const [next] = fromAddress(); Object.assign(state, next); stage.redraw(); });
  let width = 0;
  new ResizeObserver(([entry]) => { if (Math.round(entry.contentRect.width) !== width) { width = Math.round(entry.contentRect.width); stage.redraw(); } }).observe(frame);
  if (linked) requestAnimationFrame(() => root.scrollIntoView({ block: "start" }));
  return stage;
}

// --- plots ---------------------------------------------------------------------------------------------------------------

export const linear = domain => scaleLinear().domain(domain);
export const log = domain => scaleLog().domain(domain);
const NARROW = 420;

// An SVG with axes, in the pixels of the page, so that letters keep their size at every width.
// plot.frame({ x, y, height, ... }) sets scales and returns { x, y, width, height, inner } to draw with.
export function plot(host, { label, height = 240, margin = {} }) {
  const node = element("div", { class: "plot" }), canvas = element("canvas", { hidden: true });
  node.append(canvas);
  host.append(node);
  const svg = select(node).append("svg").attr("role", "img").attr("aria-label", label);
  const clipId = `edm-clip-${Math.random().toString(36).slice(2)}`, clip = svg.append("clipPath").attr("id", clipId).append("rect");
  const layers = Object.fromEntries(["grid y", "grid x", "axis x", "axis y"].map(name => [name, svg.append("g").attr("class", name)]));
  const ink = svg.append("g").attr("clip-path", `url(#${clipId})`), top = svg.append("g");
  const texts = { title: svg.append("text").attr("class", "plot-title"), x: svg.append("text").attr("class", "axis-label"), y: svg.append("text").attr("class", "axis-label") };

  const frame = ({ x, y, xLabel = "", yLabel = "", title = "", tall = height, xTicks, yTicks, xFormat, yFormat, grid = true, left }) => {
    const width = Math.max(200, node.clientWidth || 600), narrow = width < NARROW;
    const m = { top: (title ? 24 : 8) + (yLabel ? 16 : 0), right: 18, bottom: xLabel ? 40 : 24, left: left ?? 46, ...margin };
    const inner = { left: m.left, right: width - m.right, top: m.top, bottom: tall - m.bottom };
    svg.attr("viewBox", `0 0 ${width} ${tall}`).attr("height", tall);
    clip.attr("x", inner.left).attr("y", inner.top).attr("width", inner.right - inner.left).attr("height", Math.max(0, inner.bottom - inner.top));
    x.range([inner.left, inner.right]); y.range([inner.bottom, inner.top]);
    const logTicks = scale => scale.base && { values: decades(scale.domain(), narrow ? 5 : 7), format: v => Math.abs(Math.log10(v)) < 2.5 ? number(v) : power(Math.round(Math.log10(v))) };
    const make = (axis, scale, ticks, format, count) => {
      const log = logTicks(scale);
      axis.tickSize(4).tickSizeOuter(0).tickPadding(5);
      if (ticks || log) axis.tickValues(ticks ?? log.values).tickFormat(format ?? log?.format ?? (v => number(v))); else axis.ticks(count).tickFormat(format ?? (v => number(v)));
      return axis;
    };
    const xAxis = make(axisBottom(x), x, xTicks, xFormat, narrow ? 5 : 8), yAxis = make(axisLeft(y), y, yTicks, yFormat, Math.max(2, Math.round((inner.bottom - inner.top) / 45)));
    layers["axis x"].attr("transform", `translate(0,${inner.bottom})`).call(xAxis);
    layers["axis y"].attr("transform", `translate(${inner.left},0)`).call(yAxis);
    if (grid) {
      layers["grid x"].attr("transform", `translate(0,${inner.bottom})`).call(make(axisBottom(x), x, xTicks, () => "", narrow ? 5 : 8).tickSizeInner(inner.top - inner.bottom));
      layers["grid y"].attr("transform", `translate(${inner.left},0)`).call(make(axisLeft(y), y, yTicks, () => "", Math.max(2, Math.round((inner.bottom - inner.top) / 45))).tickSizeInner(inner.left - inner.right));
    }
    texts.title.attr("x", inner.left).attr("y", 14).text(title);
    texts.x.attr("x", (inner.left + inner.right) / 2).attr("y", tall - 6).attr("text-anchor", "middle").text(xLabel);
    texts.y.attr("x", Math.min(inner.left, 6)).attr("y", m.top - 8).text(yLabel);
    return { x, y, width, tall, inner, narrow };
  };
  // A canvas that covers the inner part of the plot, behind its lines; returns its context in pixels of the page.
  const paper = ({ inner }) => {
    const w = inner.right - inner.left, h = inner.bottom - inner.top, ratio = window.devicePixelRatio || 1;
    canvas.hidden = false;
    if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) { canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
    Object.assign(canvas.style, { left: inner.left + "px", top: inner.top + "px", width: w + "px", height: h + "px" });
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, w, h);
    return context;
  };
  return { node, svg, ink, top, frame, paper, canvas };
}

// Whole powers of ten inside a domain, thinned to at most `most`; the half-decades too where there are few.
function decades([low, high], most) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9), values = [];
  const every = Math.max(1, Math.ceil((last - first + 1) / most));
  for (let e = first; e <= last; e += every) values.push(10 ** e);
  if (last - first < 2) for (let e = first - 1; e <= last; e++) for (const k of [2, 5]) if (k * 10 ** e >= low && k * 10 ** e <= high) values.push(k * 10 ** e);
  return values.sort((a, b) => a - b);
}

// Bind data to elements of one kind: join(parent, "circle.a", data) returns the d3 selection.
export function join(parent, what, data) {
  const [tag, ...classes] = what.split(".");
  return parent.selectAll(what).data(data).join(tag).attr("class", classes.join(" "));
}

// Pointer (mouse, pen, finger) positions in a plot's scales while dragged or tapped.
export function draggable(node, move) {
  let active = false;
  const at = event => { const box = node.getBoundingClientRect(); move(event.clientX - box.left, event.clientY - box.top); };
  node.classList.add("drag");
  node.addEventListener("pointerdown", event => { active = true; node.setPointerCapture(event.pointerId); at(event); event.preventDefault(); });
  node.addEventListener("pointermove", event => { if (active) at(event); });
  for (const end of ["pointerup", "pointercancel"]) node.addEventListener(end, () => { active = false; });
}

export function legend(host, entries) {
  const node = element("div", { class: "legend", "aria-hidden": "true" });
  host.append(node);
  return { node, show: (list = entries) => node.replaceChildren(...list.map(([colour, text, kind = ""]) => {
    const mark = element("i", { class: kind === "dashed" ? "" : kind });
    mark.style.borderColor = mark.style.color = colour;
    if (kind === "dashed") mark.style.borderTopStyle = "dashed";
    if (kind === "fill") mark.style.background = colour;
    const text_ = element("span", { html: text });
    return element("span", {}, mark, text_);
  })) };
}
