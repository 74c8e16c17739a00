"""Layers: arrays in, arrays out. They know no configuration file and no mesh, only logical axis names."""
