"""What to train and on what. Holds the built-in model `demo` and the text that it can be healed on."""
