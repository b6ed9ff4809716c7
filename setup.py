"""Packaging of textlock: the repository root is the package ``textlock``.

The folders carry no ``__init__.py`` on purpose. A regular top-level package named ``kernels`` on ``sys.path`` shadows
the distribution of that name that transformers imports; a namespace folder never does.
"""

from setuptools import find_namespace_packages, setup

ROOMS = ("kernels*", "models*", "data*", "engine*", "exports*", "search*", "evals*", "demo*", "bench*")

setup(
    package_dir={"textlock": "."},
    packages=[f"textlock.{room}" for room in find_namespace_packages(include=ROOMS) if "." not in room],
    package_data={"textlock.engine": ["page/*"], "textlock.search": ["page/*"]},
    # Naming the modules, not the package, keeps setup.py and other root files out of the wheel.
    py_modules=["textlock.train", "textlock.evaluate", "textlock.export", "textlock.explore", "textlock.settings"],
)
