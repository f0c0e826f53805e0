"""Until callers have moved: `edge_table` is in `graphs`."""

from steerlens.circuits.graphs import edge_table as edge_table
