"""Packaging. Everything that varies stands in settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
# The notebooks travel inside the package: kvcache-exercises makes the learner's edition from them.
notebooks = f"{cfg['lib_name']}.{cfg['nbs_path']}"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    packages=[*find_packages(include=[f"{cfg['lib_name']}*"]), notebooks],
    package_dir={notebooks: cfg["nbs_path"]},
    package_data={notebooks: ["*.ipynb"], f"{cfg['lib_name']}.stepper": ["*.js", "*.css"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "teach")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    include_package_data=False,
    zip_safe=False,
)
