"""TensorBoard's writer as the monitors of a run use it, without files: notes what it is given."""

from types import SimpleNamespace


class Writer:
    """images, texts, histograms: (tag, step, content). records: what goes past the writer's own methods.
    log_dir: where there would be files.
    """

    def __init__(self):
        self.log_dir = "none"
        self.images, self.texts, self.histograms, self.records = [], [], [], []
        self.file_writer = SimpleNamespace(add_event=self.records.append, add_summary=self.records.append)

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC" and image.dtype == "uint8" and image.ndim == 3 and image.shape[2] == 3
        self.images.append((tag, step, image))

    def add_text(self, tag, text, step):
        self.texts.append((tag, step, text))

    def add_histogram(self, tag, values, step):
        self.histograms.append((tag, step, values))


class Watched:
    """The part of an engine that a monitor talks to, on one rank. on: whether it has monitors."""

    def __init__(self, comm, on=True):
        self.comm, self.monitored = comm, on
        self.events, self.board = [], Writer()

    def write_events(self, events):
        self.events += events

    def on_board(self, action):
        if self.monitored and self.comm.is_main:
            action(self.board)
