"""From a graph of tensor operations to machine code: lowered to loops, fused, written as C, compiled, and kept."""
