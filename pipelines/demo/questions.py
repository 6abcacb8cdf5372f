"""The wording of the demo's questions, and which of them are asked of which picture."""

from collections import Counter
from collections.abc import Sequence

from numpy.random import Generator

from pipelines.demo.picture import Picture

# Wordings of each form of question. The chance level of a form is the share of its most common answer in training.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "photo-tone": (
        "Is the photograph in colour or in grey?", "Colour or grey?", "Does the picture have colour or is it grey?",
    ),
    "photo-tint": (
        "Which colour is the photograph toned in?", "What is the tint of the picture?",
        "The photograph has a tint of which colour?",
    ),
    "photo-side": (
        "Which side of the photograph is brighter, left or right?", "Is the left or the right side brighter?",
        "Where is more light, left or right?",
    ),
    "photo-corner": (
        "Which corner of the photograph is the brightest?", "In which corner is the most light?",
        "What is the brightest corner?",
    ),
    "photo-focus": ("Is the photograph sharp or blurred?", "Sharp or blurred?", "Is the picture blurred or sharp?"),
    "photo-light": ("Is the photograph dark or bright?", "Dark or bright?", "Is the picture bright or dark?"),
    "chart-type": ("Is this a bar chart or a line chart?", "Which kind of chart is it, bar or line?", "Bar or line?"),
    "chart-trend": ("Does the line rise or fall?", "Does the line of the chart fall or rise?", "Rise or fall?"),
    "chart-peak": (
        "Is the highest bar on the left, in the middle or on the right?",
        "Where is the highest bar, left, middle or right?", "Where in the chart is the tallest bar?",
    ),
    "chart-count": (
        "How many bars are there?", "What is the number of bars in the chart?", "How many bars does the chart have?",
    ),
    "chart-legend": ("Is there a legend?", "Does the chart have a legend?"),
    "chart-background": (
        "What is the background colour of the chart?", "Which colour is the background?",
        "Is the background white, grey or black?",
    ),
    "chart-colour": (
        "Which colour is the data drawn in?", "What is the colour of the bars or the line?",
        "In which colour are the values drawn?",
    ),
    "document-type": (
        "What is this page: article, letter, form or table?", "Which kind of document is it?",
        "Is this an article, a letter, a form or a table?",
    ),
    "document-columns": ("How many columns of text are there?", "In how many columns is the text set?"),
    "document-heading": ("Is there a large heading?", "Does the page have a large heading?"),
    "document-corner": (
        "In which corner is the stamp?", "Where is the stamp on the page?", "Which corner of the page has the stamp?",
    ),
    "document-stamp": ("What does the stamp say?", "Which word is on the stamp?", "Read the word on the stamp."),
    "document-paper": ("Which colour is the paper?", "What is the colour of the page?"),
    "digit-corner": (
        "In which corner is the digit?", "Where is the digit?", "Which corner of the picture has the digit?",
    ),
    "digit-value": ("Which digit is written in the picture?", "What is the digit?", "Read the digit."),
    "digit-ink": (
        "Which colour is the digit?", "What is the colour of the digit?", "In which colour is the digit written?",
    ),
    "digit-size": ("Is the digit large or small?", "Large or small digit?", "Is the written digit small or large?"),
    "medical-kind": (
        "Which kind of medical picture is this: CT, MR, ultrasound, eye or microscope?",
        "How was this medical picture taken?", "What kind of scan or picture is this?",
    ),
    "medical-side": (
        "Which side of the scan is brighter, left or right?", "Is the left or the right side brighter?",
        "Where is more light, left or right?",
    ),
    "medical-tone": (
        "Is the scan in colour or in grey?", "Colour or grey?", "Does the picture have colour or is it grey?",
    ),
    "medical-background": (
        "Is the background of the scan black or white?", "What is the background colour of the scan?",
    ),
    "medical-corner": (
        "In which corner is the marker?", "Where is the letter marker?", "Which corner of the scan has the marker?",
    ),
    "medical-marker": (
        "Which letter is on the marker, L or R?", "Read the letter of the marker.", "Is the marker L or R?",
    ),
}  # fmt: skip
PER_IMAGE = 3  # questions asked of one picture


def choose_forms(rng: Generator, pictures: Sequence[Picture]) -> list[list[str]]:
    """Chooses forms of question for each picture, `PER_IMAGE` at most, so that all answers of a form are equally common.

    A form is preferred where this picture's answer to it was used least so far.
    """
    options: dict[str, set[str]] = {}
    for picture in pictures:
        for form, answer in picture.facts.items():
            options.setdefault(form, set()).add(answer)
    used: Counter[tuple[str, str]] = Counter()
    chosen = []
    for picture in pictures:
        weight = {}
        for form, answer in picture.facts.items():
            ahead = used[form, answer] - min(used[form, other] for other in options[form])
            weight[form] = used[form, answer] * len(options[form]) + 3 * ahead + rng.random()  # random between equals
        forms = sorted(weight, key=weight.__getitem__)[:PER_IMAGE]
        used.update((form, picture.facts[form]) for form in forms)
        chosen.append(forms)
    return chosen
