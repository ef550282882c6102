"""A callback of your own: every loss of every step in a CSV file, and a line when the learning curve has a new best.

    clipdistill train --plugin own_callback.py --callback csv --recipe clip-rd --size debug --out runs/mine

or from Python, without a name:

    clipdistill.distill({"recipe": "clip-rd", "size": "debug", "out": "runs/mine"}, callbacks=[LossTable()])
"""

import csv

import clipdistill


class LossTable(clipdistill.Callback):
    """`run` is a read-only view: step, losses, scores, folder, config, ... (clipdistill.train.callbacks.RunView)."""

    def on_start(self, run):
        self.best = 0.0
        self.file = (run.folder / "losses.csv").open("a", newline="", encoding="utf-8")
        self.table = csv.writer(self.file)

    def on_step(self, run):
        for name, value in run.losses.items():
            self.table.writerow([run.step, name, value])

    def on_evaluation(self, run):
        score = run.scores.get("t2i_R@1", 0.0)
        if score > self.best:
            self.best = score
            print(f"step {run.step}: best so far, {score:.1%} among {run.images} images")

    def on_checkpoint(self, run):
        self.file.flush()  # a resumed run goes on after this step

    def on_end(self, run):
        self.file.close()
        print(f"{run.status} after {run.step} steps")


clipdistill.register_callback("csv", LossTable)
