"""The path of the files that come with the package."""

import pathlib

ASSETS = pathlib.Path(__file__).parents[1] / 'assets'
