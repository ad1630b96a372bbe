"""Packaging. Everything that varies stands in settings.ini."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
# The notebooks travel inside the package: kvcache-exercises makes the learner's edition from them.
notebooks = f"{cfg['lib_name']}.{cfg['nbs_path']}"
home = f"https://github.com/{cfg['user']}/{cfg['repo']}"
raw = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/{cfg['branch']}"
extras = {extra: cfg[f"{extra}_requirements"].split() for extra in ("learn", "dev", "peers", "site", "teach")}
extras["dev"] += extras["learn"]


def absolute(markdown: str) -> str:
    "Links and pictures that lead into the repository, so that they work on a page elsewhere."
    inside = "(?![a-z]+:|#)"
    markdown = re.sub(rf'(!\[[^\]]*\]\(|\bsrc(?:set)?="){inside}', rf"\1{raw}/", markdown)
    return re.sub(rf'(\]\(|\bhref="){inside}', rf"\1{home}/blob/{cfg['branch']}/", markdown)


setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=absolute((here / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Jupyter",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {version}" for version in cfg["pythons"].split()),
        "Topic :: Education",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    project_urls={
        "Source": home,
        "Notebooks": f"{home}/tree/{cfg['branch']}/{cfg['nbs_path']}",
        "Changes": f"{home}/blob/{cfg['branch']}/CHANGELOG.md",
        "Issues": f"{home}/issues",
    },
    packages=[*find_packages(include=[cfg["lib_name"], f"{cfg['lib_name']}.*"]), notebooks],
    package_dir={notebooks: cfg["nbs_path"]},
    package_data={"": ["py.typed", "*.js", "*.css"], cfg["lib_name"]: ["text_model/*"], notebooks: ["*.ipynb"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    include_package_data=False,
    zip_safe=False,
)
