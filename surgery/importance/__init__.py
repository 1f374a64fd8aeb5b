"""Choose layers by measurement: run a model layer by layer, score its layers, search."""
