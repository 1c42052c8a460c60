// Bundles src/ into one classic script that a page opened from file:// may load: book/_static/explorer/explorer.js.
// The first line records the hash of the sources, which book/explorer.py computes in the same way without node.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, statSync } from "node:fs";
import { dirname, join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url)), root = dirname(here);
const walk = folder => readdirSync(folder).flatMap(name => {
  const path = join(folder, name);
  return statSync(path).isDirectory() ? walk(path) : [path];
});
const name = path => relative(root, path).split(sep).join("/");
const sources = [...walk(join(here, "src")), ...["build.mjs", "package.json", "package-lock.json"].map(file => join(here, file)),
                 join(root, "results/loss_per_sigma.json")];
const hash = createHash("sha256");
for (const path of sources.sort((a, b) => (name(a) < name(b) ? -1 : 1)))
  hash.update(name(path) + "\0" + readFileSync(path, "utf8").replaceAll("\r\n", "\n") + "\0");

await build({
  entryPoints: [join(here, "src/main.js")],
  outfile: process.argv[2] ?? join(root, "book/_static/explorer/explorer.js"),
  bundle: true, minify: true, format: "iife", target: "es2020", charset: "utf8", legalComments: "none",
  loader: { ".css": "text" },
  banner: { js: `/*! edm_nb explorer, sources ${hash.digest("hex")}; Apache-2.0; contains d3 (ISC, Copyright 2010-2021 Mike Bostock) */` },
});
