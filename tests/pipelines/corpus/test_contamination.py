"""Documents that share text with what will be evaluated."""

from pipelines.corpus.contamination import read_runs, runs_of, shared, write_runs

QUESTION = "which of the two rivers that meet below the old town is the longer one by far"
SHORT = "name the capital city of the northern country please"  # nine words
TINY = "what is two and two"


def test_a_run_of_thirteen_words_is_found_wherever_it_stands():
    runs = runs_of([QUESTION], 13)
    document = "He asked: Which of the two rivers that meet below the old town is the LONGER one? Nobody knew."
    assert shared([document, "nothing of it", QUESTION.replace("old", "new")], runs).tolist() == [3, 0, 0]


def test_a_text_of_eight_to_twelve_words_counts_as_a_whole():
    runs = runs_of([SHORT], 13)
    assert shared([f"He said, {SHORT}, and sat down.", SHORT[:-7], "please " + SHORT[5:]], runs).tolist() == [1, 0, 0]


def test_shorter_texts_count_nothing():
    assert runs_of([TINY], 13) == {}
    assert shared([TINY, TINY * 9], {}).tolist() == [0, 0]


def test_runs_are_kept_in_a_file(tmp_path):
    runs = runs_of([QUESTION, SHORT, TINY], 13)
    write_runs(runs, tmp_path / "runs.arrow")
    found = read_runs(tmp_path / "runs.arrow")
    assert {n: hashes.tolist() for n, hashes in found.items()} == {n: hashes.tolist() for n, hashes in runs.items()}
    write_runs({}, tmp_path / "none.arrow")
    assert read_runs(tmp_path / "none.arrow") == {}
