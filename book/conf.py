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

extensions = ["myst_nb", "sphinx.ext.mathjax"]
root_doc = "index"
nb_execution_mode = "off"           # the pages show exactly the copies that book/execute.py ran
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]

# MathJax travels with the site, in one file with its glyphs as paths: formulas appear without a network.
html_static_path = [str(HERE / "_static"), str(Path(mathjax.__file__).parent / "static/mathjax/es5/tex-svg.js")]
mathjax_path = "tex-svg.js"

html_theme = "sphinx_book_theme"
html_title = "edm_nb"
html_css_files = ["book.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2, "use_download_button": False,
                      "home_page_in_toc": True, "use_fullscreen_button": False}
