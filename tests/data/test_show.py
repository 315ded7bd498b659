import base64
import io
from functools import partial

from PIL import Image

from mmpeft.data.augment import augment_with_notes, augmentation_of
from mmpeft.data.show import describe_samples, write_page
from mmpeft.data.tokens_view import view_samples
from tests.data.files import colour_set, gpt, human, picture, row, write_lines
from tests.data.films import film
from tests.tiny import tiny_processor


def test_a_sample_is_shown_as_the_model_sees_it(tmp_path):
    view = next(view_samples(colour_set(tmp_path), tiny_processor()))
    pieces = view["pieces"]
    assert [(piece["role"], piece["text"]) for piece in pieces] == [
        ("user", "<|im_start|>user\n"),
        ("media", "<image> x 4"),
        ("user", "\nWhich colour?<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "red<|im_end|>"),
        ("user", "\n"),
    ]
    assert [piece["trained"] for piece in pieces] == [False, False, False, True, False]
    assert len(view["pictures"]) == 1
    assert view["pictures"][0].startswith("data:image/png;base64,")


def test_the_page_escapes_text_and_goes_on_after_a_bad_row(tmp_path):
    picture(tmp_path / "a.png")
    attack = "<script>alert(1)</script>"
    rows = [{}, row(human(attack), gpt(attack), id=attack, image="a.png"), row(image="no.png")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    write_page(tmp_path / "a.html", attack, list(view_samples(path, tiny_processor())))
    page = (tmp_path / "a.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 5
    assert "no `conversations`" in page
    assert "does not exist" in page
    assert [("error" in item) for item in describe_samples(path)] == [True, False, False]


def test_a_page_shows_what_an_epoch_makes_of_a_sample_beside_it(tmp_path):
    settings = augmentation_of({"flip": {"probability": 1}, "paraphrase": {"Which colour?": ["<b>Its colour?"]}})
    vary = partial(augment_with_notes, settings=settings, seed=0)
    path = colour_set(tmp_path)
    views = {epoch: next(view_samples(path, tiny_processor(), vary=partial(vary, epoch=epoch))) for epoch in range(6)}
    said = {"".join(piece["text"] for piece in view["augmented"]["pieces"]) for view in views.values()}
    assert len(said) == 2
    assert {tuple(view["augmented"]["notes"]) for view in views.values()} == {
        ("mirrored",),
        ("other words", "mirrored"),
    }
    assert len({str(view["pieces"]) for view in views.values()}) == 1
    epoch = next(epoch for epoch, view in views.items() if len(view["augmented"]["notes"]) == 2)
    write_page(tmp_path / "a.html", "a", [views[epoch]], epoch=epoch)
    page = (tmp_path / "a.html").read_text()
    assert page.count("<img") == 2
    assert "Which colour?" in page
    assert "&lt;b&gt;Its colour?" in page
    assert "<p>other words; mirrored</p>" in page


def test_a_sample_that_cannot_be_varied_says_why(tmp_path):
    settings = augmentation_of({"paraphrase": {"Which colour?": ["<|im_end|>", "<|im_start|>", "<|pad|>"]}})
    vary = partial(augment_with_notes, settings=settings, seed=0)
    path = colour_set(tmp_path)
    views = [next(view_samples(path, tiny_processor(), vary=partial(vary, epoch=epoch))) for epoch in range(4)]
    errors = [view["augmented"]["error"] for view in views if "error" in view["augmented"]]
    assert errors
    assert all("control token" in error and f"{path}:2: sample 0" in error for error in errors)
    assert all("pieces" in view for view in views)


def test_boxes_are_written_and_drawn_and_their_convention_named(tmp_path):
    picture(tmp_path / "a.png", (40, 20), "white")
    rows = [row(human("Where?"), gpt("At <box> and <box>."), image="a.png", boxes=[[10, 5, 30, 15], [20, 10]])]
    view = next(view_samples(write_lines(tmp_path / "a.jsonl", rows), tiny_processor()))
    assert "At [0.25, 0.25, 0.75, 0.75] and [0.5, 0.5]." in "".join(piece["text"] for piece in view["pieces"])
    assert view["convention"] == "fraction"
    drawn = Image.open(io.BytesIO(base64.b64decode(view["pictures"][0].partition(",")[2])))
    assert drawn.size == (40, 20)
    assert drawn.getpixel((10, 10)) == (255, 0, 0)
    assert drawn.getpixel((14, 8)) == (255, 255, 255)


def test_films_are_shown_by_some_of_their_frames(tmp_path):
    film(tmp_path / "a.mp4")
    rows = [row(human("<video>\nWhat happens?"), gpt("Nothing."), video="a.mp4")]
    view = next(view_samples(write_lines(tmp_path / "a.jsonl", rows)))
    assert len(view["pictures"]) == 4
    assert "<video>\nWhat happens?" in view["pieces"][0]["text"]
