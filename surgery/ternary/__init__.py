"""Ternary weights, BitNet b1.58: learn them, pack them, hand them to other programs."""
