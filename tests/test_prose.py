"""What a reader of the numbered notebooks may count on: their length, their questions, their pictures, their numbers."""

import ast
import html
import json
import re

from test_notebooks import by_number
from test_notebooks import text as prose

WORDS, MINUTES, SCREEN = 3500, 45, 40  # a notebook, a sitting, the lines of one output


def read(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def output_text(output) -> str:
    "What a reader reads of an output: no scripts, no pictures, nothing that is folded."
    if output["output_type"] == "stream":
        return "".join(output["text"])
    data = output.get("data", {})
    for kind in ("text/markdown", "text/html", "text/plain"):
        if kind in data:
            text = "".join(data[kind])
            if kind == "text/plain" or ("text/html" in data and "<img" in "".join(data["text/html"])):
                return "" if kind != "text/plain" else text
            text = re.sub(r"(?s)<(script|style|details|svg)\b.*?</\1>", " ", text)
            return html.unescape(re.sub(r"<(br|/tr|/p|/div|/li)\b[^>]*>", "\n", text)) if kind == "text/html" else text
    return ""


def without_tags(text):
    return re.sub(r"<[^>]+>", " ", text)


@by_number
def test_it_reads_in_one_sitting(path):
    outputs = [without_tags(output_text(o)) for cell in read(path) for o in cell.get("outputs", ())]
    words = len(" ".join([without_tags(prose(path)), *outputs]).split())
    assert words <= WORDS
    minutes = [int(n) for n in re.findall(r"\*\*Time:\*\* about (\d+) minutes", prose(path))]
    assert len(minutes) == 1 and minutes[0] <= MINUTES


@by_number
def test_no_output_is_longer_than_a_screen(path):
    for cell in read(path):
        for output in cell.get("outputs", ()):
            lines = [line for line in without_tags(output_text(output)).split("\n") if line.strip()]
            assert len(lines) <= SCREEN, lines[0]


FOLDED = re.compile(r"(?s)<details>\s*<summary>(.*?)</summary>\s*\n\n(.+?)\n\n\s*</details>")


@by_number
def test_readers_predict_before_they_run(path):
    cells = read(path)
    asked = [n for n, cell in enumerate(cells) if cell["cell_type"] == "markdown" and "**Predict.**" in cell["source"]]
    assert len(asked) >= 2
    for n in asked:
        question = cells[n]["source"].split("**Predict.**")[-1]
        assert "?" in question.split("<details>")[0] and FOLDED.search(question), question
        assert any(cell["cell_type"] == "code" for cell in cells[n + 1 : n + 2]), "the next cell shows it"


@by_number
def test_every_question_to_take_away_has_a_folded_answer(path):
    end = prose(path).split("## Questions to take away")[1].split("\n## ")[0]
    questions = re.findall(r"(?m)^\d\. ", end)
    assert len(FOLDED.findall(end)) == len(questions) >= 2


@by_number
def test_code_that_draws_is_folded(path):
    for cell in read(path):
        if cell["cell_type"] != "code" or "#| export" in cell["source"]:
            continue
        lines = [line for line in cell["source"].split("\n") if line.strip() and not line.startswith("#|")]
        draws = re.search(r"= figure\(|\bax\.\w+\(", cell["source"])
        folded = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
        if draws and len(lines) > 3:
            assert folded, lines[0]
        assert folded == ("hide-input" in cell["metadata"].get("tags", ())), "both JupyterLab and the site fold it"


@by_number
def test_every_picture_has_a_text_alternative(path):
    for cell in read(path):
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                assert len(output["metadata"]["image/png"].get("alt", "")) >= 20
            for tag in re.findall(r"(?s)<img\b[^>]*>", "".join(data.get("text/html", ""))):
                alt = re.search(r"""alt=(["'])(.*?)\1""", tag)
                assert alt and len(alt[2]) >= 20, tag[:80]


# Numbers. A unit makes any number one that was measured, counted or given: the code of the section must know it.
UNIT = r"(?:\s?(?:%|×|ms|µs|s|kB|MB|GB|TB|times|billion|million|percent|seconds|bytes)\b|\s?[%×])"
NUMERAL = re.compile(r"(?<![\w.·])(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(" + UNIT + r")?(?!\w)")
NAMES = r"GPT-\d|SHA-\d+|AVX\d*|H100|H200|A100|RTX \d+|bf16|float\d+|int\d+|Llama[- ]\d[\w.]*|Qwen\d|arXiv \d+\.\d+|notebooks? \d\d\b|\b\d\d ·|[Ee]xercises? \d|[Rr]ungs? \d|[Mm]istakes? \d|[Ss]tep \d+|\b(?:19|20)\d\d\b(?!\s+(?:tokens|bytes|MB))"
SMALL = 12


def numerals(cell: str):
    "The numbers in a text that the code must know."
    cell = re.sub(r"(?s)```.*?```|`[^`]*`|<[^>]+>|!?\[[^\]]*\]\([^)]*\)|^#+ .*$|https?://\S+", " ", cell, flags=re.M)
    cell = re.sub(r"(?m)^\*\*Time:\*\*.*$|^ {4,}.*$|^\d+\. ", " ", cell)
    cell = re.sub(r"(?s)\$\$.*?\$\$|\$([^$]*)\$", lambda m: " ".join(re.findall(r"\\approx\s*([\d.,]*\d)", m[1] or "")), cell)
    cell = re.sub(NAMES, " ", cell)
    for number, unit in NUMERAL.findall(cell):
        value = float(number.replace(",", ""))
        if unit or value != int(value) or value > SMALL:
            yield number + unit, value


def known(sources) -> set[float]:
    "The numbers that some code holds, comments left out. A share may be said in percent."
    found = set()
    for source in sources:
        tree = ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source))
        found |= {float(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) in (int, float)}
    return found | {100 * x for x in found if 0 < x < 1}


def sections(cells):
    "The cells between one `## ` heading and the next."
    parts = [[]]
    for cell in cells:
        if cell["cell_type"] == "markdown" and re.search(r"(?m)^## ", cell["source"]) and parts[-1]:
            parts.append([])
        parts[-1].append(cell)
    return parts


@by_number
def test_numbers_in_prose_are_known_to_the_code_beside_them(path):
    unknown = []
    for part in sections(read(path)):
        values = known(cell["source"] for cell in part if cell["cell_type"] == "code")
        for cell in part:
            if cell["cell_type"] == "markdown":
                unknown += [text for text, value in numerals(cell["source"]) if not any(abs(value - v) < 1e-9 * max(1, v) for v in values)]
    assert unknown == []


def test_the_search_for_numbers_finds_them():
    found = [text for text, _ in numerals("It takes 3 ms, 0.5 of 1,024 tokens, 7 rows, `12.5`, $x = 17$, $y \\approx 7.1$, GPT-2, 40% and 2 × more.")]
    assert found == ["3 ms", "0.5", "1,024", "7.1", "40%", "2 ×"]
    assert known(["assert round(x) == 340  # MB", "share = 0.4"]) == {340.0, 0.4, 40.0}
