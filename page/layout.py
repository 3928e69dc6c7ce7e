"""The page: its tabs, its controls, and what happens when someone gives it a file."""

import concurrent.futures
import io
import tempfile
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from common import UserError
from features.audio import is_sound, spectrogram_picture
from features.image_ids import MEDIA_SUFFIXES, name_images, printable_name
from models.encoders.images import read_image
from page.gate import MOST_FILES, Page, gr_text
from page.results import SCRIPT, show_cards, show_hint, show_outcomes, show_problem
from page.settings import DECODINGS, MOST_BEAMS, MOST_CAPTIONS, MOST_PROMPT, RERANKINGS, TEMPERATURES, TOP_PS, check_settings
from page.uploads import own_path
from prediction.captions import write_captions
from prediction.reranking import BY_CLIP
from reports.pictures import data_uri

TITLE = "PrefixCap"
THUMBNAIL = 320  # pixels of the longer side, in the gallery
CALLERS = 32  # requests that read and wait at the same time; one thread runs the models
WAITING = 200  # requests in the queue; more are turned away
SECONDS = 600  # a request takes at most
# Of every event. Without `preprocess` files come as gradio's FileData: gradio itself would open them, and fail in its own words.
EVENT = {"preprocess": False, "concurrency_limit": CALLERS, "concurrency_id": "captions"}
PRIVATE = {"api_visibility": "private", **EVENT}


class Handlers:
    """What the page's events call.

    Attributes:
        worker: page.worker.Worker.
    """

    def __init__(self, worker):
        self.worker = worker

    def caption_picture(self, file, *controls):
        """Caption a picture. Returns HTML."""
        return self._show(file, False, controls)

    def caption_sound(self, file, *controls):
        """Caption a sound. Returns HTML."""
        return self._show(file, True, controls)

    def _show(self, file, hears, controls):
        if file is None:
            return show_hint(f"Give a {'sound' if hears else 'picture'}, and its captions appear here.")
        try:
            return show_outcomes(self.worker.submit(own_path(file), hears, check_settings(*controls), explain=True).result(SECONDS))
        except UserError as error:
            return show_problem(error)

    def caption_folder(self, files, decoding, beam_size, num_captions, temperature, top_p, prompt, rerank, progress=gr.Progress()):
        """Caption the pictures or sounds of a folder. Returns HTML, and a CSV file or None."""
        if not files:
            return show_hint(ABOUT_FOLDER), None
        try:
            settings = check_settings(decoding, beam_size, num_captions, temperature, top_p, prompt, rerank)
            files = sorted((path for path in map(own_path, files) if path.lower().endswith(MEDIA_SUFFIXES)), key=_name)
            if not 1 <= len(files) <= MOST_FILES:
                raise UserError(f"the folder holds {len(files)} pictures and sounds; expected 1 to {MOST_FILES}. Use predict.py for more.")
        except UserError as error:
            return show_problem(error), None
        futures = {self.worker.submit(path, is_sound(path), settings): path for path in files}
        captioned, problems = {}, ""
        for future in progress.tqdm(concurrent.futures.as_completed(futures, SECONDS), total=len(futures), desc="captions"):
            path = futures[future]
            try:
                captioned[path] = future.result()
            except UserError as error:
                problems += show_problem(f"{_name(path)}: {error}")
        files = [path for path in files if path in captioned]
        cards = show_cards([(_name(path), draw_thumbnail(path), captioned[path]) for path in files])
        return problems + cards, write_table(files, captioned)

    def caption(self, file, *controls):
        """Caption a picture or a sound.

        Returns:
            List of one dict for each checkpoint: its name, and "captions", a list of {"caption", "score"} best first, or "error".
        """
        if file is None:
            raise UserError("no file was given. Upload a picture or a sound.")
        path = own_path(file)
        outcomes = self.worker.submit(path, is_sound(path), check_settings(*controls)).result(SECONDS)
        if all(outcome.error for outcome in outcomes):
            raise UserError(outcomes[0].error)
        return [
            {"checkpoint": outcome.name, "captions": [{"caption": text, "score": round(score, 6)} for text, score in outcome.captions]}
            | ({"error": outcome.error} if outcome.error else {})
            for outcome in outcomes
        ]


ABOUT_FOLDER = f"Choose a folder of up to {MOST_FILES} pictures or sounds, and they appear here with their captions."


def _name(path):
    """The name of an upload, as its owner calls it."""
    return printable_name(Path(path).name)


def draw_thumbnail(path):
    """Draw a picture, or a sound's spectrogram, small. Returns a data URI."""
    image = spectrogram_picture(path) if is_sound(path) else read_image(path, least_side=THUMBNAIL)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return data_uri(content.getvalue(), "image/jpeg")


def write_table(files, captioned):
    """Write captions.csv, as predict.py --out does, into a folder among the uploads. Returns its path, or None for no captions."""
    names = [outcome.name for outcome in captioned[files[0]]] if files else []
    alike = [path for path in files if [o.name for o in captioned[path]] == names and not any(o.error for o in captioned[path])]
    if not alike:
        return None
    by_checkpoint = [[captioned[path][place].captions for path in alike] for place in range(len(names))]
    path = Path(tempfile.mkdtemp(dir=get_upload_folder())) / "captions.csv"
    write_captions(str(path), name_images([Path(_name(one)) for one in alike]), list(map(_name, alike)), names, by_checkpoint)
    return str(path)


def add_controls(can_clip):
    """Add the controls of decoding. Returns the components, in the order of page.settings.check_settings."""
    with gr.Accordion("Decoding", open=False):
        with gr.Row():
            decoding = gr.Radio(
                [("beam search", "beam"), ("greedy", "greedy"), ("sampling", "sample")], value=DECODINGS[0], label="Decoding",
                info="beam search keeps the likeliest captions; sampling draws them",
            )  # fmt: skip
            about = "consensus puts the caption first that is most like the others"
            about += "; clip, the one nearest to the picture; clip+score weighs that with its likelihood" * can_clip
            choices = [name for name in RERANKINGS if name not in BY_CLIP or can_clip]
            rerank = gr.Radio(choices, value="none", label="Re-ranking", info=about)
        with gr.Row():
            beams = gr.Slider(1, MOST_BEAMS, 5, step=1, label="Beams")
            captions = gr.Slider(1, MOST_CAPTIONS, 1, step=1, label="Captions")
            temperature = gr.Slider(*TEMPERATURES, 1.0, step=0.05, label="Temperature")
            top_p = gr.Slider(*TOP_PS, 1.0, step=0.05, label="top_p (sampling)")
        prompt = gr.Textbox("", label="Prompt", placeholder="text that every caption begins with", max_length=MOST_PROMPT)
    return [decoding, beams, captions, temperature, top_p, prompt, rerank]


def add_tab(component, thing, handler, controls):
    """Add what takes a picture or a sound, side by side with its captions. component: the input, not yet rendered."""
    with gr.Row():
        with gr.Column():
            component.render()
            ask = gr.Button(f"Caption the {thing}", variant="primary")
        with gr.Column():
            captions = gr.HTML(show_hint(f"Give a {thing}, and its captions appear here."), js_on_load=SCRIPT, elem_id=f"{thing}-captions")
    gr.on([component.change, ask.click], handler, [component, *controls], captions, **PRIVATE)


def build_page(worker, examples=()):
    """Build the page.

    Args:
        worker: page.worker.Worker.
        examples: paths of pictures that visitors can try.

    Returns:
        Page, not yet launched.
    """
    handlers = Handlers(worker)
    names = ", ".join(captioner.name for captioner in worker.captioners)
    with Page(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\nCaptions by {gr_text(names)}.")
        controls = add_controls(any(captioner.tower is not None for captioner in worker.captioners))
        with gr.Tabs(selected="picture" if worker.of_kind(False) else "sound"):
            with gr.Tab("Picture", id="picture"):
                sources = ["upload", "webcam", "clipboard"]
                picture = gr.Image(type="filepath", sources=sources, height=360, elem_id="picture", label="Picture", render=False)
                add_tab(picture, "picture", handlers.caption_picture, controls)
                if examples and worker.of_kind(False):
                    gr.Examples([[str(path)] for path in examples], [picture], label="Examples", cache_examples=False)
            with gr.Tab("Sound", id="sound"):
                sound = gr.Audio(type="filepath", sources=["upload", "microphone"], elem_id="sound", label="Sound", render=False)
                add_tab(sound, "sound", handlers.caption_sound, controls)
            with gr.Tab("Folder", id="folder"):
                folder = gr.File(label="Folder", file_count="directory", height=140, elem_id="folder")
                ask = gr.Button("Caption the folder", variant="primary")
                gallery = gr.HTML(show_hint(ABOUT_FOLDER), min_height=80, elem_id="folder-captions")
                table = gr.File(label="Captions as a table", interactive=False, elem_id="table")
                gr.on(
                    [folder.upload, ask.click], handlers.caption_folder, [folder, *controls], [gallery, table],
                    show_progress_on=gallery, **PRIVATE,
                )  # fmt: skip
        add_endpoint(handlers, controls)
    page.queue(max_size=WAITING, default_concurrency_limit=CALLERS, api_open=False)
    return page


def add_endpoint(handlers, controls):
    """Add /caption for gradio_client; docs/page.md describes it. The controls' first values are its defaults."""
    file, answer = gr.File(visible=False, label="file"), gr.JSON(visible=False, label="captions")
    decoding, beams, captions, temperature, top_p, prompt, rerank = controls
    named = {"file": file, "decoding": decoding, "beam_size": beams, "num_captions": captions, "temperature": temperature}
    named |= {"top_p": top_p, "prompt": prompt, "rerank": rerank}
    assert list(named.values())[1:] == controls

    def caption(file, decoding, beam_size, num_captions, temperature, top_p, prompt, rerank):  # the names of its parameters
        return handlers.caption(file, decoding, beam_size, num_captions, temperature, top_p, prompt, rerank)

    caption.__doc__ = handlers.caption.__doc__
    gr.Button(visible=False).click(caption, list(named.values()), answer, api_name="caption", **EVENT)
