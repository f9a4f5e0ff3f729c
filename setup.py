"""The package list. pyproject.toml holds the rest: metadata, dependencies and the tools' settings."""

from setuptools import setup

# The rooms lie at the top of the repository and are reached through relative links in src/bylaw.
# kernels has no __init__.py on purpose (CONTRIBUTING.md says why), so it is named here, not discovered.
PACKAGES = [
    "bylaw",
    "bylaw.benchmarks",
    "bylaw.benchmarks.operations",
    "bylaw.benchmarks.village",
    "bylaw.benchmarks.village.experiments",
    "bylaw.constitution",
    "bylaw.kernels",
    "bylaw.model",
    "bylaw.model.engine",
    "bylaw.report",
    "bylaw.rlaif",
    "bylaw.sl_cai",
]

setup(
    packages=PACKAGES,
    package_dir={"": "src"},
    package_data={
        "bylaw": ["py.typed", "refusals.toml"],
        "bylaw.constitution": ["*.toml"],
        "bylaw.kernels": ["configs/*.json"],
        "bylaw.report": ["page.css", "page.js", "*.jinja"],
        "bylaw.benchmarks": ["resources.json"],
        "bylaw.benchmarks.village": ["checkpoint/*"],
    },
)
