"The package's metadata, read from settings.ini, so that it is written down once."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def words(key):
    "The requirements listed under `key`, one for each word (so none may hold a space)."
    return settings.get(key, "").split()


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="MIT",
    keywords=settings["keywords"],
    url=settings["git_url"],
    packages=find_packages(include=["nano_vllm*"]),
    python_requires=">=" + settings["min_python"],
    install_requires=words("requirements"),
    extras_require={name: words(f"{name}_requirements") for name in ("dev", "flash", "bench", "serve", "structured", "ray", "course")},
    entry_points={"console_scripts": words("console_scripts"), "nbdev": ["nano_vllm=nano_vllm._modidx:d"]},
    package_data={"nano_vllm": ["*.html"]},
    zip_safe=False,
)
