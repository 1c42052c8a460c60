// Page 4: the parabola of c_skip; what F sees and must say; noise, data, v, flow and EDM as places on one slider.
import * as numerics from "../numerics.js";
import { choice, element, fixed, join, legend, number, plot, range, linear, log } from "../ui.js";
import { line } from "d3-shape";

const SIZE = 32, LOW = 0.01, HIGH = 100, GRID = Array.from({ length: 161 }, (_, i) => LOW * (HIGH / LOW) ** (i / 160)), ERROR = 0.1;
const KINDS = { noise: ["noise", "amber"], data: ["data", "grey"], v: ["v", "sky"], flow: ["flow", "pink"], edm: ["EDM", "blue"] };

// [c_skip, c_out, c_in] of each way to ask the network.
const scalings = {
  noise: sigma => numerics.vpScalings(sigma),
  data: (sigma, sigma_data) => [0, 1, 1 / Math.hypot(sigma, sigma_data)],
  v: sigma => numerics.vScalings(sigma),
  flow: sigma => numerics.flowScalings(sigma),
  edm: (sigma, sigma_data) => numerics.edmScalings(sigma, sigma_data),
};
const free = (c_skip, sigma, sigma_data) => [c_skip, Math.sqrt(numerics.targetVariance(c_skip, sigma, sigma_data)), 1 / Math.hypot(sigma, sigma_data)];

// A picture from formulas, mean 0 and standard deviation 1: a low sun, hills, and light on water.
const PICTURE = (() => {
  const shade = (u, v) => {
    const hill = Math.min(0.52 + 0.10 * Math.cos(5.2 * u + 0.6) + 0.05 * Math.cos(11 * u), 0.62), horizon = 0.62;
    if (v < hill) return Math.hypot(u - 0.68, v - 0.3) < 0.13 ? 2.4 : 0.75 - 1.1 * v + 0.5 * Math.exp(-9 * Math.hypot(u - 0.68, v - 0.3));
    if (v < horizon) return -1.5 + 0.5 * u;
    const glitter = Math.exp(-((u - 0.68) ** 2) / (0.004 + 0.06 * (v - horizon))) * (0.6 + 0.6 * Math.cos(70 * v));
    return -0.75 - 0.5 * (v - horizon) + 1.7 * glitter;
  };
  const values = Float64Array.from({ length: SIZE * SIZE }, (_, i) => {
    let sum = 0;
    for (let k = 0; k < 16; k++) sum += shade((i % SIZE + (k % 4 + 0.5) / 4) / SIZE, (Math.floor(i / SIZE) + (Math.floor(k / 4) + 0.5) / 4) / SIZE);
    return sum / 16;
  });
  const mean = values.reduce((a, b) => a + b) / values.length, std = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
  return values.map(v => (v - mean) / std);
})();
const uniform = numerics.generator(5), NOISE = numerics.normals(uniform, SIZE * SIZE), MISTAKE = numerics.normals(uniform, SIZE * SIZE);
const rms = values => Math.sqrt(values.reduce((sum, v) => sum + v * v, 0) / values.length);

export const preconditioning = {
  id: "preconditioning",
  title: "Preconditioning: what the network sees and must say",
  lead: "D(x; σ) = c<sub>skip</sub> x + c<sub>out</sub> F(c<sub>in</sub> x). With c<sub>skip</sub> = 1 the network F predicts noise, with 0 it predicts the picture; "
    + "everything else lies between. The parabola is what F has to supply; its lowest point is EDM's choice at this σ.",
  fields: {
    sigma: range("noise level <i>σ</i>", 0.5, LOW, HIGH, { log: true }),
    kind: choice("F predicts", "edm", [...Object.entries(KINDS).map(([kind, [text]]) => [kind, text]), ["free", "free"]]),
    c_skip: range("<i>c</i><sub>skip</sub>", 0.5, 0, 1, { apart: true, format: v => fixed(v, 3) }),
    sigma_data: range("<i>σ</i><sub>data</sub>", 0.5, 0.1, 2, { log: true }),
  },
  tries: [
    { text: "<b>Noise prediction shouts at high σ.</b> At σ = 20 a mistake of 10 % in F becomes a mistake of 2 in D, four times the picture. Switch to data or EDM.", set: { sigma: 20, kind: "noise" } },
    { text: "<b>Data prediction squanders low σ.</b> At σ = 0.03 the input is almost the answer, yet F must say it again, and its 10 % spoil it. Switch to noise or EDM.", set: { sigma: 0.03, kind: "data" } },
    { text: "<b>v and flow are cousins.</b> Set σ<sub>data</sub> to 1: v becomes EDM at every σ. At 0.5 drag σ and see where each of them leaves the bottom of the parabola.", set: { sigma_data: 1, kind: "v", sigma: 1 } },
  ],
  build(stage, makeControl) {
    const { plots, colour, set, state, read, reads } = stage;
    const marks = s => Object.fromEntries(Object.keys(KINDS).map(kind => [kind, scalings[kind](s.sigma, s.sigma_data)[0]]));
    const slider = makeControl("c_skip", (_, value) => {
      const near = Object.entries(marks(state)).sort((a, b) => Math.abs(a[1] - value) - Math.abs(b[1] - value))[0];
      set(Math.abs(near[1] - value) < 0.009 && near[0] !== state.kind ? { kind: near[0] } : { kind: "free", c_skip: value });
    });
    const ticks = element("div", { class: "ticks", "aria-hidden": "true" });
    const tiles = element("div", { class: "tiles" }), canvases = [];
    for (const [name, text] of [["y", "the picture"], ["x = y + σn", "what is given"], ["c_in x", "what F sees"], ["F should say", "(y − c_skip x)/c_out"], ["D", "if F errs by 10 %"]]) {
      const canvas = element("canvas", { width: SIZE, height: SIZE });
      canvases.push(canvas);
      tiles.append(element("figure", {}, canvas, element("b", {}, name), text));
    }
    plots.append(tiles);
    plots.append(element("div", { class: "reads" }, read("c_skip", "c_skip"), read("c_out", "c_out"), read("c_in", "c_in"), read("input", "std F sees"), read("target", "std F must say"), read("error", "error of D")));
    const pair = element("div", { class: "pair stack" });
    plots.append(pair);
    const bowl = plot(pair, { label: "Mean square of y minus c_skip x, a parabola in c_skip", height: 300 });
    const gains = plot(pair, { label: "How much an error of F counts in D, for each parametrisation, against noise level", height: 300 });
    slider.node.append(ticks);
    bowl.node.append(slider.node);
    const key = legend(gains.node);

    const paint = (canvas, values, half) => {
      const image = new ImageData(SIZE, SIZE);
      values.forEach((v, i) => image.data.set([...Array(3).fill(Math.max(0, Math.min(255, 127.5 + 127.5 * v / half))), 255], 4 * i));
      canvas.getContext("2d").putImageData(image, 0, 0);
    };

    return s => {
      const { sigma, sigma_data, kind } = s, places = marks(s);
      const [c_skip, c_out, c_in] = kind === "free" ? free(s.c_skip, sigma, sigma_data) : scalings[kind](sigma, sigma_data);
      const y = PICTURE.map(v => sigma_data * v), x = y.map((v, i) => v + sigma * NOISE[i]), target = y.map((v, i) => (v - c_skip * x[i]) / c_out);
      const D = target.map((F, i) => c_skip * x[i] + c_out * (F + ERROR * MISTAKE[i])), range_ = 2.2 * sigma_data;
      [[y, range_], [x, range_], [x.map(v => c_in * v), 2.2], [target, 2.2], [D, range_]].forEach(([values, half], i) => paint(canvases[i], values, half));
      // expectations over the data, not of this one picture
      const need = numerics.targetVariance(c_skip, sigma, sigma_data), said = Math.sqrt(need) / Math.abs(c_out), seen = c_in * Math.hypot(sigma, sigma_data);
      reads.c_skip(c_skip, fixed(c_skip, 3)); reads.c_out(c_out); reads.c_in(c_in);
      reads.input(seen, number(seen)); reads.target(said, number(said));
      reads.error(rms(D.map((v, i) => v - y[i])) / sigma_data, `${number(ERROR * Math.abs(c_out) / sigma_data * 100, 2)} % of σ_data`);
      slider.show(kind === "free" ? s.c_skip : c_skip);

      const steps = Array.from({ length: 101 }, (_, i) => i / 100), curve = c => numerics.targetVariance(c, sigma, sigma_data), high = 1.08 * Math.max(sigma ** 2, sigma_data ** 2);
      const f = bowl.frame({ x: linear([0, 1]), y: linear([0, high]), yLabel: "what F must supply: E(y − c_skip x)² per value", xLabel: "c_skip" });
      join(bowl.ink, "path.bowl", [0]).attr("d", () => line().x(c => f.x(c)).y(c => f.y(curve(c)))(steps)).attr("fill", "none").attr("stroke", colour("ink")).attr("stroke-width", 2);
      const dots = Object.entries(places).sort(([a], [b]) => (a === kind) - (b === kind));
      join(bowl.top, "line.stem", [0]).attr("x1", f.x(c_skip)).attr("x2", f.x(c_skip)).attr("y1", f.inner.bottom).attr("y2", f.y(need)).attr("stroke", colour("ink")).attr("stroke-dasharray", "3 3");
      join(bowl.top, "circle.kind", dots).attr("cx", d => f.x(d[1])).attr("cy", d => f.y(curve(d[1]))).attr("r", d => d[0] === kind ? 8 : 5.5).attr("fill", d => colour(KINDS[d[0]][1])).attr("stroke", colour("card")).attr("stroke-width", 1.5);
      join(bowl.top, "circle.free", kind === "free" ? [0] : []).attr("cx", f.x(c_skip)).attr("cy", f.y(need)).attr("r", 7).attr("fill", colour("ink"));
      // names under the slider would collide where positions crowd: only those far enough apart are written
      const shown = [];
      for (const [name, place] of Object.entries(places).sort((a, b) => (b[0] === kind) - (a[0] === kind) || (b[0] === "edm") - (a[0] === "edm"))) if (shown.every(other => Math.abs(other[1] - place) > 0.115)) shown.push([name, place]);
      ticks.replaceChildren(...shown.map(([name, place]) => { const tick = element("span", {}, KINDS[name][0]); tick.style.left = `calc(${100 * place}% + ${8 - 16 * place}px)`; tick.style.transform = `translateX(${-100 * Math.max(place < 0.06 ? 0 : 0.5, place > 0.94 ? 1 : 0)}%)`; tick.style.color = `var(--${KINDS[name][1]})`; return tick; }));

      const g = gains.frame({ x: log([LOW, HIGH]), y: log([0.005, 120]), yLabel: "error of D per error of F: |c_out|", xLabel: "noise level σ" });
      const draw = which => line().x(v => g.x(v)).y(v => g.y(Math.abs(scalings[which](v, sigma_data)[1])))(GRID);
      const order = Object.keys(KINDS).sort((a, b) => (a === kind) - (b === kind));
      join(gains.ink, "path.gain", order).attr("d", draw).attr("fill", "none").attr("stroke", name => colour(KINDS[name][1])).attr("stroke-width", name => name === kind ? 3.4 : 1.8);
      join(gains.ink, "line.now", [0]).attr("x1", g.x(sigma)).attr("x2", g.x(sigma)).attr("y1", g.inner.top).attr("y2", g.inner.bottom).attr("stroke", colour("ink")).attr("stroke-dasharray", "3 3");
      join(gains.top, "circle.now", [0]).attr("cx", g.x(sigma)).attr("cy", g.y(Math.abs(c_out))).attr("r", 6).attr("fill", kind === "free" ? colour("ink") : colour(KINDS[kind][1])).attr("stroke", colour("card")).attr("stroke-width", 1.5);
      key.show(Object.values(KINDS).map(([text, hue]) => [colour(hue), text]));
    };
  },
};
