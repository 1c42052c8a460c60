"Hands settings.ini, the one configuration of the project, to setuptools."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def lines(key):
    "The non-empty lines of one multi-line setting."
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]



def long_description():
    "The README with its relative links and pictures made absolute: a package index has no files beside the text."
    text = (HERE / "README.md").read_text(encoding="utf-8")
    pictures = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/{cfg['branch']}/"
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", lambda found: found[1] + pictures, text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", lambda found: f"{found[1]}{HOME}/blob/{cfg['branch']}/", text)


HOME = f"https://github.com/{cfg['user']}/{cfg['repo']}"
SITE = f"https://{cfg['user']}.github.io/{cfg['repo']}"
STATUS = {"2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
extras = {key.removesuffix("_requirements"): lines(key) for key in cfg if key.endswith("_requirements")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=HOME,
    project_urls={
        "Documentation": SITE,
        "Source": HOME,
        "Issues": f"{HOME}/issues",
        "Changelog": f"{HOME}/blob/{cfg['branch']}/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2206.00364",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    packages=[cfg["lib_path"]],
    package_data={cfg["lib_path"]: ["assets/*", "py.typed"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": lines("console_scripts")},
    classifiers=[
        f"Development Status :: {STATUS[cfg['status']]}",
        "Environment :: Console",
        "Framework :: Jupyter",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {version}" for version in cfg["python_versions"].split()),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
