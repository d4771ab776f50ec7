"""Package the folder configs/ as shunted_lit/configs. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["shunted_lit*"]), "shunted_lit.configs"],
    package_dir={"shunted_lit.configs": "configs"},
)
