"""Labelled clients that start at one initial adapter, and what is studied on them."""
