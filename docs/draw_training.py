"""Draw the figure of training by the norm and on the frozen axis, from SmolLM2 and `honesty`.

python docs/draw_training.py [pca] [norm]   trains on these axes first; their histories are kept
"""

import sys
from pathlib import Path

import pandas as pd

import steerlens as sl

LAYER, EPOCHS = 20, 6
folder = Path(__file__).parent
for name in sys.argv[1:]:
    model = sl.load_model("smollm2-135m-instruct")
    pairs = sl.ContrastivePairs.load("honesty")
    trained = sl.directions.train_directions(
        model,
        sl.ContrastivePairs(tuple(pairs)[::8], "honesty"),
        layers=[LAYER],
        axis=None if name == "norm" else name,
        labels="all",
        schedule=sl.directions.Schedule(max_epochs=EPOCHS, patience=EPOCHS, step_size=0.02),
    )
    sl.tables.write_csv(trained.history, folder / "training" / f"{name}.csv")
kept = [
    sl.tables.read_csv(path, "training") for path in sorted((folder / "training").glob("*.csv"))
]
sl.plots.training(pd.concat(kept)).save(folder / "training.svg")
