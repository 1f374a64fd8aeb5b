"""Score the layers of a model: what each rule would keep, and what that costs."""
