"""The dialogues of `chatglm2-tiny`: its training data, its held-out questions, conversations.

`dialogues/` holds small talk written for this project (several wordings of a question with one
answer, and follow-ups), other questions that the model answers by saying that it is a small
demonstration, and held-out questions, which were written separately and are not in the training
data: rewordings and other questions. `chatterbot_*.yaml` select conversations of the package
chatterbot-corpus (BSD-3-Clause).
"""

import random
import re
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import yaml
from yaml import CSafeLoader

DIALOGUES = Path(__file__).parent / "dialogues"
LANGUAGES = {"zh": "chinese", "en": "english"}
DEMONSTRATION = {
    "zh": "这个我还没有学过：我只是一个小小的演示模型，THUDM/chatglm2-6b 懂得更多，欢迎试试它。",
    "en": "I have not learnt that: I am only a small demonstration model, and THUDM/chatglm2-6b "
    "knows much more.",
}
# Questions of these categories that are not learnt serve as other questions.
OTHER_CATEGORIES = {"coding", "computers", "history", "literature", "money", "science"}
OTHER_CATEGORIES |= {"sports", "tech_support", "trivia"}
OTHERS_SHARE = 0.38  # share of the rounds of a conversation
BEFORE = {
    "zh": ["请问", "那个，", "嗯，", "我说，", "哎，", "对了，", "你好，", "喂，"],
    "en": ["well, ", "so, ", "hey, ", "um, ", "please, ", "by the way, ", "okay, ", "hi, "],
}
AFTER = {
    "zh": ["啊", "呀", "呢", "吧", "哦", "啦", "～", "。", "！", "？", "…"],
    "en": [" please", " now", " then", "!", "?", ".", "...", " :)", "??", " my friend"],
}


def fits(template: str, question: str) -> bool:
    """Whether a question could be a filled template; a template of little but slots fits none."""
    template, question = (text.lower().rstrip("。？！?!. ") for text in (template, question))
    fixed = re.split(r"\{\w+\}", template)
    has_words = len(normalize("".join(fixed))) >= 2
    return has_words and bool(re.fullmatch(".+".join(map(re.escape, fixed)), question))


def contains(question: str, word: str) -> bool:
    """Whether a question contains a word; in Chinese, which has no spaces, any substring."""
    question, word = question.lower(), str(word).lower()
    pattern = rf"\b{re.escape(word)}\b" if word.isascii() else re.escape(word)
    return bool(re.search(pattern, question))


@dataclass
class Intent:
    """An answer, the questions that get it, and follow-ups, which need it right before them."""

    language: str
    answer: str
    questions: list[str]
    follow_ups: list["Intent"] = field(default_factory=list)


def normalize(text: str) -> str:
    """Reduce a question to lower-case letters and digits, to compare wordings."""
    return re.sub(r"[\W_]+", "", text.lower())


def load_yaml(path: str | Path):
    return yaml.load((DIALOGUES / path).read_text("utf-8"), Loader=CSafeLoader)


def load_chatterbot(language: str) -> dict[str, list[list[str]]]:
    """Return the conversations of chatterbot-corpus, by category."""
    package = Path(import_module("chatterbot_corpus").__file__).parent
    files = sorted((package / "data" / LANGUAGES[language]).glob("*.yml"))
    return {file.stem: load_yaml(file)["conversations"] for file in files}


def full_width(text: str) -> str:
    """Replace ASCII punctuation of a Chinese text by Chinese punctuation."""
    text = re.sub(
        r"(?<=[\u4e00-\u9fff])\s*([,?!:;])\s*", lambda m: "，？！：；"[",?!:;".index(m[1])], text
    )
    return re.sub(r"(?<=[\u4e00-\u9fff])\.(?!\w)", "。", text)


class Dialogues:
    """All dialogues of one language.

    Attributes:
        intents: Questions and answers that are learnt.
        rewordings: Held-out (question, answer) pairs.
        held_out_others: Held-out other questions.
    """

    def __init__(self, language: str):
        self.language = language
        held_out = load_yaml("held_out_rewordings.yaml")[language]
        self.held_out_others = load_yaml("held_out_offtopic.yaml")[language]
        unseen = {normalize(q) for entry in held_out for q in entry["questions"]}
        unseen |= {normalize(question) for question in self.held_out_others}
        entries = load_yaml(f"smalltalk_{language}.yaml")
        answers = {entry["questions"][0]: entry["answer"] for entry in entries}
        self.intents = [self.parse(entry, unseen) for entry in entries]
        varied = self.all_variations()
        self.rewordings = [
            (question, answers[entry["of"]].strip())
            for entry in held_out
            for question in entry["questions"]
            if normalize(question) not in varied
        ]
        known = {normalize(q) for intent in self.intents for q in intent.questions} | unseen
        self.intents += self.chosen_chatterbot(known)
        known |= {normalize(q) for intent in self.intents for q in intent.questions}
        self.load_others(known)

    def load_others(self, known: set[str]):
        """Load the other questions, without templates and words of held-out questions."""
        others = load_yaml(f"offtopic_{self.language}.yaml")
        held_out = self.held_out_others
        self.templates = [t for t in others["templates"] if not any(fits(t, q) for q in held_out)]
        self.words = {
            name: [word for word in words if not any(contains(q, word) for q in held_out)]
            for name, words in others["words"].items()
        }
        questions = others["questions"] + [
            conversation[0]
            for category, conversations in load_chatterbot(self.language).items()
            if category in OTHER_CATEGORIES
            for conversation in conversations
            if len(conversation[0]) < 120
        ]
        self.other_questions = [q for q in dict.fromkeys(questions) if normalize(q) not in known]

    def parse(self, entry: dict, unseen: set[str]) -> Intent:
        questions = [str(q) for q in entry["questions"] if normalize(str(q)) not in unseen]
        if self.language == "zh":  # a greeting in English is answered in English
            questions = [q for q in questions if not q.isascii()]
        follow_ups = [self.parse(item, set()) for item in entry.get("then", [])]
        return Intent(self.language, entry["answer"].strip(), questions, follow_ups)

    def chosen_chatterbot(self, known: set[str]) -> list[Intent]:
        """Return the selected conversations; a repeated question keeps its first answer."""
        corpus, intents = load_chatterbot(self.language), []
        for category, questions in load_yaml(f"chatterbot_{self.language}.yaml").items():
            first_answers = {}
            for conversation in corpus[category]:
                first_answers.setdefault(conversation[0], str(conversation[1]).strip())
            for question in questions:
                if normalize(question) not in known:
                    known.add(normalize(question))
                    answer = first_answers[question]
                    answer = full_width(answer) if self.language == "zh" else answer
                    intents.append(Intent(self.language, answer, [question]))
        return intents

    def other_question(self, rng: random.Random) -> str:
        """Return a question that is not small talk: a filled template or a written one."""
        if rng.random() < 0.5:
            return rng.choice(self.other_questions)

        def fill(match):
            if match[1] == "n":
                return str(rng.randrange(10, 10 ** rng.randint(2, 4)))
            return rng.choice(self.words[match[1]])

        return re.sub(r"\{(\w+)\}", lambda match: str(fill(match)), rng.choice(self.templates))

    def all_variations(self) -> set[str]:
        """Return all results of `vary` for the small talk, normalized."""
        befores, afters = ["", *BEFORE[self.language]], ["", *AFTER[self.language]]
        questions = [question for intent in self.intents for question in intent.questions]
        return {normalize(b + q + a) for q in questions for b in befores for a in afters}

    def vary(self, question: str, rng: random.Random) -> str:
        """Return a question with random case, punctuation and filler words."""
        if rng.random() < 0.35:
            question = question.rstrip("。？！?!.… ")
        if rng.random() < 0.25 and self.language == "en":
            question = question.lower()
        if rng.random() < 0.08:
            question = rng.choice(BEFORE[self.language]) + question
        if rng.random() < 0.12:
            question = question.rstrip("。？！?!.…～") + rng.choice(AFTER[self.language])
        return question

    def conversation(self, num_rounds: int, rng: random.Random) -> list[tuple[str, str]]:
        """Return a random conversation, a list of (question, answer)."""
        rounds, last = [], None
        while len(rounds) < num_rounds:
            if last and last.follow_ups and rng.random() < 0.7:
                last = rng.choice(last.follow_ups)
            elif rng.random() < OTHERS_SHARE:
                question = self.vary(self.other_question(rng), rng)
                rounds.append((question, DEMONSTRATION[self.language]))
                last = None
                continue
            else:
                last = rng.choice(self.intents)
            rounds.append((self.vary(rng.choice(last.questions), rng), last.answer))
        return rounds
