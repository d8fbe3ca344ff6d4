"""Reward for multiple choice: the letter that a completion chooses must equal the row's.

Answer: the part after the last `</think>` is read, and in it the last `<answer>...</answer>` if there is one. After an
unclosed `<think>` there is no answer. The first of these that is present gives the answer:

- the last `\\boxed{B}`, else the last `[[B]]`
- the last sentence that chooses: "Answer: B", "the answer is (B)", "I choose B", "B is correct", "Therefore, B.", and
  the like in the languages of `NOUN`
- a text that is or begins with a lone letter, "B", "(B)", "**B**", "B. because ..."
- a last line that is a lone letter or "Option B"

A sentence that asks a question, begins with "if" or says which letter is not the answer chooses nothing. A choice
between letters ("A or B", also in boxes) is no answer, and neither is a list of letters ("A. B. C. D.", or options line
by line).

Comparison: the letters A to Z must be equal. Lower case is allowed in a box and in the row. Elsewhere a lower-case
letter is a word ("a") and no choice. So is a capital A or I before a word ("A cat", "I think"), unless the word can
follow a choice ("A because").
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

GOLD = True
"""The reward compares with the row's gold answer, which is checked before a run."""

MAX_TAIL = 20_000
"""Characters at the end of a completion whose sentences are read."""
MAX_SENTENCE = 500
"""Characters at the end of a sentence, or after it, that are read."""
MARKUP = re.compile(r"\\(?:text|math)[a-z]*|[*${}\\]")
LETTER = r"\(?([A-Z])(?:\)|\b)"
HEDGE = r"(?!\s*(?:or|and|[/,;&+])\s*(?:(?:maybe|perhaps|possibly)\s+)?\(?[A-Z]\b)"
FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}  # as Chinese and Japanese write letters and signs
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
BRACKETED = re.compile(r"\[\[\s*\(?([A-Z])\)?\s*\]\]")
ALONE = re.compile(r"\(?([A-Za-z])(?:\)?[.:]?|\)?[.:]\s.*|\)\s.*)", re.S)
"""A letter, or a letter with punctuation and the text of its option."""

# Parts of sentences that choose. At each position a part matches in only one way, so that no pattern backtracks long.
LATIN = r"A-Za-zÀ-ɏḀ-ỿ"
NOUN = (
    r"(?:\b(?:answer|ans|respuesta|réponse|reponse|antwort|lösung|resposta|risposta|cevap|yanıt|jawaban|đáp án"
    r"|câu trả lời|solution|solución|richtig(?=\s+ist)"
    r"|correct(?=\s*:)|antwoord|odpowiedź|odpověď|svar)\b|答案|正确的|的(?=是)|答え|正解|回答"
    r"|คำตอบ|정답|답|الإجابة|الاجابة|إجابة|الجواب|جواب|پاسخ|जवाब|उत्तर|উত্তর|ответ|відповідь|απάντηση)"
)
OPTION = (
    r"(?:\b(?:option|choice|selection|pick|one|statement|letter|opción|opcion|alternativa|choix|proposition|opção|opzione"
    r"|seçenek|pilihan|phương án|lựa chọn)\b|选项|選項|選択肢|보기|선택지|الخيار|विकल्प|вариант)"
)
FILL = (
    rf"(?:(?<![{LATIN}])(?:the|my|our|option|choice|letter|answer|statement|one|correct|right|best|final|most|likely|true"
    r"|appropriate|accurate|therefore|thus|then|hence|so|clearly|definitely|indeed|that|which|to|of|for|this|question"
    r"|problem|given|is|was|be|would|must|should|will|has|just|simply|only|with|fits|works|matches|applies|makes|sense"
    r"|la|el|los|opción|opcion|letra|correcta|correcto|es|sería|respuesta|alternativa|le|lettre|bonne|réponse|correcte"
    r"|est|donc|finale|proposition|die|der|das|richtige|antwort|korrekte|ist|lautet|also|buchstabe|a|opção|é|correta|certa"
    r"|lettera|opzione|corretta|giusta|è|là|phương|án|đáp|đúng|câu|seçenek|şıkkı|doğru|adalah|yang|benar|opsi|pilihan"
    rf"|het|juiste|jest)(?![{LATIN}])|คือ|হল|это|вариант|буква|буквой|под|правильный|верный|ответ|هو|هي|الصحيحة|الصحيح"
    r"|الخيار|الحرف|विकल्प|सही|है|보기|은|는|選択肢|は|の|应该|應該|选项|選項|是|为|為|应|應|选择|选|選|就|第"
    r"|[\s:=,\"'“”‘’(【】\[>–—-])"
)
LINK = re.compile(
    r"\b(?:is|was|be|es|sería|est|ist|lautet|é|è|là|adalah)\b|[:=】–—-]|是|为|為|选|選|は|은|는|هو|هي|это|คือ|হল", re.I
)
NAMED = (
    rf"(?<![{LATIN}\d.])(?-i:([A-Z]))(?![{LATIN}\d+*/^_]|['’](?!d[iıuü]r)[{LATIN}]|-[{LATIN}\d]|\.[{LATIN}]"
    r"|\s*[+*/^=<>]|\s-\s*[A-Z]\b)[)\"'”’\]】]*"
)
"""A capital letter that is not part of a word, a name or a formula."""
VERB = (
    r"(?:\b(?:choos(?:e|ing)|chose|select(?:ing)?|pick(?:ing)?|vote\s+for|go(?:ing)?\s+with|opt\s+for|elijo|escojo|selecciono|choisis|sélectionne|wähle"
    r"|escolho|scelgo|chọn|seçiyorum|memilih)\b|(?:would|'d)\s+say\b|选择|選擇|选|選|выбираю|أختار|선택)"
)
RIGHT = (
    r"(?:\s+it\s+is\b|\s(?:is|would\s+be|must\s+be|should\s+be|has\s+to\s+be|es|est|ist|é|è|là|adalah)\s+(?:(?:therefore|thus|indeed|clearly|definitely)\s+)?"
    r"(?:(?:the|la|die|a|le)\s+)?"
    r"(?:(?:most\s+)?(?:correct|right|best|final|only|appropriate|bonne|richtige)\s+){0,2}(?:answer|choice|option|one"
    r"|correct|right|true|richtig|korrekt|correct[ae]?|corretta|vraie|verdadera|juste|respuesta|réponse|antwort|đúng"
    r"|benar)\b(?!\s+(?:only|if|when|than|to|but)\b)|\s*(?:选项|選項|项)?\s*(?:是|为)?\s*(?:正确|正確|对的)"
    r"|\s*が(?:正解|正しい)|[이가]\s*(?:정답|맞)|\s*[-–—]?\s*(?:верный|правильный)|\s*सही\s*है)"
)
SO = (
    r"(?:therefore|thus|hence|so|clearly|definitely|obviously|certainly|must be|consequently|finally|in conclusion"
    r"|por lo tanto|entonces|donc|also|daher|итак|因此|所以|故|よって|따라서)"
)
END = r"(?:\s*(?:d[iıuü]r|입니다|이다|です|है|选项|選項|项))?[\s.。!।]*(?:$|\b(?:because|since|as)\b|[,(])"
IT_IS = (
    r"\b(?:it|this|that|which)(?:\s+(?:is|must\s+be|would\s+be|should\s+be|has\s+to\s+be|matches|corresponds\s+to)|'s)"
)
CLAUSE = (
    rf"(?:^|[,:]\s*|\b(?:that|means|think|believe|so|thus|hence|therefore|only|but|and)\s+|{OPTION}\s*|{NOUN}\s*"
    r"|(?:只有|只|所以|因此|故|认为|觉得|可知|说明|即|则)\s*)"
)
NOT_BUT = (
    rf"(?:\bnot|\bno|\bpas|\bnicht|不是|\bне)\s*{FILL}{{0,6}}(?-i:[A-Z])\)?[,\s]*"
    r"(?:but|sino|mais|sondern|rather|而是|\bа)\b"
)
CHOICES = tuple(re.compile(pattern, re.I) for pattern in (
    rf"(?:{NOUN}|{OPTION})(?P<gap>{FILL}{{0,24}}){NAMED}",
    rf"{NOUN}{FILL}{{0,24}}{NAMED}{END}",
    rf"(?<!不){VERB}{FILL}{{0,12}}{NAMED}(?!\s+(?:such|to|on|from|so|where|with|in|between|as\s+(?:the|an?))\b)",
    rf"\b(?:matches|corresponds\s+to)\s+{FILL}{{0,12}}{NAMED}{END}",
    rf"{CLAUSE}[\s(\"'“]*{NAMED}\s*{RIGHT}",
    rf"\bmakes\s+(?:{OPTION}\s*)?{NAMED}\s+the\s+(?:correct|right|best)\b",
    rf"{OPTION}\s*{NAMED}\s*:[^.;:]{{1,60}}\sis\s+(?:the\s+)?(?:correct|right|best)\b",
    rf"{OPTION}{FILL}{{0,24}}{NAMED}\s*(?:है|입니다|です)",
    rf"(?:^|,)\s*{SO}{FILL}{{0,12}}{NAMED}{END}",
    rf"{IT_IS}\s+{FILL}{{0,12}}(?!I){NAMED}{END}",
    rf"{NOT_BUT}{FILL}{{0,12}}{NAMED}",
))  # fmt: skip
"""Patterns of sentences that choose. The last group is the letter. The first pattern needs a copula in `gap`."""
NOT_BEFORE = re.compile(
    r"(?:\b(?:not|never|no|nicht|ne|não|non|cannot|incorrect|wrong|false|incorrecta|falsche|might|may|could)|n't|不(?:应该?|能|会|可以|要)?|\bне"
    r"|(?:\bnot|n't)\s+(?:think|believe|say|agree)(?:\s+that)?(?:\s+the)?)\s*$",
    re.I,
)
NOT_BEHIND = re.compile(
    r"\s*(?:で(?:は|も)?(?:ない|ありません)|じゃない|[이가은는]?\s*아[니닙]|नहीं|is (?:not|wrong|incorrect|false)|isn't"
    r"|不|错|ist (?:nicht|falsch))",
    re.I,
)
IDLE = re.compile(
    r"^\W*(?:if|suppose|assume|imagine|assuming|when|unless|si|wenn|если|如果|假如|若)\b|[?？؟]\s*$|吗\s*$|^(?:如果|假如|若)",
    re.I,
)
"""Matches a sentence that asks a question or makes an assumption."""
OTHERS = re.compile(
    r"\s*(?:or|and|o|y|e|ou|et|oder|und|или|и|veya|hoặc|또는|أو|या|[/,;&+、]|か|或者|或|和|与|及)"
    r"\s*(?:(?:maybe|perhaps|possibly)\s+)?\(?[A-Z](?![A-Za-z])|\s*[A-Z]\b(?!\s+[a-z])"
)
WORD_BEHIND = re.compile(
    r"\s+(?!(?:because|since|as|for|is|which|with|not|but|non|no|and|or|ist|es|est|é|è|porque|parce|weil)\b)[A-Za-zÀ-ɏ]"
)
SENTENCE_END = re.compile(r"[\n。！!?؟।;]+|\.(?=\s)")
HEADING = re.compile(rf"({NOUN})\s*:?\s*\n\s*", re.I)
OPENING = re.compile(
    rf"(?:(?i:{OPTION}) ?)?{LETTER}\s*(?:[.:。、](?=\s|$|[\u3040-\u9fff])|(?<=\))|$|(?<=\s)[-–—]\s(?=\w{{2}})){HEDGE}"
    r"(?!\W*(?i:(?:is\s+)?(?:not|wrong|incorrect|false|untrue))\b)"
)
OPTIONS = re.compile(r"^ *(?:(?:Option|Choice) )?\(?([A-Z])[.:)](?!\S)", re.M)


def multiple_choice(
    completion: str,
    row: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    log_extra: Callable[[str, Any], None] | None = None,
) -> float:
    """Return 1.0 if the completion chooses the letter `row["answer"]`, else 0.0 (see the module's docstring).

    `log_extra`: given by the trainer; it is passed the letter that is chosen, and why it gets 0.

    Raises KeyError without `answer`, ValueError if it is not a letter ("C", "(C)" or "C. its text").
    """
    if "answer" not in row:
        raise KeyError(f"the row has no column 'answer', only {sorted(row)}")
    gold = gold_letter(row["answer"])
    text = behind_reasoning(completion, info)
    letter = chosen(text)
    if log_extra is not None:
        problem = f"it is not {gold}"
        if letter is None:
            problem = "no letter is chosen, or several" if text else "there is no text after the reasoning"
        log_extra("extracted", letter)
        log_extra("why", None if letter == gold else problem)
    return 1.0 if letter == gold else 0.0


def multiple_choice_unclosed(
    completion: str, row: Mapping[str, Any], log_extra: Callable[[str, Any], None] | None = None
) -> float:
    """Grade like `multiple_choice`, for models that never close `<think>`: without `</think>`, read everything."""
    return multiple_choice(completion.replace("<think>", ""), row, log_extra=log_extra)


def behind_reasoning(completion: str, info: Mapping[str, Any] | None) -> str:
    """Return the part of `completion` after its reasoning; empty if the reasoning is unfinished.

    `info`: given by the trainer. If its prompt ends with `<think>`, the completion begins inside the reasoning.
    """
    begun = info is not None and info["prompt"].rstrip().endswith("<think>") and "</think>" not in completion
    text = completion.rpartition("</think>")[2]
    return "" if begun or "<think>" in text else text


def gold_letter(answer: Any) -> str:
    letter = ALONE.fullmatch(plain(str(answer)))
    if not isinstance(answer, str) or letter is None:
        raise ValueError(f"the gold answer must be a letter, not {answer!r}")
    return letter[1].upper()


def plain(text: str) -> str:
    """Return `text` without emphasis and surrounding LaTeX."""
    return MARKUP.sub("", text.translate(FULL_WIDTH)).strip()


def chosen(text: str) -> str | None:
    """Return the letter chosen by `text`, the part of a completion after its reasoning, if any."""
    _, tag, after = text.rpartition("<answer>")
    text = after.partition("</answer>")[0] if tag else text
    start = text.rfind("\\boxed")
    if start >= 0:
        return boxed(text, start)
    if bracketed := BRACKETED.findall(text):
        return bracketed[-1] if len({*bracketed}) == 1 else None
    text = re.sub(r"(?<!\w)\[([A-Z])\]", r"(\1)", text)
    text = HEADING.sub(r"\1: ", re.sub(r"[ \t\u3000]+", " ", plain(text)))
    begin = max(0, len(text) - MAX_TAIL)
    ends = [begin, *(e.end() for e in SENTENCE_END.finditer(text, begin)), len(text)]
    for start, end in reversed([*itertools.pairwise(ends)]):
        letter = said(text, start, end)
        if letter is not None:
            return letter or None
    lines = [line for line in text.splitlines() if line.strip()]
    opening = OPENING.match(text)
    options = OPTIONS.findall(text)[:2] if OPTIONS.match(text) else []
    labels = re.findall(r"(?<!\w)\(?([A-Z])[.:)]\s", lines[0])[:2] if lines else []
    listed = is_list(" ".join(options)) or is_list(" ".join(labels))
    if opening and not is_list(lines[0]) and not listed:
        return opening[1]
    alone = [re.fullmatch(rf"(?:(?i:{OPTION}) ?)?{LETTER}\.?", line.strip()) for line in (lines[:2] + lines[-1:])]
    if alone and alone[0] and not alone[1] and not alone[2] and not lines[1].strip()[0].islower() and not listed:
        return alone[0][1]  # the following lines explain it
    last = alone[-1] if lines else None
    return last[1] if last and not is_list(" ".join(lines[-2:])) else None


def said(text: str, start: int, end: int) -> str | None:
    """Return the letter that a sentence of `text` chooses; empty for several; None if it chooses nothing."""
    start = max(start, end - MAX_SENTENCE)
    start += len(text[start:end]) - len(text[start:end].lstrip())
    sentence = text[start:end].rstrip()
    if not re.search(r"[A-Z]", sentence) or IDLE.search(sentence):
        return None
    found = 0, ""
    for number, pattern in enumerate(CHOICES):
        for choice in pattern.finditer(sentence):
            letter, at = choice[choice.lastindex or 1], choice.start(choice.lastindex or 1)
            behind = re.compile(r"[)\"'”’\]】]*").match(sentence, at + 1)
            after = behind.end() if behind else at + 1
            if (
                (number == 0 and not LINK.search(choice["gap"]))
                or (
                    pattern is not CHOICES[-1]
                    and NOT_BEFORE.search(sentence[max(0, choice.start() - 30) : choice.start()])
                )
                or NOT_BEHIND.match(sentence, after)
                or (letter in "AI" and after == at + 1 and WORD_BEHIND.match(sentence, after))
            ):
                continue
            several = OTHERS.match(sentence, after) or is_list(text[start + at : end + MAX_SENTENCE].partition("\n")[0])
            found = max(found, (at + 1, "" if several else letter))
    return found[1] if found[0] else None


def boxed(text: str, start: int) -> str | None:
    """Return the letter in the last box, at `start`, if it is closed and not joined to a box with another letter."""
    last = BOXED.match(text, start)
    if last is None:
        return None
    letters = set[str]()
    for box in (last, *reversed(list(BOXED.finditer(text, 0, start)))):
        between = re.sub(r"[^\w.:=?!]", "", plain(text[box.end() : start]))
        if between not in ("", "or", "and"):
            break
        letter, start = ALONE.fullmatch(re.sub(rf"^{OPTION} ", "", plain(box[1]), flags=re.I)), box.start()
        letters.add(letter[1].upper() if letter and not is_list(plain(box[1])) else "")
    return letters.pop() or None if len(letters) == 1 else None


def is_list(text: str) -> bool:
    """Return whether `text` consists of two or more consecutive letters of the alphabet, besides "or" and "and"."""
    words = [word for word in re.findall(r"\w+", text.lower()) if word not in ("or", "and")]
    return len(words) > 1 and all(len(word) == 1 for word in words) and "".join(words) in string.ascii_lowercase
