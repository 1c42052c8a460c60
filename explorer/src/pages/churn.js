// Page 3: 500 particles in the plane, Algorithm 2 beside Euler-Maruyama, a denoiser that can be biased, distribution against truth.
import * as numerics from "../numerics.js";
import { element, fixed, legend, percent, range } from "../ui.js";

const MIX = numerics.mixture([[1, 0], [-0.5, 0.87], [-0.5, -0.87]], [0.15, 0.3, 0.1], [0.5, 0.3, 0.2]);   // chapter 02's toy density
const PARTICLES = 500, SIGMA_MAX = 20, SIGMA_MIN = 0.02, SECONDS = 7;
const SHADES = ["one", "two", "three"], BLOBS = ["right", "upper left", "lower left"];

// Which blob of the true mixture each point belongs to; shares; widths and shifts of the centres in units of the blob's own width.
function census(points) {
  const blobs = [0, 1, 2].map(() => ({ n: 0, x: 0, y: 0, square: 0 })), owner = new Uint8Array(points.length / 2);
  for (let i = 0; i < owner.length; i++) {
    const k = owner[i] = numerics.likeliest(MIX, points, 2 * i), blob = blobs[k];
    const x = (points[2 * i] - MIX.means[2 * k]) / MIX.std[k], y = (points[2 * i + 1] - MIX.means[2 * k + 1]) / MIX.std[k];
    blob.n++; blob.x += x; blob.y += y; blob.square += x * x + y * y;
  }
  const centre = ({ n, x, y }) => (x * x + y * y) / (n * n);
  return { owner, share: blobs.map(({ n }) => n / owner.length), width: blobs.map(blob => Math.sqrt((blob.square / blob.n - centre(blob)) / 2)),
           shift: Math.sqrt(blobs.reduce((sum, blob) => sum + (blob.n ? centre(blob) : 0), 0) / 3) };
}

// Unit noise by seed and step, the start being step 0: the same for every setting, so that a slider changes the run and not the luck.
const drawn = new Map();
function noise(seed, step) {
  const key = 1000 * seed + step;
  if (!drawn.has(key)) drawn.set(key, numerics.normals(numerics.generator(7919 * seed + step), 2 * PARTICLES));
  return drawn.get(key);
}

// A run as { time, x, sigma } in units of steps, each climb a moment of its own.
function algorithm2(D, { N, seed }, churn) {
  const levels = numerics.edmSigmas(N, SIGMA_MIN, SIGMA_MAX), moments = numerics.knots(numerics.LINEAR, levels);
  let x = noise(seed, 0).map(v => SIGMA_MAX * v);
  const path = [{ time: 0, x, sigma: SIGMA_MAX }];
  numerics.churnGammas(levels, churn).forEach((gamma, i) => {
    const done = numerics.churnStep(D, numerics.LINEAR, x, moments[i], moments[i + 1], gamma, churn.S_noise, noise(seed, i + 1));
    if (gamma) path.push({ time: i + 0.4, x: done.up.x, sigma: done.up.knot.sigma });
    path.push({ time: i + 1, x: x = done.x, sigma: levels[i + 1] });
  });
  return path;
}

// The SDE with as many evaluations: 2N - 1 levels, and per step the new noise that Algorithm 2's rule gives there.
function eulerMaruyama(D, { N, seed }, churn) {
  const n = 2 * N - 1, levels = numerics.edmSigmas(n, SIGMA_MIN, SIGMA_MAX), moments = numerics.knots(numerics.LINEAR, levels);
  let x = noise(seed, 0).map(v => SIGMA_MAX * v);
  const path = [{ time: 0, x, sigma: SIGMA_MAX }];
  numerics.churnGammas(levels, churn).forEach((gamma, i) => {
    x = numerics.sdeStep(D, x, moments[i], moments[i + 1], numerics.churnRate(gamma), noise(seed, i + 1));
    path.push({ time: N * (i + 1) / n, x, sigma: levels[i + 1] });
  });
  return path;
}

// Between two moments points move on straight lines.
function between(path, time, out) {
  let i = 1;
  while (i < path.length - 1 && path[i].time < time) i++;
  const a = path[i - 1], b = path[i], f = Math.max(0, Math.min(1, (time - a.time) / (b.time - a.time)));
  for (let j = 0; j < out.length; j++) out[j] = a.x[j] + f * (b.x[j] - a.x[j]);
  return a.sigma + f * (b.sigma - a.sigma);
}

export const churn = {
  id: "churn",
  below: true,
  title: "Churn: noise that heals, up to a point",
  lead: "500 particles fall from noise into three blobs that hold 50, 30 and 20 % of the data. Algorithm 2 first climbs to a higher noise level, "
    + "then takes a Heun step down. Beside it the SDE by Euler–Maruyama, with as many evaluations of D and the same rule for new noise. Rings: where p(x; σ) is.",
  fields: {
    S_churn: range("<code>S_churn</code>", 20, 0, 80, { format: v => fixed(v, 1), }),
    S_tmin: range("<code>S_tmin</code>", 0.02, 0.02, 20, { log: true }),
    S_tmax: range("<code>S_tmax</code>", 20, 0.02, 20, { log: true }),
    S_noise: range("<code>S_noise</code>", 1, 0.95, 1.1, { format: v => fixed(v, 3) }),
    excess: range("denoiser takes away", 0, -0.1, 0.1, { format: v => (v < 0 ? "−" : "+") + percent(Math.abs(v), 1), hint: "more noise (+) than there is, or less" }),
    pull: range("denoiser pulls to the mean", 0, 0, 0.1, { format: v => percent(v, 1), hint: "a share of the way, at every level" }),
    N: range("steps <i>N</i>", 24, 4, 128, { step: 1, log: true }),
    seed: range("seed", 4, 1, 40, { step: 1 }),
    time: range("moment", 1, 0, 1, { apart: true, format: v => percent(v) }),
  },
  tries: [
    { text: "<b>Churn needs steps.</b> With 10 steps every climb is paid by a longer step down: the blobs come out too wide, and the SDE does not even get their shares right. Raise N to 64, and the same noise does no harm.",
      set: { N: 10, S_churn: 10 } },
    { text: "<b>Noise heals.</b> This denoiser takes away 5 % too much, and without churn the blobs end too narrow, by up to a sixth. Raise S_churn to 60: every climb gives the points a fresh start. S_noise = 1.03 does the rest.",
      set: { excess: 0.05, S_churn: 0, N: 64 } },
    { text: "<b>Noise repeats.</b> This one pulls 5 % towards the mean whenever it is asked, and churn asks again and again. Set S_churn to 0 and watch the shift of the centres. Then 60 again, with S_tmin = 0.3: no noise where the pull is worst.",
      set: { pull: 0.05, S_churn: 60, N: 64 } },
  ],
  build(stage, makeControl) {
    const { plots, colour, set, read, reads } = stage;
    const key = legend(plots), pair = element("div", { class: "pair" });
    plots.append(pair);
    const views = ["Algorithm 2", "Euler–Maruyama"].map(name => {
      const canvas = element("canvas", { role: "img", "aria-label": `500 particles moved by ${name}` });
      pair.append(element("div", { class: "panel" }, element("div", { class: "panel-title" }, name), canvas));
      return canvas;
    });
    const player = element("div", { class: "player" }), button = element("button", { type: "button", class: "play" }, "Play");
    const moment = makeControl("time");
    player.append(button, moment.node, element("div", { class: "reads" }, read("sigma", "σ =")));
    plots.append(player);
    const cells = {}, cell = (row, column) => { const output = element("output", { "data-read": `${row}.${column}` }); cells[`${row}.${column}`] = output; return element("td", {}, output); };
    const columns = [["heun", "Heun, no&nbsp;noise"], ["algorithm2", "Algo&shy;rithm&nbsp;2"], ["sde", "Euler–<wbr>Maruyama"], ["exact", "exact draws"]];
    const rows = [...BLOBS.map((name, k) => [`share${k}`, `share ${name} (${[50, 30, 20][k]}\u00a0%)`]), ...BLOBS.map((name, k) => [`width${k}`, `width ${name} (1)`]), ["shift", "shift of centres (0)"], ["distance", "distance (0)"]];
    plots.append(element("div", { class: "scroll late" }, element("table", {},
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "at the end (truth)"), ...columns.map(([, name]) => element("th", { scope: "col", html: name })))),
      element("tbody", {}, ...rows.map(([row, name]) => element("tr", {}, element("th", { scope: "row" }, name), ...columns.map(([column]) => cell(row, column))))))));
    plots.append(element("p", { class: "aside late" }, "All are measured at the end, and 500 points are few: exact draws (mean and standard deviation of 12 sets) show the floor. Widths and shifts are in units of the blob's own width. Distance: sliced Wasserstein-2 to the exact density, in data units."));

    let distance = null, plain = null, paths = null, owners = null, run = null, floor = null;
    const points = new Float64Array(2 * PARTICLES), frames = { drawn: 0, ms: [] };
    stage.frames = frames;

    const simulate = state => {
      const churn = { S_churn: state.S_churn, S_tmin: state.S_tmin, S_tmax: state.S_tmax, S_noise: state.S_noise }, D = numerics.biased(MIX, state.excess, state.pull);
      paths = [algorithm2(D, state, churn), eulerMaruyama(D, state, churn)];
      distance ??= numerics.slicedDistance(MIX, PARTICLES, 8);
      const report = (column, { share, width, shift }, d) => {
        const show = (name, value, text) => { const cell = cells[name]; cell.dataset.value = value; if (cell.firstChild?.data !== text) cell.textContent = text; };
        share.forEach((v, k) => show(`share${k}.${column}`, v, percent(v, 1)));
        width.forEach((v, k) => show(`width${k}.${column}`, v, Number.isFinite(v) ? fixed(v, 2) : "–"));
        show(`shift.${column}`, shift, fixed(shift, 2));
        show(`distance.${column}`, d, fixed(d, 3));
      };
      owners = paths.map((path, which) => {
        const end = path[path.length - 1].x, found = census(end);
        report(which ? "sde" : "algorithm2", found, distance(end));
        return found.owner;
      });
      // what no slider of the noise changes is not computed again
      const same = [state.N, state.excess, state.pull, state.seed].join();
      if (plain !== same) { plain = same; const path = algorithm2(D, state, { S_noise: 1 }), end = path[path.length - 1].x; report("heun", census(end), distance(end)); }
      if (!floor) {
        floor = Array.from({ length: 12 }, (_, i) => { const x = numerics.draw(MIX, numerics.generator(1000 + i), PARTICLES); return { ...census(x), distance: distance(x) }; });
        const show = (name, pick, text) => {
          const values = floor.map(pick), mean = values.reduce((a, b) => a + b) / 12, spread = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / 11);
          cells[`${name}.exact`].dataset.value = mean;
          cells[`${name}.exact`].textContent = `${text(mean)} ±\u00a0${text(spread)}`;
        };
        for (const k of [0, 1, 2]) { show(`share${k}`, c => c.share[k], v => fixed(100 * v, 0)); show(`width${k}`, c => c.width[k], v => fixed(v, 2)); }
        show("shift", c => c.shift, v => fixed(v, 2)); show("distance", c => c.distance, v => fixed(v, 3));
      }
      frames.steps = paths[0].length;
    };

    // All on canvas: nothing of the page is laid out again while particles move.
    const draw = (state, time) => {
      const began = performance.now(), ratio = window.devicePixelRatio || 1, { shades, ink, soft } = hues;
      views.forEach((canvas, which) => {
        const side = canvas.width / ratio, context = canvas.getContext("2d"), sigma = between(paths[which], time * state.N, points);
        const reach = 1.65 + 2.3 * sigma, unit = side / (2 * reach), size = side < 260 ? 1.7 : 2.1, owner = owners[which];
        const px = x => side / 2 + unit * x, py = y => side / 2 - unit * y;
        context.setTransform(ratio, 0, 0, ratio, 0, 0);
        context.clearRect(0, 0, side, side);
        context.globalAlpha = 0.75;
        for (let k = 0; k < 3; k++) {
          context.fillStyle = shades[k];
          context.beginPath();
          for (let i = 0; i < PARTICLES; i++) {
            if (owner[i] !== k) continue;
            const x = px(points[2 * i]), y = py(points[2 * i + 1]);
            context.moveTo(x + size, y);
            context.arc(x, y, size, 0, 2 * Math.PI);
          }
          context.fill();
        }
        context.globalAlpha = 1;
        for (let k = 0; k < 3; k++) for (const times of [1, 2]) {          // truth: one and two standard deviations of p(x; sigma)
          context.beginPath();
          context.arc(px(MIX.means[2 * k]), py(MIX.means[2 * k + 1]), times * unit * Math.hypot(MIX.std[k], sigma), 0, 2 * Math.PI);
          context.strokeStyle = shades[k];
          context.lineWidth = times === 1 ? 1.6 : 0.8;
          context.stroke();
        }
        const bar = [0.5, 1, 2, 5, 10, 20].find(v => v > reach / 4) ?? 40;  // the scale
        context.strokeStyle = ink; context.lineWidth = 2;
        context.beginPath(); context.moveTo(10, side - 12); context.lineTo(10 + bar * unit, side - 12); context.stroke();
        context.fillStyle = soft; context.font = "12.5px system-ui, 'DejaVu Sans', sans-serif";
        context.fillText(String(bar), 10, side - 18);
        if (!which) reads.sigma(sigma, sigma < 1e-9 ? "0" : sigma < 0.1 ? fixed(sigma, 3) : fixed(sigma, 2));
      });
      frames.drawn++;
      frames.ms.push(performance.now() - began);
      if (frames.ms.length > 2000) frames.ms.shift();
    };

    // sizes and colours are looked up when the page changes, not in every frame
    let hues = null;
    const prepare = () => {
      key.show(SHADES.map((shade, k) => [colour(shade), `ends in the ${BLOBS[k]} blob`, "dot"]));
      hues = { shades: SHADES.map(colour), ink: colour("ink"), soft: colour("soft") };
      const ratio = window.devicePixelRatio || 1;
      for (const canvas of views) {
        const side = Math.round(canvas.clientWidth * ratio);
        if (canvas.width !== side || canvas.height !== side) canvas.width = canvas.height = side;
      }
    };

    const stop = () => { if (run) cancelAnimationFrame(run.id); run = null; button.textContent = "Play"; };
    const play = (options = {}) => {
      stop();
      const first = stage.state.time >= 1 ? 0 : stage.state.time, began = performance.now();
      run = { id: 0 };
      button.textContent = "Pause";
      const tick = now => {
        let time = first + Math.max(0, now - began) / (1000 * SECONDS);
        if (options.loop) time %= 1;
        stage.state.time = Math.min(1, time);
        moment.show(stage.state.time);
        draw(stage.state, stage.state.time);
        if (time >= 1) stop(); else run.id = requestAnimationFrame(tick);
      };
      run.id = requestAnimationFrame(tick);
    };
    Object.assign(stage, { play, stop });
    button.addEventListener("click", () => run ? stop() : stage.still.matches ? set("time", stage.state.time >= 1 ? 0 : Math.min(1, stage.state.time + 1 / stage.state.N)) : play());
    moment.node.addEventListener("input", stop);

    return (state, changed) => {
      if (!paths || ["S_churn", "S_tmin", "S_tmax", "S_noise", "excess", "pull", "N", "seed"].some(name => changed.has(name))) simulate(state);
      if (stage.fresh) prepare();
      if (!run) button.textContent = stage.still.matches ? "One step" : "Play";
      moment.show(state.time);
      if (!run) draw(state, state.time);
    };
  },
};
