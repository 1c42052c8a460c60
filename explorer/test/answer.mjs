// Answers cases for tests/test_explorer.py: JSON [[function, ...arguments], ...] on stdin, a list of results on stdout.
import { readFileSync } from "node:fs";
import * as numerics from "../src/numerics.js";

const mix = ([means, std, weights]) => numerics.mixture(means, std, weights);
const exact = data => { const m = mix(data); return (x, sigma) => numerics.denoise(m, x, sigma); };
const solver = ([name, parameter]) =>
  ({ euler: numerics.euler, heun: numerics.heun, rk2: numerics.rk2(parameter), multistep: numerics.multistep(parameter), dpmpp2m: numerics.dpmpp2m })[name];
const schedule = name => numerics.SCHEDULES[name];

const answers = {
  D: (data, x, sigma) => numerics.denoise(mix(data), x, sigma),
  biased: (data, excess, pull, x, sigma) => numerics.biased(mix(data), excess, pull)(x, sigma),
  score: (data, x, sigma) => numerics.score(mix(data), x, sigma),
  posterior: (data, x, sigma) => numerics.posterior(mix(data), x, sigma),
  logProb: (data, x, sigma) => numerics.logProb(mix(data), x, sigma),
  schedule: (name, t) => { const { sigma, dsigma, s, ds } = numerics.knotAt(schedule(name), t); return [sigma, dsigma, s, ds, schedule(name).inverse(sigma)]; },
  slope: (data, name, x, t) => numerics.slope(exact(data), x, numerics.knotAt(schedule(name), t)),
  run: (data, name, x, levels, step) => numerics.integrate(exact(data), schedule(name), x, levels, solver(step)).flatMap(state => [...state]),
  calls: (name, n) => numerics.evaluations[name](n),
  churnGammas: (levels, churn) => numerics.churnGammas(levels, churn),
  churn: (data, name, x, levels, churn, noises, step) => {
    const moments = numerics.knots(schedule(name), levels), gammas = numerics.churnGammas(levels, churn), history = [];
    return gammas.reduce((state, gamma, i) => numerics.churnStep(
      exact(data), schedule(name), state, moments[i], moments[i + 1], gamma, churn.S_noise, noises[i], solver(step), history).x, x);
  },
  sde: (data, name, x, levels, beta, noises) => {
    const moments = numerics.knots(schedule(name), levels);
    return noises.reduce((state, noise, i) => numerics.sdeStep(
      exact(data), state, moments[i], moments[i + 1], beta * Math.abs(moments[i + 1].t - moments[i].t), noise), x);
  },
  exactPath: (data, x, from, levels) => numerics.exactPath(mix(data), x, from, levels),
  slicedDistance: (data, points, directions) => numerics.slicedDistance(mix(data), points.length / 2, directions)(points),
};
const typed = value => Array.isArray(value) && value.length && value.every(v => typeof v === "number") ? Float64Array.from(value) : value;
const plain = value => ArrayBuffer.isView(value) ? [...value] : value;

const cases = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(cases.map(([name, ...args]) => plain((answers[name] ?? numerics[name])(...args.map(typed))))));
