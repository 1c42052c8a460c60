// Page 5: where training looks. The density of ln sigma over a measured loss curve, with VP's and VE's densities behind it.
import results from "../../../results/loss_per_sigma.json";
import * as numerics from "../numerics.js";
import { choice, element, fixed, join, legend, percent, plot, range, linear, log } from "../ui.js";
import { area, line } from "d3-shape";

const { sigmas, curves } = results, LOW = sigmas[0], HIGH = sigmas[sigmas.length - 1], last = curves[curves.length - 1];
const GRID = Array.from({ length: 401 }, (_, i) => LOW * (HIGH / LOW) ** (i / 400));
const thousand = n => n >= 1000 ? `${Math.round(n / 1000)} k images` : "untrained";
// What training has yet to gain at each level, from a moment to the end.
const gain = from => sigmas.map((_, i) => Math.max(0, curves[from].loss[i] - last.loss[i]));

export const training = {
  id: "training",
  title: "Training noise: where to look, and for how long",
  lead: `Points: the loss per value of a digits network at every noise level, measured while it learned (${results.n} digits, ${results.seeds} draws of noise; bars are standard errors). `
    + "Blue area: how often EDM's training would visit each level. Behind it VP's and VE's choice; each area is 1, VP's goes on beyond the edge.",
  fields: {
    P_mean: range("<code>P_mean</code>", results.training_noise.P_mean, -4, 3, { format: v => fixed(v) }),
    P_std: range("<code>P_std</code>", results.training_noise.P_std, 0.2, 3, { format: v => fixed(v) }),
    from: choice("gain counted from", "1", curves.slice(0, -1).map((c, i) => [String(i), thousand(c.images)])),
  },
  tries: [
    { text: "<b>The middle is where there is something to learn.</b> At tiny σ the noise cannot be seen, at huge σ the picture cannot. Move P_mean until the useful visits are most, then see what VE's even spread wastes at both ends.",
      set: { P_mean: -3.2, P_std: 1.2 } },
    { text: "<b>The gain moves.</b> Counted from the untrained network it covers all high levels: that is the mean of each class, learned once, within the first few thousand images. Late in training it has moved to low σ.",
      set: { from: "0" } },
    { text: "<b>Too narrow is a gamble.</b> P_std = 0.3 puts nearly every visit on good levels, but the levels outside are then hardly trained at all, and a sampler passes through every one of them.",
      set: { P_std: 0.3, P_mean: -0.6 } },
  ],
  build(stage) {
    const { plots, colour, read, reads } = stage;
    const key = legend(plots);
    const top = plot(plots, { label: "Measured loss against noise level, with the density of training noise", height: 330 });
    const low = plot(plots, { label: "How much each level's loss will still fall, and how often it is visited", height: 190 });
    plots.append(element("div", { class: "reads" }, read("edm", "useful visits: EDM"), read("vp", "VP"), read("ve", "VE"), read("best", "EDM over VE")));
    plots.append(element("p", { class: "aside" }, "Useful visits: the mean over training of (what is left to gain at the visited level) / (the most that is left at any level). 100 % would be to look only at the best level."));
    const densities = ({ P_mean, P_std }) => ({ edm: s => numerics.lognormalDensity(s, P_mean, P_std), vp: s => numerics.vpDensity(s), ve: s => numerics.veDensity(s) });

    return state => {
      const density = densities(state), tint = { edm: colour("blue"), vp: colour("amber"), ve: colour("green") }, names = ["vp", "ve", "edm"];
      const shades = curves.map((_, i) => i === curves.length - 1 ? colour("ink") : i === 0 ? colour("orange") : colour("soft"));
      key.show([[tint.edm, "EDM: ln σ ~ N(P_mean, P_std²)", "fill"], [tint.vp, "VP"], [tint.ve, "VE"], [shades[0], "loss, untrained", "dot"], [colour("soft"), "on the way", "dot"], [colour("ink"), `after ${thousand(last.images)}`, "dot"]]);
      const x = () => log([LOW, HIGH]), peak = 1 / (state.P_std * Math.sqrt(2 * Math.PI)), most = Math.max(1.05, ...curves.flatMap(c => c.loss)) * 1.08;
      const f = top.frame({ x: x(), y: linear([0, most]), yLabel: "weighted loss per value", xLabel: "" });
      const unit = (f.inner.bottom - f.inner.top) * 0.86 / Math.max(0.55, peak);            // pixels per unit of density
      const shape = p => area().x(s => f.x(s)).y0(f.inner.bottom).y1(s => f.inner.bottom - unit * p(s))(GRID), rim = p => line().x(s => f.x(s)).y(s => f.inner.bottom - unit * p(s))(GRID);
      join(top.ink, "path.area", names).attr("d", name => shape(density[name])).attr("fill", name => tint[name]).attr("opacity", name => name === "edm" ? 0.22 : 0.08);
      join(top.ink, "path.rim", names).attr("d", name => rim(density[name])).attr("fill", "none").attr("stroke", name => tint[name]).attr("stroke-width", name => name === "edm" ? 2.4 : 1.6);
      const bars = curves.flatMap((c, i) => (c.error ?? []).map((e, j) => ({ s: sigmas[j], a: c.loss[j] - e, b: c.loss[j] + e, i })));
      join(top.ink, "line.bar", bars).attr("x1", d => f.x(d.s)).attr("x2", d => f.x(d.s)).attr("y1", d => f.y(d.a)).attr("y2", d => f.y(d.b)).attr("stroke", d => shades[d.i]).attr("stroke-width", 1.2);
      join(top.ink, "path.loss", curves).attr("d", c => line().x((_, j) => f.x(sigmas[j])).y(v => f.y(v))(c.loss)).attr("fill", "none").attr("stroke", (_, i) => shades[i]).attr("stroke-width", 1.4)
        .attr("opacity", (_, i) => i === 0 || i === curves.length - 1 ? 1 : 0.6);
      join(top.ink, "circle.loss", curves.flatMap((c, i) => c.loss.map((v, j) => ({ v, s: sigmas[j], i })))).attr("cx", d => f.x(d.s)).attr("cy", d => f.y(d.v)).attr("r", d => d.i === 0 || d.i === curves.length - 1 ? 3 : 1.8).attr("fill", d => shades[d.i]);

      const left = gain(+state.from), best = Math.max(...left);
      const g = low.frame({ x: x(), y: linear([0, best * 1.12]), xLabel: "noise level σ (units of the pixel values)", yLabel: "loss still to gain" });
      join(low.ink, "path.gain", [left]).attr("d", area().x((_, j) => g.x(sigmas[j])).y0(g.inner.bottom).y1(v => g.y(v))).attr("fill", colour("grey")).attr("opacity", 0.35);
      join(low.ink, "path.visits", ["edm"]).attr("d", () => line().x(s => g.x(s)).y(s => g.y(best * density.edm(s) / peak))(GRID)).attr("fill", "none").attr("stroke", tint.edm).attr("stroke-width", 2);

      const useful = Object.fromEntries(names.map(name => { const { mean, mass } = numerics.expectation(density[name], sigmas, left); return [name, mean * mass / best]; }));
      for (const name of names) reads[name](useful[name], percent(useful[name], 1));
      reads.best(useful.edm / useful.ve, `× ${fixed(useful.edm / useful.ve)}`);
    };
  },
};
