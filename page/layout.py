"""The page: its tabs, its controls, and what happens when someone gives it a file."""

import concurrent.futures
import tempfile
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from common import UserError
from features.audio import is_sound, spectrogram_picture
from features.image_ids import MEDIA_SUFFIXES, name_images, printable_name
from models.encoders.images import read_image
from page.gate import MOST_FILES, Page, gr_text
from page.results import SCRIPT, show_hint, show_outcomes, show_problem
from page.settings import DECODINGS, MOST_BEAMS, MOST_CAPTIONS, MOST_PROMPT, RERANKINGS, TEMPERATURES, TOP_PS, check_settings
from page.uploads import Files, Picture, Sound
from prediction.captions import write_captions

TITLE = "PrefixCap"
THUMBNAIL = 512  # pixels of the longer side, in the gallery
CALLERS = 32  # requests that read and wait at the same time; one thread runs the models
WAITING = 200  # requests in the queue; more are turned away
SECONDS = 600  # a request takes at most


class Handlers:
    """What the page's events call.

    Attributes:
        worker: page.worker.Worker.
    """

    def __init__(self, worker):
        self.worker = worker

    def caption_picture(self, path, *controls):
        """Caption a picture. Returns HTML."""
        return self._show(path, False, controls)

    def caption_sound(self, path, *controls):
        """Caption a sound. Returns HTML."""
        return self._show(path, True, controls)

    def _show(self, path, hears, controls):
        if path is None:
            return show_hint(f"Give a {'sound' if hears else 'picture'}, and its captions appear here.")
        try:
            return show_outcomes(self.worker.submit(path, hears, check_settings(*controls), explain=True).result(SECONDS))
        except UserError as error:
            return show_problem(error)

    def caption_folder(self, paths, decoding, beam_size, num_captions, temperature, top_p, prompt, rerank, progress=gr.Progress()):
        """Caption the pictures or sounds of a folder. Returns items of the gallery, HTML on what was left out, and a CSV file."""
        try:
            settings = check_settings(decoding, beam_size, num_captions, temperature, top_p, prompt, rerank)
            files = [path for path in paths or [] if path.lower().endswith(MEDIA_SUFFIXES)]
            if not files:
                return [], show_problem("there is no picture and no sound in it.") if paths else show_hint(ABOUT_FOLDER), None
            if len(files) > MOST_FILES:
                raise UserError(f"{len(files)} files; expected at most {MOST_FILES}. Caption large folders with predict.py.")
        except UserError as error:
            return [], show_problem(error), None
        futures = {self.worker.submit(path, is_sound(path), settings): path for path in files}
        captioned, problems = {}, []
        for future in progress.tqdm(concurrent.futures.as_completed(futures, SECONDS), total=len(futures), desc="captions"):
            path = futures[future]
            try:
                captioned[path] = future.result()
            except UserError as error:
                problems.append(f"{printable_name(Path(path).name)}: {error}")
        files = [path for path in files if path in captioned]
        items = [(draw_thumbnail(path), describe_item(path, captioned[path])) for path in files]
        problems += [f"{one.name}: {one.error}" for one in {o.name: o for path in files for o in captioned[path] if o.error}.values()]
        about = "".join(map(show_problem, problems)) or show_hint(f"{len(items)} of {len(files)} captioned.")
        return items, about, write_table(files, captioned)

    def caption(self, file, *controls):
        """Caption a picture or a sound.

        Returns:
            List of one dict for each checkpoint: its name, and "captions", a list of {"caption", "score"} best first, or "error".
        """
        if file is None:
            raise UserError("no file was given. Upload a picture or a sound.")
        outcomes = self.worker.submit(file, is_sound(file), check_settings(*controls)).result(SECONDS)
        if all(outcome.error for outcome in outcomes):
            raise UserError(outcomes[0].error)
        return [
            {"checkpoint": outcome.name, "captions": [{"caption": text, "score": round(score, 6)} for text, score in outcome.captions]}
            | ({"error": outcome.error} if outcome.error else {})
            for outcome in outcomes
        ]


ABOUT_FOLDER = f"Choose a folder of up to {MOST_FILES} pictures or sounds, and they appear here with their captions."


def draw_thumbnail(path):
    """Draw a picture, or a sound's spectrogram, for the gallery. Returns a PIL picture."""
    image = spectrogram_picture(path) if is_sound(path) else read_image(path, least_side=THUMBNAIL)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def describe_item(path, outcomes):
    """Write the best caption of every captioner under the name of a file."""
    several = len(outcomes) > 1
    best = [(f"{one.name}: " if several else "") + one.captions[0][0].strip() for one in outcomes if one.captions]
    return " | ".join(best) or printable_name(Path(path).name)


def write_table(files, captioned):
    """Write captions.csv, as predict.py --out does, into a folder among the uploads. Returns its path, or None for no captions."""
    names = [outcome.name for outcome in captioned[files[0]]] if files else []
    alike = [path for path in files if [o.name for o in captioned[path]] == names and not any(o.error for o in captioned[path])]
    if not alike:
        return None
    by_checkpoint = [[captioned[path][place].captions for path in alike] for place in range(len(names))]
    path = Path(tempfile.mkdtemp(dir=get_upload_folder())) / "captions.csv"
    ids = name_images([Path(Path(one).name) for one in alike])
    write_captions(str(path), ids, [printable_name(Path(one).name) for one in alike], names, by_checkpoint)
    return str(path)


def add_controls(can_clip):
    """Add the controls of decoding. Returns the components, in the order of page.settings.check_settings."""
    with gr.Accordion("Decoding", open=False):
        with gr.Row():
            decoding = gr.Radio(
                [("beam search", "beam"), ("greedy", "greedy"), ("sampling", "sample")], value=DECODINGS[0], label="Decoding",
                info="beam search keeps the likeliest captions; sampling draws them",
            )  # fmt: skip
            about = "consensus puts the caption first that is most like the others" + "; clip, the one nearest to the picture" * can_clip
            choices = [name for name in RERANKINGS if name != "clip" or can_clip]
            rerank = gr.Radio(choices, value="none", label="Re-ranking", info=about)
        with gr.Row():
            beams = gr.Slider(1, MOST_BEAMS, 5, step=1, label="Beams", info="also how many captions are re-ranked")
            captions = gr.Slider(1, MOST_CAPTIONS, 1, step=1, label="Captions", info="best first")
            temperature = gr.Slider(*TEMPERATURES, 1.0, step=0.05, label="Temperature", info="below 1: likelier words")
            top_p = gr.Slider(*TOP_PS, 1.0, step=0.05, label="top_p", info="sampling: likeliest words up to this sum")
        prompt = gr.Textbox("", label="Prompt", placeholder="text that every caption begins with", max_length=MOST_PROMPT)
    return [decoding, beams, captions, temperature, top_p, prompt, rerank]


def build_page(worker, examples=()):
    """Build the page.

    Args:
        worker: page.worker.Worker.
        examples: paths of pictures that visitors can try.

    Returns:
        Page, not yet launched.
    """
    handlers = Handlers(worker)
    sees, hears = worker.of_kind(False), worker.of_kind(True)
    names = ", ".join(captioner.name for captioner in worker.captioners)
    private = {"api_visibility": "private", "concurrency_limit": CALLERS, "concurrency_id": "captions"}
    with Page(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\nCaptions by {gr_text(names)}.")
        controls = add_controls(any(captioner.tower is not None for captioner in worker.captioners))
        with gr.Tab("Picture", interactive=bool(sees)), gr.Row():
            with gr.Column():
                sources = ["upload", "webcam", "clipboard"]
                picture = Picture(label="Picture", type="filepath", sources=sources, height=360, elem_id="picture")
                ask_picture = gr.Button("Caption the picture", variant="primary")
                if examples:
                    gr.Examples([[str(path)] for path in examples], [picture], label="Examples", cache_examples=False)
            with gr.Column():
                said = gr.HTML(show_hint("Give a picture, and its captions appear here."), js_on_load=SCRIPT, elem_id="picture-captions")
        gr.on([picture.change, ask_picture.click], handlers.caption_picture, [picture, *controls], said, **private)
        with gr.Tab("Sound", interactive=bool(hears)), gr.Row():
            with gr.Column():
                sound = Sound(label="Sound", type="filepath", sources=["upload", "microphone"], elem_id="sound")
                ask_sound = gr.Button("Caption the sound", variant="primary")
            with gr.Column():
                heard = gr.HTML(show_hint("Give a sound, and its captions appear here."), js_on_load=SCRIPT, elem_id="sound-captions")
        gr.on([sound.change, ask_sound.click], handlers.caption_sound, [sound, *controls], heard, **private)
        with gr.Tab("Folder"):
            folder = Files(label="Folder", file_count="directory", height=140, elem_id="folder")
            ask_folder = gr.Button("Caption the folder", variant="primary")
            about = gr.HTML(show_hint(ABOUT_FOLDER), elem_id="folder-captions")
            gallery = gr.Gallery(label="Captions", columns=4, height="auto", object_fit="contain", interactive=False, elem_id="gallery")
            table = gr.File(label="Captions as a table", interactive=False)
        gr.on(
            [folder.upload, ask_folder.click], handlers.caption_folder, [folder, *controls], [gallery, about, table],
            show_progress_on=gallery, **private,
        )  # fmt: skip
        add_endpoint(handlers, controls)
    page.queue(max_size=WAITING, default_concurrency_limit=CALLERS)
    return page


def add_endpoint(handlers, controls):
    """Add /caption for gradio_client; docs/page.md describes it. The controls' first values are its defaults."""
    file, answer = Files(visible=False, label="file"), gr.JSON(visible=False, label="captions")
    decoding, beams, captions, temperature, top_p, prompt, rerank = controls
    named = {"file": file, "decoding": decoding, "beam_size": beams, "num_captions": captions, "temperature": temperature}
    named |= {"top_p": top_p, "prompt": prompt, "rerank": rerank}
    assert list(named.values())[1:] == controls

    def caption(file, decoding, beam_size, num_captions, temperature, top_p, prompt, rerank):  # the names of its parameters
        return handlers.caption(file, decoding, beam_size, num_captions, temperature, top_p, prompt, rerank)

    caption.__doc__ = handlers.caption.__doc__
    gr.Button(visible=False).click(
        caption, list(named.values()), answer, api_name="caption", concurrency_limit=CALLERS, concurrency_id="captions",
    )  # fmt: skip
