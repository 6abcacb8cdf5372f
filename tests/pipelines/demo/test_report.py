"""The demo's page: what it shows, and that no value of the data becomes markup."""

from PIL import Image

from pipelines.demo.report import EXAMPLES, write_report


def test_the_page_shows_answers_and_escapes_them(tmp_path):
    for number in range(6):
        Image.new("RGB", (20, 10), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    gates = [{"sam": 0.75, "vary": 0.25}, {"sam": 0.5, "vary": 0.5}]
    answers = [
        {
            "image": str(tmp_path / f"{number}.png"), "kind": "photo", "question": "<script>?", "answer": "", "truth": "a & b",
            "correct": number < 3, "router": "G" if number else None, "experts": ["sam", "vary"] if number else [], "gates": gates,
        }
        for number in range(6)
    ]  # fmt: skip
    kinds = {
        "photo": {"questions": 6, "accuracy": 0.5, "chance": 0.25, "experts": {"sam": 5}},
        "chart": {"questions": 0, "accuracy": 0.0, "chance": None, "experts": {}},
    }
    result = {
        "kinds": kinds, "seconds": 61.2, "peak_bytes": 2**30, "features_computed": 42, "features_reused": 0,
        "quarantined": [{"path": "/somewhere/<bad>.png", "reason": "0 bytes"}],
    }  # fmt: skip
    write_report(
        tmp_path / "report.html", result, answers, {"precompute": {"seconds": 30.0}, "train": {"seconds": 0.0}}
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == EXAMPLES and "http" not in page
    assert "<script>" not in page and "&lt;script&gt;?" in page and "a &amp; b" in page and "&lt;bad&gt;.png" in page
    assert "50.0 %" in page and "25.0 %" in page and "sam: 0.75" in page and "base encoder alone" in page
    assert page.count('<b class="ok">right</b>') == 2 == page.count('<b class="no">wrong</b>')
