"""Whether an Axolotl YAML is sound: its keys and values, what contradicts what, and what Axolotl itself says."""
