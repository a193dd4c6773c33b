"""Error messages of one line."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
