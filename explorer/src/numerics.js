// The mathematics of the explorer, in float64, with the names of the Python package. No drawing and no page in here:
// tests/test_explorer.py compares every function with edm_nb.
//
// A batch of states is a Float64Array of B·d numbers, row after row. A "knot" is what Eq. 4 needs to know of a moment:
// { t, sigma, dsigma, s, ds }.

// --- densities and denoisers -----------------------------------------------------------------------------------------

// A mixture of isotropic Gaussians: means [K][d], std [K], weights [K] (normalised here).
export function mixture(means, std, weights) {
  const total = weights.reduce((a, b) => a + b, 0);
  return { d: means[0].length, K: means.length, means: Float64Array.from(means.flat()), std: Float64Array.from(std),
           weights: Float64Array.from(weights, w => w / total) };
}

// What depends on sigma alone: per component the log of weight and normaliser, 1/variance, and how much of x - mean stays in D.
// One of them is kept between calls and overwritten: no allocation and no logarithm inside the loops of 60 frames a second.
const constants = { base: new Float64Array(64), precision: new Float64Array(64), keep: new Float64Array(64) };
const scratch = new Float64Array(64);

function level({ d, K, std, weights }, sigma) {
  for (let k = 0; k < K; k++) {
    const c2 = std[k] * std[k], variance = c2 + sigma * sigma;
    constants.base[k] = Math.log(weights[k]) - 0.5 * d * Math.log(2 * Math.PI * variance);
    constants.precision[k] = 1 / variance;
    constants.keep[k] = c2 / variance;
  }
  return constants;
}

// log(weight × density) of every component at one point x[at..at+d], into `out`; returns the largest.
function logJoint({ d, K, means }, { base, precision }, x, at, out) {
  let largest = -Infinity;
  for (let k = 0; k < K; k++) {
    let distance = 0;
    for (let i = 0; i < d; i++) { const diff = x[at + i] - means[k * d + i]; distance += diff * diff; }
    out[k] = base[k] - 0.5 * distance * precision[k];
    if (out[k] > largest) largest = out[k];
  }
  return largest;
}

// Probability of each component given x (one point).
export function posterior(mix, x, sigma) {
  const w = new Float64Array(mix.K), largest = logJoint(mix, level(mix, sigma), x, 0, w);
  let total = 0;
  for (let k = 0; k < mix.K; k++) total += (w[k] = Math.exp(w[k] - largest));
  return w.map(v => v / total);
}

// The component that most probably made the clean point x[at..].
export function likeliest(mix, x, at) {
  logJoint(mix, level(mix, 0), x, at, scratch);
  let best = 0;
  for (let k = 1; k < mix.K; k++) if (scratch[k] > scratch[best]) best = k;
  return best;
}

// log p(x; sigma) of one point, in nats.
export function logProb(mix, x, sigma) {
  const largest = logJoint(mix, level(mix, sigma), x, 0, scratch);
  let total = 0;
  for (let k = 0; k < mix.K; k++) total += Math.exp(scratch[k] - largest);
  return largest + Math.log(total);
}

// D(x; sigma) for a batch: the posterior mean of the data.
export function denoise(mix, x, sigma, out = new Float64Array(x.length)) {
  const { d, K, means } = mix, here = level(mix, sigma), { keep } = here;
  for (let at = 0; at < x.length; at += d) {
    const largest = logJoint(mix, here, x, at, scratch);
    let total = 0;
    for (let k = 0; k < K; k++) total += (scratch[k] = Math.exp(scratch[k] - largest));
    for (let i = 0; i < d; i++) {
      let D = 0;
      for (let k = 0; k < K; k++) { const mean = means[k * d + i]; D += scratch[k] * (mean + keep[k] * (x[at + i] - mean)); }
      out[at + i] = D / total;
    }
  }
  return out;
}

// The score (Eq. 3) for a batch.
export function score(mix, x, sigma) {
  return denoise(mix, x, sigma).map((D, i) => (D - x[i]) / (sigma * sigma));
}

// A denoiser with two faults: it takes away (1 + excess) times the noise it should, and draws everything towards the data's
// mean by a share `pull` of the way.
export function biased(mix, excess, pull = 0) {
  const { d, K, means, weights } = mix, centre = Float64Array.from({ length: d }, (_, i) => {
    let sum = 0;
    for (let k = 0; k < K; k++) sum += weights[k] * means[k * d + i];
    return sum;
  });
  return (x, sigma, out) => {
    const D = denoise(mix, x, sigma, out);
    if (excess || pull) for (let i = 0; i < D.length; i++) {
      const strong = x[i] + (1 + excess) * (D[i] - x[i]);
      D[i] = strong + pull * (centre[i % d] - strong);
    }
    return D;
  };
}

// --- schedules: sigma(t), s(t), their derivatives, and the inverse of sigma -------------------------------------------

export const LINEAR = { sigma: t => t, dsigma: () => 1, inverse: sigma => sigma, s: () => 1, ds: () => 0 };

export const VE = { sigma: Math.sqrt, dsigma: t => 0.5 / Math.sqrt(t), inverse: sigma => sigma * sigma, s: () => 1, ds: () => 0 };

export function vpSchedule(beta_d = 19.9, beta_min = 0.1) {
  const u = t => 0.5 * beta_d * t * t + beta_min * t, beta = t => beta_d * t + beta_min;   // u = log(1 + sigma²)
  const sigma = t => Math.sqrt(Math.expm1(u(t)));
  return {
    sigma,
    dsigma: t => 0.5 * beta(t) * (sigma(t) + 1 / sigma(t)),
    inverse: level => { const v = Math.log1p(level * level); return 2 * v / (Math.sqrt(beta_min ** 2 + 2 * beta_d * v) + beta_min); },
    s: t => Math.exp(-0.5 * u(t)),
    ds: t => -0.5 * beta(t) * Math.exp(-0.5 * u(t)),
  };
}

// Rectified flow: x_t = (1 - t) y + t n.
export const FLOW = { sigma: t => t / (1 - t), dsigma: t => 1 / (1 - t) ** 2, inverse: sigma => sigma / (1 + sigma),
                      s: t => 1 - t, ds: () => -1 };

export const SCHEDULES = { linear: LINEAR, vp: vpSchedule(), ve: VE, flow: FLOW };

export const knotAt = (schedule, t) =>
  ({ t, sigma: schedule.sigma(t), dsigma: schedule.dsigma(t), s: schedule.s(t), ds: schedule.ds(t) });

// The moments of noise levels. The level is kept as given, free of the rounding of sigma(sigma⁻¹(·)).
export const knots = (schedule, levels) => Array.from(levels, sigma => ({ ...knotAt(schedule, schedule.inverse(sigma)), sigma }));

// --- noise levels of Table 1's rows: N levels, then 0 ----------------------------------------------------------------

const fractions = n => Array.from({ length: n }, (_, i) => i / Math.max(n - 1, 1));

// Eq. 5: evenly spaced in sigma^(1/rho).
export function edmSigmas(n, sigma_min = 0.002, sigma_max = 80, rho = 7) {
  const range = Math.expm1(Math.log(sigma_min / sigma_max) / rho);
  return [...fractions(n).map(u => sigma_max * Math.exp(rho * Math.log1p(u * range))), 0];
}

export function vpSigmas(n, beta_d = 19.9, beta_min = 0.1, eps_s = 1e-3) {
  const { sigma } = vpSchedule(beta_d, beta_min);
  return [...fractions(n).map(u => sigma(1 + u * (eps_s - 1))), 0];
}

export function veSigmas(n, sigma_min = 0.02, sigma_max = 100) {
  return [...fractions(n).map(u => sigma_max * Math.exp(u * Math.log(sigma_min / sigma_max))), 0];
}

// u_0 > ... > u_M = 0, on which an iDDPM network was trained.
export function iddpmLevels(M = 1000, C_1 = 0.001, C_2 = 0.008) {
  const alphaBar = j => Math.sin(0.5 * Math.PI * j / (M * (C_2 + 1))) ** 2, u = [0];
  for (let j = M; j > 0; j--) u.push(Math.sqrt((u[u.length - 1] ** 2 + 1) / Math.max(alphaBar(j - 1) / alphaBar(j), C_1) - 1));
  return u.reverse();
}

export function iddpmSigmas(n, M = 1000, C_1 = 0.001, C_2 = 0.008, j_0 = 8) {
  const u = iddpmLevels(M, C_1, C_2);
  return [...fractions(n).map(r => u[Math.floor(j_0 + (M - 1 - j_0) * r + 0.5)]), 0];
}

// Levels of one range spread as a row of Table 1 would: for comparing the spacings alone.
export function spaced(kind, n, sigma_min, sigma_max, rho) {
  if (kind === "geometric") return veSigmas(n, sigma_min, sigma_max);
  const schedule = SCHEDULES[kind];
  if (!schedule) return edmSigmas(n, sigma_min, sigma_max, rho);
  const first = schedule.inverse(sigma_max), last = schedule.inverse(sigma_min);
  return [...fractions(n).map(u => schedule.sigma(first + u * (last - first))), 0];
}

// --- ODE steps: (denoiser, schedule, x, here, next, history) -> x at `next` --------------------------------------------
// `denoiser(x, sigma)` returns D for a batch. `history` is an array that multistep methods keep between steps.

// D(x/s; sigma) at a knot.
function denoisedAt(denoiser, x, knot) {
  return denoiser(knot.s === 1 ? x : x.map(v => v / knot.s), knot.sigma);
}

// dx/dt (Eq. 4).
export function slope(denoiser, x, { sigma, dsigma, s, ds }) {
  const D = denoisedAt(denoiser, x, { sigma, s });
  return combine(dsigma / sigma + ds / s, x, -dsigma * s / sigma, D);
}

// a x + b y, without a call per number.
function combine(a, x, b, y) {
  const out = new Float64Array(x.length);
  for (let i = 0; i < out.length; i++) out[i] = a * x[i] + b * y[i];
  return out;
}

const along = (x, h, d) => combine(1, x, h, d);

export function euler(denoiser, schedule, x, here, next) {
  return along(x, next.t - here.t, slope(denoiser, x, here));
}

// Two stages (Algorithm 3): the second slope is taken at t + alpha h. alpha = 1 is Heun (Algorithm 1), 1/2 the midpoint.
// The step to sigma = 0 is Euler's for every alpha.
export const rk2 = (alpha = 1) => function step(denoiser, schedule, x, here, next) {
  const h = next.t - here.t, d = slope(denoiser, x, here), w = 1 / (2 * alpha);
  if (next.sigma === 0) return along(x, h, d);
  const middle = alpha === 1 ? next : knotAt(schedule, here.t + alpha * h);
  const dMiddle = slope(denoiser, along(x, alpha * h, d), middle);
  return along(along(x, h * (1 - w), d), h * w, dMiddle);
};

export const heun = rk2(1);

// Integrals over the step of the Lagrange polynomials through `times` (newest last): Adams-Bashforth on uneven steps.
export function adamsBashforthWeights(times, tNext) {
  const now = times[times.length - 1], h = tNext - now, u = times.map(t => (t - now) / h);
  return u.map((node, j) => {
    let polynomial = [1];                                         // coefficients, constant first
    u.forEach((other, i) => {
      if (i === j) return;
      const scaled = polynomial.map(c => c / (node - other)), product = new Array(polynomial.length + 1).fill(0);
      scaled.forEach((c, power) => { product[power] -= c * other; product[power + 1] += c; });
      polynomial = product;
    });
    return h * polynomial.reduce((sum, c, power) => sum + c / (power + 1), 0);
  });
}

export const multistep = (order = 2) => function step(denoiser, schedule, x, here, next, history) {
  history.push({ t: here.t, d: slope(denoiser, x, here) });
  if (history.length > order) history.shift();
  return adamsBashforthWeights(history.map(past => past.t), next.t)
    .reduce((y, w, k) => along(y, w, history[k].d), x);
};

// DPM-Solver++(2M). With lambda = -ln sigma the ODE of x/s is linear but for D:
// x/s ← (σ'/σ) x/s + (1 - σ'/σ) D̃, and D̃ is D carried half a step ahead in lambda by the step before.
// A step to sigma = 0 is infinitely long in lambda; there D̃ = D, as in the first step.
export function dpmpp2m(denoiser, schedule, x, here, next, history) {
  const D = denoisedAt(denoiser, x, here), past = history.pop(), ratio = next.sigma / here.sigma;
  history.push({ sigma: here.sigma, D });
  let carried = D;
  if (past && next.sigma > 0) {
    const r = Math.log(here.sigma / next.sigma) / Math.log(past.sigma / here.sigma) / 2;
    carried = D.map((v, i) => v + r * (v - past.D[i]));
  }
  return combine(next.s * ratio / here.s, x, next.s * (1 - ratio), carried);
}

// All states of a run over `levels`, from x at levels[0].
export function integrate(denoiser, schedule, x, levels, step) {
  const moments = knots(schedule, levels), states = [x], history = [];
  for (let i = 0; i + 1 < moments.length; i++) states.push(step(denoiser, schedule, states[i], moments[i], moments[i + 1], history));
  return states;
}

// How often the denoiser is called for N steps that end at sigma = 0.
export const evaluations = { euler: n => n, heun: n => 2 * n - 1, alpha: n => 2 * n - 1, multistep: n => n, dpmpp2m: n => n };

// --- noise on the way ------------------------------------------------------------------------------------------------

export const MAX_GAMMA = Math.SQRT2 - 1;

// γ_i of Algorithm 2.
export function churnGammas(levels, { S_churn = 0, S_tmin = 0, S_tmax = Infinity } = {}) {
  const gamma = Math.min(S_churn / (levels.length - 1), MAX_GAMMA);
  return Array.from(levels).slice(0, -1).map(sigma => S_tmin <= sigma && sigma <= S_tmax ? gamma : 0);
}

// The climb of Algorithm 2 from `here` by gamma, with unit noise given: { x, knot } at the higher level.
export function addChurn(schedule, x, here, gamma, S_noise, noise) {
  if (gamma === 0) return { x, knot: here };
  const sigma = here.sigma * (1 + gamma), knot = { ...knotAt(schedule, schedule.inverse(sigma)), sigma };
  const spread = S_noise * Math.sqrt(sigma * sigma - here.sigma * here.sigma);
  return { x: combine(knot.s / here.s, x, knot.s * spread, noise), knot };
}

// One step of Algorithm 2: climb, then an ODE step down to `next`.
export function churnStep(denoiser, schedule, x, here, next, gamma, S_noise, noise, step = heun, history = []) {
  const up = addChurn(schedule, x, here, gamma, S_noise, noise);
  if (gamma) history.length = 0;              // old slopes belong to the path before the noise
  return { up, x: step(denoiser, schedule, up.x, up.knot, next, history) };
}

// β(t)|Δt| of the SDE whose step adds as much noise as a climb by gamma: (1 + gamma)² - 1 = 2 rate.
export const churnRate = gamma => gamma + gamma * gamma / 2;

// One Euler-Maruyama step of the SDE (Eq. 6), backward in time: rate = β(t)|Δt|; no noise in a step that ends at sigma = 0.
export function sdeStep(denoiser, x, here, next, rate, noise) {
  const { sigma, dsigma, s, ds } = here, dt = next.t - here.t, D = denoisedAt(denoiser, x, here);
  if (next.sigma === 0) rate = 0;
  const a = 1 + (dsigma / sigma + ds / s) * dt - rate, b = s * (rate - dsigma / sigma * dt), c = s * sigma * Math.sqrt(2 * rate);
  return along(combine(a, x, b, D), c, noise);
}

// --- preconditioning: sigma -> [c_skip, c_out, c_in, c_noise] ---------------------------------------------------------

export function edmScalings(sigma, sigma_data = 0.5) {
  const variance = sigma * sigma + sigma_data * sigma_data;
  return [sigma_data ** 2 / variance, sigma * sigma_data / Math.sqrt(variance), 1 / Math.sqrt(variance), Math.log(sigma) / 4];
}

export function vpScalings(sigma, M = 1000) {
  return [1, -sigma, 1 / Math.sqrt(sigma * sigma + 1), (M - 1) * SCHEDULES.vp.inverse(sigma)];
}

export const veScalings = sigma => [1, sigma, 1, Math.log(sigma / 2)];

const table = iddpmLevels();

export function iddpmScalings(sigma) {
  let best = 0;
  for (let j = 1; j < table.length - 1; j++) if (Math.abs(table[j] - sigma) < Math.abs(table[best] - sigma)) best = j;
  return [1, -sigma, 1 / Math.sqrt(sigma * sigma + 1), table.length - 2 - best];
}

export function vScalings(sigma) {
  const c_in = 1 / Math.sqrt(sigma * sigma + 1);
  return [c_in * c_in, -sigma * c_in, c_in, Math.atan(sigma) * 2 / Math.PI];
}

export const flowScalings = sigma => [1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma), sigma / (1 + sigma)];

// E|y - c_skip (y + n)|² per value: the parabola whose minimum is EDM's c_skip.
export const targetVariance = (c_skip, sigma, sigma_data) => (1 - c_skip) ** 2 * sigma_data ** 2 + c_skip ** 2 * sigma ** 2;

// --- training noise: density of ln sigma ------------------------------------------------------------------------------

export const lognormalDensity = (sigma, P_mean, P_std) =>
  Math.exp(-0.5 * ((Math.log(sigma) - P_mean) / P_std) ** 2) / (P_std * Math.sqrt(2 * Math.PI));

export function vpDensity(sigma, eps_t = 1e-5) {
  const { inverse, dsigma } = SCHEDULES.vp, t = inverse(sigma);
  return t < eps_t || t > 1 ? 0 : sigma / dsigma(t) / (1 - eps_t);
}

export const veDensity = (sigma, sigma_min = 0.02, sigma_max = 100) =>
  sigma < sigma_min || sigma > sigma_max ? 0 : 1 / Math.log(sigma_max / sigma_min);

// Mean of a curve (given at rising levels, linear in ln sigma between them) under a density of ln sigma, and the density's mass there.
export function expectation(density, levels, values) {
  let sum = 0, mass = 0;
  for (let i = 0; i + 1 < levels.length; i++) {
    const a = Math.log(levels[i]), b = Math.log(levels[i + 1]), parts = 24;
    for (let k = 0; k < parts; k++) {
      const f = (k + 0.5) / parts, p = density(Math.exp(a + f * (b - a))) * (b - a) / parts;
      sum += p * (values[i] + f * (values[i + 1] - values[i]));
      mass += p;
    }
  }
  return { mean: sum / mass, mass };
}

// --- the exact path on a line ------------------------------------------------------------------------------------------

// Upper tail of the normal: a series near 0, a continued fraction (from its end inwards) in the tail.
export function normalTail(z) {
  if (z < 0) return 1 - normalTail(-z);
  if (z < 2.5) {
    let term = z, sum = z;
    for (let n = 1; Math.abs(term) > 1e-18 * sum && n < 200; n++) sum += (term *= z * z / (2 * n + 1));
    return 0.5 - sum * Math.exp(-0.5 * z * z) / Math.sqrt(2 * Math.PI);
  }
  let fraction = z;
  for (let n = Math.ceil(10 + 700 / (z * z)); n > 0; n--) fraction = z + n / fraction;
  return Math.exp(-0.5 * z * z) / (Math.sqrt(2 * Math.PI) * fraction);
}

// Share of p(x; sigma) on a line below x (side = -1) or above it (side = 1).
export function tail(mix, x, sigma, side) {
  let sum = 0;
  for (let k = 0; k < mix.K; k++) sum += mix.weights[k] * normalTail(side * (x - mix.means[k]) / Math.hypot(mix.std[k], sigma));
  return sum;
}

// The x that has a given share on one side: bisection, with Newton's steps where they stay inside.
export function quantile(mix, share, sigma, side) {
  let low = Infinity, high = -Infinity;
  for (let k = 0; k < mix.K; k++) {
    const reach = 12 * Math.hypot(mix.std[k], sigma);
    low = Math.min(low, mix.means[k] - reach); high = Math.max(high, mix.means[k] + reach);
  }
  let x = 0.5 * (low + high);
  for (let i = 0; i < 200; i++) {
    const excess = side * (share - tail(mix, x, sigma, side));        // > 0: x is too far right
    if (excess > 0) high = x; else low = x;
    const newton = x - excess / Math.exp(logProb(mix, [x], sigma));
    const next = newton > low && newton < high ? newton : 0.5 * (low + high);
    if (Math.abs(next - x) <= 1e-15 * Math.max(1, Math.abs(x))) return next;
    x = next;
  }
  return x;
}

// The probability-flow ODE on a line carries every point so that the share of the density on either side of it stays the
// same: its solution needs no solver. From x at level `from` (s = 1) to each of `levels`.
export function exactPath(mix, x, from, levels) {
  const below = tail(mix, x, from, -1), above = tail(mix, x, from, 1), side = below < above ? -1 : 1;
  return Array.from(levels, sigma => quantile(mix, Math.min(below, above), sigma, side));
}

// --- random numbers and distances ---------------------------------------------------------------------------------------

// A small seeded generator (splitmix32), uniform in (0, 1).
export function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let z = state;
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return (((z ^ (z >>> 15)) >>> 0) + 0.5) / 4294967296;
  };
}

// Unit normal numbers (Box-Muller).
export function normals(uniform, n) {
  const out = new Float64Array(n);
  for (let i = 0; i < n; i += 2) {
    const r = Math.sqrt(-2 * Math.log(uniform())), angle = 2 * Math.PI * uniform();
    out[i] = r * Math.cos(angle);
    if (i + 1 < n) out[i + 1] = r * Math.sin(angle);
  }
  return out;
}

// n draws from the mixture.
export function draw(mix, uniform, n) {
  const { d, means, std, weights } = mix, out = normals(uniform, n * d);
  for (let b = 0; b < n; b++) {
    let k = 0, u = uniform();
    while (k < mix.K - 1 && u > weights[k]) u -= weights[k++];
    for (let i = 0; i < d; i++) out[b * d + i] = means[k * d + i] + std[k] * out[b * d + i];
  }
  return out;
}

// Distance of points in the plane to the exact mixture: Wasserstein-2 along `directions` lines, root mean square. The
// truth enters by its quantiles, so it has no noise of its own.
export function slicedDistance(mix, n, directions = 12) {
  const lines = Array.from({ length: directions }, (_, j) => {
    const angle = Math.PI * j / directions, c = Math.cos(angle), s = Math.sin(angle);
    const shadow = mixture(Array.from({ length: mix.K }, (_, k) => [c * mix.means[2 * k] + s * mix.means[2 * k + 1]]), mix.std, mix.weights);
    const truth = Float64Array.from({ length: n }, (_, i) =>
      2 * i < n ? quantile(shadow, (i + 0.5) / n, 0, -1) : quantile(shadow, (n - i - 0.5) / n, 0, 1));
    return { c, s, truth };
  });
  return points => {
    let sum = 0;
    for (const { c, s, truth } of lines) {
      const sorted = Float64Array.from({ length: n }, (_, i) => c * points[2 * i] + s * points[2 * i + 1]).sort();
      for (let i = 0; i < n; i++) sum += (sorted[i] - truth[i]) ** 2;
    }
    return Math.sqrt(sum / (n * directions));
  };
}
