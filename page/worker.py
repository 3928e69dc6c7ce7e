"""One thread that runs the models for all callers of the page.

What arrives while it works is taken together: files are read and encoded in one batch, and those with equal settings are decoded in one.
"""

import concurrent.futures
import dataclasses
import queue
import sys
import threading

from common import UserError
from models.weights import first_line
from page.captioners import describe
from prediction.inputs import encode_pictures

TOGETHER = 32  # files taken together at most


@dataclasses.dataclass
class Item:
    """A file to be captioned.

    Attributes:
        path: the file.
        hears: whether it is a sound.
        settings: Settings.
        explain: whether to measure what words attend to.
        future: takes the list of Outcome, one for each captioner of its kind, or a UserError.
    """

    path: str
    hears: bool
    settings: object
    explain: bool
    future: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)


class Worker:
    """Captions files on a thread of its own.

    Attributes:
        captioners: list of Captioner.
    """

    def __init__(self, captioners):
        self.captioners = captioners
        self._items = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="captions", daemon=True)
        self._thread.start()

    def of_kind(self, hears):
        """List the captioners of sounds, or of pictures."""
        return [captioner for captioner in self.captioners if captioner.hears == hears]

    def submit(self, path, hears, settings, explain=False):
        """Ask for the captions of a file.

        Args:
            path: a picture or a sound.
            hears: whether it is a sound.
            settings: Settings.
            explain: whether to measure what the words attend to.

        Returns:
            Future of a list of Outcome; it raises UserError where the file cannot be read.
        """
        item = Item(str(path), hears, settings, explain)
        if not self.of_kind(hears):
            thing, other = ("sounds", "pictures") if hears else ("pictures", "sounds")
            error = UserError(f"this page captions {other}. To caption {thing}, start it with a checkpoint trained on {thing}.")
            item.future.set_exception(error)
        else:
            self._items.put(item)
        return item.future

    def close(self):
        """Finish what was asked for, and end the thread."""
        self._items.put(None)
        self._thread.join()

    def _run(self):
        while (first := self._items.get()) is not None:
            items = [first]
            while len(items) < TOGETHER and not self._items.empty():
                items.append(self._items.get())
            ended = items[-1] is None
            try:
                for hears in (False, True):
                    self._caption([item for item in items if item is not None and item.hears == hears], self.of_kind(hears))
            except Exception as error:  # whatever it is, the next callers get their captions
                print(f"app.py: captioning failed: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
                for item in items:
                    if item is not None and not item.future.done():
                        item.future.set_exception(UserError("captioning failed on the server; its log says why."))
            if ended:
                return

    def _caption(self, items, captioners):
        """Caption items of one kind, and set their futures."""
        paths, encoded, skipped = list(dict.fromkeys(item.path for item in items)), {}, {}
        for encoder in {id(captioner.encoder): captioner.encoder for captioner in captioners}.values():
            if paths:
                embeddings, read = encode_pictures(paths, encoder, skipped, TOGETHER, num_workers=0)
                encoded[id(encoder)] = embeddings, {path: row for row, path in enumerate(read)}
        for item in items:
            if item.path in skipped:
                item.future.set_exception(UserError(f"this file cannot be captioned: {skipped[item.path]}."))
        items = [item for item in items if item.path not in skipped]
        outcomes = {id(item): [] for item in items}
        for captioner in captioners:
            embeddings, rows = encoded[id(captioner.encoder)] if items else (None, {})
            for settings in dict.fromkeys(item.settings for item in items):
                alike = [item for item in items if item.settings == settings]
                found = describe(captioner, embeddings[[rows[item.path] for item in alike]], settings, [item.explain for item in alike])
                for item, outcome in zip(alike, found):
                    outcomes[id(item)].append(outcome)
        for item in items:
            item.future.set_result(outcomes[id(item)])
