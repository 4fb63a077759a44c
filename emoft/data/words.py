"""Texts as words, so that case, punctuation and blanks tell no two texts apart."""

import unicodedata


class _Characters(dict[int, str]):
    """What each character becomes, by its Unicode category, looked up once."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)[0]
        # Letters, marks (Khmer's vowels are some) and numbers stay. Apostrophes join: "didn't" is also written "didnt".
        self[code] = character.casefold() if kind in "LMN" else "" if character in "'’ʼ" else " "
        return self[code]


_CHARACTERS = _Characters()


def words(text: str) -> list[str]:
    """Return the words of a text: in lower case, without punctuation, split at blanks.

    A script that puts no blanks between words, as Khmer, has words as long as its phrases. Where there is nothing but
    signs, they are the words: ":)" is not the same text as ":(".
    """
    normal = unicodedata.normalize("NFKC", text)
    return normal.translate(_CHARACTERS).split() or normal.split()


def runs(sequence: list[str], length: int) -> list[str]:
    """Return all runs of so many consecutive words, each joined by blanks."""
    return [" ".join(sequence[start : start + length]) for start in range(len(sequence) - length + 1)]
