"""The steps of a stage without Ray: tasks run one after another in this process, through the same files."""

from cluster.runs import StageFolder
from pipelines import partitions
from pipelines.partitions import Work


class InProcess(Work):
    """`Work` whose tasks run here."""

    def _run(self, waiting, do, data):
        for row in waiting:
            yield partitions._do(row, **do.keywords)  # looked up anew: some tests replace it


def work_in(path):
    """Steps under `path`, which stands for a stage's folder."""
    folder = StageFolder(path)
    folder.begin("0" * 64)
    return InProcess(folder, cpus=1)
