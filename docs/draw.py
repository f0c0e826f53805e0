"""Draw the picture of README and the site from a run of `steerlens geometry`.

python docs/draw.py RUN_DIR LAYER
"""

import sys
from pathlib import Path

import steerlens as sl

run = sl.read_run(sys.argv[1])
geometry = sl.measure.LossGeometry(
    *(run.tables[name] for name in ("geometry", "contours", "shape"))
)
picture = sl.plots.loss_geometry(geometry).at(sys.argv[2])
picture.save(Path(__file__).parent / "loss_geometry.svg")
