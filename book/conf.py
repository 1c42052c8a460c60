"Sphinx configuration of the book; `book/build.py` lays out the sources that it reads."
import configparser
from pathlib import Path

import mathjax

HERE = Path(__file__).resolve().parent
settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
settings.read(HERE.parent / "settings.ini", encoding="utf-8")

project = "edm_nb"
author = settings["DEFAULT"]["author"]
copyright = settings["DEFAULT"]["copyright"]
release = settings["DEFAULT"]["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinxcontrib.bibtex"]
bibtex_bibfiles = [str(HERE / "references.bib")]
bibtex_reference_style = "author_year"
root_doc = "index"
nb_execution_mode = "off"           # the pages show exactly the copies that book/execute.py ran
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
myst_html_meta = {"description": settings["DEFAULT"]["description"], "viewport": "width=device-width, initial-scale=1"}
nb_render_markdown_format = "myst"  # Markdown that cells print is read like the prose: links, formulas, citations
nb_code_prompt_show = "Show how this is made"
nb_code_prompt_hide = "Hide the code"
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]

# MathJax travels with the site, in one file with its glyphs as paths: formulas appear without a network.
html_static_path = [str(HERE / "_static"), str(Path(mathjax.__file__).parent / "static/mathjax/es5/tex-svg.js")]
mathjax_path = "tex-svg.js"

html_theme = "sphinx_book_theme"
html_title = "edm_nb"
html_css_files = ["book.css"]
html_copy_source = True            # the download button hands out the notebook
html_show_sourcelink = False
# One configured address: user and repository of settings.ini.
repository = f"https://github.com/{settings['DEFAULT']['user']}/{settings['DEFAULT']['repo']}"
html_baseurl = settings["DEFAULT"].get("doc_host", "")
html_favicon = str(HERE / "_static/favicon.svg")
html_sidebars = {"**": ["navbar-logo.html", "sbt-sidebar-nav.html"]}    # one search box: the one in the header
html_context = {"default_mode": "auto"}     # else the theme complains in the console of every new reader
html_theme_options = {
    "show_navbar_depth": 1, "show_toc_level": 2, "home_page_in_toc": True, "use_fullscreen_button": False,
    "use_download_button": True, "repository_url": repository, "repository_branch": settings["DEFAULT"]["branch"],
    "path_to_docs": "nbs", "use_repository_button": True, "launch_buttons": {"colab_url": "https://colab.research.google.com"},
}


def add_explorer(app, pagename, templatename, context, doctree):
    "The explorer's script, on the pages that have a place for it."
    if "edm-explorer" in context.get("body", ""):
        app.add_js_file("explorer/explorer.js", loading_method="defer")


def setup(app):
    "Sphinx calls this."
    app.connect("html-page-context", add_explorer)
