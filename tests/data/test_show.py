from mmpeft.data.show import describe_samples, write_page
from mmpeft.data.tokens_view import view_samples
from tests.data.files import colour_set, gpt, human, picture, row, write_lines
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
