// Finds every <div class="edm-explorer" data-page="..."> and replaces the static picture in it by the page.
import css from "./style.css";
import { churn } from "./pages/churn.js";
import { denoiser } from "./pages/denoiser.js";
import { preconditioning } from "./pages/preconditioning.js";
import { training } from "./pages/training.js";
import { trajectories } from "./pages/trajectories.js";
import { element, mount } from "./ui.js";

const PAGES = Object.fromEntries([denoiser, trajectories, churn, preconditioning, training].map(page => [page.id, page]));
const stages = {};

function start() {
  const roots = [...document.querySelectorAll(".edm-explorer[data-page]")].filter(root => PAGES[root.dataset.page]);
  if (!roots.length) return;
  document.head.append(element("style", {}, css));
  for (const root of roots) {
    root.style.minHeight = root.offsetHeight + "px";          // the text below does not jump
    stages[root.dataset.page] = mount(root, PAGES[root.dataset.page]);
    root.style.minHeight = "";
  }
}

window.edmExplorer = { stages };                              // for tests and the benchmark
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
