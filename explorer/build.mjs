// Bundles src/ into one classic script that a page opened from file:// may load: book/_static/explorer/explorer.js.
// The first line records the hash of the sources, which book/explorer.py computes in the same way without node.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, statSync, writeFileSync } from "node:fs";
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

const outfile = process.argv[2] ?? join(root, "book/_static/explorer/explorer.js");
const { metafile } = await build({
  entryPoints: [join(here, "src/main.js")],
  outfile, metafile: true,
  bundle: true, minify: true, format: "iife", target: "es2020", charset: "utf8", legalComments: "none",
  loader: { ".css": "text" },
  banner: { js: `/*! edm_nb explorer, sources ${hash.digest("hex")}; Apache-2.0; contains parts of d3 (ISC), see THIRD-PARTY.txt */` },
});

// The licences of what went into the bundle, each text once.
const texts = new Map();
for (const library of new Set(Object.keys(metafile.inputs).flatMap(path => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1] ?? []))) {
  const folder = join(here, "node_modules", library), text = readFileSync(join(folder, "LICENSE"), "utf8").trim();
  texts.set(text, [...texts.get(text) ?? [], `${library} ${JSON.parse(readFileSync(join(folder, "package.json"), "utf8")).version}`]);
}
writeFileSync(join(dirname(outfile), "THIRD-PARTY.txt"), "explorer.js contains parts of the following libraries.\n\n"
  + [...texts].map(([text, names]) => `${names.sort().join(", ")}\n\n${text}\n`).join(`\n${"-".repeat(78)}\n\n`));
