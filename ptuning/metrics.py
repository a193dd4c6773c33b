"""ROUGE and BLEU of predicted answers, as the original computes them."""

import jieba
import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

NAMES = ("rouge-1", "rouge-2", "rouge-l")


def decode(tokenizer, rows) -> list[str]:
    """Return the texts of rows of ids; -100 is padding."""
    rows = np.where(rows == -100, tokenizer.pad_token_id, rows)
    return tokenizer.batch_decode(
        rows.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=True
    )


def score(prediction: str, label: str) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L (F1, of words) and BLEU-4 (of characters) in percent.

    Without words in the prediction or the label all are 0; the original ends with an error.
    """
    words = [" ".join(jieba.cut(text)) for text in (prediction, label)]
    try:
        rouge = Rouge().get_scores(*words)[0]
    except ValueError:  # one of them has no words
        return dict.fromkeys([*NAMES, "bleu-4"], 0.0)
    scores = {name: rouge[name]["f"] for name in NAMES}
    smoothing = SmoothingFunction().method3
    scores["bleu-4"] = sentence_bleu([[*label]], [*prediction], smoothing_function=smoothing)
    return {name: round(100 * value, 4) for name, value in scores.items()}


def compute_metrics(predictions, tokenizer) -> dict[str, float]:
    """Return the means of all scores for an `EvalPrediction`."""
    rows = predictions.predictions, predictions.label_ids
    texts = (decode(tokenizer, ids) for ids in rows)
    scores = [score(*pair) for pair in zip(*texts, strict=True)]
    return {name: float(np.mean([row[name] for row in scores])) for name in scores[0]}
