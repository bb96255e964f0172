"""Recipes: how the models that ship with this project are made and measured."""
