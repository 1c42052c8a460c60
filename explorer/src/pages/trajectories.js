// Page 2: paths of the probability-flow ODE on a line under four schedules, a solver beside the exact path, error against cost.
import * as numerics from "../numerics.js";
import { choice, draggable, element, fixed, join, legend, number, plot, range, linear, log } from "../ui.js";
import { line as d3line } from "d3-shape";

const { SCHEDULES } = numerics;
const LEFT = 0.02;                                                       // left edge of the picture over ln sigma
const FIRST = 0.002;                                                     // sigma_min of every run here
const STARTS = [-1.7, -1.1, -0.65, -0.25, 0.1, 0.5, 0.95, 1.6];          // unit noise of the paths in the background
const COUNTS = [2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256];
const POINTS = 48;                                                       // of the error: equal shares of the normal
const NOISE = Float64Array.from({ length: POINTS }, (_, i) => {
  const u = (i + 0.5) / POINTS, unit = numerics.mixture([[0]], [1], [1]);
  return u < 0.5 ? numerics.quantile(unit, u, 0, -1) : numerics.quantile(unit, 1 - u, 0, 1);
});
const SOLVERS = { euler: ["Euler", "orange"], heun: ["Heun", "blue"], alpha: ["α-family", "sky"], multistep: ["Adams–Bashforth", "purple"], dpmpp2m: ["DPM++(2M)", "leaf"] };
const step = (name, { alpha, order }) => ({ euler: numerics.euler, heun: numerics.heun, alpha: numerics.rk2(alpha), multistep: numerics.multistep(order), dpmpp2m: numerics.dpmpp2m })[name];
const calls = (name, n) => numerics.evaluations[name](n);
const data = width => numerics.mixture([[-1], [0], [1.2]], [width, width, width], [0.3, 0.2, 0.5]);

export const trajectories = {
  id: "trajectories",
  below: true,
  title: "Trajectories: one density, four schedules, five solvers",
  lead: "Noise enters at the right, data stand at the left edge. Grey is the density at every time; thin lines are exact paths, found without a solver "
    + "(on a line, the flow keeps the share of the density on either side of a path). The thick path is stepped by the solver.",
  fields: {
    view: choice("picture", "time", [["time", "x against t"], ["log", "against ln σ"]]),
    schedule: choice("schedule", "linear", [["linear", "σ = t"], ["vp", "VP"], ["ve", "VE"], ["flow", "flow"]]),
    solver: choice("solver", "euler", Object.entries(SOLVERS).map(([name, [text]]) => [name, text])),
    alpha: range("<i>α</i>: where the second slope is taken", 0.5, 0.2, 1, { when: s => s.solver === "alpha", hint: "1 is Heun, ½ the midpoint rule" }),
    order: range("order", 3, 2, 4, { step: 1, when: s => s.solver === "multistep" }),
    N: range("steps <i>N</i>", 5, 2, 64, { step: 1, log: true }),
    spacing: choice("noise levels", "edm", [["edm", "ρ"], ["vp", "as VP"], ["geometric", "as VE"]]),
    rho: range("<i>ρ</i>", 7, 1, 20, { log: true, when: s => s.spacing === "edm", hint: "1: equal steps of σ. Larger: more of the steps at low noise" }),
    z: range("start, in units of σ<sub>max</sub>", -0.9, -2.2, 2.2, { format: v => fixed(v) }),
    tangent: range("tangent at step", 1, 0, 63, { step: 1, hint: "followed to t = 0" }),
    sigma_max: range("<i>σ</i><sub>max</sub>", 2.5, 2, 80, { log: true }),
    width: range("width of the bumps", 0.2, 0.05, 0.5, { log: true }),
    cost: choice("compare at equal", "nfe", [["nfe", "evaluations of D"], ["steps", "steps"]]),
  },
  tries: [
    { text: "<b>Under σ = t every tangent ends in D.</b> Move “tangent at step”: the line meets the left edge at the pink dot. Now choose VE or VP: it misses, so a long Euler step must miss too. Flow hits again.",
      set: { schedule: "linear", solver: "euler", N: 8, tangent: 3 } },
    { text: "<b>ρ trades early error for late error.</b> With Heun and 8 steps move ρ from 1 to 20 and watch the error: it is lowest in between, near 2 for these wide bumps. Raise σ<sub>max</sub> to 80, where most levels lie far above the data, and the best ρ moves up.",
      set: { solver: "heun", N: 8, rho: 1 } },
    { text: "<b>Slopes on log-log axes are orders.</b> Euler falls as 1/N, Heun, DPM++(2M) and the α-family as 1/N² once the steps resolve the bumps. Make the bumps narrow: all must wait longer for their order.",
      set: { solver: "dpmpp2m", N: 16, width: 0.3, cost: "steps" } },
  ],
  build(stage) {
    const { plots, read, reads, colour, set } = stage;
    const key = legend(plots);
    const paths = plot(plots, { label: "Paths in the plane of time t and state x: exact, and as the solver steps them", height: 340 });
    const reading = element("div", { class: "reads" }, read("end", "solver ends at"), read("exact", "exact end"), read("D", "D at the tangent"), read("tangentEnd", "tangent ends at"));
    plots.append(reading);
    const late = element("div", { class: "plots late" }), keyErrors = legend(late);
    plots.append(late);
    const errors = plot(late, { label: "Error of the end point against cost, both logarithmic, for five solvers", height: 290 });
    late.append(element("div", { class: "reads" }, read("error", "error of the chosen solver"), read("nfe", "evaluations of D"), read("slope", "slope at large N")));
    let view = null, job = 0, results = null;
    draggable(paths.svg.node(), (px, py) => {
      if (!view) return;
      const z = view.unscale(view.y.invert(py));
      set("z", +Math.max(-2.2, Math.min(2.2, z)).toFixed(2));
    });

    // errors of all solvers, a few milliseconds a frame, smallest N first
    const measure = state => {
      const mix = data(state.width), D = (x, sigma) => numerics.denoise(mix, x, sigma), schedule = SCHEDULES[state.schedule], mine = ++job;
      const start = NOISE.map(z => z * state.sigma_max), ends = start.map(x => numerics.exactPath(mix, x, state.sigma_max, [0])[0]);
      const s = schedule.s(schedule.inverse(state.sigma_max)), names = Object.keys(SOLVERS), queue = COUNTS.flatMap(n => names.map(name => [name, n]));
      results = Object.fromEntries(names.map(name => [name, []]));
      const go = () => {
        if (mine !== job) return;
        const until = performance.now() + 12;
        while (queue.length && performance.now() < until) {
          const [name, n] = queue.shift(), levels = numerics.spaced(state.spacing, n, FIRST, state.sigma_max, state.rho);
          const got = numerics.integrate(D, schedule, start.map(x => s * x), levels, step(name, state)).pop();
          const rms = Math.sqrt(got.reduce((sum, v, i) => sum + (v - ends[i]) ** 2, 0) / POINTS);
          results[name].push({ n, nfe: calls(name, n), error: rms });
        }
        if (!queue.length || performance.now() - shown > 120) { drawErrors(state); shown = performance.now(); }
        if (queue.length) requestAnimationFrame(go); else errors.svg.attr("data-done", mine);
      };
      let shown = 0;
      errors.svg.attr("data-done", null);
      go();
    };

    const drawErrors = state => {
      const cost = state.cost === "nfe" ? "nfe" : "n", shown = Object.entries(results);
      const all = shown.flatMap(([, list]) => list.map(r => r.error)).filter(e => e > 0 && Number.isFinite(e));
      const low = Math.max(1e-9, Math.min(...all, 0.05)), high = Math.min(1e4, Math.max(...all, 1));
      const f = errors.frame({ x: log([2, cost === "nfe" ? 512 : 256]), y: log([low / 1.5, high * 1.5]), xTicks: [2, 4, 8, 16, 32, 64, 128, 256, 512].filter(v => cost === "nfe" || v < 500), xFormat: v => String(v),
        xLabel: cost === "nfe" ? "evaluations of D" : "steps N", yLabel: `RMS error of the end point, ${POINTS} starts (data units)` });
      const draw = d3line().x(r => f.x(r[cost])).y(r => f.y(Math.max(r.error, low / 2)));
      const chosen = ([name]) => name === state.solver;
      shown.sort((a, b) => chosen(a) - chosen(b));
      join(errors.ink, "path.run", shown).attr("d", ([, list]) => draw(list.filter(r => Number.isFinite(r.error)))).attr("fill", "none").attr("stroke", ([name]) => colour(SOLVERS[name][1]))
        .attr("stroke-width", d => chosen(d) ? 3 : 1.6).attr("opacity", d => chosen(d) ? 1 : 0.65);
      const dots = shown.flatMap(([name, list]) => list.map(r => ({ ...r, name })));
      join(errors.ink, "circle.run", dots).attr("cx", r => f.x(r[cost])).attr("cy", r => f.y(Math.max(r.error, low / 2))).attr("r", r => r.name === state.solver ? 3.4 : 2).attr("fill", r => colour(SOLVERS[r.name][1]));
      const at = calls(state.solver, state.N), here = cost === "nfe" ? at : state.N;
      join(errors.ink, "line.now", [0]).attr("x1", f.x(here)).attr("x2", f.x(here)).attr("y1", f.inner.top).attr("y2", f.inner.bottom).attr("stroke", colour("ink")).attr("stroke-dasharray", "3 3");
      // guides of slope 1 and 2 from one corner
      const from = 24, guide = order => [from, 256].map(n => [f.x(n), f.y(high * 0.5 * (from / n) ** order)]);
      join(errors.ink, "path.guide", [1, 2]).attr("d", o => d3line()(guide(o))).attr("stroke", colour("grey")).attr("stroke-dasharray", "2 4").attr("fill", "none");
      join(errors.ink, "text.halo", [1, 2]).attr("x", o => guide(o)[1][0] - 4).attr("y", o => guide(o)[1][1] - 5).attr("text-anchor", "end").style("fill", colour("soft")).text(o => `1/N${o > 1 ? "²" : ""}`);
      const list = results[state.solver].filter(r => r.n >= 64);
      if (list.length > 3) { const a = list[0], b = list[list.length - 1], slope = Math.log(b.error / a.error) / Math.log(b.n / a.n); reads.slope(slope, fixed(slope, 2)); } else reads.slope(NaN, "…");
    };

    return (state, changed) => {
      const { schedule: name, N, sigma_max, z } = state;
      const mix = data(state.width), D = (x, sigma) => numerics.denoise(mix, x, sigma), schedule = SCHEDULES[name];
      const last = schedule.inverse(sigma_max), byTime = state.view === "time";
      // where a state at time t is drawn: as it is over t, or as the network sees it (unit variance) over ln sigma
      const size = t => byTime ? 1 : 1 / (schedule.s(t) * Math.hypot(schedule.sigma(t), 0.95)), across = t => byTime ? t : Math.max(schedule.sigma(t), LEFT);
      const reach = byTime ? Math.max(2.1, ...Array.from({ length: 60 }, (_, i) => { const t = last * (i + 1) / 60; return schedule.s(t) * (1.6 + 1.75 * schedule.sigma(t)); })) : 2.4;
      const f = paths.frame({ x: byTime ? linear([0, last]) : log([LEFT, sigma_max]), y: linear([-reach, reach]),
        xLabel: byTime ? { linear: "time t = σ", vp: "time t", ve: "time t = σ²", flow: "time t = σ/(1 + σ)" }[name] : "noise level σ",
        yLabel: !byTime ? "state, scaled to unit variance" : name === "vp" || name === "flow" ? "state x = s(t) · (image + noise)" : "state x" });
      view = { y: f.y, unscale: y => y / (size(last) * schedule.s(last) * sigma_max) };
      const { inner } = f, place = (t, x) => [f.x(across(t)), f.y(size(t) * x)];

      // density p(x, t): columns two pixels wide, each scaled to its own maximum so that both ends can be seen
      const context = paths.paper(f), columns = Math.ceil((inner.right - inner.left) / 2), rows = Math.ceil((inner.bottom - inner.top) / 2);
      const image = new ImageData(columns, rows), [r, g, b] = getComputedStyle(stage.frame).getPropertyValue("--density").split(",").map(Number), column = new Float64Array(rows);
      for (let i = 0; i < columns; i++) {
        const h = f.x.invert(inner.left + (i + 0.5) / columns * (inner.right - inner.left)), t = Math.max(byTime ? h : schedule.inverse(h), 1e-9);
        const unit = size(t) * schedule.s(t), sigma = schedule.sigma(t);
        let highest = 0;
        for (let j = 0; j < rows; j++) {
          const x = reach * (1 - 2 * (j + 0.5) / rows) / unit;
          let p = 0;
          for (let k = 0; k < 3; k++) { const v = mix.std[k] ** 2 + sigma * sigma; p += mix.weights[k] * Math.exp(-0.5 * (x - mix.means[k]) ** 2 / v) / Math.sqrt(v); }
          column[j] = p; if (p > highest) highest = p;
        }
        for (let j = 0; j < rows; j++) image.data.set([r, g, b, 150 * (column[j] / highest) ** 0.7], 4 * (j * columns + i));
      }
      const tile = document.createElement("canvas");
      tile.width = columns; tile.height = rows;
      tile.getContext("2d").putImageData(image, 0, 0);
      context.imageSmoothingEnabled = true;
      context.drawImage(tile, 0, 0, inner.right - inner.left, inner.bottom - inner.top);

      // exact paths: moments that are dense where the path moves, both in t and in ln sigma
      const times = [...Array.from({ length: 70 }, (_, i) => last * i / 69), ...Array.from({ length: 40 }, (_, i) => schedule.inverse(LEFT * (sigma_max / LEFT) ** (i / 39)))].sort((p, q) => p - q);
      const levels = times.map(t => t === 0 ? 0 : schedule.sigma(t)), scales = times.map(t => schedule.s(t));
      const path = start => { const x = numerics.exactPath(mix, start * sigma_max, sigma_max, levels); return times.map((t, i) => place(t, scales[i] * x[i])); };
      const draw = d3line();
      join(paths.ink, "path.exact", STARTS.map(path)).attr("d", draw).attr("fill", "none").attr("stroke", colour("soft")).attr("stroke-width", 1).attr("opacity", 0.8);
      join(paths.ink, "path.mine", [path(z)]).attr("d", draw).attr("fill", "none").attr("stroke", colour("ink")).attr("stroke-width", 2);

      // the solver's run
      const steps = numerics.spaced(state.spacing, N, FIRST, sigma_max, state.rho), moments = numerics.knots(schedule, steps);
      const run = numerics.integrate(D, schedule, Float64Array.of(moments[0].s * sigma_max * z), steps, step(state.solver, state));
      const hue = colour(SOLVERS[state.solver][1]), dots = run.map((x, i) => { const [px, py] = place(moments[i].t, x[0]); return [px, Math.max(-4000, Math.min(4000, py))]; });
      join(paths.ink, "path.run", [dots]).attr("d", draw).attr("fill", "none").attr("stroke", hue).attr("stroke-width", 2.4);
      const k = Math.min(state.tangent, N - 1), at = moments[k], x = run[k][0], d = numerics.slope(D, run[k], at)[0], goal = D(Float64Array.of(x / at.s), at.sigma)[0], landing = x - at.t * d;
      const tangent = Array.from({ length: 61 }, (_, i) => { const t = i === 60 ? 0 : byTime ? at.t * (1 - i / 60) : schedule.inverse(at.sigma * (LEFT / at.sigma) ** (i / 59)); return place(t, x + (t - at.t) * d); });
      join(paths.ink, "path.tangent", [tangent]).attr("d", draw).attr("stroke", colour("pink")).attr("stroke-width", 2).attr("stroke-dasharray", "6 4").attr("fill", "none");
      join(paths.top, "circle.step", dots).attr("cx", p => p[0]).attr("cy", p => Math.max(inner.top - 4, Math.min(inner.bottom + 4, p[1]))).attr("r", (_, i) => i === k ? 5.5 : 3.6).attr("fill", hue).attr("stroke", colour("card"));
      const end = place(0, goal);
      join(paths.top, "circle.goal", [end]).attr("cx", p => p[0]).attr("cy", p => p[1]).attr("r", 6).attr("fill", colour("pink")).attr("stroke", colour("card")).attr("stroke-width", 1.5);
      join(paths.top, "text.halo", [end]).attr("x", p => p[0] + 10).attr("y", p => p[1] - 8).style("fill", colour("pink")).style("font-weight", 650).text("D");
      key.show([[colour("soft"), "exact paths"], [colour("ink"), "exact, this start"], [hue, SOLVERS[state.solver][0]], [colour("pink"), "tangent to t = 0", "dashed"], [colour("pink"), "D there", "dot"]]);
      keyErrors.show(Object.entries(SOLVERS).map(([n, [text, c]]) => [colour(c), n === state.solver ? `<b>${text}</b>` : text]));

      const exact = numerics.exactPath(mix, z * sigma_max, sigma_max, [0])[0];
      reads.end(run[N][0], fixed(run[N][0], 4)); reads.exact(exact, fixed(exact, 4));
      reads.D(goal, fixed(goal, 3)); reads.tangentEnd(landing, Math.abs(landing) < 1e4 ? fixed(landing, 3) : number(landing));
      reads.nfe(calls(state.solver, N), String(calls(state.solver, N)));
      // the error of this very setting, by the same measure as the curves
      const start = NOISE.map(v => v * sigma_max), ends = start.map(v => numerics.exactPath(mix, v, sigma_max, [0])[0]);
      const got = numerics.integrate(D, schedule, start.map(v => moments[0].s * v), steps, step(state.solver, state)).pop();
      const rms = Math.sqrt(got.reduce((sum, v, i) => sum + (v - ends[i]) ** 2, 0) / POINTS);
      reads.error(rms, number(rms));
      if (!results || ["schedule", "spacing", "rho", "sigma_max", "width", "alpha", "order"].some(field => changed.has(field))) measure(state); else drawErrors(state);
    };
  },
};
