"""One family of models per model_type: its config, its tensor names, its stack of layers."""
