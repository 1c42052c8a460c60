// Page 1: three bumps on a line; drag x and sigma, and D, the score and the posterior weights follow.
import { denoise, logProb, mixture, posterior } from "../numerics.js";
import { draggable, fixed, join, legend, number, percent, plot, range, linear } from "../ui.js";
import { area, line } from "d3-shape";

const MIX = mixture([[-1], [0], [1.2]], [0.05, 0.05, 0.08], [0.3, 0.2, 0.5]);     // chapter 00's toy density
const NAMES = ["left", "middle", "right"], SHADES = ["one", "two", "three"];
const REACH = 3.6, FINE = Array.from({ length: 801 }, (_, i) => -REACH + 2 * REACH * i / 800);

export const denoiser = {
  id: "denoiser",
  title: "The denoiser: what a noisy point could have been",
  lead: "The data lie in three bumps on a line. Noise of standard deviation <b>σ</b> blurs them into p(x; σ). From one noisy point <b>x</b> the "
    + "denoiser answers with the mean of everything that x could have been, <b>D</b>. Drag the picture, or use the sliders.",
  fields: {
    sigma: range("noise level <i>σ</i>", 1.4, 0.02, 10, { log: true }),
    x: range("noisy point <i>x</i>", 2.2, -3, 3, { format: value => fixed(value) }),
  },
  tries: [
    { text: "<b>Far away from the data everything looks alike.</b> At σ = 8 the weights are those of the bumps, and D is near the data's mean, 0.3, wherever x is.",
      set: { sigma: 8, x: -1.5 } },
    { text: "<b>Close by, D is the nearest bump.</b> At σ = 0.06 drag x across 0.6: D jumps, because the weights change hands within a hair's breadth.",
      set: { sigma: 0.06, x: 0.55 } },
    { text: "<b>In between, D is a compromise that no data point resembles.</b> At σ = 0.35 and x = 0.6 it lies between two bumps: the blur of a denoised image.",
      set: { sigma: 0.35, x: 0.6 } },
  ],
  build(stage) {
    const { plots, read, reads, colour, set } = stage;
    const reading = document.createElement("div");
    reading.className = "reads";
    reading.append(read("D", "D(x; σ) ="), read("score", "score (D − x)/σ² ="), read("spread", "spread of what it could have been"), read("density", "p(x; σ) ="));
    const key = legend(plots);
    const top = plot(plots, { label: "Density of the data and of the noisy data, with the noisy point x and the denoised point D", height: 250 });
    const low = plot(plots, { label: "The denoiser D as a function of x", height: 250 });
    const bars = plot(plots, { label: "Posterior weight of each bump", height: 112 });
    plots.append(reading);
    let frame = null;
    for (const { svg } of [top, low]) draggable(svg.node(), px => { if (frame) set("x", +Math.max(-3, Math.min(3, frame.x.invert(px))).toFixed(2)); });

    return ({ sigma, x }) => {
      const D = denoise(MIX, Float64Array.of(x), sigma)[0], w = posterior(MIX, [x], sigma), here = Math.exp(logProb(MIX, [x], sigma));
      const density = FINE.map(v => Math.exp(logProb(MIX, [v], sigma))), data = FINE.map(v => Math.exp(logProb(MIX, [v], 0)));
      const curve = denoise(MIX, Float64Array.from(FINE), sigma);
      // Var[y | x] = Σ w_k (posterior variance of bump k + its mean²) - D²
      let second = 0;
      for (let k = 0; k < 3; k++) {
        const c2 = MIX.std[k] ** 2, keep = c2 / (c2 + sigma * sigma), mean = MIX.means[k] + keep * (x - MIX.means[k]);
        second += w[k] * (keep * sigma * sigma + mean * mean);
      }
      reads.D(D, fixed(D, 3));
      reads.score((D - x) / sigma ** 2, number((D - x) / sigma ** 2));
      reads.spread(Math.sqrt(Math.max(0, second - D * D)), fixed(Math.sqrt(Math.max(0, second - D * D)), 3));
      reads.density(here, number(here));

      const highest = Math.max(...density), blue = colour("blue"), orange = colour("orange"), grey = colour("grey"), ink = colour("ink");
      key.show([[grey, "data (not to scale)", "fill"], [blue, "p(x; σ)"], [ink, "noisy x", "dot"], [orange, "denoised D", "dot"]]);
      frame = top.frame({ x: linear([-REACH, REACH]), y: linear([0, 1.18 * highest]), yLabel: "probability density" });
      const { x: sx, y: sy, inner } = frame, tallest = Math.max(...data);
      const shape = area().x((_, i) => sx(FINE[i])).y0(inner.bottom).y1(v => sy(v / tallest * 0.85 * highest));
      join(top.ink, "path.data", [data]).attr("d", shape).attr("fill", grey).attr("opacity", 0.28);
      join(top.ink, "path.noisy", [density]).attr("d", line().x((_, i) => sx(FINE[i])).y(v => sy(v))).attr("fill", "none").attr("stroke", blue).attr("stroke-width", 2.2);
      const level = sy(here);
      join(top.ink, "line.at", [[x, ink], [D, orange]]).attr("x1", d => sx(d[0])).attr("x2", d => sx(d[0])).attr("y1", inner.bottom).attr("y2", level)
        .attr("stroke", d => d[1]).attr("stroke-width", 1.4).attr("stroke-dasharray", "3 3");
      const far = Math.abs(sx(D) - sx(x)), direction = Math.sign(sx(D) - sx(x)), tip = sx(D) - 7 * direction;
      join(top.ink, "path.arrow", far > 16 ? [0] : []).attr("d", `M${sx(x) + 7 * direction},${level}H${tip}m${-7 * direction},-5l${7 * direction},5l${-7 * direction},5`)
        .attr("fill", "none").attr("stroke", orange).attr("stroke-width", 2.2);
      join(top.top, "circle.mark", [[x, ink], [D, orange]]).attr("cx", d => sx(d[0])).attr("cy", level).attr("r", 6).attr("fill", d => d[1]).attr("stroke", colour("card")).attr("stroke-width", 1.5);
      const left = x <= D ? -1 : 1;
      join(top.top, "text.halo", [["x", x, left, ink], ["D", D, -left, orange]]).attr("x", d => sx(d[1]) + 11 * d[2]).attr("y", level - 9)
        .attr("text-anchor", d => d[2] < 0 ? "end" : "start").style("fill", d => d[3]).style("font-weight", 650).text(d => d[0]);

      const f = low.frame({ x: linear([-REACH, REACH]), y: linear([-1.6, 1.9]), xLabel: "x (data units)", yLabel: "D(x; σ)", yTicks: [-1, 0, 1.2] });
      join(low.ink, "path.same", [0]).attr("d", `M${f.x(-REACH)},${f.y(-REACH)}L${f.x(REACH)},${f.y(REACH)}`).attr("stroke", grey).attr("stroke-dasharray", "5 4").attr("fill", "none");
      join(low.top, "text.same", [0]).attr("x", f.x(1.5) + 8).attr("y", f.y(1.72)).attr("text-anchor", "start").style("fill", colour("soft")).text("D = x");
      join(low.ink, "path.D", [curve]).attr("d", line().x((_, i) => f.x(FINE[i])).y(v => f.y(v))).attr("fill", "none").attr("stroke", orange).attr("stroke-width", 2.2);
      join(low.ink, "path.to", [0]).attr("d", `M${f.x(x)},${f.inner.bottom}V${f.y(D)}H${f.inner.left}`).attr("fill", "none").attr("stroke", ink).attr("stroke-dasharray", "3 3");
      join(low.top, "circle.mark", [0]).attr("cx", f.x(x)).attr("cy", f.y(D)).attr("r", 6).attr("fill", orange).attr("stroke", colour("card")).attr("stroke-width", 1.5);

      const b = bars.frame({ x: linear([0, 1]), y: linear([3, 0]), yTicks: [0.5, 1.5, 2.5], yFormat: v => NAMES[Math.floor(v)], xFormat: v => percent(v), yLabel: "probability that x came from each bump", left: 58 });
      join(bars.ink, "rect", [...w]).attr("x", b.inner.left).attr("width", v => b.x(v) - b.inner.left).attr("y", (_, k) => b.y(k + 0.14)).attr("height", Math.abs(b.y(0.72) - b.y(0)))
        .attr("fill", (_, k) => colour(SHADES[k]));
      join(bars.top, "text.halo", [...w]).attr("x", v => Math.min(b.x(v) + 6, b.inner.right - 40)).attr("y", (_, k) => b.y(k + 0.5) + 4).text(v => percent(v, v < 0.1 && v > 0.0005 ? 1 : 0));
      w.forEach((v, k) => { bars.svg.attr(`data-weight-${NAMES[k]}`, v); });
    };
  },
};
