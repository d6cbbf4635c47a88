"""One id space: every id has one meaning, every meaning one id, no text is unknown."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pagellm.model.vocab import SPECIALS, Vocab
from pagellm.stage.config import PageLLMError

GPT2 = Path(__file__).parents[3] / "shared" / "data" / "gpt2"
TRAINED = Vocab.train(
    ["a small blue drum", "a large drum for children"] * 3, n_users=3, n_items=4, size=300
)


@settings(deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    assert TRAINED.decode(TRAINED.words(text)) == text.encode("utf-8", "ignore").decode()
    assert all(token < TRAINED.n_words for token in TRAINED.words(text))


SNIPPETS = st.sampled_from(
    [
        "'s",
        "'",
        "'ll",
        "don't",
        " a",
        "  ",
        "\n",
        " \n ",
        "\t",
        "\x0b",
        "\x1c",
        "\x85",
        "\x00",
        "12",
        "x1",
        "_",
        "!?",
        " --",
        "é",
        " ☃",
        "small",
        " drum",
        "blue",
    ]
)


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(st.text(), st.text(st.characters(max_codepoint=127)), st.lists(SNIPPETS).map("".join))
)
def test_words_looked_up_one_by_one_are_what_the_tokeniser_makes_of_the_whole_text(text):
    text = text.encode("utf-8", "ignore").decode()
    assert TRAINED.words(text) == TRAINED.tokenizer.encode(text).ids == TRAINED.words(text)


def test_the_memory_for_words_is_bounded(monkeypatch):
    monkeypatch.setattr("pagellm.model.vocab.CACHED_WORDS", 3)
    v = Vocab(TRAINED.tokenizer, 3, 4)
    text = "one two three four five " + "x" * 100
    assert v.words(text) == v.words(text) == v.tokenizer.encode(text).ids
    assert len(v._tokens) == 3


def test_the_four_runs_tile_the_id_space():
    v = TRAINED
    ids = (
        list(range(v.n_words))
        + [v.special(s) for s in SPECIALS]
        + [v.user(u) for u in range(3)]
        + [v.item(i) for i in range(4)]
    )
    assert ids == list(range(v.size))
    assert v.decode([v.user(2), v.item(0), v.page, *v.words(" x")]) == "<user 2><item 0><page> x"


def test_unknown_users_and_wrong_items():
    v = TRAINED
    assert v.user(None) == v.user(3) == v.user(-1) == v.user_unk
    for item in (-1, 4):
        with pytest.raises(ValueError, match="outside 0..3"):
            v.item(item)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        v.decode([v.size])


def test_ratings_have_five_levels_and_an_unknown_one():
    v = TRAINED
    assert [v.rating(r) for r in (1.0, 2.0, 3.0, 4.0, 5.0)] == [
        v.special(f"<r{r}>") for r in range(1, 6)
    ]
    assert v.rating(float("nan")) == v.special("<r?>")
    assert v.rating(9.0) == v.special("<r5>") and v.rating(0.2) == v.special("<r1>")


def test_text_that_looks_like_a_special_token_stays_text():
    assert all(token < TRAINED.n_words for token in TRAINED.words("<page><r5><pad>"))


def test_save_and_load(tmp_path):
    TRAINED.save(tmp_path)
    again = Vocab.load(tmp_path)
    assert again.size == TRAINED.size and again.words("blue drum!") == TRAINED.words("blue drum!")
    with pytest.raises(PageLLMError, match="no vocabulary"):
        Vocab.load(tmp_path / "none")


def test_no_text_at_all_still_has_every_byte():
    untrained = Vocab.train([], 1, 1, 256)
    assert untrained.decode(untrained.words("é☃\0")) == "é☃\0"
    with pytest.raises(PageLLMError, match="at least 256"):
        Vocab.train([], 1, 1, 200)


@pytest.mark.skipif(not GPT2.exists(), reason="shared: no GPT-2 word files in ../shared/data/gpt2")
def test_published_words():
    v = Vocab.gpt2(GPT2, 3, 4)
    assert v.n_words == 50257 and v.item(0) == 50257 + len(SPECIALS) + 3
    # Ids that GPT-2's published tokeniser gives.
    assert v.words("Hello world") == [15496, 995] and v.words(" drums") == [24730]
    assert v.decode(v.words("naïve ☃ text\n")) == "naïve ☃ text\n"


def like_llama(path):
    """A tokenizer.json of Llama 3's kind.

    It cuts digits in threes, has special tokens behind the words, and puts one before a text.
    """
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["a small blue drum 1234"] * 3,
        trainers.BpeTrainer(
            vocab_size=280,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    first = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", first)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))
    return tokenizer, first


def test_a_published_tokenizer_file(tmp_path):
    other, first = like_llama(tmp_path / "tokenizer.json")
    assert other.encode("a drum").ids[0] == first
    (tmp_path / "run").mkdir()
    v = Vocab.published(tmp_path, 3, 4)
    v.save(tmp_path / "run")
    text = "a small blue drum 1234 for <|end_of_text|> children"
    for again in (
        v,
        Vocab.published(tmp_path / "tokenizer.json", 3, 4),
        Vocab.load(tmp_path / "run"),
    ):
        assert again.n_words == other.get_vocab_size() == first + 2
        assert (
            again.words("a drum")
            == other.encode("a drum").ids[1:]
            == again.words_batch(["a drum"])[0]
        )
        # What a review says is text: no special token, nothing put before, nothing cut.
        assert again.decode(again.words(text)) == text and not {first, first + 1} & set(
            again.words(text)
        )


def test_a_broken_tokenizer_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(PageLLMError, match="no .*tokenizer.json"):
        Vocab.published(path, 1, 1)
    path.write_text("{}")
    with pytest.raises(PageLLMError, match="no tokenizer.json of the tokenizers package"):
        Vocab.published(path, 1, 1)
    like_llama(path)
    gap = json.loads(path.read_text())
    words = gap["model"]["vocab"]
    words[max(words, key=words.get)] += 5
    path.write_text(json.dumps(gap))
    with pytest.raises(PageLLMError, match="without gaps"):
        Vocab.published(tmp_path, 1, 1)


def test_missing_word_files_are_named(tmp_path):
    with pytest.raises(PageLLMError, match="encoder.json and vocab.bpe"):
        Vocab.gpt2(tmp_path, 1, 1)
