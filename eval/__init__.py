"""What a cut cost: measuring a child against its parent; and handing it on: packing, exporting, publishing."""
